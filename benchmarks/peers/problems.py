"""The problems that every library is given, in numpy: data, lam, w_0, the step size, and both objectives.

    f_T(lam) = E(w_T, lam),   w_0 = 0 or given,   w_t = w_{t-1} - eta_t grad L(w_{t-1}, lam),   t = 1, ..., T

Each side writes L and E in its own library; before anything is timed, both are compared with the functions here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Arrays = dict[str, np.ndarray]


class Numbers(NamedTuple):
    """A problem in numbers. `w` is a list of arrays; eta is `step_size`, or exp(lam_t) where it is `None`."""

    name: str
    steps: int
    lam: np.ndarray
    w: list[np.ndarray]
    data: Arrays
    step_size: float | None


def ridge(steps: int = 250) -> Numbers:
    """Ridge regression, d = 30, 80 + 80 examples, one log-regulariser a feature, float64."""
    draw = np.random.default_rng(0)
    d, n = 30, 80
    x, x_val = draw.normal(size=(n, d)), draw.normal(size=(n, d))
    truth = draw.normal(size=d) * (draw.random(d) < 0.5)
    y, y_val = (features @ truth + draw.normal(size=n) for features in (x, x_val))
    lam = draw.normal(size=d) - 2.0
    largest = np.linalg.eigvalsh(x.T @ x / n + np.diag(np.exp(lam)))[-1]
    data = {"x": x, "y": y, "x_val": x_val, "y_val": y_val}
    return Numbers("ridge", steps, lam, [np.zeros(d)], data, float(1.0 / largest))


def linear_representation(steps: int = 256) -> Numbers:
    """The linear feature map of the ICML paper's Sec. 5.1: 3 examples of 100 classes, lam = H 256 x 256, float32."""
    draw = np.random.default_rng(1)
    n, d, classes, rho = 300, 256, 100, 0.2
    y = np.eye(classes)[np.arange(n) % classes]
    centres = draw.normal(size=(classes, d))
    features = lambda: (centres[np.arange(n) % classes] + draw.normal(size=(n, d))) / np.sqrt(2 * n)
    x, x_val = features(), features()
    lam = np.eye(d) + 0.1 * draw.normal(size=(d, d)) / np.sqrt(d)
    z = x @ lam
    curvature = 2.0 * np.linalg.eigvalsh(z.T @ z) + 2.0 * rho
    data = {"x": x, "y": y, "x_val": x_val, "y_val": y, "rho": np.asarray(rho)}
    w, eta = np.zeros((d, classes)), float(2.0 / (curvature[0] + curvature[-1]))
    return _single(Numbers("linear_representation", steps, lam, [w], data, eta))


def logistic(steps: int = 100) -> Numbers:
    """Softmax regression, 10 classes, 1000 + 1000 examples x 784, one log-regulariser a feature, float32."""
    draw = np.random.default_rng(2)
    n, d, classes = 1000, 784, 10
    y = np.arange(n) % classes
    centres = draw.normal(size=(classes, d))
    features = lambda: 0.1 * centres[y] + draw.normal(size=(n, d))
    x, x_val = features(), features()
    lam = draw.normal(size=d) - 3.0
    largest = 0.5 * np.linalg.eigvalsh(x.T @ x / n)[-1] + np.exp(lam).max()  # Hessian of log-sum-exp is at most 1/2
    data = {"x": x, "y": np.eye(classes)[y], "x_val": x_val, "y_val": np.eye(classes)[y]}
    return _single(Numbers("logistic", steps, lam, [np.zeros((d, classes))], data, float(1.0 / largest)))


def network(steps: int = 100) -> Numbers:
    """Two layers, 64 - 64 - 10, 500 + 500 examples; lam is the logarithm of every step's step size, float32."""
    draw = np.random.default_rng(3)
    n, d, hidden, classes = 500, 64, 64, 10
    y = np.arange(n) % classes
    centres = draw.normal(size=(classes, d))
    features = lambda: centres[y] + 2.0 * draw.normal(size=(n, d))
    x, x_val = features(), features()
    w = [draw.normal(size=(d, hidden)) / np.sqrt(d), np.zeros(hidden)]
    w += [draw.normal(size=(hidden, classes)) / np.sqrt(hidden), np.zeros(classes)]
    lam = np.log(0.1) + 0.1 * draw.normal(size=steps)
    data = {"x": x, "y": np.eye(classes)[y], "x_val": x_val, "y_val": np.eye(classes)[y]}
    return _single(Numbers("network", steps, lam, w, data, None))


def _single(numbers: Numbers) -> Numbers:
    single = lambda array: array.astype(np.float32)
    data = {name: single(array) for name, array in numbers.data.items()}
    return numbers._replace(lam=single(numbers.lam), w=[single(leaf) for leaf in numbers.w], data=data)


PROBLEMS: dict[str, Callable[..., Numbers]] = {
    problem.__name__: problem for problem in (ridge, linear_representation, logistic, network)
}


def cross_entropy(logits: np.ndarray, y: np.ndarray) -> Any:
    """Mean over the examples; y has one row a class indicator."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.mean(np.log(np.exp(shifted).sum(axis=1)) - (shifted * y).sum(axis=1))


def layers(w: list[np.ndarray], x: np.ndarray) -> np.ndarray:
    """The logits of the network."""
    return np.tanh(x @ w[0] + w[1]) @ w[2] + w[3]


def inner(name: str, w: list[np.ndarray], lam: np.ndarray, data: Arrays) -> Any:
    """L(w, lam)."""
    x, y = data["x"], data["y"]
    if name == "ridge":
        return 0.5 * np.mean((x @ w[0] - y) ** 2) + 0.5 * np.sum(np.exp(lam) * w[0] ** 2)
    if name == "linear_representation":
        return np.sum((y - x @ lam @ w[0]) ** 2) + data["rho"] * np.sum(w[0] ** 2)
    if name == "logistic":
        return cross_entropy(x @ w[0], y) + 0.5 * np.sum(np.exp(lam)[:, None] * w[0] ** 2)
    return cross_entropy(layers(w, x), y)


def outer(name: str, w: list[np.ndarray], lam: np.ndarray, data: Arrays) -> Any:
    """E(w, lam)."""
    x, y = data["x_val"], data["y_val"]
    if name == "ridge":
        return 0.5 * np.mean((x @ w[0] - y) ** 2)
    if name == "linear_representation":
        return np.sum((y - x @ lam @ w[0]) ** 2)
    if name == "logistic":
        return cross_entropy(x @ w[0], y)
    return cross_entropy(layers(w, x), y)


def somewhere(numbers: Numbers) -> list[np.ndarray]:
    """Inner variables other than w_0, at which the objectives of the sides are compared with those here."""
    draw = np.random.default_rng(9)
    return [(leaf + 0.1 * draw.normal(size=leaf.shape)).astype(leaf.dtype) for leaf in numbers.w]
