"""The linear solvers of `Implicit`, on lists of torch tensors: the same equations as in `hyperax.linear_solvers`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hyperax.linear_solvers import ConjugateGradient, FixedPoint, Neumann, Nystrom

Vector = list[torch.Tensor]
Operator = Callable[[Vector], Vector]


def linear_solve(
    solver: Any, operator: Operator, g: Vector, start: Vector | None, tolerance: float | None
) -> tuple[Vector, int | None]:
    """(q with A q = g, nearly; the steps it took). `start` is a guess, `tolerance` the |A q - g| to stop at."""
    if isinstance(solver, Nystrom):
        return _nystrom(solver, operator, g), None
    relative = solver.tolerance if isinstance(solver, ConjugateGradient | FixedPoint) else 0.0
    if relative is None:
        relative = torch.finfo(g[0].dtype).eps ** 0.75 if isinstance(solver, ConjugateGradient) else 0.0
    stop = relative * norm(g) if tolerance is None else torch.as_tensor(tolerance)
    if isinstance(solver, ConjugateGradient):
        return _conjugate_gradient(operator, g, start, solver.max_steps, stop)
    eta, most = (solver.step_size, solver.terms) if isinstance(solver, Neumann) else (1.0, solver.iterations)
    return _richardson(operator, g, start, eta, most, stop)


def _conjugate_gradient(
    operator: Operator, g: Vector, start: Vector | None, most: int, stop: torch.Tensor
) -> tuple[Vector, int]:
    q, r = _first(operator, g, start)
    p, square, k = r, dot(r, r), 0
    while k < most and square.sqrt() > stop:
        k += 1
        product = operator(p)
        curvature = dot(p, product)
        if not curvature > 0:  # A is not positive definite there: q stays
            break
        alpha = square / curvature
        q, r = add(q, alpha, p), add(r, -alpha, product)
        new = dot(r, r)
        p, square = add(r, new / square, p), new
    return q, k


def _richardson(
    operator: Operator, g: Vector, start: Vector | None, eta: float, most: int, stop: torch.Tensor
) -> tuple[Vector, int]:
    """Q <- q + eta (g - A q)."""
    q, r = _first(operator, g, start)
    for k in range(most):
        if not norm(r) > stop:
            return q, k
        q = add(q, eta, r)
        r = add(g, -1.0, operator(q))
    return q, most


def _nystrom(solver: Nystrom, operator: Operator, g: Vector) -> Vector:
    """The damped inverse of the low-rank A that random directions show; see `hyperax.Nystrom` for the equations."""
    flat = torch.cat([x.flatten() for x in g])
    generator = torch.Generator().manual_seed(solver.seed)
    rank = min(solver.rank, flat.numel())
    draw = torch.randn(flat.numel(), rank, generator=generator, dtype=torch.float64)
    directions, _ = torch.linalg.qr(draw.to(flat))
    products = torch.stack([torch.cat([x.flatten() for x in operator(_cut(d, g))]) for d in directions.T], dim=1)
    Q, R = torch.linalg.qr(products)
    core = torch.linalg.pinv(directions.T @ products, hermitian=True)
    s, V = torch.linalg.eigh(R @ core @ R.T)
    U = Q @ V
    along = U.T @ flat
    rest = flat - U @ along
    rest = rest - U @ (U.T @ rest)  # what rounding left of the span would be divided by rho
    return _cut(U @ (along / (s + solver.damping)) + rest / solver.damping, g)


def _cut(flat: torch.Tensor, like: Vector) -> Vector:
    return [part.reshape(x.shape) for part, x in zip(flat.split([x.numel() for x in like]), like, strict=True)]


def _first(operator: Operator, g: Vector, start: Vector | None) -> tuple[Vector, Vector]:
    """(q, g - A q) at the start; no product for a start at zero."""
    if start is None:
        return [torch.zeros_like(x) for x in g], g
    return start, add(g, -1.0, operator(start))


def dot(a: Vector, b: Vector) -> torch.Tensor:
    """a^T b."""
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()


def norm(a: Vector) -> torch.Tensor:
    """|a|."""
    return dot(a, a).sqrt()


def add(a: Vector, factor: Any, b: Vector) -> Vector:
    """A + factor b."""
    return [x + factor * y for x, y in zip(a, b, strict=True)]
