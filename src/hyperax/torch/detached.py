"""What a step or E loses on the way: derivatives that are not those of the values, and tensors nobody knows of."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from hyperax.torch.problem import Inner, floats_of, is_float, mode, names_of, replaced
from hyperax.torch.runs import backward, live, variable

Floats = Sequence[torch.Tensor]


class DetachedWarning(UserWarning):
    """Something that a step or E depends on is cut off from the derivative.

    Do not silence it without a look at `hyperax.torch.certify`; a straight-through estimator is a good reason to.

    >>> issubclass(DetachedWarning, UserWarning)
    True
    """


def check_derivatives(inner: Inner, state: Any, lam: Any) -> bool:
    """Whether the derivative of the first step in the state and in lam is that of its values; warn where it is not.

    Along one random direction u the change of each tensor of the state, d = (Phi(x + e u) - Phi(x - e u)) / 2e, is
    compared with the derivative J u by <d, J u> / <d, d>, which is to be 1.
    """
    of_state = lambda floats: _stepped(inner, replaced(state, floats), lam)
    of_lam = lambda floats: _stepped(inner, state, replaced(lam, floats))
    names = [name for name, x in names_of("state", state) if is_float(x)]
    right = True
    for what, function, at, moved in (
        ("the state before it", of_state, floats_of(state), True),
        ("lam", of_lam, floats_of(lam), False),
    ):
        wrong = [name for name, off in zip(names, _off(function, at, moved), strict=True) if off]
        if wrong:
            right = False
            warnings.warn(
                f"the derivative of a step of {', '.join(wrong)} with respect to {what} is not that of the values: "
                "something is detached on the way. Take gradients by hyperax.torch.inner_gradient (torch.autograd.grad "
                "needs create_graph=True), and leave out .detach(), .data, .item() and torch.no_grad",
                DetachedWarning,
                stacklevel=2,
            )
    return right


def check_strangers(inner: Inner, state: Any, lam: Any) -> None:
    """Warn of tensors that want a gradient, take part in a step or in E, and are neither in the state nor in lam."""
    at, point = variable(lam), variable(state)
    known = {id(x) for x in floats_of((at, point))}
    with mode("graph"):
        outcomes = {"a step": floats_of(inner.step(1, point, at))}
        if callable(inner.problem.outer):
            outcomes["the outer objective"] = [inner.outer(point, at)[0]]
    for what, outputs in outcomes.items():
        shapes = [list(x.shape) for x in _leaves(outputs) if id(x) not in known]
        if shapes:
            some = ", ".join(map(str, shapes[:4])) + (", ..." if len(shapes) > 4 else "")
            warnings.warn(
                f"{what} depends on tensors (of shapes {some}) that require a gradient and are neither in the state "
                "nor in lam: parameters of a module itself, where those of the state were meant? They count as "
                "constants; if that is right, say so by requires_grad_(False)",
                DetachedWarning,
                stacklevel=2,
            )


def _stepped(inner: Inner, state: Any, lam: Any) -> list[torch.Tensor]:
    with mode("graph"):
        return floats_of(inner.step(1, live(state), live(lam)))


def _off(function: Callable[[Floats], Floats], at: Floats, moved: bool) -> list[bool]:
    """For each output whether its derivative is not that of its values; `moved`: the outputs are `at`, moved a bit."""
    precision = max(float(torch.finfo(x.dtype).eps) for x in at)
    u = _direction(at)
    point = [x.detach().requires_grad_() for x in at]
    outputs = function(point)
    suspects = [True] * len(outputs)
    before: list[torch.Tensor] | None = None
    # A kink, or a bend within e, is told by another e: there the quotient changes.
    for e in (precision ** (1 / 3), precision ** (1 / 3) / 4):
        ends = [[x.detach() for x in function([x + s * e * d for x, d in zip(at, u, strict=True)])] for s in (1, -1)]
        change = [(a - b) / (2 * e) for a, b in zip(*ends, strict=True)]
        beside = [d if moved else torch.zeros_like(c) for c, d in zip(change, u if moved else change, strict=True)]
        d = [c - b for c, b in zip(change, beside, strict=True)]
        for i, (x, y) in enumerate(zip(d, outputs, strict=True)):
            noise = 20 * precision / e * float(y.detach().norm())
            still = before is None or float((x - before[i]).norm()) < 0.2 * float(x.norm())
            suspects[i] = suspects[i] and still and float(x.norm()) > noise
        before = d
        for i in [i for i, suspect in enumerate(suspects) if suspect]:
            back = backward([outputs[i]], point, [d[i]], again=True)
            derivative = sum(float((g * b).sum()) for g, b in zip(back, u, strict=True) if g is not None)
            ratio = (derivative - float((d[i] * beside[i]).sum())) / float((d[i] * d[i]).sum())
            suspects[i] = not abs(ratio - 1) < 0.3
        if not any(suspects):
            break
    return suspects


def _direction(at: Floats) -> list[torch.Tensor]:
    """Random, each tensor by its own size; one of zeros stays, unless all are."""
    draw = np.random.default_rng(0)
    sizes = [float(x.detach().square().mean().sqrt()) if x.numel() else 0.0 for x in at]
    sizes = sizes if any(sizes) else [1.0] * len(at)
    return [size * torch.tensor(draw.normal(size=tuple(x.shape))).to(x) for x, size in zip(at, sizes, strict=True)]


def _leaves(outputs: Floats) -> list[torch.Tensor]:
    """The variables that a graph begins with."""
    found, seen = [], set()
    nodes = [x.grad_fn for x in outputs if x.grad_fn is not None]
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        nodes += [after for after, _ in node.next_functions if after is not None]
    return found
