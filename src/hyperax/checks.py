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


def check_lam(lam: Lam) -> None:
    """Raise `ValueError` unless the leaves of lam are floats (or not arrays at all, as functions in a module)."""
    floats = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(lam):
        if isinstance(leaf, bool | int | complex) or (eqx.is_array_like(leaf) and not _is_float(leaf)):
            kind = getattr(leaf, "dtype", type(leaf).__name__)
            raise ValueError(
                f"{leaf_name('lam', path)} has type {kind}; only floating-point numbers have a hypergradient: convert "
                "it to float, or move it into data if it is not to be optimised"
            )
        floats += eqx.is_array_like(leaf)
    if floats == 0:
        raise ValueError("lam has no floating-point leaf, so there is nothing to differentiate")


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype, jnp.floating)


def check_problem(problem: Problem, lam: Lam, data: Data) -> None:
    """Raise `ValueError` unless the inner and the outer objective are scalars; nothing is computed."""

    def shapes(lam: Lam, data: Data) -> tuple[Any, Any]:
        prepared = problem.prepare(lam, data)
        w = problem.init(lam, prepared)
        for path, leaf in jax.tree_util.tree_leaves_with_path(w):
            if not _is_float(leaf):
                raise ValueError(
                    f"{leaf_name('w', path)} is {jnp.result_type(leaf)}; inner variables are floating-point numbers: "
                    "let Phi_0 convert it, or move it into data"
                )
        return problem.objective(prepared, jnp.asarray(1))(w, lam), problem.outer(w, lam, prepared)

    inner, outer = eqx.filter_eval_shape(shapes, lam, data)
    if problem.has_metrics:
        if not (isinstance(outer, tuple) and len(outer) == 2 and isinstance(outer[1], dict)):
            raise ValueError("with has_metrics the outer objective must return a pair (scalar, dict of arrays)")
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


def warn_unused(value: Callable[[Lam], Any], lam: Lam) -> None:
    """Warn of every leaf of lam that does not reach value(lam) along a differentiable path."""
    variables, constants = eqx.partition(lam, eqx.is_inexact_array)
    jaxpr = jax.make_jaxpr(lambda x: value(eqx.combine(x, constants)))(variables).jaxpr
    reaching = _reaching(jaxpr, [{i} for i in range(len(jaxpr.invars))])[0]
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(variables)]
    unused = [leaf_name("lam", path) for i, path in enumerate(paths) if i not in reaching]
    if unused:
        one = len(unused) == 1
        warnings.warn(
            f"{', '.join(unused)} {'does' if one else 'do'} not reach f_T: the hypergradient there is zero. Remove "
            f"{'it' if one else 'them'} from lam, or look for a stop_gradient, a method that cuts the path (FirstOrder "
            "drops what enters the inner objective alone), or T = 0",
            UnusedLeafWarning,
            stacklevel=2,
        )


def _reaching(jaxpr: Any, inputs: list[set[int]]) -> list[set[int]]:
    """For each output of a jaxpr the set of labels that reach it, given the labels at its inputs."""
    labels: dict[Any, set[int]] = dict(zip(jaxpr.invars, inputs, strict=True))
    read = lambda atom: set() if hasattr(atom, "val") else labels.get(atom, set())
    for equation in jaxpr.eqns:
        arguments = [read(atom) for atom in equation.invars]
        for variable, label in zip(equation.outvars, _through(equation, arguments), strict=True):
            labels[variable] = label
    return [read(atom) for atom in jaxpr.outvars]


def _through(equation: Any, arguments: list[set[int]]) -> list[set[int]]:
    name, parameters = equation.primitive.name, equation.params
    if name == "stop_gradient":
        return [set() for _ in equation.outvars]
    if name == "scan":
        constants, carried = parameters["num_consts"], parameters["num_carry"]
        body = parameters["jaxpr"].jaxpr
        if parameters["length"] == 0:  # no step: what is carried comes out as it went in
            return [*arguments[constants : constants + carried], *(set() for _ in equation.outvars[carried:])]
        while True:  # labels only grow, so this ends
            outputs = _reaching(body, arguments)
            grown = [a | b for a, b in zip(arguments[constants : constants + carried], outputs[:carried], strict=True)]
            if grown == arguments[constants : constants + carried]:
                return outputs
            arguments = [*arguments[:constants], *grown, *arguments[constants + carried :]]
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        inner = parameters.get(key)
        inner = getattr(inner, "jaxpr", inner)
        if inner is not None and len(inner.invars) == len(arguments) and len(inner.outvars) == len(equation.outvars):
            return _reaching(inner, arguments)
    # Any other operation, loops and branches included: whatever goes in may come out.
    union = set().union(*arguments)
    return [union for _ in equation.outvars]
