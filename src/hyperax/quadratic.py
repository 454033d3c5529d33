"""What the trace of an objective says of it: whether it is quadratic in w, and whether it treats columns of w alike."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from hyperax.checks import body_of, scan_sizes
from hyperax.problem import W

# Functions with a derivative of their own (custom_jvp, custom_vjp) are not among them: it need not be the derivative.
CALLS = ("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint")
ELEMENTWISE = (
    *("add", "add_any", "sub", "mul", "div", "neg", "integer_pow", "square", "pow", "sqrt", "rsqrt", "exp", "exp2"),
    *("log", "log1p", "expm1", "tanh", "logistic", "sin", "cos", "abs", "sign", "max", "min", "floor", "select_n"),
    *("eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not", "convert_element_type", "copy", "copy_p"),
    *("reduce_precision", "stop_gradient"),
)

# Operations that are linear in all their operands together, and in those that the next table does not name.
LINEAR = (
    *("add", "add_any", "sub", "neg", "convert_element_type", "copy", "copy_p", "reduce_sum", "cumsum", "transpose"),
    *("reshape", "broadcast_in_dim", "squeeze", "expand_dims", "slice", "concatenate", "pad", "rev", "split"),
    *("real", "imag", "complex", "conj", "fft", "reduce_window_sum", "optimization_barrier", "select_n", "div"),
    *("gather", "dynamic_slice", "dynamic_update_slice", "scatter", "scatter-add", "triangular_solve"),
)
# Operands of these that must not depend on w: predicates, denominators, indices, matrices of systems.
FIXED = {
    "select_n": slice(0, 1),
    "div": slice(1, 2),
    "gather": slice(1, None),
    "dynamic_slice": slice(1, None),
    "dynamic_update_slice": slice(2, None),
    "scatter": slice(1, 2),
    "scatter-add": slice(1, 2),
    "triangular_solve": slice(0, 1),
}
# Operations that mix, or count, along the axis that this parameter names.
ALONG = {"concatenate": "dimension", "iota": "dimension", "rev": "dimensions", "cumsum": "axis", "split": "axis"}
PRODUCTS = ("mul", "dot_general", "conv_general_dilated")
TOO_HIGH = 3  # above two, or no polynomial at all: what the trace shows is all the same then


class Degree(NamedTuple):
    """The degree of a variable in w; with TOO_HIGH, the operation that made it so."""

    of: int = 0
    by: str = ""


def why_not_quadratic(objective: Callable[[W], Any], w: W) -> str | None:
    """The operation that keeps the trace from showing that the objective is quadratic in w; `None` if it does.

    Then its gradient is affine and its Hessian symmetric, all derivatives being JAX's own.

    >>> why_not_quadratic(lambda w: jnp.sum((w - 1.0) ** 2), jnp.ones(3)), why_not_quadratic(jnp.sin, jnp.ones(()))
    (None, 'sin')
    """
    jaxpr = jax.make_jaxpr(objective)(w).jaxpr
    (degree,) = _degrees(jaxpr, [Degree(1)] * len(jaxpr.invars))
    return degree.by if degree.of == TOO_HIGH else None


def _read(known: dict[Any, Any], atom: Any, constant: Any) -> Any:
    return constant if hasattr(atom, "val") else known.get(atom, constant)


def _called(equation: Any) -> Any:
    """The jaxpr that an equation calls on its operands as they stand, or `None`."""
    if equation.primitive.name not in CALLS:
        return None
    found = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
    inner: Any = getattr(found, "jaxpr", found)
    counts = lambda called: (len(called.invars), len(called.outvars))
    return inner if inner is not None and counts(inner) == counts(equation) else None


def _degrees(jaxpr: Any, inputs: list[Degree]) -> list[Degree]:
    known = dict(zip(jaxpr.invars, inputs, strict=True))
    for equation in jaxpr.eqns:
        arguments = [_read(known, atom, Degree()) for atom in equation.invars]
        known |= dict(zip(equation.outvars, _degrees_through(equation, arguments), strict=True))
    return [_read(known, atom, Degree()) for atom in jaxpr.outvars]


def _degrees_through(equation: Any, arguments: list[Degree]) -> list[Degree]:
    name, parameters = equation.primitive.name, equation.params
    everywhere = lambda degree: [degree] * len(equation.outvars)
    highest = max(arguments, key=lambda degree: degree.of, default=Degree())
    if highest.of == 0:
        return everywhere(highest)
    called = _called(equation)
    if called is not None:
        return _degrees(called, arguments)
    if name == "scan":
        return _degrees_through_scan(equation, arguments)
    if name == "cond" and arguments[0].of == 0:
        branches = [_degrees(getattr(branch, "jaxpr", branch), arguments[1:]) for branch in parameters["branches"]]
        return [max(degrees, key=lambda degree: degree.of) for degrees in zip(*branches, strict=True)]
    if highest.of == TOO_HIGH:
        return everywhere(highest)
    to_floats = all(jnp.issubdtype(variable.aval.dtype, jnp.inexact) for variable in equation.outvars)
    fixed = arguments[FIXED[name]] if name in FIXED else []
    if name == "custom_linear_solve":
        fixed = arguments[: sum(parameters["const_lengths"])]
    if (name in LINEAR or name == "custom_linear_solve") and to_floats and all(degree.of == 0 for degree in fixed):
        return everywhere(highest)
    of = TOO_HIGH
    if name in PRODUCTS:
        of = sum(degree.of for degree in arguments)
    elif name == "square" or (name == "integer_pow" and parameters["y"] >= 0):
        of = highest.of * parameters.get("y", 2)
    return everywhere(Degree(of) if of < TOO_HIGH else Degree(TOO_HIGH, name))


def _degrees_through_scan(scan: Any, arguments: list[Degree]) -> list[Degree]:
    first, carried = scan_sizes(scan)
    end = first + carried
    while True:  # degrees only grow, up to TOO_HIGH, so this ends
        outputs = _degrees(body_of(scan), arguments)
        grown = [max(a, b, key=lambda degree: degree.of) for a, b in zip(arguments[first:end], outputs, strict=False)]
        if grown == arguments[first:end]:
            return [*grown, *outputs[len(grown) :]]
        arguments = [*arguments[:first], *grown, *arguments[end:]]


Columns: TypeAlias = int | frozenset[int] | None
"""Of a variable of a linear map v -> F v: the axis that runs over the columns of v, each computed from its own column
and all in the same way; the axes along which it is constant, if it does not depend on v; `None` if columns mix."""


def column_axis(linear: Callable[[W], Any], w: W) -> int | None:
    """The axis (-1 or 0) of every leaf of w along which a linear map acts on each slice alike: F = F_0 (x) I.

    Arguments:
        linear: v -> pytrees like w, one or several, linear in v.
        w: its leaves share the length c of that axis; a leaf of shape (..., c) is a matrix of c columns.

    Returns: the axis with the most slices, or `None` if the trace does not show that there is one.
    """
    leaves = jax.tree.leaves(w)
    if any(leaf.ndim == 0 for leaf in leaves):
        return None
    jaxpr = jax.make_jaxpr(linear)(w).jaxpr
    for axis in sorted((-1, 0), key=lambda axis: -leaves[0].shape[axis]):
        inputs: list[Columns] = [axis % leaf.ndim for leaf in leaves]
        if {leaf.shape[axis] for leaf in leaves} != {max(2, leaves[0].shape[axis])}:
            continue
        expected = inputs * (len(jaxpr.outvars) // len(inputs))
        found = zip(_columns(jaxpr, inputs), expected, strict=True)
        # What does not depend on v is zero, the map being linear, and the trace must show it alike in all columns.
        if all(axis in out if isinstance(out, frozenset) else out == axis for out, axis in found):
            return axis
    return None


def _columns(jaxpr: Any, inputs: list[Columns]) -> list[Columns]:
    known = dict(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> Columns:
        here = _read(known, atom, frozenset())
        ones = [axis for axis, size in enumerate(atom.aval.shape) if size == 1]
        return here.union(ones) if isinstance(here, frozenset) else here

    for equation in jaxpr.eqns:
        known |= dict(
            zip(equation.outvars, _columns_through(equation, [read(a) for a in equation.invars]), strict=True)
        )
    return [read(atom) for atom in jaxpr.outvars]


def _columns_through(equation: Any, arguments: list[Columns]) -> list[Columns]:
    everywhere = lambda columns: [columns] * len(equation.outvars)
    depend = any(not isinstance(argument, frozenset) for argument in arguments)
    if None in arguments:
        return everywhere(None)
    called = _called(equation)
    if called is not None:
        return _columns(called, arguments)

    def alike(sources: tuple[int | None, ...]) -> bool:
        """Whether these axes of the operands (`None`: it has none) are all columns of v, or constant."""
        return all(
            (source is None or source in columns) if isinstance(columns, frozenset) else source == columns
            for source, columns in zip(sources, arguments, strict=True)
        )

    kept = [axis for axis, sources in _sources(equation).items() if alike(sources)]
    if not depend:
        return everywhere(frozenset(kept))
    return everywhere(kept[0] if kept else None)


def _sources(equation: Any) -> dict[int, tuple[int | None, ...]]:
    """For each axis of the result along which an operation does the same at every index: its axis in each operand.

    `None` for an operand that has no such axis: it is the same at every index. Operations not listed are taken to
    have no such axis, which costs time and is never wrong.
    """
    name, parameters = equation.primitive.name, equation.params
    shapes = [atom.aval.shape for atom in equation.invars]
    if not equation.outvars:
        return {}
    out = equation.outvars[0].aval.shape
    first = lambda source: (source, *(None for _ in shapes[1:]))
    axes = range(len(out))
    if name in ELEMENTWISE:
        return {j: tuple(j if shape else None for shape in shapes) for j in axes}
    if name == "broadcast_in_dim":
        placed = {j: i for i, j in enumerate(parameters["broadcast_dimensions"])}
        return {j: first(placed[j] if j in placed and shapes[0][placed[j]] == out[j] else None) for j in axes}
    if name == "reshape" and parameters["dimensions"] is None:
        starts = {(size, prod(shapes[0][:i])): i for i, size in enumerate(shapes[0]) if size > 1}
        return {j: (starts[out[j], prod(out[:j])],) for j in axes if (out[j], prod(out[:j])) in starts}
    if name == "transpose":
        return {j: (parameters["permutation"][j],) for j in axes}
    if name in ("squeeze", "reduce_sum", "reduce_max", "reduce_min", "reduce_prod"):
        gone = parameters["dimensions" if name == "squeeze" else "axes"]
        return {j: (i,) for j, i in enumerate(i for i in range(len(shapes[0])) if i not in gone)}
    if name in ("slice", "dynamic_slice"):  # of equal length: all of it, in order
        return {j: first(j) for j in axes if out[j] == shapes[0][j]}
    if name == "dynamic_update_slice":
        return {j: (j, j, *(None for _ in shapes[2:])) for j in axes if shapes[0][j] == shapes[1][j]}
    if name == "pad":
        return {j: first(j) for j in axes if parameters["padding_config"][j] == (0, 0, 0)}
    if name in ALONG:
        moved = parameters[ALONG[name]]
        return {j: tuple(j for _ in shapes) for j in axes if j not in (moved if isinstance(moved, tuple) else (moved,))}
    return _sources_of_product(parameters, shapes) if name == "dot_general" else {}


def _sources_of_product(parameters: Any, shapes: list[tuple[int, ...]]) -> dict[int, tuple[int | None, ...]]:
    contracted, batch = parameters["dimension_numbers"]
    free = lambda k: [i for i in range(len(shapes[k])) if i not in contracted[k] and i not in batch[k]]
    both: list[tuple[int | None, ...]] = list(zip(*batch, strict=True))
    return dict(enumerate([*both, *((i, None) for i in free(0)), *((None, i) for i in free(1))]))
