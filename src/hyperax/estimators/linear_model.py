"""What ridge and logistic regression share as estimators: options, their checks, the search, prediction."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import scipy.sparse
from sklearn.base import BaseEstimator
from sklearn.utils._param_validation import StrOptions
from sklearn.utils.extmath import safe_sparse_dot
from sklearn.utils.validation import check_is_fitted, validate_data

from hyperax.estimators.search import Evaluate, search
from hyperax.estimators.tables import COUNT, NOT_NEGATIVE, POSITIVE, check_bounds

DENSE = 2**22
"""Entries: a sparse table below this is made dense (32 MB), a larger one never."""


class LinearModel(BaseEstimator):
    """The base of `HypergradientRidge` and `HypergradientLogisticRegression`; not for use by itself."""

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "penalty": [StrOptions({"one", "per-feature"}), "array-like"],
        "fit_intercept": ["boolean"],
        "shrinkage": [NOT_NEGATIVE],
        "max_iter": [COUNT],
        "tol": [POSITIVE],
        "parallel": [COUNT, None],
    }

    n_features_in_: int
    coef_: np.ndarray
    intercept_: Any

    def __init__(
        self,
        penalty="one",
        *,
        cv=5,
        fit_intercept=True,
        alpha_bounds=(1e-8, 1e8),
        shrinkage=1.0,
        max_iter=100,
        tol=1e-5,
        parallel=None,
    ):
        self.penalty = penalty
        self.cv = cv
        self.fit_intercept = fit_intercept
        self.alpha_bounds = alpha_bounds
        self.shrinkage = shrinkage
        self.max_iter = max_iter
        self.tol = tol
        self.parallel = parallel

    def __sklearn_tags__(self):
        """Sparse tables are taken."""
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags

    def _check_options(self) -> None:
        self._validate_params()
        check_bounds("alpha_bounds", self.alpha_bounds)

    def _groups(self, features: int) -> np.ndarray:
        """The group of each feature, 0 ... G - 1."""
        if isinstance(self.penalty, str):
            return np.arange(features) if self.penalty == "per-feature" else np.zeros(features, int)
        group = np.asarray(self.penalty)
        if group.shape != (features,) or group.dtype.kind not in "iu":
            raise ValueError(
                f"penalty has shape {group.shape} and type {group.dtype}; it must have one whole number, that of a "
                f"group, for each of the {features} features"
            )
        return np.unique(group, return_inverse=True)[1]

    def _search(
        self, evaluate: Evaluate, squares: float, examples: int, unit: float | None, scale: float
    ) -> np.ndarray:
        """Log alpha [d], and the attributes that tell of the search. `scale`: of f, to the units of y."""
        bounds = np.log(self.alpha_bounds) + np.log(squares or 1.0)
        found = search(
            evaluate,
            self._groups(self.n_features_in_),
            (float(bounds[0]), float(bounds[1])),
            examples=examples,
            unit=unit,
            shrinkage=self.shrinkage,
            max_iter=self.max_iter,
            tol=self.tol,
            impatient=unit is not None,
        )
        alpha = np.exp(found.log_alpha)
        single = isinstance(self.penalty, str) and self.penalty == "one"
        self.alpha_ = float(alpha[0]) if single else alpha
        self.validation_curve_ = scale * found.curve
        self.best_score_ = -scale * found.value
        self.n_iter_ = max(found.iterations, 1)
        self.n_hyperiterations_ = len(found.curve)
        return found.log_alpha

    def _linear(self, X: Any) -> np.ndarray:
        """X coef^T + intercept."""
        check_is_fitted(self)
        X = validate_data(self, X, accept_sparse="csr", reset=False)
        return safe_sparse_dot(X, self.coef_.T, dense_output=True) + self.intercept_


def dense_if_small(x: Any) -> Any:
    """A sparse table as a NumPy array if it has less than `DENSE` entries."""
    return x.toarray() if scipy.sparse.issparse(x) and x.shape[0] * x.shape[1] <= DENSE else x


def mean_square(x: Any, weights: np.ndarray) -> float:
    """sum_ij s_i x_ij^2 / d: the unit of alpha, so that alpha is c^2 times as large for a table c times as large."""
    squares = x.multiply(x) if scipy.sparse.issparse(x) else x**2
    return float(np.sum(squares.T @ weights) / x.shape[1])
