"""What is wrong with a bilevel problem, said before anything is compiled: shapes and dependences, read from traces."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from hyperax.problem import Data, Lam, Problem


class UnusedLeafWarning(UserWarning):
    """A leaf of lam cannot influence f_T: its hypergradient is zero whatever its value."""


def leaf_name(name: str, path: Any) -> str:
    """`lam['decay'][0]` and the like."""
    return name + jax.tree_util.keystr(path)


def variables_of(lam: Lam) -> Lam:
    """Lam with its hyperparameters as arrays: what is differentiated, and what is not, is the same everywhere.

    Arrays are hyperparameters, and so are Python floats in plain containers. In an Equinox module, by Equinox's own
    convention, only arrays are: the slope of an activation or the rate of a dropout stays as it is.

    Raises: `ValueError` for integers (in plain containers) and arrays of integers, and if nothing is left.
    """

    def convert(path: Any, leaf: Any, in_module: bool) -> Any:
        if in_module and not eqx.is_array(leaf) and not isinstance(leaf, np.ndarray):
            return leaf
        if isinstance(leaf, bool | int | complex) or (eqx.is_array_like(leaf) and not _is_float(leaf)):
            kind = getattr(leaf, "dtype", type(leaf).__name__)
            advice = "split it into real and imaginary part" if "complex" in str(kind) else "convert it to float"
            raise ValueError(
                f"{leaf_name('lam', path)} has type {kind}; only floating-point numbers have a hypergradient: {advice} "
                "or, if it is not to be optimised, move it into data (in a module: split it off with eqx.partition)"
            )
        # An explicit type: a weak one would change, and retrace, after one update.
        weak = isinstance(leaf, float | np.ndarray | np.generic) or getattr(leaf, "weak_type", False)
        return jnp.asarray(leaf, jnp.result_type(leaf)) if weak else leaf

    def of_node(path: Any, node: Any) -> Any:
        if not _is_module(node):
            return convert(path, node, in_module=False)
        inside = lambda inner, leaf: convert((*path, *inner), leaf, in_module=True)
        return jax.tree_util.tree_map_with_path(inside, node)

    if any(type(leaf).__module__.partition(".")[0] == "torch" for leaf in jax.tree.leaves(lam)):
        raise ValueError(
            "lam has tensors or modules of PyTorch, and here it is made of JAX arrays: hyperax.torch.to_jax(lam), of a "
            "module to_jax(dict(module.named_parameters())); to_torch converts back"
        )
    variables = jax.tree_util.tree_map_with_path(of_node, lam, is_leaf=_is_module)
    if not any(eqx.is_inexact_array(leaf) for leaf in jax.tree.leaves(variables)):
        raise ValueError("lam has no floating-point leaf, so there is nothing to differentiate or optimise")
    return variables


def _is_module(node: Any) -> bool:
    return isinstance(node, eqx.Module)


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype, jnp.floating)


def check_problem(problem: Problem, lam: Lam, data: Data) -> None:
    """Raise `ValueError` unless the inner and the outer objective are scalars; nothing is computed."""

    def shapes(lam: Lam, data: Data) -> tuple[Any, Any]:
        prepared = problem.prepare(lam, data)
        w = problem.start(lam, prepared)
        if not jax.tree.leaves(w):
            raise ValueError("Phi_0 returns no array, so there are no inner variables: let it return arrays")
        for path, leaf in jax.tree_util.tree_leaves_with_path(w):
            if not _is_float(leaf):
                raise ValueError(
                    f"{leaf_name('w', path)} is {jnp.result_type(leaf)}; inner variables are floating-point numbers: "
                    "let Phi_0 convert it, or move it into data"
                )
        outer = problem.outer(problem.whole(w, lam, prepared), lam, prepared)
        return problem.objective(prepared, jnp.asarray(1))(w, lam), outer

    inner, outer = eqx.filter_eval_shape(shapes, lam, data)
    if problem.has_metrics:
        if not (isinstance(outer, tuple) and len(outer) == 2 and isinstance(outer[1], dict)):
            raise ValueError("with has_metrics the outer objective must return a pair (scalar, dict of arrays)")
        for name, metric in outer[1].items():
            if not eqx.is_array_like(metric) and not isinstance(metric, jax.ShapeDtypeStruct):
                raise ValueError(f"metric {name!r} of the outer objective is {type(metric).__name__}, not an array")
        outer = outer[0]
    for name, value in (("inner", inner), ("outer", outer)):
        if isinstance(value, float):
            continue
        if not hasattr(value, "shape") or value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
            described = f"{value.dtype}{list(value.shape)}" if hasattr(value, "shape") else type(value).__name__
            hint = "; set has_metrics=True if it returns metrics" if isinstance(value, tuple) else ""
            raise ValueError(
                f"the {name} objective must be a floating-point scalar; it is {described}: take a sum or a mean{hint}"
            )


def unused_leaves(value: Callable[[Lam], Any], lam: Lam) -> list[str]:
    """The names of the leaves of lam that do not reach value(lam) along a differentiable path; reads its trace."""
    variables, constants = eqx.partition(lam, eqx.is_inexact_array)
    jaxpr = jax.make_jaxpr(lambda x: value(eqx.combine(x, constants)))(variables).jaxpr
    found = reaching(jaxpr, [{i} for i in range(len(jaxpr.invars))])[0]
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(variables)]
    return [leaf_name("lam", path) for i, path in enumerate(paths) if i not in found]


def warn_unused(value: Callable[[Lam], Any], lam: Lam) -> None:
    """Warn of every leaf of lam that does not reach value(lam) along a differentiable path."""
    unused = unused_leaves(value, lam)
    if unused:
        one = len(unused) == 1
        warnings.warn(
            f"{', '.join(unused)} {'does' if one else 'do'} not reach f_T: the hypergradient there is zero. Remove "
            f"{'it' if one else 'them'} from lam, or look for a stop_gradient, a method that cuts the path (FirstOrder "
            "drops what enters the inner objective alone), or T = 0",
            UnusedLeafWarning,
            stacklevel=2,
        )


def reaching(jaxpr: Any, inputs: list[set[int]]) -> list[set[int]]:
    """For each output of a jaxpr the set of labels that reach it, given the labels at its inputs."""
    labels: dict[Any, set[int]] = dict(zip(jaxpr.invars, inputs, strict=True))
    read = lambda atom: set() if hasattr(atom, "val") else labels.get(atom, set())
    for equation in jaxpr.eqns:
        arguments = [read(atom) for atom in equation.invars]
        for variable, label in zip(equation.outvars, _through(equation, arguments), strict=True):
            # Nothing differentiable comes through an integer or a truth value.
            labels[variable] = label if jnp.issubdtype(variable.aval.dtype, jnp.inexact) else set()
    return [read(atom) for atom in jaxpr.outvars]


def body_of(scan: Any) -> Any:
    """The jaxpr of one step of a scan."""
    return getattr(scan.params["jaxpr"], "jaxpr", scan.params["jaxpr"])


def scan_sizes(scan: Any) -> tuple[int, int]:
    """(constants, carried values) of a scan, the first of its operands in this order.

    They are what a step sees as the scan does, and not a slice of it; JAX's own names for the two change.
    """
    body = body_of(scan)
    whole = lambda outside, inside: sum(a.aval.shape == b.aval.shape for a, b in zip(outside, inside, strict=True))
    carried = whole(scan.outvars, body.outvars)
    return whole(scan.invars, body.invars) - carried, carried


def _through(equation: Any, arguments: list[set[int]]) -> list[set[int]]:
    name, parameters = equation.primitive.name, equation.params
    if name in ("stop_gradient", "round", "floor", "ceil", "sign"):
        return [set() for _ in equation.outvars]
    if name == "scan":
        body = body_of(equation)
        constants, carried = scan_sizes(equation)
        if parameters["length"] == 0:  # no step: what is carried comes out as it went in
            return [*arguments[constants : constants + carried], *(set() for _ in equation.outvars[carried:])]
        while True:  # labels only grow, so this ends
            outputs = reaching(body, arguments)
            grown = [a | b for a, b in zip(arguments[constants : constants + carried], outputs[:carried], strict=True)]
            if grown == arguments[constants : constants + carried]:
                return outputs
            arguments = [*arguments[:constants], *grown, *arguments[constants + carried :]]
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        inner = parameters.get(key)
        inner = getattr(inner, "jaxpr", inner)
        if inner is not None and len(inner.invars) == len(arguments) and len(inner.outvars) == len(equation.outvars):
            return reaching(inner, arguments)
    # Any other operation, loops and branches included: whatever goes in may come out.
    union = set().union(*arguments)
    return [union for _ in equation.outvars]
