"""TorchOpt: its differentiable SGD, and its implicit differentiation by CG."""

from __future__ import annotations

import torch
import torchopt
from torch import Tensor
from torchopt.diff.implicit import custom_root

from benchmarks.peers.problems import Numbers
from benchmarks.peers.side import ALL, CG_STEPS, CG_TOLERANCE, CONVEX, Row, Run
from benchmarks.peers.torch_objectives import features, inner, outer, tensors
from benchmarks.peers.torch_side import objectives as objectives
from benchmarks.peers.torch_side import rate, unroll
from benchmarks.peers.torch_side import to_numpy as to_numpy

PACKAGES = ("torchopt", "optree", "torch")


def unrolled(numbers: Numbers) -> Run:
    """The functional optimizer, not in place; learned step sizes as a schedule."""
    lam, w, data = tensors(numbers)

    def run() -> Tensor:
        prepared = features(numbers.name, lam, data)
        schedule = lambda count: rate(numbers, lam, int(count) + 1)
        sgd = torchopt.sgd(lr=schedule if numbers.step_size is None else numbers.step_size)
        w_t = tuple(leaf.clone().requires_grad_() for leaf in w)
        state = sgd.init(w_t)
        for _ in range(numbers.steps):
            gradient = torch.autograd.grad(inner(numbers.name, list(w_t), lam, prepared), w_t, create_graph=True)
            updates, state = sgd.update(gradient, state, params=w_t, inplace=False)
            w_t = torchopt.apply_updates(w_t, updates, inplace=False)
        return torch.autograd.grad(outer(numbers.name, list(w_t), lam, prepared), lam)[0]

    return run


def implicit(numbers: Numbers) -> Run:
    """custom_root on grad_w L = 0; the T steps are plain eager ones, the system is solved by its CG."""
    lam, w, data = tensors(numbers)
    tolerance = CG_TOLERANCE[str(numbers.lam.dtype)]
    slope = torch.func.grad(lambda w, lam: inner(numbers.name, [w], lam, features(numbers.name, lam, data)))
    solve = torchopt.linear_solve.solve_cg(rtol=tolerance, atol=0.0, maxiter=CG_STEPS)

    @custom_root(slope, argnums=1, solve=solve)
    def solver(w: Tensor, lam: Tensor) -> Tensor:
        prepared = features(numbers.name, lam.detach(), data)
        with torch.enable_grad():
            return unroll(numbers, [w], lam.detach(), prepared, create_graph=False)[0].detach()

    def run() -> Tensor:
        w_T = solver(w[0].clone().requires_grad_(), lam)
        value = outer(numbers.name, [w_T], lam, features(numbers.name, lam, data))
        return torch.autograd.grad(value, lam)[0]

    return run


ROWS = {"TorchOpt": Row("unrolled", ALL, unrolled), "TorchOpt CG": Row("implicit", CONVEX, implicit)}
