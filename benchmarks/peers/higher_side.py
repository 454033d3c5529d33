"""higher: the unroll of a patched module."""

from __future__ import annotations

import higher
import torch
from torch import Tensor

from benchmarks.peers.problems import Numbers
from benchmarks.peers.side import ALL, Row, Run
from benchmarks.peers.torch_objectives import features, inner, outer, tensors
from benchmarks.peers.torch_side import objectives as objectives
from benchmarks.peers.torch_side import rate
from benchmarks.peers.torch_side import to_numpy as to_numpy

PACKAGES = ("higher", "torch")


class Parameters(torch.nn.Module):
    """A module of the inner variables."""

    def __init__(self, w: list[Tensor]):
        super().__init__()
        self.w = torch.nn.ParameterList(torch.nn.Parameter(leaf) for leaf in w)


def unrolled(numbers: Numbers) -> Run:
    """innerloop_ctx over torch.optim.SGD; learned step sizes by `override`."""
    lam, w, data = tensors(numbers)
    module = Parameters(w)
    sgd = torch.optim.SGD(module.parameters(), lr=1.0 if numbers.step_size is None else numbers.step_size)

    def run() -> Tensor:
        prepared = features(numbers.name, lam, data)
        with higher.innerloop_ctx(module, sgd) as (patched, optimizer):
            for t in range(1, numbers.steps + 1):
                override = {"lr": [rate(numbers, lam, t)]} if numbers.step_size is None else None
                loss = inner(numbers.name, list(patched.parameters()), lam, prepared)
                optimizer.step(loss, override=override)
            value = outer(numbers.name, list(patched.parameters()), lam, prepared)
            return torch.autograd.grad(value, lam)[0]

    return run


ROWS = {"higher": Row("unrolled", ALL, unrolled)}
