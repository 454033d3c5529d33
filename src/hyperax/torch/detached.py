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

    Along one random direction u, in tensors that are not zero there, the change of each tensor of the state, d = (Phi(x
    + e u) - Phi(x - e u)) / 2e, is compared with the derivative J u by <d, J u> / <d, d>, which is to be 1.
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
    once, again = ({"a step": _stepped(inner, point, at)} for _ in range(2))
    if callable(inner.problem.outer):
        for outcomes in (once, again):
            outcomes["the outer objective"] = [inner.outer(point, at)[0]]
    for what, outputs in once.items():
        # A variable that the step itself makes (the inputs of a gradient penalty) is another one each time.
        lasting = {id(x) for x in _leaves(again[what])} - known
        shapes = [list(x.shape) for x in _leaves(outputs) if id(x) in lasting]
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
    # A kink, or a bend within e, is told by another e: there the quotient changes.
    widths, quotients = (precision ** (1 / 3), precision ** (1 / 3) / 4), []
    for e in widths:
        try:
            ends = [function([x + s * e * d for x, d in zip(at, u, strict=True)]) for s in (1, -1)]
        except Exception:  # beside the point a step may have no value: at a bound of lam, in a factorisation
            return [False] * len(outputs)
        # In double: squares of small numbers vanish in others.
        d = [(a.detach().double() - b.detach().double()) / (2 * e) for a, b in zip(*ends, strict=True)]
        beside = [x.double() for x in u] if moved else [torch.zeros_like(x) for x in d]
        quotients.append(([x - y for x, y in zip(d, beside, strict=True)], beside))

    def steady(i: int) -> bool:
        of_output = precision * float(outputs[i].detach().double().norm())
        noise = 20 * (of_output + torch.finfo(outputs[i].dtype).tiny * outputs[i].numel() ** 0.5)
        one, other = (float(d[i].norm()) for d, _ in quotients)
        change = float((quotients[0][0][i] - quotients[1][0][i]).norm())
        return change < 0.2 * other and one > noise / widths[0] and other > noise / widths[1]

    suspects = [i for i in range(len(outputs)) if steady(i)]
    for d, beside in quotients:
        suspects = _contradicted(suspects, outputs, point, u, d, beside)
    return [i in suspects for i in range(len(outputs))]


def _contradicted(some: list[int], outputs: Floats, point: Floats, u: Floats, d: Floats, beside: Floats) -> list[int]:
    """Those of these outputs whose <d, J u> / <d, d> is far from 1, found by halves.

    Far means below 0.2 or over 5: many kinks together, as of relu over a large batch, are a part of d and not of J.
    """
    if not some:
        return []
    sizes = {i: float(d[i].norm()) for i in some}
    least = min(sizes.values())
    cotangents = [(d[i] / sizes[i] * (least / sizes[i])).to(outputs[i]) for i in some]
    back = backward([outputs[i] for i in some], point, cotangents, again=True)
    slope = sum(float((g.double() * x.double()).sum()) for g, x in zip(back, u, strict=True) if g is not None)
    missing = slope / least - sum(float((d[i] * beside[i]).sum()) / sizes[i] ** 2 for i in some) - len(some)
    if abs(missing) < 0.3 or (len(some) == 1 and -0.8 < missing < 4):
        return []
    if len(some) == 1:
        return some
    halves = some[: len(some) // 2], some[len(some) // 2 :]
    return [i for half in halves for i in _contradicted(half, outputs, point, u, d, beside)]


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
