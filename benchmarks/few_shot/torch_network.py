"""The network of problems.py in PyTorch, functional and as a module.

SAME padding of an even side with stride 2 pads after the image only; PyTorch pads on both sides. On mirrored images,
with mirrored weights, it is padding=1: that is how the numbers are read here, and gradients are mirrored back.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.few_shot.problems import EPSILON, FILTERS, WAYS, Numbers, vector
from benchmarks.few_shot.side import THREADS

torch.set_num_threads(THREADS)
Weights = tuple[Tensor, ...]
"""Four convolutions [out, in, 3, 3], four shifts [64] and, where the network has one, the head (weight, bias)."""


class Episodes(NamedTuple):
    """All episodes, images [tasks, images, 1, 28, 28]."""

    support: Tensor
    support_labels: Tensor
    query: Tensor
    query_labels: Tensor

    def one(self, j: int) -> Episodes:
        """Episode j."""
        return Episodes(*(part[j] for part in self))


def episodes(numbers: Numbers) -> Episodes:
    """As tensors, images in the channels-last layout: its convolutions are a little faster for all rows."""

    def images(x: np.ndarray) -> Tensor:
        flat = torch.tensor(np.ascontiguousarray(x[:, :, ::-1, ::-1].transpose(0, 1, 4, 2, 3)))
        return flat.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, x.shape[:2])

    labels = (torch.tensor(x.astype(np.int64)) for x in (numbers.support_labels, numbers.query_labels))
    support_labels, query_labels = labels
    return Episodes(images(numbers.support), support_labels, images(numbers.query), query_labels)


def weights(numbers: Numbers, head: bool) -> Weights:
    """lam, its features in PyTorch's order: channels, height, width."""
    convolutions = [
        torch.tensor(np.ascontiguousarray(x[::-1, ::-1].transpose(3, 2, 0, 1))) for x in numbers.convolutions
    ]
    shifts = [torch.tensor(x) for x in numbers.shifts]
    weight, bias = numbers.head
    rows = weight.reshape(WAYS, 2, 2, FILTERS)[:, ::-1, ::-1].transpose(0, 3, 1, 2).reshape(WAYS, -1)
    last = (torch.tensor(np.ascontiguousarray(rows)), torch.tensor(bias)) if head else ()
    return (*convolutions, *shifts, *last)


def to_vector(gradient: Weights) -> np.ndarray:
    """A gradient, mirrored back, as the vector of problems.py."""
    arrays = [part.detach().numpy() for part in gradient]
    convolutions = [x.transpose(2, 3, 1, 0)[::-1, ::-1] for x in arrays[:4]]
    if len(arrays) == 8:
        return vector(convolutions, arrays[4:], None)
    weight = arrays[8].reshape(WAYS, FILTERS, 2, 2).transpose(0, 2, 3, 1)[:, ::-1, ::-1]
    return vector(convolutions, arrays[4:8], (weight, arrays[9]))


def normalised(x: Tensor, shift: Tensor) -> Tensor:
    """Batch normalisation with the statistics of x; a scale of one, as its second derivative wants a scale."""
    return F.batch_norm(x, None, None, torch.ones_like(shift), shift, True, 0.0, EPSILON)


def features(w: Weights, images: Tensor) -> Tensor:
    """[images, 256], normalised with the statistics of these images."""
    for convolution, shift in zip(w[:4], w[4:8], strict=True):
        images = F.conv2d(images, convolution, stride=2, padding=1)
        images = F.relu(normalised(images, shift))
    return images.flatten(1)


def logits(w: Weights, images: Tensor) -> Tensor:
    """Of the network with its head."""
    return F.linear(features(w, images), w[8], w[9])


class BatchNorm(nn.Module):
    """Batch statistics, a learned shift, no scale, as `torch.nn.BatchNorm2d` would call it."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(FILTERS))

    def forward(self, x: Tensor) -> Tensor:
        """[images, channels, height, width]."""
        return normalised(x, self.bias)


class Network(nn.Module):
    """The same as a module; `parameters()` are in the order of `Weights`."""

    def __init__(self, w: Weights):
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv2d(x.shape[1], FILTERS, 3, stride=2, padding=1, bias=False) for x in w[:4]
        )
        self.normalisations = nn.ModuleList(BatchNorm() for _ in w[4:8])
        if len(w) > 8:
            self.head = nn.Linear(w[8].shape[1], WAYS)
        with torch.no_grad():
            for parameter, value in zip(self.parameters(), w, strict=True):
                parameter.copy_(value)

    def forward(self, x: Tensor) -> Tensor:
        """Features, or with a head logits."""
        for convolution, normalisation in zip(self.convolutions, self.normalisations, strict=True):
            x = F.relu(normalisation(convolution(x)))
        x = x.flatten(1)
        return self.head(x) if hasattr(self, "head") else x


def zero_head(like: Tensor) -> nn.Linear:
    """Softmax regression at w_0 = 0."""
    head = nn.Linear(like.shape[-1], WAYS, dtype=like.dtype)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
    return head
