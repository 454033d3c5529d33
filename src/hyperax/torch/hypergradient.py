"""The verb for PyTorch: a problem and a method make a function (lam, data) -> Hypergradient."""

from __future__ import annotations

from itertools import count
from typing import Any, NamedTuple

import equinox as eqx
import jax
import numpy as np
import torch

from hyperax.checks import variables_of as jax_variables_of
from hyperax.methods import Method
from hyperax.problem import Hypergradient
from hyperax.torch import evolution, forward, implicit  # noqa: F401  (each adds its methods to `solve`)
from hyperax.torch.checks import check_reached, check_step, variables_of
from hyperax.torch.crossing import is_torch, is_traced, shapes_of, to_jax, to_numpy, to_torch
from hyperax.torch.forward import pushed_run
from hyperax.torch.problem import Inner, JaxObjective, Problem, floats_of, split_metrics
from hyperax.torch.reverse import first_carry, shortened, solve
from hyperax.torch.runs import Gradients, Solved, added, backward, begin, engine, plain, variable, zeros_where_none


class Known(NamedTuple):
    """What the first look at a problem told, for lam and data of these shapes.

    Fields:
        quiet: whether a step works without a graph.
        state, carry, value, metrics: shapes and types in JAX.
        types: those of the carry in PyTorch.
    """

    quiet: bool
    state: Any
    carry: Any
    value: Any
    metrics: Any
    types: Any


class TorchHypergradient:
    """What `hyperax.torch.hypergradient` returns: call it with (lam, data) for a `Hypergradient`.

    With tensors for lam it gives tensors, with JAX arrays JAX arrays. Inside `jax.jit` (as in `minimize`) the inner run
    is one call back to Python per hypergradient (two for an outer objective in JAX), `state` is `None`, and of `info`
    there are the metrics.
    """

    def __init__(self, problem: Problem, method: Method):
        self.problem, self.method = problem, method
        self._known: dict[Any, Known] = {}
        self._waiting: dict[int, tuple[Any, Solved]] = {}  # inner runs whose E is being computed in JAX
        self._tickets = count(1)

    def __call__(self, lam: Any, data: Any = None, carry: Any = None) -> Hypergradient:
        """The hypergradient at lam on `data`; `carry` is the `carry` of the last call, for methods that use one."""
        if is_traced((lam, data, carry)):
            return self._called_back(lam, data, carry)
        if is_torch(lam):
            return self._evaluated(variables_of(lam), data, carry)
        lam, data = self._given(jax_variables_of(lam), data)
        known = self._look(lam, data)
        return to_jax(self._evaluated(lam, data, None if carry is None else self._carried(carry, known)))

    def init(self, lam: Any, data: Any = None) -> Any:
        """The first carry: `()` for methods that remember nothing."""
        if is_traced((lam, data)):
            known = self._look(*self._examples(lam, data))
            if not jax.tree.leaves(known.carry):
                return known.carry
            arrays, others = eqx.partition(data, eqx.is_array)

            def first(lam: Any, arrays: Any) -> Any:
                return to_numpy(self._first_carry(*self._given(lam, eqx.combine(arrays, others))), known.carry)

            return jax.pure_callback(first, known.carry, lam, arrays)
        if is_torch(lam):
            return self._first_carry(variables_of(lam), data)
        return to_jax(self._first_carry(*self._given(jax_variables_of(lam), data)))

    def value(self, lam: Any, data: Any = None) -> torch.Tensor:
        """f_T(lam) of tensors, by plain steps: no derivative, no memory for the past."""
        lam = variables_of(lam)
        steps = getattr(self.method, "steps", None)
        if steps is None:
            raise ValueError(f"{type(self.method).__name__} without steps has no f_T")
        known = self._look(lam, data)
        inner = self._inner(lam, data, known.quiet)
        with engine():
            state = plain(inner, begin(inner, lam)[0], lam, range(1, steps + 1))
            return self._outer(inner, state, lam)[0]

    def along(self, lam: Any, direction: Any, data: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        """(f_T(lam), its derivative along a direction like lam), in forward mode: one run, no memory for the past."""
        lam, inner = variables_of(lam), self._inner(lam, data)
        z = [x.detach()[None] for x in floats_of(direction)]
        with engine():
            state, tangents = pushed_run(inner, lam, z, self.method.steps)  # pyright: ignore[reportAttributeAccessIssue]
            value, _, of_state, of_lam = self._outer(inner, state, lam)
        pairs = zip([*of_state, *of_lam], [*tangents, *z], strict=True)
        return value, sum((g * x[0]).sum() for g, x in pairs if g is not None)  # pyright: ignore[reportReturnType]

    @property
    def remembers_tasks(self) -> bool:
        """Whether a carry belongs to the data of the call it came from."""
        return self.method.remembers_tasks

    def _inner(self, lam: Any, data: Any, quiet: bool = False) -> Inner:
        return Inner(self.problem, data, floats_of(lam)[0].device, quiet)

    def _given(self, *trees: Any) -> tuple[Any, ...]:
        return tuple(to_torch(tree, self.problem.device) for tree in trees)

    def _carried(self, carry: Any, known: Known) -> Any:
        """A carry from JAX, in the types it had here."""
        return jax.tree.map(lambda x, dtype: x.to(dtype), to_torch(carry, self.problem.device), known.types)

    def _first_carry(self, lam: Any, data: Any) -> Any:
        with engine():
            return first_carry(self.method, self._inner(lam, data), lam)

    def _evaluated(self, lam: Any, data: Any, carry: Any) -> Hypergradient:
        """The hypergradient, of tensors and in tensors."""
        inner = self._inner(lam, data, self._look(lam, data).quiet)
        with engine():
            carry = first_carry(self.method, inner, lam) if carry is None else carry
            return self._whole(self.method, inner, lam, carry)[0]

    def _whole(self, method: Method, inner: Inner, lam: Any, carry: Any) -> tuple[Hypergradient, Gradients]:
        """(the hypergradient, its leaves with `None` where nothing arrives)."""
        solved = solve(method, inner, lam, carry)
        value, metrics, of_state, of_lam = self._outer(inner, solved.state, lam)
        pulled = solved.pull(of_state)
        found = pulled.gradient if pulled.whole else added(of_lam, pulled.gradient)
        gradient = jax.tree.unflatten(jax.tree.structure(lam), zeros_where_none(found, floats_of(lam)))
        info = {"metrics": metrics, **pulled.info}
        return Hypergradient(value, gradient, solved.state, info, pulled.carry), found  # pyright: ignore[reportArgumentType]

    def _outer(self, inner: Inner, state: Any, lam: Any) -> tuple[torch.Tensor, Any, Gradients, Gradients]:
        """(E, metrics, dE/ds_T, dE/dlam)."""
        if isinstance(self.problem.outer, JaxObjective):
            value, metrics, of_state, of_lam = self._in_jax(*to_jax((state, lam, inner.data)))
            device = floats_of(state)[0].device
            value, metrics, of_state, of_lam = to_torch((value, metrics, of_state, of_lam), device)
            like = [*floats_of(state), *floats_of(lam)]
            cast = [g.to(x) for g, x in zip([*of_state, *of_lam], like, strict=True)]
            return value, metrics, cast[: len(of_state)], cast[len(of_state) :]
        at_state, at_lam = variable(state), variable(lam)
        value, metrics = inner.outer(at_state, at_lam)
        inputs = [*floats_of(at_state), *floats_of(at_lam)]
        found = backward([value], inputs, [torch.ones_like(value)])
        cut = len(floats_of(at_state))
        detached = {name: x.detach() if isinstance(x, torch.Tensor) else x for name, x in metrics.items()}
        return value.detach(), detached, found[:cut], found[cut:]

    def _in_jax(self, state: Any, lam: Any, data: Any) -> tuple[Any, Any, list[Any], list[Any]]:
        """(E, metrics, dE/ds_T, dE/dlam) of an objective in JAX; not compiled by itself."""
        objective = self.problem.outer
        assert isinstance(objective, JaxObjective)
        is_float = lambda x: jax.numpy.issubdtype(x.dtype, jax.numpy.floating)
        leaves, tree = jax.tree.flatten(state)

        def value(floats: list[Any], lam: Any) -> tuple[Any, Any]:
            new = iter(floats)
            whole = jax.tree.unflatten(tree, [next(new) if is_float(x) else x for x in leaves])
            return split_metrics(self.problem, objective.function(whole, lam, data))

        differentiated = jax.value_and_grad(value, argnums=(0, 1), has_aux=True)
        (found, metrics), (of_state, of_lam) = differentiated([x for x in leaves if is_float(x)], lam)
        return found, metrics, of_state, jax.tree.leaves(of_lam)

    def _look(self, lam: Any, data: Any) -> Known:
        """Check the problem once for lam and data of these shapes; remember what it looks like."""
        described = lambda x: (tuple(x.shape), x.dtype, x.device) if isinstance(x, torch.Tensor) else type(x)
        leaves = jax.tree.leaves((lam, data))
        key = (jax.tree.structure((lam, data)), tuple(described(x) for x in leaves))
        if key not in self._known:
            # Values are looked at also while a program around this is being traced.
            with engine(), jax.ensure_compile_time_eval():
                self._known[key] = self._looked(lam, data)
        return self._known[key]

    def _looked(self, lam: Any, data: Any) -> Known:
        inner = self._inner(lam, data)
        steps = getattr(self.method, "steps", 1)
        steps = 1 if steps is None else steps
        quiet = check_step(inner, lam, steps)
        inner = inner._replace(quiet=quiet)
        carry = first_carry(self.method, inner, lam)
        state = inner.start(lam)
        value, metrics, _, _ = self._outer(inner, state, lam)
        gradient = lambda method: self._whole(method, inner, lam, first_carry(method, inner, lam))[1]
        check_reached(inner, lam, self.method, gradient, shortened)
        return Known(
            quiet,
            shapes_of(state),
            shapes_of(carry),
            shapes_of(value),
            shapes_of(metrics),
            jax.tree.map(lambda x: x.dtype, carry),
        )

    def _examples(self, lam: Any, data: Any) -> tuple[Any, Any]:
        """Values to look at a problem with, while those of lam are not known: `Problem.example`, or ones."""

        def ones(x: Any) -> Any:
            if not isinstance(x, jax.Array | np.ndarray):
                return x
            floating = jax.numpy.issubdtype(x.dtype, jax.numpy.floating)
            return (np.ones if floating else np.zeros)(x.shape, x.dtype)

        example, shapes = self.problem.example, lambda tree: jax.tree.map(lambda x: tuple(np.shape(x)), tree)
        if example is None or shapes(example) != shapes(lam):
            example = jax.tree.map(ones, lam)
        lam = to_torch(example, self.problem.device)
        return variables_of(lam), to_torch(jax.tree.map(ones, data), self.problem.device)

    def _called_back(self, lam: Any, data: Any, carry: Any) -> Hypergradient:
        """The hypergradient inside a JAX program: the inner run is a call back to Python."""
        known = self._look(*self._examples(lam, data))
        _check_precision(known)
        carry = self.init(lam, data) if carry is None else carry
        gradient = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), lam)
        if isinstance(self.problem.outer, JaxObjective):
            return self._called_back_twice(lam, data, carry, known, gradient)
        shapes = (known.value, gradient, known.metrics, known.carry)
        arrays, others = eqx.partition(data, eqx.is_array)  # what is no array of JAX cannot be an argument

        def host(lam: Any, arrays: Any, carry: Any) -> Any:
            lam, data = self._given(lam, eqx.combine(arrays, others))
            h = self._evaluated(lam, data, self._carried(carry, known))
            return to_numpy((h.value, h.grad, h.info["metrics"], h.carry), shapes)

        value, grad, metrics, carry = jax.pure_callback(host, shapes, lam, arrays, carry)
        return Hypergradient(value, grad, None, {"metrics": metrics}, carry)

    def _called_back_twice(self, lam: Any, data: Any, carry: Any, known: Known, shapes: Any) -> Hypergradient:
        """The same around an objective in JAX: down with lam, E and its gradient in the program, back with dE/ds_T.

        A call back must not wait for JAX itself, so E cannot be computed within it.
        """
        ticket_shape = jax.ShapeDtypeStruct((), np.int32)
        arrays, others = eqx.partition(data, eqx.is_array)

        def down(lam: Any, arrays: Any, carry: Any) -> Any:
            lam, data = self._given(lam, eqx.combine(arrays, others))
            inner = self._inner(lam, data, known.quiet)
            with engine():
                solved = solve(self.method, inner, lam, self._carried(carry, known))
            self._waiting.clear()  # what an earlier program left behind by failing in between
            ticket = next(self._tickets) % 2**31
            self._waiting[ticket] = (lam, solved)
            return np.int32(ticket), to_numpy(solved.state, known.state)

        ticket, state = jax.pure_callback(down, (ticket_shape, known.state), lam, arrays, carry)
        value, metrics, of_state, of_lam = self._in_jax(state, lam, data)

        def up(ticket: Any, of_state: Any) -> Any:
            lam, solved = self._waiting.pop(int(ticket))
            alpha = [g.to(x) for g, x in zip(to_torch(of_state), floats_of(solved.state), strict=True)]
            with engine():
                pulled = solved.pull(alpha)
            found = zeros_where_none(pulled.gradient, floats_of(lam))
            return to_numpy((jax.tree.unflatten(jax.tree.structure(lam), found), pulled.carry), (shapes, known.carry))

        grad, carry = jax.pure_callback(up, (shapes, known.carry), ticket, of_state)
        grad = jax.tree.map(jax.numpy.add, grad, jax.tree.unflatten(jax.tree.structure(lam), of_lam))
        return Hypergradient(value, grad, None, {"metrics": metrics}, carry)


def _check_precision(known: Known) -> None:
    """A carry in float64 would lose half of its digits each time."""
    for dtype, shape in zip(jax.tree.leaves(known.types), jax.tree.leaves(known.carry), strict=True):
        if dtype == torch.float64 and shape.dtype != np.float64:
            raise ValueError(
                "the method carries a state in float64 from one hyperiteration to the next, and JAX is in float32: "
                'jax.config.update("jax_enable_x64", True), or a state and data in float32 (module.float())'
            )


def hypergradient(problem: Problem, method: Method) -> TorchHypergradient:
    """A function (lam, data) -> `Hypergradient` of a training step in PyTorch, for `hyperax.minimize` or by itself.

        f_T(lam) = E(s_T(lam), lam),   s_0 = Phi_0(lam),   s_t = Phi_t(s_{t-1}, lam)

    Arguments:
        problem: a `hyperax.torch.Problem`, or the `problem` of `from_module`; its step is the dynamics.
        method: exact for f_T `Reverse` (with `segment` or `memory`), `Forward`; exact for f `Implicit`; approximate
            `Truncated`, `FirstOrder`, `EvolutionStrategy`; online `RealTime`. All with the arguments they have in JAX.

    Returns: `h = f(lam, data=None, carry=None)`: `h.value`, `h.grad` (a pytree like lam), `h.state` (s_T), `h.info`,
    `h.carry`; tensors if lam has tensors, else JAX arrays, which share the memory of the tensors where they can.
    Raises: `ValueError` for what cannot work here (`Reversible`, `Doubling`, `ClosedForm`, `FiniteDifference`), and, at
    the first call for given shapes, after one step was tried: for lam with integers or nothing that reaches
    f_T, tensors changed in place, states that change shape, type, device or structure or hold something else than
    tensors, steps that draw other random numbers when they run again, and an outer objective that is not a scalar.
    `UnusedLeafWarning` names leaves of lam that were detached on the way.
    Cost: see the method. `Reverse` without segments keeps the graph of all steps; with them, states at their ends. The
    first look costs about ten steps.
    Reference: Franceschi et al. 2018, eq. 5-6; Algorithm 1.
    Do not use it for derivatives of hypergradients, in `jax.vmap`, or for steps much shorter than 0.1 ms: PyTorch
    spends as long on calling its operations there, and JAX compiles them away.

    >>> import hyperax as hx
    >>> def step(t, w, lam, batch):
    ...     return w - 0.25 * inner_gradient(lambda w: (w - lam) ** 2, w)
    >>> from hyperax.torch.problem import Problem, inner_gradient
    >>> problem = Problem(step, outer=lambda w, lam, data: w**2, init=lambda lam, data: torch.zeros(()))
    >>> h = hypergradient(problem, hx.Reverse(steps=2))(torch.tensor(2.0))
    >>> h.value.item(), h.grad.item()
    (2.25, 2.25)
    """
    if not isinstance(problem, Problem):
        hint = "; give its .problem" if hasattr(problem, "problem") else ""
        raise ValueError(f"problem must be a hyperax.torch.Problem, not {type(problem).__name__}{hint}")
    if solve.dispatch(type(method)) is solve.dispatch(object):
        solve(method, None, None, None)
    return TorchHypergradient(problem, method)
