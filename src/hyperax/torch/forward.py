"""`Forward` and `RealTime` on torch tensors: tangents that travel with the state."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any
from weakref import WeakSet

import jax
import torch
from torch.autograd import forward_ad

from hyperax.methods import Forward, RealTime
from hyperax.methods.real_time import InnerProgress
from hyperax.torch.problem import Inner, Problem, floats_of, is_float, mode, replaced, w_of, with_w
from hyperax.torch.reverse import first_carry, solve
from hyperax.torch.runs import (
    Gradients,
    Pulled,
    Solved,
    added,
    backward,
    begin,
    constant,
    plain,
    unrolled,
    variable,
    zeros_where_none,
)

Tangents = list[torch.Tensor]
"""One for each floating-point tensor, with a leading axis of directions."""


@solve.register
def _(method: Forward, inner: Inner, lam: Any, carry: Any) -> Solved:
    lam, parts = constant(lam), []
    state = None
    for directions in _coordinates(lam, method.chunk):
        state, z = pushed_run(inner, lam, directions, method.steps)
        parts.append(z)
    return Solved(state, lambda alpha: Pulled(_paired(alpha, parts, lam), {}, carry))


def pushed_run(inner: Inner, lam: Any, directions: Tangents, steps: int) -> tuple[Any, Tangents]:
    """(s_T, Z_T along the directions)."""
    state, z = _pushed_start(inner, lam, directions)
    for t in range(1, steps + 1):
        state, z = _pushed(inner, t, state, z, lam, directions)
    return state, z


def _coordinates(lam: Any, chunk: int | None) -> Iterator[Tangents]:
    """Unit tangents along the coordinates of lam, so many at a time."""
    leaves = floats_of(lam)
    count = sum(x.numel() for x in leaves)
    for first in range(0, count, chunk or count):
        last, offset, directions = min(first + (chunk or count), count), 0, []
        for x in leaves:
            rows = torch.arange(first, last, device=x.device) - offset
            inside = (rows >= 0) & (rows < x.numel())
            columns = torch.zeros(last - first, x.numel(), dtype=x.dtype, device=x.device)
            columns[torch.nonzero(inside)[:, 0], rows[inside]] = 1
            directions.append(columns.reshape(last - first, *x.shape))
            offset += x.numel()
        yield directions


def _pushed_start(inner: Inner, lam: Any, directions: Tangents) -> tuple[Any, Tangents]:
    """(s_0, Z_0 = d Phi_0 / d lam along the directions)."""
    return _push(inner, lambda lam: inner.start(lam), (lam,), directions)


def _pushed(inner: Inner, t: int, state: Any, z: Tangents, lam: Any, directions: Tangents) -> tuple[Any, Tangents]:
    """(s_t, Z_t = (d Phi_t / d s) Z_{t-1} + d Phi_t / d lam)."""
    return _push(inner, lambda state, lam: inner.step(t, state, lam), (state, lam), [*z, *directions])


@cache
def _load_rules() -> None:
    """Have PyTorch load its forward rules now: on the way it warns of what it does not do any more by itself."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore")
        forward_ad.make_dual(torch.zeros(()), torch.zeros(()))


def _push(inner: Inner, function: Any, arguments: tuple, tangents: Tangents) -> tuple[Any, Tangents]:
    """(function(*arguments), its derivative along each direction)."""
    _load_rules()
    if len(tangents[0]) == 1:
        return _push_one(inner.problem, function, arguments, tangents)
    arguments = constant(arguments)
    primals, shape = tuple(floats_of(arguments)), []

    def of_floats(*floats: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], tuple[Any, ...]]:
        result = function(*replaced(arguments, floats))
        leaves, tree = jax.tree.flatten(result)
        shape[:] = [tree, [is_float(x) for x in leaves]]
        return tuple(x for x in leaves if is_float(x)), tuple(x for x in leaves if not is_float(x))

    def along(*directions: torch.Tensor) -> Any:
        return torch.func.jvp(of_floats, primals, directions, has_aux=True)

    shared: Any = (None, 0, None)  # states do not depend on the direction: they are computed once for all tangents
    with mode("functional"):
        try:
            floats, derivatives, others = torch.func.vmap(along, out_dims=shared, randomness="same")(*tangents)
        except (RuntimeError, NotImplementedError) as error:
            raise ValueError(
                "the step cannot be differentiated along several directions at once by torch.func "
                f"({str(error).splitlines()[0]}): take inner gradients by hyperax.torch.inner_gradient, or use "
                "Forward(steps, chunk=1), which follows one direction at a time, or Reverse"
            ) from error
    tree, kinds = shape
    floats, others = iter(floats), iter(others)
    return constant(tree.unflatten([next(floats) if kind else next(others) for kind in kinds])), list(derivatives)


_WITHOUT_RULES: WeakSet[Problem] = WeakSet()
"""Problems of which an operation has no forward rule: it is not tried again at every step."""


def _push_one(problem: Problem, function: Any, arguments: tuple, tangents: Tangents) -> tuple[Any, Tangents]:
    """The same for one direction, by dual numbers; where PyTorch has none of an operation, by two ways back."""
    without = "left out"
    if problem not in _WITHOUT_RULES:
        try:
            return _push_dual(function, arguments, tangents)
        except (RuntimeError, NotImplementedError) as error:
            without = str(error).splitlines()[0]
    try:
        found = _push_twice(function, arguments, tangents)
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"the step has no derivative along a direction ({str(error).splitlines()[0]}; by forward rules: {without})"
            ": use Reverse, with segments where memory is short"
        ) from error
    _WITHOUT_RULES.add(problem)
    return found


def _push_dual(function: Any, arguments: tuple, tangents: Tangents) -> tuple[Any, Tangents]:
    with forward_ad.dual_level(), mode("graph"):
        with_tangents = iter(tangents)
        dual = lambda x: forward_ad.make_dual(x.detach().requires_grad_(), next(with_tangents)[0])
        after = function(*jax.tree.map(lambda x: dual(x) if is_float(x) else x, arguments))
        pairs = [(x, forward_ad.unpack_dual(x).tangent) for x in floats_of(after)]
        derivatives = [torch.zeros_like(x)[None] if z is None else z.detach()[None] for x, z in pairs]
        primal = lambda x: forward_ad.unpack_dual(x).primal if is_float(x) else x
        return constant(jax.tree.map(primal, after)), derivatives


def _push_twice(function: Any, arguments: tuple, tangents: Tangents) -> tuple[Any, Tangents]:
    """J u as the derivative of v -> J^T v, which is linear in v, pulled back by u; <v, J u> = <J^T v, u> is checked."""
    at = variable(arguments)
    with mode("graph"):
        after = function(*at)
    outputs, inputs = floats_of(after), floats_of(at)
    v = [torch.ones_like(y).requires_grad_() for y in outputs]
    reached = [(y, x) for y, x in zip(outputs, v, strict=True) if y.requires_grad]
    pulled: Gradients = [None] * len(inputs)
    if reached:
        pulled = torch.autograd.grad(
            [y for y, _ in reached], inputs, [x for _, x in reached], create_graph=True, allow_unused=True
        )
    known = [(p, u[0]) for p, u in zip(pulled, tangents, strict=True) if p is not None]
    products = [(p.detach().double() * u).flatten() for p, u in known]
    found = zeros_where_none(backward([p for p, _ in known], v, [u for _, u in known]), v)
    left, right = sum(float(z.double().sum()) for z in found), sum(float(x.sum()) for x in products)
    tolerance = max(1e-3, 8 * max(torch.finfo(x.dtype).eps for x in outputs))
    if abs(left - right) > tolerance * (abs(left) + sum(float(x.abs().sum()) for x in products)):
        raise RuntimeError("a function in it is differentiable once only")
    return constant(after), [z[None] for z in found]


def _paired(alpha: Gradients, parts: Sequence[Tangents], lam: Any) -> Gradients:
    """Z^T alpha, cut into the leaves of lam."""
    slopes = []
    for z in parts:
        products = [
            x.reshape(len(x), -1) @ a.flatten().to(x.dtype) for x, a in zip(z, alpha, strict=True) if a is not None
        ]
        slopes.append(sum(products) if products else z[0].new_zeros(len(z[0])))
    flat, leaves = torch.cat(slopes), floats_of(lam)
    return [
        part.reshape(x.shape).to(x.dtype)
        for part, x in zip(flat.split([x.numel() for x in leaves]), leaves, strict=True)
    ]


@first_carry.register
def _(method: RealTime, inner: Inner, lam: Any) -> InnerProgress:
    state, _ = begin(inner, lam)
    t: Any = torch.tensor(0, dtype=torch.int32)
    if method.window is not None:
        return InnerProgress(t, state)
    count = sum(x.numel() for x in floats_of(lam))
    return InnerProgress(t, state, [x.new_zeros((count, *x.shape)) for x in floats_of(state)])


@solve.register
def _(method: RealTime, inner: Inner, lam: Any, carry: InnerProgress) -> Solved:
    t = int(carry.t)
    ended = method.steps is not None and t == method.steps
    anew = t == 0 or (ended and not method.warm_restart)
    state = carry.state
    if ended and not anew:
        state, t = _warm(inner, state, lam), 0
    after = (0 if anew else t) + method.every
    times = range(after - method.every + 1, after + 1)
    step: Any = torch.tensor(after, dtype=torch.int32)
    if method.window is None:
        lam = constant(lam)
        (directions,) = _coordinates(lam, None)
        if anew:
            state, z = _pushed_start(inner, lam, directions)
        else:
            z = [torch.zeros_like(x) for x in carry.tangents] if ended else list(carry.tangents)
        for t in times:
            state, z = _pushed(inner, t, state, z, lam, directions)
        after = InnerProgress(step, state, z)
        return Solved(state, lambda alpha: Pulled(_paired(alpha, [z], lam), {"step": step}, after))
    to_lam = None
    if anew:
        state, to_lam = begin(inner, lam)
    cut = method.every - method.window
    state = plain(inner, state, lam, times[:cut])
    state, pull = unrolled(inner, state, lam, times[cut:])

    def whole(alpha: Gradients) -> Pulled:
        alpha, found = pull(alpha)
        if to_lam is not None and not cut:
            found = added(found, to_lam(alpha))
        return Pulled(found, {"step": step}, InnerProgress(step, state))

    return Solved(state, whole)


def _warm(inner: Inner, state: Any, lam: Any) -> Any:
    """s_0 of the next run at the last w: auxiliary variables start afresh."""
    start, _ = begin(inner, lam)
    return with_w(start, w_of(state))
