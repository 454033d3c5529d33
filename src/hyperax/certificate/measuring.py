"""What is measured, in double precision, and one task after the other's result: the plumbing of `certify`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from hyperax.methods import HypergradientFunction
from hyperax.problem import Data, Lam
from hyperax.tasks import TASKS, MeanOverTasks, count_tasks, one_task, split_tasks

Measure = Callable[..., Any]
"""(problem, dynamics, lam, data, shared, mapped) -> arrays of one task; `mapped` is of each task, `shared` of all."""


def in_double(tree: PyTree) -> PyTree:
    """The tree with its floating-point arrays in float64; to be called inside `float64()`."""
    convert = lambda x: jnp.asarray(x, jnp.float64) if eqx.is_inexact_array(x) else x
    return jax.tree.map(convert, tree)


class Subject(eqx.Module):
    """A hypergradient function at one point: what is measured.

    Fields:
        whole: of a single problem, or the mean over tasks.
        lam, data: the point; lam with arrays for hyperparameters.
    """

    whole: HypergradientFunction | MeanOverTasks
    lam: Lam
    data: Data

    @property
    def single(self) -> HypergradientFunction:
        """The hypergradient of one task."""
        return self.whole.hypergradient if isinstance(self.whole, MeanOverTasks) else self.whole

    @property
    def tasks(self) -> int | None:
        """N, or `None` for a single problem."""
        return count_tasks(self.data) if isinstance(self.whole, MeanOverTasks) else None

    @property
    def steps(self) -> int:
        """T, or 0 where the method has none."""
        return int(getattr(self.single.method, "steps", 0) or 0) if self.single.method.needs_dynamics else 0

    @property
    def floats(self) -> Lam:
        """What of lam is differentiated."""
        return eqx.filter(self.lam, eqx.is_inexact_array)

    def each(self, measure: Measure, floats: Lam, shared: Any = None, mapped: Any = None) -> Any:
        """A measure of each task at the lam with these floats: numpy arrays with a leading axis of tasks (or of one).

        As many tasks are taken at a time as the hypergradient takes. Compiled once for a measure, problem and shapes.
        """
        fixed, groups = self._prepared(measure, mapped)
        if self.tasks is None:
            return jax.tree.map(lambda x: np.asarray(x)[None], _of_task(fixed, floats, groups[0][0], shared, mapped))
        found = [_of_tasks(fixed, floats, arrays, shared, of_group) for arrays, of_group in groups]
        return jax.tree.map(lambda *parts: np.concatenate([np.asarray(part) for part in parts]), *found)

    def precision(self, measure: Measure, floats: Lam, shared: Any = None, mapped: Any = None) -> np.dtype:
        """The coarsest floating-point type that anything passes through on its way from these floats: a trace tells."""
        fixed, groups = self._prepared(measure, mapped)
        function = _measured if self.tasks is None else _mapped
        traced = jax.make_jaxpr(lambda floats: function(fixed, floats, groups[0][0], shared, groups[0][1]))(floats)
        types = {np.dtype(leaf.dtype) for leaf in jax.tree.leaves(floats)} | _types(traced.jaxpr, traced.jaxpr.invars)
        return max(types, key=lambda dtype: float(jnp.finfo(dtype).eps))

    def _prepared(self, measure: Measure, mapped: Any) -> tuple[Any, list[tuple[Data, Any]]]:
        """What is constant, and (arrays of data, mapped) of each group of tasks."""
        rest = eqx.filter(self.lam, eqx.is_inexact_array, inverse=True)
        over_tasks = isinstance(self.whole, MeanOverTasks)
        arrays, others = split_tasks(self.data) if over_tasks else eqx.partition(self.data, eqx.is_array)
        # Not the method: most measures do without, and then those of two methods share one compiled program.
        fixed = (measure, self.single.problem, self.single.dynamics, rest, others)
        if not isinstance(self.whole, MeanOverTasks):
            return fixed, [(arrays, mapped)]
        count = count_tasks(self.data)
        on_device = count if self.whole.mesh is None else count // self.whole.mesh.size
        together = min(self.whole.parallel or on_device, on_device)
        cut = lambda i: jax.tree.map(lambda x: x[i : i + together], (arrays, mapped))
        return fixed, [cut(i) for i in range(0, count, together)]


def _measured(fixed: Any, floats: Lam, arrays: Data, shared: Any, mapped: Any) -> Any:
    measure, problem, dynamics, rest, others = fixed
    return measure(problem, dynamics, eqx.combine(floats, rest), eqx.combine(arrays, others), shared, mapped)


def _mapped(fixed: Any, floats: Lam, arrays: Data, shared: Any, mapped: Any) -> Any:
    measure, problem, dynamics, rest, others = fixed
    lam = eqx.combine(floats, rest)
    of_task = lambda arrays, mapped: measure(problem, dynamics, lam, one_task(arrays, others), shared, mapped)
    return jax.vmap(of_task, axis_name=TASKS)(arrays, mapped)


_of_task, _of_tasks = eqx.filter_jit(_measured), eqx.filter_jit(_mapped)


def _types(jaxpr: Any, inputs: Iterable[Any]) -> set[np.dtype]:
    """The floating-point types of what depends on these inputs of a jaxpr, loops and calls in it included."""
    found, depending = set(), set(inputs)
    for equation in jaxpr.eqns:
        if not any(not hasattr(atom, "val") and atom in depending for atom in equation.invars):
            continue
        depending.update(equation.outvars)
        types = {v.aval.dtype for v in equation.outvars}
        found |= {np.dtype(dtype) for dtype in types if jnp.issubdtype(dtype, jnp.floating)}
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                found |= _types(inner, inner.invars)
    return found
