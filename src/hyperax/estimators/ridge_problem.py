"""Ridge regression on folds as a bilevel problem whose inner solution is a formula."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import cho_solve
from jaxtyping import Array

from hyperax.cross_validation import Fold
from hyperax.methods import ClosedForm, hypergradient
from hyperax.problem import Problem, Shared
from hyperax.tasks import MeanOverTasks, mean_over_tasks

GRAM_BYTES = 2**29


class Moments(NamedTuple):
    """What the normal equations of a fold need of its training examples, with weights s_i of the examples.

    Fields:
        mean_x, mean_y: [d], [m], weighted means; 0 without an intercept.
        gram: [d, d], sum_i s_i (x_i - mean_x)(x_i - mean_x)^T.
        moment: [d, m], sum_i s_i (x_i - mean_x)(y_i - mean_y)^T.
    """

    mean_x: Any
    mean_y: Any
    gram: Any
    moment: Any


def centred(d: dict[str, Any]) -> tuple[Array, Array, Array, Array]:
    """(mean_x, mean_y, sqrt(s) (x - mean_x), sqrt(s) (y - mean_y)) of the training examples."""
    # Operators alone, so that it takes NumPy arrays too. In folds that fill up the batch s is 0.
    s = d["fold"].train
    total = s.sum()
    share = d["intercept"] * s / (total + (total == 0))
    mean_x, mean_y = share @ d["x"], share @ d["y"]
    root = (s**0.5)[:, None]
    return mean_x, mean_y, root * (d["x"] - mean_x), root * (d["y"] - mean_y)


def moments(d: dict[str, Any]) -> Moments:
    """The moments of one fold."""
    mean_x, mean_y, x, y = centred(d)
    return Moments(mean_x, mean_y, x.T @ x, x.T @ y)


def inner(w: dict[str, Array], log_alpha: Array, d: dict[str, Any]) -> Array:
    """sum_i s_i |y_i - w^T x_i - b|^2 + sum_j alpha_j |w_j|^2, scikit-learn's scale."""
    fit = jnp.sum(d["fold"].train * jnp.sum(_residual(w, d) ** 2, 1))
    return fit + jnp.exp(log_alpha) @ jnp.sum(w["coef"] ** 2, 1)


def outer(w: dict[str, Array], log_alpha: Array, d: dict[str, Any]) -> Array:
    """A fold's part of the squared error (summed over targets) of a validated example, times K."""
    return jnp.sum(d["fold"].validation * jnp.sum(_residual(w, d) ** 2, 1))


def _residual(w: dict[str, Array], d: dict[str, Any]) -> Array:
    return d["y"] - d["x"] @ w["coef"] - d["intercept"] * w["intercept"]


def solve(log_alpha: Array, d: dict[str, Any]) -> dict[str, Array]:
    """The solution by a Cholesky factor of the smaller of two systems, with Xc = sqrt(s) (x - mean_x), D = diag(alpha).

    (Xc^T Xc + D) w = Xc^T yc     (d <= n),       w = D^-1 Xc^T (Xc D^-1 Xc^T + I)^-1 yc     (n < d)
    """
    alpha = jnp.exp(log_alpha)[:, None]
    if d["x"].shape[1] <= d["x"].shape[0]:
        of = moments(d) if d["moments"] is None else d["moments"]
        coef = _solve(lambda v: of.gram @ v + alpha * v, lambda: of.gram + jnp.diag(alpha[:, 0]), of.moment)
        return {"coef": coef, "intercept": of.mean_y - of.mean_x @ coef}
    mean_x, mean_y, x, y = centred(d)
    product = lambda v: x @ ((x.T @ v) / alpha) + v
    dual = _solve(product, lambda: (x / alpha[:, 0]) @ x.T + jnp.eye(len(x)), y)
    coef = (x.T @ dual) / alpha
    return {"coef": coef, "intercept": mean_y - mean_x @ coef}


def _solve(product: Any, matrix: Any, right: Array) -> Array:
    """A^-1 b; the derivative takes products with A alone, so that it costs one more pair of triangular solves."""
    factor = jax.lax.stop_gradient(jnp.linalg.cholesky(jax.lax.stop_gradient(matrix())))
    return jax.lax.custom_linear_solve(product, right, lambda _, b: cho_solve((factor, True), b), symmetric=True)


def zeros(log_alpha: Array, d: dict[str, Any]) -> dict[str, Array]:
    """What w looks like."""
    targets = d["y"].shape[1]
    return {"coef": jnp.zeros((d["x"].shape[1], targets)), "intercept": jnp.zeros(targets)}


RIDGE = Problem(inner=inner, outer=outer, init=zeros)
"""lam = log alpha [d]; data {"x": [n, d], "y": [n, m], "fold", "intercept": 0 or 1, "moments": `Moments` or `None`}."""


def ridge_hypergradient(parallel: int | None = None) -> MeanOverTasks:
    """The hypergradient of cross-validated ridge regression, exact: a function (log_alpha, data) of `hyperax`."""
    return mean_over_tasks(hypergradient(RIDGE, None, ClosedForm(solve)), parallel)


def ridge_data(
    x: np.ndarray, y: np.ndarray, train: np.ndarray, validation: np.ndarray, intercept: bool
) -> dict[str, Any]:
    """The data of `ridge_hypergradient`, from x [n, d], y [n, m] and weights [K, n], inside `float64`.

    The Gram matrices do not depend on alpha: where K d^2 numbers fit into 512 MB they are computed once.
    """
    count, (n, d) = len(train), x.shape
    of = {"x": x, "y": y, "intercept": float(intercept)}
    precomputed = None
    if d <= n and 8 * count * d * d <= GRAM_BYTES:
        every = [moments({**of, "fold": Fold(row, row)}) for row in train]
        precomputed = Moments(*(np.stack(part) for part in zip(*every, strict=True)))
    shared = {name: Shared(np.asarray(value)) for name, value in of.items()}
    # `jnp.asarray` would compile a program for each shape.
    fold = Fold(*jax.device_put((train, count * validation)))
    return jax.device_put({**shared, "fold": fold, "moments": precomputed})
