"""What is timed: networks of several sizes, their data, the losses, and one training step as a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

import hyperax.torch as ht

STEP_SIZE, MOMENTUM = 0.02, 0.9
Parameters = dict[str, Tensor]


class Setting(NamedTuple):
    """A network and its data.

    Fields:
        name: of the setting.
        module: with its first weights.
        data: (inputs, labels), of which every step sees `size` examples.
        validation: the same for E.
        size: examples a step.
    """

    name: str
    module: nn.Module
    data: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    size: int

    @property
    def batches(self) -> ht.Batches:
        """(run, t) -> B_t, the same for everybody."""
        return ht.Batches(self.data, self.size)

    @property
    def groups(self) -> list[int]:
        """The layer of each parameter."""
        layers = [name.rpartition(".")[0] for name, _ in self.module.named_parameters()]
        return [list(dict.fromkeys(layers)).index(layer) for layer in layers]

    def lam(self) -> Tensor:
        """Logarithm of the weight decay of each layer."""
        return torch.full((max(self.groups) + 1,), -5.0)

    def start(self) -> Parameters:
        """w_0."""
        return {name: p.detach() for name, p in self.module.named_parameters()}

    def penalised(self, cost: Tensor, parameters: Any, lam: Tensor) -> Tensor:
        """L = cost + 1/2 sum over layers exp(lam) |w|^2, for the parameters in their order."""
        decays = lam.exp()
        return cost + 0.5 * sum(decays[g] * p.pow(2).sum() for g, p in zip(self.groups, parameters, strict=True))

    def inner(self, w: Parameters, lam: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        """L of a batch."""
        return self.penalised(self.outer(w, batch), w.values(), lam)

    def outer(self, w: Parameters, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Cross-entropy."""
        return nn.functional.cross_entropy(functional_call(self.module, w, (batch[0],)), batch[1])

    def updated(self, w: Parameters, v: Parameters, slopes: Any) -> tuple[Parameters, Parameters]:
        """One step of SGD with momentum."""
        v = {name: MOMENTUM * v[name] + g for name, g in zip(v, slopes, strict=True)}
        return {name: x - STEP_SIZE * v[name] for name, x in w.items()}, v


def convolutional(name: str, channels: int, side: int, size: int) -> Setting:
    """Two convolutions of stride 2 and a linear layer, without normalisation."""
    layers = [
        *(nn.Conv2d(1, channels, 3, stride=2, padding=1), nn.Tanh()),
        *(nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1), nn.Tanh()),
        *(nn.Flatten(), nn.Linear(2 * channels * (side // 4) ** 2, 10)),
    ]
    return _setting(name, layers, (1, side, side), size)


def dense(name: str, hidden: int, size: int) -> Setting:
    """One hidden layer."""
    return _setting(name, [nn.Linear(16, hidden), nn.Tanh(), nn.Linear(hidden, 10)], (16,), size)


def _setting(name: str, layers: list[nn.Module], shape: tuple[int, ...], size: int) -> Setting:
    draw = torch.Generator().manual_seed(0)
    module = nn.Sequential(*layers)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=draw) / max(1, p[0].numel()) ** 0.5)

    def examples(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(10, (count,), generator=draw)
        return torch.randn(count, *shape, generator=draw) + labels.reshape(-1, *[1] * len(shape)) / 5, labels

    return Setting(name, module, examples(8 * size), examples(2 * size), size)


SETTINGS: dict[str, Callable[[], Setting]] = {
    "dense": lambda: dense("dense", 16, 16),
    "convolutional, 8 x 8": lambda: convolutional("convolutional, 8 x 8", 4, 8, 16),
    "convolutional, 28 x 28": lambda: convolutional("convolutional, 28 x 28", 8, 28, 32),
    "convolutional, 28 x 28, wide": lambda: convolutional("convolutional, 28 x 28, wide", 16, 28, 96),
}
"""From steps that are the overhead of PyTorch's operations to steps that are arithmetic."""


def of_long_runs() -> Setting:
    """The network of `torch-mnist` without its normalisation, on mini-batches of 96."""
    return convolutional("long", 8, 28, 96)
