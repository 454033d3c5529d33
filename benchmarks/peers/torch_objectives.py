"""L and E in PyTorch, shared by all sides that are written in it. `z` is x, or x H where lam = H."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.peers.problems import Numbers

Data = dict[str, Tensor]


def tensors(numbers: Numbers, double: bool = False) -> tuple[Tensor, list[Tensor], Data]:
    """(lam, w_0, data), in the type of the arrays or in float64."""
    convert = lambda array: torch.tensor(array, dtype=torch.float64 if double else None)
    lam = convert(numbers.lam).requires_grad_()
    return lam, [convert(leaf) for leaf in numbers.w], {name: convert(array) for name, array in numbers.data.items()}


def features(name: str, lam: Tensor, data: Data) -> Data:
    """The data with z = x H and z_val = x_val H in the linear representation: once for all T steps."""
    if name != "linear_representation":
        return {**data, "z": data["x"], "z_val": data["x_val"]}
    return {**data, "z": data["x"] @ lam, "z_val": data["x_val"] @ lam}


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    return torch.mean(torch.logsumexp(logits, 1) - torch.sum(logits * y, 1))


def predict(name: str, w: list[Tensor], z: Tensor) -> Tensor:
    return torch.tanh(z @ w[0] + w[1]) @ w[2] + w[3] if name == "network" else z @ w[0]


def inner(name: str, w: list[Tensor], lam: Tensor, data: Data) -> Tensor:
    p, y = predict(name, w, data["z"]), data["y"]
    if name == "ridge":
        return 0.5 * torch.mean((p - y) ** 2) + 0.5 * torch.sum(torch.exp(lam) * w[0] ** 2)
    if name == "linear_representation":
        return torch.sum((y - p) ** 2) + data["rho"] * torch.sum(w[0] ** 2)
    if name == "logistic":
        return cross_entropy(p, y) + 0.5 * torch.sum(torch.exp(lam)[:, None] * w[0] ** 2)
    return cross_entropy(p, y)


def outer(name: str, w: list[Tensor], lam: Tensor, data: Data) -> Tensor:
    p, y = predict(name, w, data["z_val"]), data["y_val"]
    if name == "ridge":
        return 0.5 * torch.mean((p - y) ** 2)
    return torch.sum((y - p) ** 2) if name == "linear_representation" else cross_entropy(p, y)
