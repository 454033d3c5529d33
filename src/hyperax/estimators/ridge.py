"""Ridge regression with L2 coefficients tuned by hypergradient."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import scipy.linalg
import scipy.sparse
from sklearn.base import RegressorMixin
from sklearn.utils.validation import validate_data

from hyperax.estimators.linear_folds import COLUMNS, ROWS, SMALL, NewtonFolds
from hyperax.estimators.linear_model import LinearModel, dense_if_small, mean_square
from hyperax.estimators.newton_problem import half_square
from hyperax.estimators.ridge_problem import ridge_data, ridge_hypergradient
from hyperax.estimators.search import Evaluate
from hyperax.estimators.tables import bucket, example_weights, fold_bucket, fold_weights, padded
from hyperax.precision import float64

TARGETS = 4


class HypergradientRidge(RegressorMixin, LinearModel):
    """Ridge regression with one, per-group or per-feature L2 coefficients, tuned by hypergradient on folds.

        f(alpha) = sum over folds k, validated i of s_i |y_i - x_i w^k - b^k|^2 / sum of s_i
        (w^k, b^k) = argmin sum over trained i of s_i |y_i - x_i w - b|^2 + sum_j alpha_j |w_j|^2

    log alpha goes from the best common value on a grid downhill along the exact gradient of f (L-BFGS-B); the model is
    then trained on all samples. With more than one coefficient, f alone would fit the noise of the folds. So the log
    coefficients are drawn to their mean (or to the common value, if that is larger), by a Gaussian prior that gets
    narrower the fewer samples there are for each of them (`shrinkage`): on 100 samples of 30 to 300 features it kept
    most of what there was to gain on useless features, and lost 1 % in error where all were useful (without it the
    error was up to two and a half times as large).

    Arguments:
        penalty: "one" coefficient, "per-feature", or an array with the number of the group of each feature.
        cv: what `hyperax.folds` takes: a number of folds (not shuffled), a splitter of scikit-learn, pairs of index
            arrays. For one validation split `ShuffleSplit(1, test_size=0.25)`.
        fit_intercept: whether b is fitted; it is not penalised.
        alpha_bounds: of the coefficients, in units of sum_ij s_i x_ij^2 / d (of centred columns, for dense X).
        shrinkage: of the log coefficients to each other; 0 for none. With "one" there is nothing to shrink.
        max_iter: iterations of L-BFGS-B, for the common coefficient and again for those of groups or features.
        tol: an iteration that lowers f by less than tol f is the last.
        parallel: folds at a time; `None` for all, 1 for the least memory.

    Attributes:
        alpha_: the coefficient, or [n_features]; in the scale of `sklearn.linear_model.Ridge`.
        coef_: [n_features] or [n_targets, n_features].
        intercept_: number, or [n_targets].
        validation_curve_: f at each hyperiteration (17 on the grid, then those of L-BFGS-B), in units of y^2.
        best_score_: -f at alpha_.
        n_hyperiterations_: evaluations of f and its gradient.
        n_iter_: iterations of L-BFGS-B.
        n_features_in_, feature_names_in_: as usual.

    Raises: `ValueError` for options outside their ranges, and what scikit-learn raises for bad data.
    Cost: a hyperiteration takes a Cholesky factor a fold of the smaller of d x d and n x n, that is K min(d, n)^3 / 3
    operations (and K n^2 d for n < d). A sparse X of more than four million entries is not made dense and not
    centred: conjugate gradients, some tens of products with it a fold.
    Reference: Franceschi et al. 2018, eq. 1-2 and App. B; alpha's scale is that of scikit-learn.
    Do not use it to select features (no alpha is infinite), or without a grouped splitter where samples depend on each
    other.

    >>> X = np.random.default_rng(0).normal(size=(60, 8))
    >>> y = X[:, 0] + X[:, 1] ** 2
    >>> model = HypergradientRidge("per-feature").fit(X, y)
    >>> print(f"{model.score(X, y):.1f}", bool(model.alpha_[0] < model.alpha_[1:].min()))
    0.6 True
    """

    def __sklearn_tags__(self):
        """Several targets are taken."""
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def fit(self, X, y, sample_weight=None, groups=None):
        """Tune and train.

        Arguments:
            X: [n_samples, n_features], dense or sparse.
            y: [n_samples] or [n_samples, n_targets].
            sample_weight: [n_samples], s >= 0; in training and validation.
            groups: [n_samples], for a grouped splitter.
        """
        self._check_options()
        table: Any = validate_data(
            self, X, y, accept_sparse="csr", dtype=np.float64, y_numeric=True, multi_output=True, ensure_min_samples=2
        )
        X, y = table
        self._groups(X.shape[1])
        s = example_weights(sample_weight, X)
        train, validation = fold_weights(self.cv, X, y, s, groups)
        x = dense_if_small(X)
        Y = np.asarray(y, np.float64).reshape(len(y), -1)
        centre = (s @ Y) / s.sum() if self.fit_intercept else np.zeros(Y.shape[1])
        unit = np.sqrt(s @ np.sum((Y - centre) ** 2, 1) / s.sum()) or 1.0
        fit = self._fit_sparse if scipy.sparse.issparse(x) else self._fit_dense
        coef, intercept = fit(x, (Y - centre) / unit, s, train, validation, unit)
        coef, intercept = unit * coef.T, unit * intercept + centre
        self.coef_, self.intercept_ = (coef, intercept) if y.ndim == 2 else (coef[0], float(intercept[0]))
        return self

    def predict(self, X):
        """X w + b; [n_samples] or [n_samples, n_targets]."""
        return self._linear(X)

    def _fit_dense(self, x, y, s, train, validation, unit) -> tuple[np.ndarray, np.ndarray]:
        mean = (s @ x) / s.sum() if self.fit_intercept else np.zeros(x.shape[1])
        x = x - mean
        evaluate = _exact(x, y, train, validation, self.fit_intercept, self.parallel)
        log_alpha = self._search(evaluate, mean_square(x, s), _validated(validation), None, unit**2)
        coef = _solve(x, y, s, np.exp(log_alpha))
        return coef, -(mean @ coef)

    def _fit_sparse(self, x, y, s, train, validation, unit) -> tuple[np.ndarray, np.ndarray]:
        # Half the square is the loss, so the error is twice the outer objective.
        classes = np.ones((len(train), y.shape[1]))
        evaluate = NewtonFolds(
            half_square, x, y, np.ones(y.shape[1]), s, train, 2 * validation, classes,
            intercept=self.fit_intercept, reference=0.0, parallel=self.parallel,
        )  # fmt: skip
        log_alpha = self._search(evaluate, mean_square(x, s), _validated(validation), None, unit**2)
        return evaluate.refit(log_alpha)


def _validated(validation: np.ndarray) -> int:
    return int(np.count_nonzero(validation.any(0)))


def _exact(x, y, train, validation, intercept: bool, parallel: int | None) -> Evaluate:
    """F(log alpha) and its gradient from Cholesky factors, on tables padded with zeros."""
    # Which of the two systems is the smaller is decided by the padded sizes.
    wide = x.shape[0] < x.shape[1]
    n, d = bucket(x.shape[0], COLUMNS if wide else ROWS, 64 if wide else 512), bucket(x.shape[1], COLUMNS, 64)
    K = fold_bucket(len(train), parallel, small=n * d <= SMALL)
    targets = bucket(y.shape[1], TARGETS) if y.shape[1] > 1 else 1
    hypergradient = ridge_hypergradient(parallel)
    with float64():
        data = ridge_data(
            padded(x, n, d), padded(y, n, targets), padded(train, K, n), padded(validation, K, n), intercept
        )

    def evaluate(log_alpha: np.ndarray) -> tuple[float, np.ndarray]:
        with float64():
            h = hypergradient(jax.device_put(padded(log_alpha, d)), data)
            return float(h.value), np.asarray(h.grad)[: len(log_alpha)]

    return evaluate


def _solve(x: np.ndarray, y: np.ndarray, s: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """The coefficients [d, m] of all samples, from centred tables."""
    root = np.sqrt(s)[:, None]
    x, y = root * x, root * y
    if x.shape[1] <= x.shape[0]:
        return scipy.linalg.solve(x.T @ x + np.diag(alpha), x.T @ y, assume_a="pos")
    shrunk = x / alpha
    return shrunk.T @ scipy.linalg.solve(shrunk @ x.T + np.eye(len(x)), y, assume_a="pos")
