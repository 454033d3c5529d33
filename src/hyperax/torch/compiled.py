"""Hypergradients inside programs of JAX, such as that of `minimize`: the inner run is a call back to Python."""

from __future__ import annotations

import threading
from itertools import count
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import numpy as np
import torch

from hyperax.problem import Hypergradient
from hyperax.torch.checks import variables_of
from hyperax.torch.crossing import is_torch, to_jax, to_numpy, to_torch
from hyperax.torch.objective import in_jax
from hyperax.torch.problem import JaxObjective, floats_of
from hyperax.torch.reverse import solve
from hyperax.torch.runs import Solved, engine, zeros_where_none

if TYPE_CHECKING:
    from hyperax.torch.hypergradient import Known, TorchHypergradient

_ONE_AT_A_TIME = threading.RLock()
"""A program may call back from several threads, and torch's random numbers are of the whole process."""


class Waiting:
    """Inner runs whose E is being computed in JAX, by ticket."""

    def __init__(self) -> None:
        self._runs: dict[int, tuple[Any, Solved]] = {}
        self._tickets = count(1)

    def leave(self, lam: Any, solved: Solved) -> np.int32:
        """A ticket for a run."""
        while len(self._runs) >= 1024:  # what earlier programs left behind by failing in between
            self._runs.pop(next(iter(self._runs)))
        ticket = next(self._tickets) % 2**31
        self._runs[ticket] = (lam, solved)
        return np.int32(ticket)

    def fetch(self, ticket: Any) -> tuple[Any, Solved]:
        """The run of a ticket."""
        return self._runs.pop(int(ticket))


def called_back(f: TorchHypergradient, lam: Any, data: Any, carry: Any) -> Hypergradient:
    """The hypergradient inside a JAX program."""
    known = _look(f, lam, data)
    _check_precision(known)
    carry = f.init(lam, data) if carry is None else carry
    gradient = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), lam)
    if isinstance(f.problem.outer, JaxObjective):
        return _called_back_twice(f, lam, data, carry, known, gradient)
    shapes = (known.value, gradient, known.metrics, known.carry)

    def host(lam: Any, data: Any, carry: Any) -> Any:
        h = f.evaluated(lam, data, f.carried(carry, known))
        return to_numpy((h.value, h.grad, h.info["metrics"], h.carry), shapes)

    value, grad, metrics, carry = _call_back(f, host, shapes, lam, data, carry)
    return Hypergradient(value, grad, None, {"metrics": metrics}, carry)


def first_carry_called_back(f: TorchHypergradient, lam: Any, data: Any) -> Any:
    """The first carry inside a JAX program."""
    known = _look(f, lam, data)
    if not jax.tree.leaves(known.carry):
        return known.carry
    host = lambda lam, data: to_numpy(f.first_carry(lam, data), known.carry)
    return _call_back(f, host, known.carry, lam, data)


def _called_back_twice(
    f: TorchHypergradient, lam: Any, data: Any, carry: Any, known: Known, shapes: Any
) -> Hypergradient:
    """The same around an objective in JAX: down with lam, E and its gradient in the program, back with dE/ds_T.

    A call back must not wait for JAX itself, so E cannot be computed within it.
    """

    def down(lam: Any, data: Any, carry: Any) -> Any:
        inner = f.inner(lam, data, known.quiet)
        with engine():
            solved = solve(f.method, inner, lam, f.carried(carry, known))
        return f.waiting.leave(lam, solved), to_numpy(solved.state, known.state)

    ticket = jax.ShapeDtypeStruct((), np.int32)
    ticket, state = _call_back(f, down, (ticket, known.state), lam, data, carry)
    value, metrics, of_state, of_lam = in_jax(f.problem, state, lam, to_jax(data))

    def up(ticket: Any, of_state: Any, value: Any) -> Any:
        lam, solved = f.waiting.fetch(ticket)
        alpha = [g.to(x) for g, x in zip(to_torch(of_state), floats_of(solved.state), strict=True)]
        with _ONE_AT_A_TIME, engine():
            pulled = solved.pull(alpha)
        found = zeros_where_none(pulled.gradient, floats_of(lam))
        grad = jax.tree.unflatten(jax.tree.structure(lam), found)
        return *to_numpy((grad, pulled.carry), (shapes, known.carry)), np.asarray(value)

    # The value comes along, so that a program that wants nothing else fetches its run too.
    grad, carry, value = jax.pure_callback(up, (shapes, known.carry, known.value), ticket, of_state, value)
    grad = jax.tree.map(jax.numpy.add, grad, jax.tree.unflatten(jax.tree.structure(lam), of_lam))
    return Hypergradient(value, grad, None, {"metrics": metrics}, carry)


def _call_back(f: TorchHypergradient, host: Any, shapes: Any, lam: Any, data: Any, *more: Any) -> Any:
    """host(lam, data, ...) with lam and data in PyTorch; what of data is no array of JAX is closed over."""
    arrays, others = eqx.partition(data, eqx.is_array)

    def function(lam: Any, arrays: Any, *more: Any) -> Any:
        with _ONE_AT_A_TIME:
            return host(*f.given(lam, eqx.combine(arrays, others)), *more)

    return jax.pure_callback(function, shapes, lam, arrays, *more)


def _look(f: TorchHypergradient, lam: Any, data: Any) -> Known:
    """The first look at a problem, with values made up, for those of the program are not known yet."""
    try:
        return f.look(*_examples(f, lam, data))
    except (RuntimeError, ValueError) as error:
        if any(eqx.is_array(x) for x in jax.tree.leaves(data)):
            error.add_note(
                "The problem was tried with ones and zeros in place of the data, which a compiled program does not "
                "know yet; if that is why it failed, call f(lam, data) once before."
            )
        raise


def _examples(f: TorchHypergradient, lam: Any, data: Any) -> tuple[Any, Any]:
    """Values to look at a problem with: for lam `Problem.example`, or ones."""

    def ones(x: Any) -> Any:
        if not isinstance(x, jax.Array | np.ndarray):
            return x
        floating = jax.numpy.issubdtype(x.dtype, jax.numpy.floating)
        return (np.ones if floating else np.zeros)(x.shape, x.dtype)

    example, shapes = f.problem.example, lambda tree: jax.tree.map(lambda x: tuple(np.shape(x)), tree)
    if example is None or shapes(example) != shapes(lam):
        example = jax.tree.map(ones, lam)
    lam, data = f.given(example, jax.tree.map(ones, data))
    assert is_torch(lam)
    return variables_of(lam), data


def _check_precision(known: Known) -> None:
    """A carry in float64 would lose half of its digits each time."""
    for dtype, shape in zip(jax.tree.leaves(known.types), jax.tree.leaves(known.carry), strict=True):
        if dtype == torch.float64 and shape.dtype != np.float64:
            raise ValueError(
                "the method carries a state in float64 from one hyperiteration to the next, and JAX is in float32: "
                'jax.config.update("jax_enable_x64", True), or a state and data in float32 (module.float())'
            )
