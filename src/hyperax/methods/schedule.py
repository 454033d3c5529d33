"""How often to keep a state: the cheapest way through T steps and back within a number of bytes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from hyperax.dynamics.dynamics import Dynamics, State
from hyperax.problem import Data, Lam, Problem
from hyperax.rollout import exact_gradient

_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


class StepSize(NamedTuple):
    """Bytes that a reverse pass keeps: of the state at the end of a segment, and of a step that is not run again."""

    state: int
    step: int


class Schedule(NamedTuple):
    """Segments of segments: lengths, longest first; none keeps every step. `bytes` is what they keep at most."""

    segments: tuple[int, ...]
    bytes: int


def parse_bytes(memory: int | str) -> int:
    """A number of bytes from 2147483648, "2GiB", "500 MB"; `ValueError` for anything else."""
    if isinstance(memory, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", memory)
        if match and (unit := match[2].lower().removesuffix("ytes").removesuffix("yte")) in (*_UNITS, "b"):
            memory = int(float(match[1]) * _UNITS.get(unit, 1))
    if isinstance(memory, bool) or not isinstance(memory, int) or memory < 1:
        raise ValueError(f'memory is {memory!r}; use a number of bytes, or a string like "2GiB" or "500MB"')
    return memory


def measure_step(problem: Problem, dynamics: Dynamics, state: State, lam: Lam, prepared: Data) -> StepSize:
    """The sizes of the state and of what the derivative of one step needs, read from its trace; nothing is computed.

    What does not change from step to step (data, lam) is kept once whatever the schedule, so it is not counted.
    """
    floats, rest = eqx.partition((lam, prepared), eqx.is_inexact_array)

    def residuals(state: State, t: jax.Array) -> list[Any]:
        def step(state: State, floats: Any) -> State:
            lam, prepared = eqx.combine(floats, rest)
            return dynamics.step(exact_gradient(problem.objective(prepared, t)), state, lam, t)

        return jax.tree.leaves(eqx.filter_vjp(step, state, floats)[1])

    jaxpr = jax.make_jaxpr(lambda state, t: [x for x in residuals(state, t) if eqx.is_array(x)])(
        state, jnp.asarray(1)
    ).jaxpr
    varying = set(jaxpr.invars)
    for equation in jaxpr.eqns:
        if any(not hasattr(atom, "val") and atom in varying for atom in equation.invars):
            varying.update(equation.outvars)
    kept = {atom for atom in jaxpr.outvars if not hasattr(atom, "val") and atom in varying}
    of_state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    return StepSize(of_state, max(of_state, sum(x.aval.size * x.aval.dtype.itemsize for x in kept)))


def cheapest(steps: int, sizes: StepSize, budget: int) -> Schedule:
    """The schedule with the fewest inner runs that fits, and of these the one that keeps least.

    Without segments T steps are kept; each level of segments costs one inner run more:

        bytes(k_1, ..., k_L) = (T / k_1 + k_1 / k_2 + ... + k_{L-1} / k_L) state + k_L step

    Raises: `ValueError` if no schedule fits, with what the least one needs.
    """
    if steps * sizes.step <= budget:
        return Schedule((), steps * sizes.step)
    best, levels = Schedule((), steps * sizes.step), 1
    while (found := _least(steps, levels, sizes)).bytes < best.bytes:
        if found.bytes <= budget:
            return found
        best, levels = found, levels + 1
    raise ValueError(
        f"a reverse pass through {steps} steps needs {best.bytes:,} bytes at least ({sizes.state:,} for a state, "
        f"{sizes.step:,} for a step), and memory is {budget:,}: give it more, or use Forward (few hyperparameters), "
        "Truncated, or Implicit (a converged inner run)"
    )


@cache
def _least(steps: int, levels: int, sizes: StepSize) -> Schedule:
    """The schedule of so many levels that keeps least."""
    if levels == 0 or steps <= 1:
        return Schedule((), steps * sizes.step)
    inner = lambda size: _least(size, levels - 1, sizes)
    kept = lambda size: -(-steps // size) * sizes.state + inner(size).bytes
    size = min(_lengths(steps), key=kept)
    return Schedule((size, *inner(size).segments), kept(size))


def _lengths(steps: int) -> Sequence[int]:
    """Lengths of segments worth trying: all short ones, then 2 % apart."""
    lengths, size = [], 1
    while size < max(steps, 2):
        lengths.append(size)
        size = max(size + 1, int(1.02 * size))
    return lengths
