"""Ridge regression on several related tasks, the relation between them learned by hypergradient."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import scipy.optimize
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import _safe_indexing, check_random_state
from sklearn.utils.validation import check_array, check_is_fitted, check_X_y, validate_data

from hyperax.estimators.multitask_problem import (
    Relation,
    Sums,
    Table,
    cross_validation,
    solution,
    sums,
)
from hyperax.estimators.tables import bucket, check_count, check_flag, check_number, float64, fold_weights, padded
from hyperax.problem import Shared

_RANGE = 14.0  # of log alpha and log beta around n / N and n: from no relation, or no penalty, to nothing else
_GRID = {"alpha": (-6.0, -2.0, 2.0, 6.0, 10.0), "beta": (-12.0, -8.0, -5.0, -2.0, 1.0)}  # where the search may begin
_FARTHEST = 4.0  # of a similarity from the common one, as a logarithm
_MISSING = ("None", "nan", "<NA>", "NaT")  # what is no string and reads so is no name of a task
_PATIENCE = 5  # hyperiterations without a lower held-out error


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
        _check_choice("relation", self.relation, ("mean", "similarities"))
        _check_choice("unknown_tasks", self.unknown_tasks, ("mean", "error"))
        check_flag("per_feature", self.per_feature)
        check_flag("fit_intercept", self.fit_intercept)
        check_count("max_iter", self.max_iter)
        check_number("tol", self.tol)
        x, y, names = self._read(X, y, fitting=True)
        y = np.asarray(y, np.float64)  # `y_numeric` converts objects alone, no strings
        self.tasks_, task = np.unique(names, return_inverse=True)
        center, scale, level = np.zeros(x.shape[1]), x.std(0), 0.0
        if self.fit_intercept:
            center, level = x.mean(0), y.mean()
        scale[scale <= 1e-12 * np.abs(x).max(0, initial=0.0)] = 1.0
        z = np.column_stack([(x - center) / scale, np.full(len(x), float(self.fit_intercept))])
        with float64():
            search = _Search(self, z, y - level, task)
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


class _Search:
    """The folds of a table, summed up, and what was found on them.

    Attributes:
        whole: all rows, for the final fit.
        curve: the cross-validated error of each evaluation on all validation examples.
        iterations: of L-BFGS-B.
    """

    def __init__(self, model: MultitaskRidge, z: np.ndarray, y: np.ndarray, task: np.ndarray):
        n, p = z.shape
        self.model, self.tasks = model, int(task.max()) + 1
        count, width = bucket(self.tasks, 4), bucket(p, 8)
        random = check_random_state(model.random_state)
        folds = _dealt(model.cv, task, random)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The groups parameter is ignored")  # the user gave none
            self.train, self.validation = fold_weights(folds, z, y, np.ones(n), groups=model.tasks_[task])
        self.half = deal(task, 2, random)
        sides = np.zeros(p, int)
        sides[-1] = 1
        self.group = np.arange(p) if model.per_feature else sides
        present = padded(np.ones(self.tasks), count)

        def summed(weight: np.ndarray) -> Sums:
            found = sums(z, y, task, weight, self.tasks)
            shapes = ((count, width, width), (count, width), ())
            parts = zip((found.gram, found.moment, found.energy), shapes, strict=True)
            return Sums(*(padded(np.asarray(part), *shape) for part, shape in parts))

        def of_folds(weights: np.ndarray) -> Sums:
            found = [summed(weight) for weight in weights]
            return Sums(*(np.stack([getattr(s, name) for s in found]) for name in ("gram", "moment", "energy")))

        self.whole = Table(summed(np.ones(n)), summed(np.zeros(n)), present, np.arange(width))
        trained = of_folds(self.train)
        self.table = lambda mine: Table(
            trained,
            of_folds(self.validation * mine * len(self.train) / (self.validation * mine).sum()),
            Shared(present),
            Shared(np.arange(width)),
        )
        self.width, self.pairs = width, count * (count - 1) // 2
        self.curve: list[float] = []
        self.iterations = 0
        self.alpha_scale, self.beta_scale = np.log(n / self.tasks), np.log(n)

    def lam(self, theta: np.ndarray, s: np.ndarray) -> Relation:
        """The hyperparameters at (log alpha of the groups, log beta) and s."""
        log_alpha = np.full(self.width, self.alpha_scale)
        log_alpha[: self.group.size] = theta[:-1][self.group]
        return Relation(log_alpha, np.asarray(theta[-1]), s)  # pyright: ignore[reportArgumentType]

    def evaluate(self, theta: np.ndarray, s: np.ndarray, table: Table) -> tuple[float, np.ndarray, np.ndarray]:
        """The validation error and its gradients in theta and s."""
        h = cross_validation(self.lam(theta, s), table)
        value = float(h.value)
        if not np.isfinite(value):
            raise ValueError("the validation error is not finite: scale y to about 1")
        slope = np.bincount(self.group, np.asarray(h.grad.log_alpha)[: self.group.size], self.group.max() + 1)
        return value, np.append(slope, float(h.grad.log_beta)), np.asarray(h.grad.log_similarity)

    def relation(self) -> Relation:
        """First alpha and beta, from the best point of a grid on; then, if they are to be learned, the similarities."""
        table, even = self.table(np.ones(self.half.size)), np.zeros(self.pairs)

        def common(theta: np.ndarray) -> tuple[float, np.ndarray]:
            value, slope, _ = self.evaluate(theta, even, table)
            self.curve.append(value)
            return value, slope

        groups = int(self.group.max()) + 1
        alphas = self.alpha_scale + np.array(_GRID["alpha"] if self.tasks > 1 else (0.0,))
        points = [
            np.append(np.full(groups, alpha), self.beta_scale + beta) for alpha in alphas for beta in _GRID["beta"]
        ]
        start = min(points, key=lambda theta: common(theta)[0])
        centers = np.append(np.full(groups, self.alpha_scale), self.beta_scale)
        found = self._descend(common, start, np.stack([centers - _RANGE, centers + _RANGE], 1))
        if found.status == 1:
            warnings.warn(
                f"the search for alpha and beta stopped after max_iter={self.model.max_iter} iterations: raise "
                "max_iter or tol",
                ConvergenceWarning,
                stacklevel=3,
            )
        if self.model.relation == "mean" or self.tasks < 3:  # two tasks have one similarity, and alpha stands for it
            return self.lam(found.theta, even)
        sides = [(self.half == side).astype(float) for side in (0, 1)]
        if not all((self.validation * mine).any() for mine in sides):
            raise ValueError("the folds validate on too few samples for two halves of them: use relation='mean'")
        halves = [self.table(mine) for mine in sides]
        learned = [self._similarities(found.theta, *pair) for pair in (halves, halves[::-1])]
        return self.lam(found.theta, (learned[0] + learned[1]) / 2)

    def _similarities(self, theta: np.ndarray, table: Table, other: Table) -> np.ndarray:
        """The s on the way to the lowest error of one half, where the other half's is lowest."""
        best, waited = [np.inf, np.zeros(self.pairs)], [0]

        def look(s: np.ndarray) -> None:
            value = self.evaluate(theta, s, other)[0]
            waited[0] += 1
            if value < best[0]:
                best[:], waited[0] = [value, np.array(s)], 0
            if waited[0] == _PATIENCE:
                raise StopIteration

        look(best[1])
        box = np.tile([-_FARTHEST, _FARTHEST], (self.pairs, 1))
        self._descend(lambda s: self.evaluate(theta, s, table)[::2], np.zeros(self.pairs), box, look)
        return best[1]

    def _descend(
        self, function: Callable[[np.ndarray], Any], start: np.ndarray, box: np.ndarray, look: Any = None
    ) -> _Found:
        unit = function(start)[0] or 1.0
        scaled = lambda x: tuple(part / unit for part in function(x))
        # The first of many similarities' steps is short, and gains little: it is the other half that ends that search.
        tol = self.model.tol * (1.0 if look is None else 1e-4)
        options = {"maxiter": self.model.max_iter, "ftol": tol, "gtol": 1e-2 * tol}
        result = scipy.optimize.minimize(
            scaled, start, jac=True, method="L-BFGS-B", bounds=box, callback=look, options=options
        )
        self.iterations += max(int(result.nit), 1)  # one that stays where it is has looked
        return _Found(np.asarray(result.x), int(result.status))


class _Found(NamedTuple):
    theta: np.ndarray
    status: int


def deal(task: np.ndarray, count: int, random: np.random.RandomState) -> np.ndarray:
    """For each row one of 0, ..., count - 1, such that every task has nearly the same number of each.

    >>> deal(np.array([0, 0, 1, 1, 1, 1]), 2, np.random.RandomState(0)).reshape(3, 2).sum(1).tolist()
    [1, 1, 1]
    """
    order = np.lexsort((random.random(task.size), task))
    dealt = np.empty(task.size, int)
    dealt[order] = np.arange(task.size) % count
    return dealt


def _dealt(cv: Any, task: np.ndarray, random: np.random.RandomState) -> Any:
    """Pairs of index arrays for a number of folds; splitters as they are."""
    if isinstance(cv, bool) or not isinstance(cv, int | np.integer) or cv < 2:
        return cv  # a splitter, or refused there
    if cv > task.size:
        raise ValueError(f"cv={cv} folds need at least {cv} samples, and there are n_samples={task.size}")
    fold = deal(task, int(cv), random)
    return [(np.flatnonzero(fold != k), np.flatnonzero(fold == k)) for k in range(int(cv))]


def _check_choice(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} is {value!r}; use {' or '.join(map(repr, known))}")
