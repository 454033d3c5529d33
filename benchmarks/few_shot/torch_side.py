"""PyTorch itself: torch.func with vmap over the episodes, an eager loop; and the float64 references.

torch.compile of a whole hypergradient is no row: it compiles for minutes, and again for each T and number of episodes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.few_shot.problems import MAML, REPRESENTATION, STEP_SIZE, WAYS, Numbers
from benchmarks.few_shot.side import Made, Row
from benchmarks.few_shot.torch_network import Episodes, Weights, episodes, features, logits, to_vector, weights

PACKAGES = ("torch",)
cross_entropy = F.cross_entropy


def maml_value(lam: Weights, episode: Episodes, steps: int) -> Tensor:
    """f_T^j of MAML by torch.func."""
    loss = lambda w: cross_entropy(logits(w, episode.support), episode.support_labels)
    w = lam
    for _ in range(steps):
        w = tuple(leaf - STEP_SIZE[MAML] * g for leaf, g in zip(w, torch.func.grad(loss)(w), strict=True))
    return cross_entropy(logits(w, episode.query), episode.query_labels)


def representation_value(lam: Weights, episode: Episodes, steps: int, once: bool = True) -> Tensor:
    """f_T^j of the hyper-representation; without `once` the features are computed again at every step."""
    support = features(lam, episode.support) if once else None

    def loss(w: Weights) -> Tensor:
        seen = features(lam, episode.support) if support is None else support
        return cross_entropy(F.linear(seen, *w), episode.support_labels)

    w = (lam[0].new_zeros(WAYS, 256), lam[0].new_zeros(WAYS))
    for _ in range(steps):
        w = tuple(leaf - STEP_SIZE[REPRESENTATION] * g for leaf, g in zip(w, torch.func.grad(loss)(w), strict=True))
    return cross_entropy(F.linear(features(lam, episode.query), *w), episode.query_labels)


def mapped(numbers: Numbers, value: Callable[..., Tensor], **options: bool) -> Made:
    """The gradient of the mean of vmap(f_T^j)."""
    lam, data = weights(numbers, head=numbers.name == MAML), episodes(numbers)

    def f(lam: Weights) -> Tensor:
        return torch.func.vmap(lambda *parts: value(lam, Episodes(*parts), numbers.steps, **options))(*data).mean()

    return Made(lambda: torch.func.grad(f)(lam), to_vector)


def one_by_one(numbers: Numbers, value: Callable[..., Tensor]) -> Made:
    """The same, an episode after the other, gradients summed: only one episode's activations are alive."""
    lam, data = weights(numbers, head=numbers.name == MAML), episodes(numbers)

    def run() -> Weights:
        total = None
        for j in range(numbers.tasks):
            g = torch.func.grad(lambda lam, j=j: value(lam, data.one(j), numbers.steps) / numbers.tasks)(lam)
            total = g if total is None else tuple(a + b for a, b in zip(total, g, strict=True))
        assert total is not None
        return total

    return Made(run, to_vector)


def eager(numbers: Numbers) -> Made:
    """MAML by torch.autograd.grad(..., create_graph=True)."""
    lam, data = tuple(x.requires_grad_() for x in weights(numbers, head=True)), episodes(numbers)

    def run() -> Weights:
        for leaf in lam:
            leaf.grad = None
        for j in range(numbers.tasks):
            episode, w = data.one(j), lam
            for _ in range(numbers.steps):
                loss = cross_entropy(logits(w, episode.support), episode.support_labels)
                g = torch.autograd.grad(loss, w, create_graph=True)
                w = tuple(leaf - STEP_SIZE[MAML] * slope for leaf, slope in zip(w, g, strict=True))
            (cross_entropy(logits(w, episode.query), episode.query_labels) / numbers.tasks).backward()
        return tuple(leaf.grad for leaf in lam)

    return Made(run, to_vector)


ROWS = {
    "torch.func, vmap": Row(MAML, lambda numbers: mapped(numbers, maml_value)),
    "torch.func, one by one": Row(MAML, lambda numbers: one_by_one(numbers, maml_value), most_tasks=8),
    "PyTorch loop": Row(MAML, eager, most_tasks=8),
    "torch.func, vmap, features once": Row(REPRESENTATION, lambda numbers: mapped(numbers, representation_value)),
    "torch.func, vmap, features every step": Row(
        REPRESENTATION, lambda numbers: mapped(numbers, representation_value, once=False), longest=20
    ),
    "torch.func, one by one, features once": Row(
        REPRESENTATION, lambda numbers: one_by_one(numbers, representation_value)
    ),
}
