"""DataCleaner: a classifier fitted without the training examples whose labels look wrong."""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Callable
from typing import Any, ClassVar, Self

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, MetaEstimatorMixin, clone
from sklearn.linear_model import LogisticRegression
from sklearn.utils import _safe_indexing, check_random_state
from sklearn.utils._param_validation import HasMethods, Interval
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_consistent_length, check_is_fitted, column_or_1d, validate_data

from hyperax.estimators.cleaning import clean, suspects
from hyperax.estimators.tables import COUNT, POSITIVE


def _estimator_has(name: str) -> Callable[[Any], bool]:
    def check(self: Any) -> bool:
        getattr(self.estimator_ if hasattr(self, "estimator_") else self._unfitted(), name)
        return True

    return check


class DataCleaner(MetaEstimatorMixin, ClassifierMixin, BaseEstimator):
    """A classifier fitted without the training examples whose labels look wrong, found with a few trusted ones.

        lam = argmin over 0 <= lam_i <= 1, sum lam_i <= R of the error of w_lam on the trusted examples
        w_lam = argmin over w of  (1 / R) sum_i lam_i CE_i(w) + (l2 / 2) |w|^2,   i the other examples, w linear
        suspects = {i : lam_i < threshold}

    The estimator is then fitted on the trusted examples and on those that are no suspects.

    Arguments:
        estimator: the classifier to fit at the end; `None` is `LogisticRegression(max_iter=1000)`. Suspects are found
            with a linear softmax model, whatever it is.
        validation: where `fit` is not told which examples are trusted, this share of each class, drawn at random, is
            taken as trusted: it judges the others and is not judged itself.
        budget: R, a share of the examples that are judged; 1 is no limit. A smaller number than the share of right
            labels finds more suspects than there are.
        l2: in units of the largest eigenvalue of the covariance of the features. Take more for few trusted examples:
            weights fit them by chance the more easily, the less the model is held.
        threshold: examples with a smaller weight are suspects.
        hyperiterations: gradient steps on the weights.
        random_state: draws the trusted examples; not used when they are given.

    `fit(X, y, trusted=mask)` takes a mask [n], True where the label was checked. In a `Pipeline` give
    `datacleaner__trusted=mask` to `fit`, in `cross_validate` `params={"trusted": mask}`. A validation set of its own is
    stacked below the training set and marked there.

    Attributes:
        weights_: lam, [n]; 1 for trusted examples.
        suspects_: indices, most suspicious first: by weight, and where weights are equal (many are 0) by `harm_`.
        harm_: [n], the rate at which the trusted error rises with the weight, R dE / dlam_i, at the end; 0 for trusted
            examples. It is the influence of the example on a model that was fitted with the weights found.
        kept_: mask [n], trusted or no suspect. trusted_: mask [n].
        estimator_, classes_, n_features_in_, feature_names_in_: as usual.
        validation_curve_: the trusted error E at each hyperiteration. n_hyperiterations_: their number.

    `transform` of scikit-learn cannot drop examples, since a `Pipeline` gives y to no transformer and takes none back.
    `fit_resample(X, y)` returns those kept, which the pipelines of imbalanced-learn use as a step; in a `Pipeline` of
    scikit-learn put the model into `DataCleaner(model)` as the last step.

    Raises: scikit-learn's `ValueError` for NaN, infinite values, one class; one for a mask of wrong length, or that
    marks all or none. A warning for classes without a trusted example.
    Cost: see `clean`; on 5000 + 5000 examples of MNIST less than a second a hyperiteration on two cores. One
    compilation, of a few seconds, for tables of nearly the same size.
    Reference: Franceschi et al. 2017 (ICML), Sec. 5.1 (data hyper-cleaning).
    Do not use it on features of very different units (put a `StandardScaler` before it), where a linear model is no
    better than chance, or where the trusted examples are far fewer than the features: then weights fit noise.

    >>> from sklearn.datasets import load_iris
    >>> X, y = load_iris(return_X_y=True)
    >>> trusted = np.arange(150) % 3 == 0
    >>> wrong = y.copy()
    >>> wrong[[10, 110]] = 1, 0
    >>> cleaner = DataCleaner().fit(X, wrong, trusted=trusted)
    >>> sorted(cleaner.suspects_[:2].tolist()), cleaner.score(X, y) > 0.9
    ([10, 110], True)
    """

    _parameter_constraints: ClassVar[dict[str, list[Any]]] = {
        "estimator": [HasMethods(["fit", "predict"]), None],
        "validation": [Interval(numbers.Real, 0, 1, closed="neither")],
        "budget": [Interval(numbers.Real, 0, 1, closed="right")],
        "l2": [POSITIVE],
        "threshold": [POSITIVE],
        "hyperiterations": [COUNT],
        "random_state": ["random_state"],
    }

    def __init__(
        self,
        estimator: Any = None,
        *,
        validation: float = 0.2,
        budget: float = 1.0,
        l2: float = 0.01,
        threshold: float = 1e-3,
        hyperiterations: int = 30,
        random_state: Any = 0,
    ):
        self.estimator = estimator
        self.validation = validation
        self.budget = budget
        self.l2 = l2
        self.threshold = threshold
        self.hyperiterations = hyperiterations
        self.random_state = random_state

    def fit(self, X: Any, y: Any, trusted: Any = None) -> Self:
        """Find the suspects, and fit the estimator without them.

        Arguments:
            X: [n, d], dense.
            y: [n], labels, some of them wrong.
            trusted: mask [n], True where the label is known to be right; `None` draws them (see `validation`).
        """
        self._validate_params()
        X, y = validate_data(self, X, y, dtype=np.float64, ensure_min_samples=2)
        check_classification_targets(y)
        labels, codes = np.unique(y, return_inverse=True)
        if len(labels) < 2:
            raise ValueError(f"DataCleaner needs samples of at least 2 classes, and y has one class: {labels[0]!r}")
        self.trusted_ = self._drawn(codes) if trusted is None else _mask(trusted, y)
        _warn_of_untrusted(labels[np.setdiff1d(codes, codes[self.trusted_])])
        judged = ~self.trusted_
        found = clean(
            X[judged],
            codes[judged],
            X[self.trusted_],
            codes[self.trusted_],
            total=self.budget * judged.sum(),
            l2=self.l2,
            hyperiterations=self.hyperiterations,
        )
        self.weights_, self.harm_ = np.ones(len(y)), np.zeros(len(y))
        self.weights_[judged], self.harm_[judged] = found.weights, found.harm
        self.suspects_ = suspects(self.weights_, self.harm_, self.threshold)
        self.kept_ = np.ones(len(y), bool)
        self.kept_[self.suspects_] = False
        self.validation_curve_, self.n_hyperiterations_ = found.values, len(found.values)
        self.estimator_ = self._unfitted().fit(X[self.kept_], y[self.kept_])
        self.classes_ = self.estimator_.classes_
        return self

    def fit_resample(self, X: Any, y: Any, trusted: Any = None) -> tuple[Any, Any]:
        """(X, y) without the suspects, after `fit`; containers as given."""
        self.fit(X, y, trusted)
        kept = np.flatnonzero(self.kept_)
        return _safe_indexing(X, kept), _safe_indexing(y, kept)

    def predict(self, X: Any) -> np.ndarray:
        """Labels [n] by the fitted estimator."""
        return self._of_estimator("predict", X)

    @available_if(_estimator_has("predict_proba"))
    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities [n, classes] by the fitted estimator."""
        return self._of_estimator("predict_proba", X)

    @available_if(_estimator_has("decision_function"))
    def decision_function(self, X: Any) -> np.ndarray:
        """Scores by the fitted estimator."""
        return self._of_estimator("decision_function", X)

    def _of_estimator(self, name: str, X: Any) -> np.ndarray:
        check_is_fitted(self)
        return getattr(self.estimator_, name)(validate_data(self, X, reset=False, dtype=np.float64))

    def _unfitted(self) -> Any:
        return LogisticRegression(max_iter=1000) if self.estimator is None else clone(self.estimator)

    def _drawn(self, codes: np.ndarray) -> np.ndarray:
        """A random part of each class: at least one example, unless it has one only."""
        random = check_random_state(self.random_state)
        mask = np.zeros(len(codes), bool)
        for c in range(codes.max() + 1):
            members = random.permutation(np.flatnonzero(codes == c))
            count = min(max(1, round(self.validation * len(members))), len(members) - 1)
            mask[members[:count]] = True
        if not mask.any():
            raise ValueError(
                f"no class has two samples among n_samples = {len(codes)}: none can be held out for validation"
            )
        return mask


def _warn_of_untrusted(classes: np.ndarray) -> None:
    if len(classes):
        warnings.warn(
            f"no sample of these classes is trusted: {classes.tolist()}. Nothing speaks for their samples, and all of "
            "them may become suspects: mark some as trusted, or leave these classes out",
            UserWarning,
            stacklevel=3,
        )


def _mask(trusted: Any, y: np.ndarray) -> np.ndarray:
    mask = column_or_1d(trusted)
    check_consistent_length(y, mask)
    if not (mask.dtype == bool or (mask.dtype.kind in "iuf" and np.isin(mask, (0, 1)).all())):
        raise ValueError("trusted must be a mask of True and False; of indices make np.isin(np.arange(n), indices)")
    mask = mask.astype(bool)
    if mask.all() or not mask.any():
        which = "all" if mask.any() else "none"
        raise ValueError(
            f"trusted marks {which} of the {len(mask)} samples; it must mark some, and leave some to judge"
        )
    return mask
