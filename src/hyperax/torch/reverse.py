"""`Reverse`, `Truncated` and `FirstOrder` on torch tensors."""

from __future__ import annotations

import dataclasses
from functools import singledispatch
from math import isqrt
from typing import Any

import torch

from hyperax.methods import FirstOrder, Method, RealTime, Reverse, Truncated
from hyperax.methods.schedule import Schedule, StepSize, cheapest, parse_bytes
from hyperax.torch.problem import Inner, floats_of, mode
from hyperax.torch.runs import Gradients, Pulled, Solved, added, begin, live, plain, unrolled, variable

_REASONS = {
    "Reversible": "it finds again, bit by bit, what its own dynamics rounded away; use Reverse(steps, memory=...)",
    "Doubling": "it reads from a JAX program that the inner objective is quadratic; use Reverse(steps, memory=...)",
    "ClosedForm": "it differentiates a formula in JAX; use Reverse(0) with the formula as init",
    "FiniteDifference": "it needs the inner objective apart from the step; use Truncated(steps, window)",
}


@singledispatch
def solve(method: Method, inner: Inner, lam: Any, carry: Any) -> Solved:
    """The inner run of a method at lam, and its way back; a method that PyTorch cannot serve is refused."""
    name = type(method).__name__
    if not isinstance(method, Method):
        raise ValueError(f"method is {method!r}; use hyperax.Reverse(steps) or another method")
    reason = _REASONS.get(name, "nothing is known here of how it differentiates a step; use Reverse(steps)")
    raise ValueError(f"{name} cannot differentiate a step in PyTorch: {reason}")


@singledispatch
def first_carry(method: Method, inner: Inner, lam: Any) -> Any:
    """What a method that remembers something starts with; `()` for the others."""
    return ()


@solve.register
def _(method: Reverse, inner: Inner, lam: Any, carry: Any) -> Solved:
    schedule = None
    if method.memory is not None and method.steps < 2:
        schedule = Schedule((), 0)
    elif method.memory is not None:
        state, _ = begin(inner, lam)
        schedule = cheapest(method.steps, measured(inner, state, lam), parse_bytes(method.memory))
    elif method.segment is not None:
        size = max(1, isqrt(method.steps)) if isinstance(method.segment, str) else method.segment
        schedule = Schedule((size,) if size < method.steps else (), 0)
    info: dict[str, Any] = {}
    if schedule is not None:
        info = {"segments": torch.tensor(schedule.segments), "extra_runs": torch.tensor(len(schedule.segments))}
        info = {"schedule": info | ({"bytes": torch.tensor(float(schedule.bytes))} if schedule.bytes else {})}
    return _through(inner, lam, carry, range(1, method.steps + 1), () if schedule is None else schedule.segments, info)


@solve.register
def _(method: FirstOrder, inner: Inner, lam: Any, carry: Any) -> Solved:
    return _through(inner, lam, carry, range(1, method.steps + 1), (), {}, "first_order")


@solve.register
def _(method: Truncated, inner: Inner, lam: Any, carry: Any) -> Solved:
    detached = method.steps - method.window
    if not detached:
        return solve(Reverse(method.steps), inner, lam, carry)
    state, _ = begin(inner, lam)
    state = plain(inner, state, lam, range(1, detached + 1))
    state, pull = unrolled(inner, state, lam, range(detached + 1, method.steps + 1))
    return Solved(state, lambda alpha: Pulled(pull(alpha)[1], {}, carry))


def _through(
    inner: Inner, lam: Any, carry: Any, times: range, segments: tuple[int, ...], info: Any, kind: str = "graph"
) -> Solved:
    """The whole run, Phi_0 included, with its way back."""
    state, to_lam = begin(inner, lam)
    state, pull = unrolled(inner, state, lam, times, segments, kind)

    def whole(alpha: Gradients) -> Pulled:
        alpha, through_steps = pull(alpha)
        return Pulled(added(through_steps, to_lam(alpha)), info, carry)

    return Solved(state, whole)


def measured(inner: Inner, state: Any, lam: Any) -> StepSize:
    """The bytes of a state and of what the graph of one step keeps, by two steps: what both keep is there anyway."""
    seen: list[dict[int, int]] = []

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        seen[-1][storage.data_ptr()] = storage.nbytes()
        return x.detach()  # x itself would be kept by its own graph, and never be freed

    at, after = variable(lam), variable(state)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), mode("graph"):
        for t in (1, 2):
            seen.append({})
            after = inner.step(t, live(after), at)
    of_state = sum(x.nbytes for x in floats_of(state))
    # The larger: the last mini-batch of an epoch may be a small one.
    kept = lambda here, there: sum(size for pointer, size in here.items() if pointer not in there)
    of_step = max(kept(*seen), kept(*seen[::-1]))
    return StepSize(of_state, max(of_state, of_step))


def shortened(method: Method, steps: int) -> Method | None:
    """A method in reverse with the same paths from lam to f_T, by so many steps or as many as there are.

    `None` for a method that sees no paths.
    """
    return _shortened(method, steps)


@singledispatch
def _shortened(method: Any, steps: int) -> Method | None:
    return Reverse(min(method.steps, steps), segment="sqrt")


@_shortened.register
def _(method: FirstOrder, steps: int) -> Method:
    return dataclasses.replace(method, steps=min(method.steps, steps))


@_shortened.register
def _(method: Truncated, steps: int) -> Method:
    window = min(method.window, steps)
    return Truncated(window + (method.steps > method.window), window)


@_shortened.register
def _(method: RealTime, steps: int) -> Method:
    count = min(method.every if method.steps is None else method.steps, steps)
    cut = method.window is not None and method.window < method.every  # then Phi_0 counts as constant
    return Truncated(count + 1, count) if cut else Reverse(count, segment="sqrt")
