"""The search for the relation between tasks: alpha and beta on folds, then similarities on halves of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import scipy.optimize
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state

from hyperax.estimators.multitask_problem import Relation, Sums, Table, cross_validation, sums
from hyperax.estimators.tables import bucket, fold_weights, padded
from hyperax.problem import Shared

_RANGE = 14.0  # of log alpha and log beta around n / N and n: from no relation, or no penalty, to nothing else
_GRID = {"alpha": (-6.0, -2.0, 2.0, 6.0, 10.0), "beta": (-12.0, -8.0, -5.0, -2.0, 1.0)}  # where the search may begin
_FARTHEST = 4.0  # of a similarity from the common one, as a logarithm
_PATIENCE = 5  # hyperiterations without a lower held-out error


class Search:
    """The folds of a table, summed up, and what was found on them, for a `MultitaskRidge` and its options.

    Attributes:
        whole: all rows, for the final fit.
        curve: the cross-validated error of each evaluation on all validation examples.
        iterations: of L-BFGS-B.
    """

    def __init__(self, model: Any, z: np.ndarray, y: np.ndarray, task: np.ndarray):
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
