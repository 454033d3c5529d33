"""Ridge regression on several related tasks, the relation between them learned by hypergradient."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils import _safe_indexing
from sklearn.utils._param_validation import StrOptions
from sklearn.utils.validation import check_array, check_is_fitted, check_X_y, validate_data

from hyperax.estimators.multitask_problem import solution
from hyperax.estimators.multitask_search import Search
from hyperax.estimators.tables import COUNT, POSITIVE
from hyperax.precision import float64

_MISSING = ("None", "nan", "<NA>", "NaT")  # what is no string and reads so is no name of a task


class MultitaskRidge(RegressorMixin, BaseEstimator):
    """Ridge regression on N tasks that may be related, with the relation learned by hypergradient on folds.

        min over w_1, ..., w_N of  sum_t |y_t - X_t w_t|^2 + sum_{i<j} C_ij sum_k alpha_k (w_ik - w_jk)^2
                                   + beta sum_t |w_t|^2

    with C_ij = 1 / N for `relation="mean"`, so that the second term is sum_t sum_k alpha_k (w_tk - mean_k)^2, the
    deviations from a common mean; alpha and beta minimise the cross-validated squared error. For
    `relation="similarities"` all C_ij = C_ji >= 0 are learned after them, N (N - 1) / 2 hyperparameters.

    Against fitting the validation error itself, half of the validation examples give the hypergradient of C and the
    other half says at which hyperiteration to stop (the first is the common mean); then the halves change places, and
    log C is the mean of both.

    Arguments:
        relation: "mean" or "similarities".
        task_column: which column of X names the task of a row: a number, or its name in a data frame; its values may be
            numbers or strings. `None`: all rows are one task, and this is ridge regression.
        per_feature: whether every feature has an alpha of its own; otherwise one for all features and one for the
            intercept.
        fit_intercept: whether each task has an intercept, a coefficient of a feature that is 1.
        unknown_tasks: what `predict` does with tasks that `fit` did not see: "mean" takes the mean of the tasks'
            coefficients, "error" raises.
        cv: number of folds, each with its share of every task, or a splitter of scikit-learn, which sees the tasks as
            `groups`, or pairs of index arrays.
        max_iter: of L-BFGS-B, in each of its runs.
        tol: it stops when an iteration lowers the error by less than tol times the error.
        random_state: of the folds and the halves.

    Features are divided by their standard deviations over all rows before they are penalised, `coef_` is in the units
    of X. With a task column do not scale it away: `make_column_transformer((StandardScaler(), columns),
    remainder="passthrough")`.

    Attributes:
        tasks_: [N], the tasks' names, sorted.
        coef_: [N, d], without the task column; `intercept_`: [N].
        mean_coef_: [d], `mean_intercept_`: their means over tasks.
        similarities_: C [N, N], its diagonal 0.
        alpha_: [d + 1], of the features and the intercept; `beta_`.
        validation_curve_: cross-validated mean squared error of each evaluation of the search for alpha and beta.
        validation_error_: its lowest value.
        n_hyperiterations_: of L-BFGS-B, all runs together; scikit-learn's name for it is `n_iter_`.

    Raises: scikit-learn's `ValueError` for NaN, infinite values, strings for numbers; one for more folds than rows.
    Cost: n d^2 K once; then for each hyperiteration a few products with N matrices of d x d a fold, N d^3 K for their
    inverses. Memory 2 K N d^2 numbers, whatever n is.
    Reference: Evgeniou et al. 2005, for the common mean; Franceschi et al. 2017, Sec. 5.2, for the similarities;
    Franceschi et al. 2018 (ICML), App. B, for the folds.
    Do not use "similarities" for many tasks of a few rows: their relation cannot be told, and costs N^2. Nor the plain
    folds for rows that depend on each other within a task.

    >>> x = np.random.default_rng(0).normal(size=(60, 2))
    >>> task = np.arange(60) % 3
    >>> y = x[:, 0] + task * x[:, 1]
    >>> model = MultitaskRidge(task_column=2, cv=3).fit(np.column_stack([x, task]), y)
    >>> print(model.coef_.round(1))
    [[1. 0.]
     [1. 1.]
     [1. 2.]]
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "relation": [StrOptions({"mean", "similarities"})],
        "unknown_tasks": [StrOptions({"mean", "error"})],
        "per_feature": ["boolean"],
        "fit_intercept": ["boolean"],
        "max_iter": [COUNT],
        "tol": [POSITIVE],
        "random_state": ["random_state"],
    }

    def __init__(
        self,
        relation: str = "mean",
        *,
        task_column: int | str | None = None,
        per_feature: bool = False,
        fit_intercept: bool = True,
        unknown_tasks: str = "mean",
        cv: Any = 5,
        max_iter: int = 100,
        tol: float = 1e-6,
        random_state: Any = 0,
    ):
        self.relation = relation
        self.task_column = task_column
        self.per_feature = per_feature
        self.fit_intercept = fit_intercept
        self.unknown_tasks = unknown_tasks
        self.cv = cv
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> MultitaskRidge:
        """Learn the relation on folds, then the coefficients on all rows.

        Arguments:
            X: [n, d], or [n, d + 1] with the task column.
            y: [n].

        Returns: self.
        """
        self._validate_params()
        x, y, names = self._read(X, y, fitting=True)
        y = np.asarray(y, np.float64)  # `y_numeric` converts objects alone, no strings
        self.tasks_, task = np.unique(names, return_inverse=True)
        center, scale, level = np.zeros(x.shape[1]), x.std(0), 0.0
        if self.fit_intercept:
            center, level = x.mean(0), y.mean()
        scale[scale <= 1e-12 * np.abs(x).max(0, initial=0.0)] = 1.0
        z = np.column_stack([(x - center) / scale, np.full(len(x), float(self.fit_intercept))])
        with float64():
            search = Search(self, z, y - level, task)
            lam = search.relation()
            w, C = (np.asarray(part) for part in solution(lam, search.whole))
            w, self.similarities_ = w[: len(self.tasks_), : z.shape[1]], C[: len(self.tasks_), : len(self.tasks_)]
            self.alpha_ = np.exp(np.asarray(lam.log_alpha))[: z.shape[1]]
            self.beta_ = float(np.exp(lam.log_beta))
        self.coef_ = w[:, :-1] / scale
        self.intercept_ = level + w[:, -1] * float(self.fit_intercept) - self.coef_ @ center
        self.mean_coef_, self.mean_intercept_ = self.coef_.mean(0), float(self.intercept_.mean())
        self.validation_curve_ = np.asarray(search.curve)
        self.validation_error_ = float(self.validation_curve_.min())
        self.n_iter_ = self.n_hyperiterations_ = search.iterations
        return self

    def predict(self, X: Any) -> np.ndarray:
        """The targets [n] of rows X, laid out as in `fit`.

        Raises: `ValueError` for tasks that `fit` did not see, with `unknown_tasks="error"`.
        """
        check_is_fitted(self)
        x, _, names = self._read(X, None, fitting=False)
        if (names.dtype.kind == "U") != (self.tasks_.dtype.kind == "U"):
            # Compared as strings the task 1.0 would not be the task "1", and silently get the mean.
            raise ValueError(
                f"the tasks of X are of type {names.dtype}, and those that were in fit of type {self.tasks_.dtype}: "
                "convert the task column"
            )
        at = np.minimum(np.searchsorted(self.tasks_, names), len(self.tasks_) - 1)
        known = self.tasks_[at] == names
        if self.unknown_tasks == "error" and not known.all():
            raise ValueError(
                f"X has tasks that were not in fit: {np.unique(names[~known])[:5].tolist()}; leave these rows out, or "
                'use unknown_tasks="mean"'
            )
        of_task = np.einsum("nd,nd->n", x, self.coef_[at]) + self.intercept_[at]
        return np.where(known, of_task, x @ self.mean_coef_ + self.mean_intercept_)

    def _read(self, X: Any, y: Any, fitting: bool) -> tuple[Any, Any, np.ndarray]:
        """Features, targets and the name of each row's task; checks all of them."""
        if self.task_column is None:
            if fitting:
                x, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True)
            else:
                x = validate_data(self, X, dtype=np.float64, reset=False)
            return x, y, np.zeros(len(x), int)
        kind: Any = np.float64
        anything: Any = None  # scikit-learn says that it is a string
        column: Any = self.task_column
        if not hasattr(X, "columns"):
            X = check_array(X, dtype=anything, ensure_all_finite=False, estimator=self)
        validate_data(self, X, reset=fitting, skip_check_array=True)
        columns = list(X.columns) if hasattr(X, "columns") else list(range(X.shape[1]))
        if self.task_column not in columns and not isinstance(self.task_column, int):
            raise ValueError(f"X has no column {self.task_column!r}: task_column must be one of {columns}")
        at = columns.index(column) if column in columns else column
        if not -len(columns) <= at < len(columns):
            raise ValueError(f"task_column is {at} and X has {len(columns)} columns")
        rest = [i for i in range(len(columns)) if i != at % len(columns)]
        x = _safe_indexing(X, rest, axis=1)
        names = np.asarray(_safe_indexing(X, at % len(columns), axis=1))
        if names.dtype.kind == "O":
            if any(not isinstance(name, str) and str(name) in _MISSING for name in names):
                raise ValueError("Input task_column contains NaN.")
            names = names.astype(str)
        check_array(names.reshape(-1, 1), dtype=anything, input_name="task_column")
        if not fitting:
            return check_array(x, dtype=kind, estimator=self), None, names
        x, y = check_X_y(x, y, dtype=kind, y_numeric=True, estimator=self)
        return x, y, names
