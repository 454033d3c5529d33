"""`EvolutionStrategy` on torch tensors: values alone."""

from __future__ import annotations

from typing import Any

import torch

from hyperax.methods import EvolutionStrategy, Method
from hyperax.torch.problem import Inner, floats_of, replaced
from hyperax.torch.reverse import _shortened, first_carry, solve
from hyperax.torch.runs import Gradients, Pulled, Solved, begin, constant, plain
from hyperax.torch.seeds import mixed


@_shortened.register
def _(method: EvolutionStrategy, steps: int) -> Method | None:
    return None  # a value without derivative does not tell which leaves it depends on


@first_carry.register
def _(method: EvolutionStrategy, inner: Inner, lam: Any) -> torch.Tensor:
    return torch.tensor(0, dtype=torch.int32)


@solve.register
def _(method: EvolutionStrategy, inner: Inner, lam: Any, carry: torch.Tensor) -> Solved:
    if not callable(inner.problem.outer):
        raise ValueError("EvolutionStrategy evaluates E at many lam: write the outer objective in PyTorch")
    lam, k = constant(lam), int(carry)
    leaves = floats_of(lam)
    times = range(1, method.steps + 1)

    def end(leaves: list[torch.Tensor]) -> Any:
        at = replaced(lam, leaves)
        return plain(inner, begin(inner, at)[0], at, times)

    def value(leaves: list[torch.Tensor]) -> torch.Tensor:
        return inner.outer(end(leaves), replaced(lam, leaves))[0].detach()

    def pull(alpha: Gradients) -> Pulled:
        """g, whatever dE/ds_T is."""
        total = [torch.zeros_like(x) for x in leaves]
        for i in range(method.pairs):
            generator = torch.Generator().manual_seed(mixed(method.seed, k, i))
            e = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in leaves]
            rise = value([x + method.sigma * d for x, d in zip(leaves, e, strict=True)]) - value(
                [x - method.sigma * d for x, d in zip(leaves, e, strict=True)]
            )
            total = [a + rise.to(a) * d for a, d in zip(total, e, strict=True)]
        scale = 2 * method.pairs * method.sigma
        return Pulled([x / scale for x in total], {}, torch.tensor(k + 1, dtype=torch.int32), whole=True)

    return Solved(end(leaves), pull)
