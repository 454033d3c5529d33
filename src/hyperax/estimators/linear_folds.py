"""A linear model on padded folds: what an estimator evaluates while it searches, and refits with in the end."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import scipy.sparse

from hyperax.cross_validation import Fold
from hyperax.estimators.newton_problem import FoldData, newton_hypergradient
from hyperax.estimators.tables import bucket, fold_bucket, padded
from hyperax.methods.implicit import Memory
from hyperax.precision import float64
from hyperax.problem import Shared

ROWS, COLUMNS, CLASSES = 320, 16, 4
"""The smallest tables, which most small fits share."""

SHARPER = 1e3
SMALL = 2**20
EXACT, NEAR = 1e-9, 1e-6
"""Tolerances: to n d C = SMALL such that repeated samples give what weights give, to seven digits; then for speed."""


class NewtonFolds:
    """F(log alpha) and its hypergradient by `newton_hypergradient`, each evaluation from the solutions of the last.

    Arguments:
        loss: `cross_entropy` or `half_square`.
        x: [n, d], dense or sparse; dense with an intercept it should be centred.
        y: [n, C], a row of 0 for the reference class.
        curvature: [C], of the loss at the start: p (1 - p) of the classes, 1 for squares.
        weights: [n], of the examples.
        train, validation: [K, n], from `fold_weights`.
        classes: [K, C], 1 where a fold is trained on examples of the class.
        intercept: whether there is one.
        reference: the logit of the reference class.
        parallel: folds at a time, `None` for all.
    """

    def __init__(
        self,
        loss: Any,
        x: Any,
        y: np.ndarray,
        curvature: np.ndarray,
        weights: np.ndarray,
        train: np.ndarray,
        validation: np.ndarray,
        classes: np.ndarray,
        *,
        intercept: bool,
        reference: float,
        parallel: int | None,
    ):
        self.features, self.targets = x.shape[1], y.shape[1]
        # One class (two of them, with the reference) is a case of its own: it would pay four times.
        C = 1 if y.shape[1] == 1 else bucket(y.shape[1], CLASSES)
        small = x.shape[0] * x.shape[1] * C <= SMALL
        K = fold_bucket(len(train), parallel, small=small)
        self.total = weights.sum()
        squares = np.asarray((x.multiply(x) if scipy.sparse.issparse(x) else x**2).T @ weights).ravel() / self.total
        if scipy.sparse.issparse(x):
            from hyperax.estimators.sparse import SparseMatrix

            n, d = x.shape
            make = lambda: SparseMatrix.from_scipy(x, np.float64)
        else:
            n, d = bucket(x.shape[0], ROWS, 512), bucket(x.shape[1], COLUMNS, 64)
            make = lambda: padded(x, n, d)
        self.curvature = np.outer(np.append(padded(squares, d), 1.0), padded(curvature, C, value=1.0))
        self.hypergradient = newton_hypergradient(loss, parallel, EXACT if small else NEAR)
        with float64():
            # `device_put`, because `jnp.asarray` compiles a program for each shape.
            shared = (make(), padded(y, n, C), np.asarray(float(intercept)), np.asarray(float(reference)))
            self.x, self.y, self.intercept, self.reference = jax.device_put(shared)
            self.all = self._fold(weights[None], np.zeros((1, x.shape[0])), np.any(classes, 0)[None], (K, n, C))
            self.fold = self._fold(train, validation, classes, (K, n, C))
        zeros = np.zeros((K, d + 1, C))
        self.w, self.q = zeros, zeros

    def _fold(self, train: np.ndarray, validation: np.ndarray, classes: np.ndarray, sizes: tuple) -> tuple:
        K, n, C = sizes
        fold = Fold(padded(train, K, n) / self.total, K * padded(validation, K, n))
        return jax.device_put((fold, padded(classes.astype(float), K, C)))

    def __call__(self, log_alpha: np.ndarray) -> tuple[float, np.ndarray]:
        """(f, its gradient [d])."""
        h = self._evaluate(self.fold, log_alpha)
        return float(h.value), np.asarray(h.grad)[: self.features]

    def refit(self, log_alpha: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(coefficients [d, C], intercepts [C]) trained on all examples, by the same program."""
        self.w = np.concatenate([self.w.mean(0, keepdims=True), np.zeros_like(self.w[1:])])
        self.q = np.zeros_like(self.q)
        # An objective SHARPER times as large is minimised to a gradient as many times smaller by the same tolerance:
        # where probabilities are next to 0 or 1, its curvature is far below that of the start.
        fold, classes = self.all
        with float64():
            fold = Fold(jax.device_put(SHARPER * np.asarray(fold.train)), fold.validation)
        self._evaluate((fold, classes), log_alpha, SHARPER)
        w = self.w[0, :, : self.targets]
        return w[: self.features], w[-1]

    def _evaluate(self, fold: tuple, log_alpha: np.ndarray, factor: float = 1.0) -> Any:
        # The training weights are divided by their sum, so alpha is too.
        log_alpha = padded(log_alpha - np.log(self.total), self.curvature.shape[0] - 1)
        scale = 1 / np.sqrt(np.append(np.exp(log_alpha), 0.0)[:, None] + self.curvature)
        with float64():
            start = Memory(self.w / scale, self.q / scale, np.zeros(len(self.w), np.int32))
            lam, scales, start = jax.device_put((log_alpha + np.log(factor), scale, start))
            shared = [Shared(value) for value in (self.x, self.y, scales, self.intercept, self.reference)]
            x, y, scales, intercept, reference = shared
            h = self.hypergradient(lam, FoldData(x, y, fold[0], scales, fold[1], intercept, reference), start)
            self.w, self.q = np.asarray(h.carry.w) * scale, np.asarray(h.carry.q) * scale
        return h
