"""PyTorch itself: eager loops, torch.func, torch.compile; and the float64 references that all sides are compared with.

The loop and the conjugate gradients are written in the manner of hypertorch (reverse mode through an eager unroll; the
implicit formula by CG on Hessian-vector products), whose package is not on PyPI.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from benchmarks.peers.problems import Numbers, somewhere
from benchmarks.peers.side import ALL, CG_STEPS, CG_TOLERANCE, CONVEX, QUADRATIC, Row, Run
from benchmarks.peers.torch_objectives import Data, features, inner, outer, tensors

torch.set_num_threads(2)
PACKAGES = ("torch",)


def to_numpy(gradient: Tensor) -> np.ndarray:
    return gradient.detach().numpy()


def objectives(numbers: Numbers) -> list[float]:
    lam, _, data = tensors(numbers)
    data, w = features(numbers.name, lam, data), [torch.tensor(leaf) for leaf in somewhere(numbers)]
    return [float(objective(numbers.name, w, lam, data)) for objective in (inner, outer)]


def rate(numbers: Numbers, lam: Tensor, t: int) -> Tensor | float:
    """eta_t, t = 1, ..., T."""
    return torch.exp(lam[t - 1]) if numbers.step_size is None else numbers.step_size


def unroll(numbers: Numbers, w: list[Tensor], lam: Tensor, data: Data, create_graph: bool) -> list[Tensor]:
    """w_T by eager gradient descent."""
    w = [leaf.clone().requires_grad_() for leaf in w]
    for t in range(1, numbers.steps + 1):
        gradient = torch.autograd.grad(inner(numbers.name, w, lam, data), w, create_graph=create_graph)
        w = [leaf - rate(numbers, lam, t) * g for leaf, g in zip(w, gradient, strict=True)]
        if not create_graph:
            w = [leaf.detach().requires_grad_() for leaf in w]
    return w


def loop(numbers: Numbers, double: bool = False) -> Run:
    """Reverse mode through an eager unroll."""
    lam, w, data = tensors(numbers, double)

    def run() -> Tensor:
        prepared = features(numbers.name, lam, data)
        w_T = unroll(numbers, w, lam, prepared, create_graph=True)
        return torch.autograd.grad(outer(numbers.name, w_T, lam, prepared), lam)[0]

    return run


def func(numbers: Numbers) -> Run:
    """torch.func.grad through a loop of torch.func.grad."""
    lam, w, data = tensors(numbers)
    lam = lam.detach()

    def f(lam: Tensor) -> Tensor:
        prepared, w_t = features(numbers.name, lam, data), w
        for t in range(1, numbers.steps + 1):
            gradient = torch.func.grad(lambda w, lam=lam, d=prepared: inner(numbers.name, w, lam, d))(w_t)
            w_t = [leaf - rate(numbers, lam, t) * g for leaf, g in zip(w_t, gradient, strict=True)]
        return outer(numbers.name, w_t, lam, prepared)

    return lambda: torch.func.grad(f)(lam)


def compiled(numbers: Numbers) -> Run:
    """The eager loop over a step that torch.compile has compiled, forward and backward."""
    lam, w, data = tensors(numbers)

    @torch.compile(dynamic=False)
    def step(w: list[Tensor], eta: Tensor, lam: Tensor, prepared: Data) -> list[Tensor]:
        gradient = torch.func.grad(lambda w: inner(numbers.name, w, lam, prepared))(w)
        return [leaf - eta * g for leaf, g in zip(w, gradient, strict=True)]

    def run() -> Tensor:
        prepared = features(numbers.name, lam, data)
        w_t = [leaf.clone().requires_grad_() for leaf in w]
        for t in range(1, numbers.steps + 1):
            w_t = step(w_t, torch.as_tensor(rate(numbers, lam, t), dtype=lam.dtype), lam, prepared)
        return torch.autograd.grad(outer(numbers.name, w_t, lam, prepared), lam)[0]

    return run


def conjugate_gradients(product: Callable, right: list[Tensor], tolerance: float, steps: int) -> list[Tensor]:
    """The solution of A q = b, from q = 0, until |b - A q| <= tolerance |b|."""
    dot = lambda a, b: sum(torch.sum(x * y) for x, y in zip(a, b, strict=True))
    q, residual = [torch.zeros_like(leaf) for leaf in right], right
    direction, norm = residual, dot(residual, residual)
    enough = tolerance**2 * norm
    for _ in range(steps):
        if norm <= enough:
            break
        image = product(direction)
        alpha = norm / dot(direction, image)
        q = [a + alpha * b for a, b in zip(q, direction, strict=True)]
        residual = [a - alpha * b for a, b in zip(residual, image, strict=True)]
        norm, old = dot(residual, residual), norm
        direction = [a + norm / old * b for a, b in zip(residual, direction, strict=True)]
    return q


def implicit(numbers: Numbers, double: bool = False) -> Run:
    """The implicit formula at w_T: grad_lam E - (d_lam grad_w L)^T q, with (Hessian of L) q = grad_w E by CG."""
    lam, w, data = tensors(numbers, double)
    tolerance, steps = (1e-13, 2000) if double else (CG_TOLERANCE[str(numbers.lam.dtype)], CG_STEPS)

    def run() -> Tensor:
        prepared = features(numbers.name, lam, data)
        fixed = {name: tensor.detach() for name, tensor in prepared.items()}
        w_T = unroll(numbers, w, lam.detach(), fixed, create_graph=False)
        slope = torch.autograd.grad(inner(numbers.name, w_T, lam, prepared), w_T, create_graph=True)
        right = torch.autograd.grad(outer(numbers.name, w_T, lam.detach(), fixed), w_T)
        product = lambda p: torch.autograd.grad(slope, w_T, grad_outputs=p, retain_graph=True)
        q = conjugate_gradients(product, list(right), tolerance, steps)
        value = outer(numbers.name, [leaf.detach() for leaf in w_T], lam, prepared)
        total = value - sum(torch.sum(a * b) for a, b in zip(slope, q, strict=True))
        return torch.autograd.grad(total, lam)[0]

    return run


def exact(numbers: Numbers) -> Run:
    """The gradient of f, float64: the inner problem solved by a factorisation, differentiated by autograd."""
    lam, _, data = tensors(numbers, double=True)

    def run() -> Tensor:
        prepared = features(numbers.name, lam, data)
        z, y = prepared["z"], prepared["y"]
        if numbers.name == "ridge":
            matrix, right = z.T @ z / len(z) + torch.diag(torch.exp(lam)), z.T @ y / len(z)
        else:
            matrix, right = z.T @ z + data["rho"] * torch.eye(z.shape[1], dtype=z.dtype), z.T @ y
        w = torch.linalg.solve(matrix, right)
        return torch.autograd.grad(outer(numbers.name, [w], lam, prepared), lam)[0]

    return run


ROWS = {
    "PyTorch loop": Row("unrolled", ALL, loop),
    "torch.func": Row("unrolled", ALL, func),
    "torch.compile": Row("unrolled", ALL, compiled),
    "PyTorch CG": Row("implicit", CONVEX, implicit),
    "reference unrolled": Row("reference", ALL, lambda numbers: loop(numbers, double=True)),
    "reference implicit": Row("reference", CONVEX, lambda numbers: implicit(numbers, double=True)),
    "reference exact": Row("reference", QUADRATIC, exact),
}
