"""What the estimators share: padded tables, weights of examples, folds as weights."""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np
from sklearn.model_selection import check_cv
from sklearn.utils._param_validation import Interval
from sklearn.utils.validation import _check_sample_weight

from hyperax.cross_validation import folds
from hyperax.precision import float64

POSITIVE = Interval(numbers.Real, 0, np.inf, closed="neither")
NOT_NEGATIVE = Interval(numbers.Real, 0, np.inf, closed="left")
COUNT = Interval(numbers.Integral, 1, None, closed="left")
"""For `_parameter_constraints`, which scikit-learn checks and words (`_validate_params`)."""


def bucket(size: int, smallest: int = 1, coarse: int = 1) -> int:
    """The size to pad to: `smallest`, powers of two up to `coarse`, then at most 1/8 more than the size.

        bucket(size) = q ceil(size / q),   q = 2^(floor(log2(size - 1)) - 3)   above `coarse`

    Tables of nearly the same size (the training sets of a cross-validation) have the same bucket, and so share one
    compiled program.

    >>> bucket(10, 128), bucket(200, 128, coarse=512), bucket(700, 128, coarse=512), bucket(1700)
    (128, 256, 704, 1792)
    """
    if size <= smallest:
        return smallest
    quantum = 1 << max((size - 1).bit_length() - (0 if size <= coarse else 4), 0)
    return -(-size // quantum) * quantum


def padded(array: np.ndarray, *sizes: int, value: float = 0.0) -> np.ndarray:
    """The array with `value` appended along its axes until they have these sizes; a copy only if there is need.

    >>> padded(np.ones((1, 2)), 2, 2).tolist()
    [[1.0, 1.0], [0.0, 0.0]]
    """
    if array.shape == sizes:
        return array
    widths = [(0, size - have) for have, size in zip(array.shape, sizes, strict=True)]
    return np.pad(array, widths, constant_values=value)


def example_weights(sample_weight: Any, x: Any) -> np.ndarray:
    """Weights of the examples as float64 [n], ones for `None`.

    Raises: scikit-learn's `ValueError` for a wrong length, NaN and negative weights; one for weights that are all 0.

    >>> example_weights(None, np.zeros((2, 3))).tolist()
    [1.0, 1.0]
    """
    weights = np.asarray(_check_sample_weight(sample_weight, x, dtype=np.float64, ensure_non_negative=True))
    if not weights.any():
        raise ValueError("sample_weight is 0 for every sample: there is nothing to fit")
    return weights


def fold_weights(
    cv: Any, x: Any, y: Any, weights: np.ndarray, groups: Any = None, *, classifier: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """(train, validation) [K, n]: weights of the examples on both sides of each fold, `hyperax.folds` times `weights`.

    Validation weights are divided by their sum over all folds, so that the sum over folds and examples of
    validation * error is the mean error of a validated example (of leave-one-out: PRESS / n).

    Arguments:
        cv: what `hyperax.folds` takes: a number, a splitter of scikit-learn, pairs of index arrays.
        x, y, groups: what the splitter sees.
        weights: [n], of the examples.
        classifier: whether a number of folds means stratified ones.

    Raises: what a splitter raises (fewer examples than folds); `ValueError` for a fold whose training examples, or
    for folds whose validation examples, all have weight 0.

    >>> train, validation = fold_weights(2, np.zeros((4, 1)), np.arange(4.0), np.ones(4))
    >>> train.tolist(), float(validation.sum())
    ([[0.0, 0.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0]], 1.0)
    """
    if isinstance(cv, bool) or (isinstance(cv, int | np.integer) and cv < 2):
        raise ValueError(f"cv is {cv!r}; use a number of folds, at least 2, a splitter of scikit-learn, or pairs")
    with float64():
        splitter: Any = check_cv(cv, y, classifier=classifier)  # pyright: ignore[reportArgumentType]
        fold = folds(splitter, x, y, groups)
        train, validation = np.asarray(fold.train) * weights, np.asarray(fold.validation) * weights
    empty = np.flatnonzero(train.sum(1) == 0)
    if empty.size:
        raise ValueError(f"fold {empty[0]} is trained on samples of weight 0 alone: leave them out, or use fewer folds")
    if not validation.any():
        raise ValueError("all samples that the folds validate on have weight 0: leave them out, or use other folds")
    return train, validation / validation.sum()


def fold_bucket(count: int, parallel: int | None = None, *, small: bool = True) -> int:
    """How many folds to pad to (with folds of weight 0): a multiple of `parallel`; of small tables, few share 5.

    >>> fold_bucket(1), fold_bucket(3), fold_bucket(10), fold_bucket(10, parallel=4)
    (1, 5, 10, 12)
    """
    together = min(parallel or count, count)
    if together == 1:
        return count  # one after the other: an empty fold would cost a turn
    size = count if not small else 5 if 1 < count <= 5 else bucket(count)
    return -(-size // together) * together if parallel else size


def check_bounds(name: str, bounds: Any) -> tuple[float, float]:
    """(low, high) with 0 < low < high, or a `ValueError`."""
    try:
        low, high = (float(bound) for bound in bounds)
    except (TypeError, ValueError):
        raise ValueError(f"{name} is {bounds!r}; it must be two numbers, (low, high)") from None
    if not 0 < low < high < float("inf"):
        raise ValueError(f"{name} is {bounds!r}; it must have 0 < low < high: regularisers cannot be negative")
    return low, high
