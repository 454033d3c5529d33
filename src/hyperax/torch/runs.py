"""The inner run in PyTorch, plain or with a way back: the only loops over t."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import torch

from hyperax.torch.problem import Inner, floats_of, is_float, mode

Gradients = Sequence[torch.Tensor | None]
"""One for each leaf of lam, or for each floating-point tensor of a state; `None` where nothing arrives."""

PullBack = Callable[[Gradients], Gradients]
"""The gradient in a state -> the gradient in lam that comes through that state."""


class Pulled(NamedTuple):
    """What came back: a part of the hypergradient, what a person may want to know, and the next carry.

    `whole` says that the gradient is all of it, the direct part dE/dlam included.
    """

    gradient: Gradients
    info: dict[str, Any]
    carry: Any
    whole: bool = False


class Solved(NamedTuple):
    """What a method makes of one lam: s_T (detached), and the way back from dE/ds_T; to be gone once."""

    state: Any
    pull: Callable[[Gradients], Pulled]


@contextlib.contextmanager
def engine() -> Iterator[None]:
    """What every run needs of torch: fused attention kernels have no second derivative, the plain one has."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), torch.enable_grad():
        yield


def constant(tree: Any) -> Any:
    """The tree as constants of the derivative, without a copy."""
    return jax.tree.map(lambda x: x.detach() if isinstance(x, torch.Tensor) else x, tree)


def variable(tree: Any) -> Any:
    """The tree with fresh variables for its floating-point tensors: the leaves of a graph."""
    return jax.tree.map(lambda x: x.detach().requires_grad_() if is_float(x) else x, tree)


def live(tree: Any) -> Any:
    """The tree with gradients switched on where they are not: a step may differentiate in every tensor it receives."""
    attached = lambda x: is_float(x) and not x.requires_grad
    return jax.tree.map(lambda x: x.detach().requires_grad_() if attached(x) else x, tree)


def plain(inner: Inner, state: Any, lam: Any, times: Sequence[int]) -> Any:
    """The state after these steps, nothing kept for a way back."""
    lam = constant(lam)
    with mode("constant"):
        for t in times:
            if inner.quiet:
                with torch.no_grad():
                    state = constant(inner.step(t, state, lam))
            else:
                state = constant(inner.step(t, live(constant(state)), lam))
    return constant(state)


def backward(
    outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], cotangents: Gradients, again: bool = False
) -> Gradients:
    """(d outputs / d inputs)^T cotangents; `None` for inputs that do not reach the outputs."""
    pairs = [(y, a) for y, a in zip(outputs, cotangents, strict=True) if a is not None and y.requires_grad]
    if not pairs:
        return [None] * len(inputs)
    outputs, cotangents = (list(column) for column in zip(*pairs, strict=True))
    return list(torch.autograd.grad(outputs, inputs, cotangents, retain_graph=again, allow_unused=True))


def added(a: Gradients, b: Gradients) -> Gradients:
    """The sum; `None` is zero."""
    return [y if x is None else x if y is None else x + y for x, y in zip(a, b, strict=True)]


def begin(inner: Inner, lam: Any) -> tuple[Any, PullBack]:
    """(s_0, the way back from it to lam)."""
    at = variable(lam)
    state = inner.start(at)
    outputs, inputs = floats_of(state), floats_of(at)
    return constant(state), lambda alpha: backward(outputs, inputs, alpha)


def unrolled(
    inner: Inner, state: Any, lam: Any, times: Sequence[int], segments: Sequence[int] = (), kind: str = "graph"
) -> tuple[Any, Callable[[Gradients], tuple[Gradients, Gradients]]]:
    """(the state after these steps, alpha -> (alpha at the state before them, gradient in lam)).

    Without segments the graph of all steps is kept. With lengths (k, ...) only the states at the ends of k steps are,
    and each stretch runs again on the way back, cut by the other lengths. The last stretch, which is the first on the
    way back, runs once.
    """
    size = segments[0] if segments else len(times)
    if size >= len(times):
        return (
            _recorded(inner, state, lam, times, kind)
            if len(segments) <= 1
            else unrolled(inner, state, lam, times, segments[1:], kind)
        )
    starts, cut = [], [times[i : i + size] for i in range(0, len(times), size)]
    for stretch in cut[:-1]:
        starts.append(state)
        state = plain(inner, state, lam, stretch)
    state, last = unrolled(inner, state, lam, cut[-1], segments[1:], kind)
    ways = [last]

    def pull(alpha: Gradients) -> tuple[Gradients, Gradients]:
        alpha, total = ways.pop()(alpha)  # popped: its graph is freed before the next stretch makes one
        for start, stretch in zip(starts[::-1], cut[-2::-1], strict=True):
            _, way = unrolled(inner, start, lam, stretch, segments[1:], kind)
            alpha, found = way(alpha)
            total = added(total, found)
            del way
        return alpha, total

    return state, pull


def _recorded(
    inner: Inner, state: Any, lam: Any, times: Sequence[int], kind: str
) -> tuple[Any, Callable[[Gradients], tuple[Gradients, Gradients]]]:
    """The run with the graph of all its steps, and the way back through it."""
    first, at = variable(state), variable(lam)
    after = first
    with mode(kind) as used:
        for t in times:
            after = inner.step(t, live(after), at)
    if kind == "first_order" and times and not used.calls:
        raise ValueError(
            "FirstOrder treats inner gradients as constants, and the step takes none by hyperax.torch.inner_gradient: "
            "use it in place of torch.autograd.grad, or another method"
        )
    outputs, inputs = floats_of(after), [*floats_of(first), *floats_of(at)]
    count = len(outputs)

    def pull(alpha: Gradients) -> tuple[Gradients, Gradients]:
        found = backward(outputs, inputs, alpha)
        return found[:count], found[count:]

    return constant(after), pull


def zeros_where_none(gradients: Gradients, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The gradients, with zeros where nothing arrived, each of the type of its variable."""
    return [torch.zeros_like(x) if g is None else g for g, x in zip(gradients, like, strict=True)]
