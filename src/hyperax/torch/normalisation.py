"""Batch normalisation whose running statistics are part of a state: returned, not overwritten, and differentiable."""

from __future__ import annotations

from collections.abc import Collection
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase


def tracking(module: nn.Module) -> list[_NormBase]:
    """The normalisation layers that keep running statistics."""
    return [m for m in module.modules() if isinstance(m, _NormBase) and m.track_running_stats]


def with_statistics_in_state(module: nn.Module, still: Collection[nn.Module] = ()) -> None:
    """Change a module's own copy so that its batch normalisation assigns new statistics in place of overwriting them.

    PyTorch overwrites them outside of the graph, so that a validation loss in evaluation mode would lose its dependence
    on the hyperparameters through them. Layers that are `still`, in evaluation mode, have no new ones.
    """
    for layer in tracking(module):
        if any(layer is one for one in still):
            continue
        if type(layer).forward is not _BatchNorm.forward:  # its own one may do more than to normalise
            raise ValueError(
                f"{type(layer).__name__} keeps running statistics in a way of its own, which cannot be part of the "
                'state: use buffers="frozen", track_running_stats=False, or a layer of PyTorch (BatchNorm2d, then relu)'
            )
        layer.forward = MethodType(_forward, layer)


def _forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    """M <- (1 - f) m + f mean(x),  v <- (1 - f) v + f var(x) (unbiased); normalised by the batch's own, or by m, v."""
    self._check_input_dim(x)
    shape = [1, -1] + [1] * (x.dim() - 2)
    if not self.training:
        scale = torch.rsqrt(self.running_var + self.eps)
        scale = scale if self.weight is None else scale * self.weight
        shift = -self.running_mean * scale
        shift = shift if self.bias is None else shift + self.bias
        return x * scale.view(shape) + shift.view(shape)
    axes = [i for i in range(x.dim()) if i != 1]
    count = x.numel() // x.shape[1]
    mean = x.mean(axes)
    variance = ((x - mean.view(shape)) ** 2).sum(axes) / max(count - 1, 1)
    self.num_batches_tracked = self.num_batches_tracked + 1
    factor = self.momentum
    if factor is None:  # the mean over all batches
        factor = 1.0 / self.num_batches_tracked.to(x.dtype)
    self.running_mean = (1 - factor) * self.running_mean + factor * mean
    self.running_var = (1 - factor) * self.running_var + factor * variance
    return functional.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)
