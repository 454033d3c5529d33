"""Cross-validation as bilevel programming: the folds are the tasks, and the table of examples is shared by them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hyperax.problem import Scalar


class Fold(eqx.Module):
    """Which examples a model is trained on, and which it is validated on, as weights of all n examples.

        training_mean(l) = sum_i train_i l_i / sum_i train_i,    validation_mean(l) likewise

    Arguments:
        train, validation: [n], 1 for the examples of that side and 0 for the others; other weights are weights of
            examples. What `folds` returns has the folds on a leading axis, for `mean_over_tasks`.

    A weight of 0 in place of a selection keeps one shape for folds of any size, so that they can be mapped.
    Cost: a fold computes with all n examples, K / (K - 1) times those that it is trained on.
    Do not use `jnp.mean` in its place in an objective: it would train on the validation examples.

    >>> import jax.numpy as jnp
    >>> fold = Fold(train=jnp.array([1.0, 1.0, 0.0]), validation=jnp.array([0.0, 0.0, 1.0]))
    >>> print(fold.training_mean(jnp.array([1.0, 3.0, 9.0])), fold.validation_mean(jnp.array([1.0, 3.0, 9.0])))
    2.0 9.0
    """

    train: Float[Array, "... n"]
    validation: Float[Array, "... n"]

    def training_mean(self, values: Float[Array, " n"]) -> Scalar:
        """The mean over the training examples of a fold."""
        return jnp.sum(self.train * values) / jnp.sum(self.train)

    def validation_mean(self, values: Float[Array, " n"]) -> Scalar:
        """The mean over the validation examples of a fold."""
        return jnp.sum(self.validation * values) / jnp.sum(self.validation)


def folds(splitter: Any, x: Any, y: Any = None, groups: Any = None) -> Fold:
    """The folds of a table of examples, stacked: `data` for `mean_over_tasks`, with the table `Shared`.

        f(lam) = (1 / K) sum over k of E(w^k(lam); validation_k),   w^k(lam) = argmin L(., lam; train_k)

    Arguments:
        splitter: K (stratified if y are labels, not floats, and at least K of each), a splitter of scikit-learn
            (`KFold`, `StratifiedKFold`, `GroupKFold`, `LeaveOneOut`, ...), or pairs (training indices, validation
            indices); an index given twice has weight 2.
        x: the table, or anything of length n.
        y: labels [n], for stratified splitters.
        groups: [n], for grouped splitters.

    Returns: a `Fold` with `train` and `validation` of shape [K, n].
    Raises: `ValueError` for more folds than examples, indices outside the table, an empty side; what a splitter of
    scikit-learn raises.
    Cost: 2 K n numbers: for leave-one-out of n > 10 000 examples give pairs for a sample of the examples instead.
    Reference: Franceschi et al. 2018, App. B (cross-validation as bilevel programming).
    Do not use it for examples that depend on each other (time series, several rows a patient) without a splitter that
    knows: the validation error is then too low.

    >>> pairs = [([0, 1], [2, 3]), ([2, 3], [0, 1])]
    >>> folds(pairs, range(4)).train.tolist()
    [[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]]

    A mean over folds in parallel, one after the other (`parallel=1`), or over some of them drawn anew each time:

        data = {"x": hx.Shared(x), "y": hx.Shared(y), "fold": hx.folds(5, x, y)}
        mean = hx.mean_over_tasks(hx.hypergradient(problem, dynamics, method), parallel=1)
        hx.minimize(mean, lam, data=data, sample=hx.sample_tasks(2), key=jax.random.key(0), ...)
    """
    count, rows = _length(x), []
    for number, pair in enumerate(_pairs(splitter, x, y, groups)):
        row = np.zeros((2, count), jnp.result_type(float))
        for side, index in zip(row, _two(pair, number), strict=True):
            np.add.at(side, _checked(index, count, number), 1)
        if np.any(row[0] * row[1]):
            raise ValueError(f"fold {number} validates on examples that it is trained on: let its indices be disjoint")
        rows.append(row)
    if not rows:
        raise ValueError("there are no folds: give at least one pair (training indices, validation indices)")
    train, validation = np.stack(rows, 1)
    # `device_put`, because `jnp.asarray` compiles a program for each shape.
    return Fold(*jax.device_put((train, validation)))


def _pairs(splitter: Any, x: Any, y: Any, groups: Any) -> Iterable[Any]:
    if isinstance(splitter, bool | str) or not (
        hasattr(splitter, "split") or isinstance(splitter, int | np.integer | Iterable)
    ):
        raise ValueError(
            f"splitter is {splitter!r}; use a number of folds, a splitter of scikit-learn, or pairs of index arrays"
        )
    if hasattr(splitter, "split") or isinstance(splitter, int | np.integer):
        try:
            from sklearn.model_selection import check_cv
        except ModuleNotFoundError as error:
            raise ValueError(
                "folds of a number or of a splitter need scikit-learn (pip install hyperax[estimators]); without it, "
                "give pairs (training indices, validation indices)"
            ) from error
        labels = y is not None and _are_labels(np.asarray(y), splitter)
        # A splitter of the user's may look into the table; one that cannot be indexed is known by its length alone.
        table = x if hasattr(x, "__getitem__") else np.zeros(_length(x))
        found: Any = check_cv(splitter, y, classifier=labels)  # pyright: ignore[reportArgumentType]
        return found.split(table, y, groups)
    return splitter


def _are_labels(y: np.ndarray, splitter: Any) -> bool:
    """Whether y are labels to stratify by: no floats, and, for a number of folds, one of each label for each fold."""
    if y.ndim != 1 or y.dtype.kind == "f":
        return False
    return hasattr(splitter, "split") or int(np.unique(y, return_counts=True)[1].min()) >= splitter


def _length(x: Any) -> int:
    return x.shape[0] if hasattr(x, "shape") else len(x)


def _two(pair: Any, number: int) -> tuple[Any, Any]:
    try:
        train, validation = pair
    except (TypeError, ValueError):
        raise ValueError(f"fold {number} is {pair!r}; it must be (training indices, validation indices)") from None
    return train, validation


def _checked(index: Any, count: int, number: int) -> np.ndarray:
    index = np.asarray(index)
    if index.dtype == bool and index.shape == (count,):
        index = np.flatnonzero(index)
    if index.size == 0:
        raise ValueError(f"fold {number} has no examples on one side: use fewer folds, or larger groups")
    if index.ndim != 1 or index.dtype.kind not in "iu" or index.min() < -count or index.max() >= count:
        raise ValueError(f"fold {number} must have indices below {count}, the number of examples")
    return index
