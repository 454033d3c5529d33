"""The usual optimizers as equations for one parameter, differentiable in everything."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

Rates = Mapping[str, Any]
"""The settings of one parameter at one step: numbers or scalar tensors."""

Moments = tuple[torch.Tensor, ...]


class Optimizer(NamedTuple):
    """One optimizer.

    Fields:
        settings: the names of its hyperparameters with their defaults; `None` has none and must be given.
        moments: how many tensors like w it carries along; all begin at zero.
        update: (w, g, moments, rates, t) -> (w, moments).
        decoupled: whether weight decay stands beside the gradient, and is not part of a training loss.
    """

    settings: dict[str, float | None]
    moments: int
    update: Callable[[torch.Tensor, torch.Tensor, Moments, Rates, int], tuple[torch.Tensor, Moments]]
    decoupled: bool = False


def decay_loss(w: Mapping[str, torch.Tensor], rates: Mapping[str, Any]) -> Any:
    """1/2 sum over parameters of weight_decay |w|^2: what coupled weight decay adds to the training loss."""
    return sum(0.5 * rates[name] * (x * x).sum() for name, x in w.items() if not is_zero(rates[name]))


def _sgd(w: torch.Tensor, g: torch.Tensor, moments: Moments, rates: Rates, t: int) -> tuple[torch.Tensor, Moments]:
    """W - eta (g + lambda w)."""
    return w - rates["step_size"] * _decayed(g, w, rates), ()


def _momentum(w: torch.Tensor, g: torch.Tensor, moments: Moments, rates: Rates, t: int) -> tuple[torch.Tensor, Moments]:
    """v_t = mu v_{t-1} + g + lambda w;  w - eta v_t."""
    v = rates["momentum"] * moments[0] + _decayed(g, w, rates)
    return w - rates["step_size"] * v, (v,)


def _adam(w: torch.Tensor, g: torch.Tensor, moments: Moments, rates: Rates, t: int) -> tuple[torch.Tensor, Moments]:
    """Adam of g + lambda w."""
    u, moments = _normalised(_decayed(g, w, rates), moments, rates, t)
    return w - rates["step_size"] * u, moments


def _adamw(w: torch.Tensor, g: torch.Tensor, moments: Moments, rates: Rates, t: int) -> tuple[torch.Tensor, Moments]:
    """Adam of g, and w - eta lambda w beside it."""
    u, moments = _normalised(g, moments, rates, t)
    return w - rates["step_size"] * (u if is_zero(rates["weight_decay"]) else u + rates["weight_decay"] * w), moments


def _rmsprop(w: torch.Tensor, g: torch.Tensor, moments: Moments, rates: Rates, t: int) -> tuple[torch.Tensor, Moments]:
    """v_t = alpha v_{t-1} + (1 - alpha) g^2;  w - eta g / sqrt(v_t + eps^2)."""
    g, alpha = _decayed(g, w, rates), rates["alpha"]
    v = alpha * moments[0] + (1 - alpha) * g**2
    return w - rates["step_size"] * g / _root(v, rates["eps"]), (v,)


def _normalised(g: torch.Tensor, moments: Moments, rates: Rates, t: int) -> tuple[torch.Tensor, Moments]:
    """m^ / sqrt(v^ + eps^2), with both means corrected for their beginning at zero."""
    b1, b2 = rates["beta1"], rates["beta2"]
    m = b1 * moments[0] + (1 - b1) * g
    v = b2 * moments[1] + (1 - b2) * g**2
    return (m / (1 - b1**t)) / _root(v / (1 - b2**t), rates["eps"]), (m, v)


def _root(v: torch.Tensor, eps: Any) -> torch.Tensor:
    """sqrt(v + eps^2), as in `hyperax.Adam`: sqrt(v) + eps has no derivative at v = 0, where a gradient is zero."""
    return torch.sqrt(v + (eps**2 + torch.finfo(v.dtype).tiny ** 0.8))


def _decayed(g: torch.Tensor, w: torch.Tensor, rates: Rates) -> torch.Tensor:
    return g if is_zero(rates["weight_decay"]) else g + rates["weight_decay"] * w


def is_zero(rate: Any) -> bool:
    """Whether a rate is the number 0; a tensor is not, for it may have a derivative."""
    return isinstance(rate, float) and rate == 0.0


_ADAM = {"step_size": None, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}

OPTIMIZERS = {
    "sgd": Optimizer({"step_size": None, "weight_decay": 0.0}, 0, _sgd),
    "momentum": Optimizer({"step_size": None, "momentum": 0.9, "weight_decay": 0.0}, 1, _momentum),
    "adam": Optimizer(dict(_ADAM), 2, _adam),
    "adamw": Optimizer(_ADAM | {"weight_decay": 0.01}, 2, _adamw, decoupled=True),
    "rmsprop": Optimizer({"step_size": None, "alpha": 0.99, "eps": 1e-8, "weight_decay": 0.0}, 1, _rmsprop),
}
"""By the names, settings and defaults of `torch.optim`."""
