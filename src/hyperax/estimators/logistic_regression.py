"""Logistic regression with L2 coefficients tuned by hypergradient."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import scipy.sparse
from scipy.special import expit, log_expit, log_softmax, softmax
from sklearn.base import ClassifierMixin
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import validate_data

from hyperax.estimators.linear_folds import NewtonFolds
from hyperax.estimators.linear_model import LinearModel, dense_if_small, mean_square
from hyperax.estimators.newton_problem import NEVER, cross_entropy
from hyperax.estimators.tables import example_weights, fold_weights


class HypergradientLogisticRegression(ClassifierMixin, LinearModel):
    """Logistic (softmax) regression with one, per-group or per-feature L2 coefficients, tuned by hypergradient.

        f(alpha) = - sum over folds k, validated i of s_i log p(y_i | x_i; w^k, b^k) / sum of s_i
        (w^k, b^k) = argmin - sum over trained i of s_i log p(y_i | x_i; w, b) + sum_j alpha_j |w_j|^2 / 2

    log alpha goes from the best common value on a grid downhill along the gradient of f by implicit differentiation
    (L-BFGS-B); the model is then trained on all samples. With more than one coefficient, the log coefficients are drawn
    together (`shrinkage`), as in `HypergradientRidge`, which says why; three times as strongly, since classes that are
    nearly separable let the alphas fit the folds more closely.

    Arguments:
        penalty: "one" coefficient, "per-feature", or an array with the number of the group of each feature. A
            coefficient serves all classes.
        cv: what `hyperax.folds` takes: a number of folds (stratified, not shuffled), a splitter of scikit-learn, pairs
            of index arrays. For one validation split `StratifiedShuffleSplit(1, test_size=0.25)`.
        fit_intercept: whether b is fitted; it is not penalised.
        alpha_bounds: of the coefficients, in units of sum_ij s_i x_ij^2 / d (of centred columns, for dense X).
        shrinkage: of the log coefficients to each other; 0 for none. With "one" there is nothing to shrink.
        max_iter: iterations of L-BFGS-B, for the common coefficient and again for those of groups or features.
        tol: an iteration that lowers f by less than tol f is the last.
        parallel: folds at a time; `None` for all, 1 for the least memory.
        class_weight: `None`, "balanced" or {class: weight}; factors of sample_weight, so in validation too.

    Attributes:
        alpha_: the coefficient, or [n_features]: 1 / C of `sklearn.linear_model.LogisticRegression`.
        classes_: [n_classes].
        coef_: [1, n_features] for two classes, else [n_classes, n_features].
        intercept_: [1] or [n_classes], of sum 0.
        validation_curve_: f at each hyperiteration (the grid from large to small alphas, then L-BFGS-B), in nats.
        best_score_: -f at alpha_.
        n_hyperiterations_: evaluations of f and its gradient.
        n_iter_: iterations of L-BFGS-B.
        n_features_in_, feature_names_in_: as usual.

    A class that a fold is not trained on has probability 0 there, and its samples are not validated in that fold; a
    warning says so. The grid ends where f rose twice, and the search where f is
    below tol times its value at the largest alpha (separable data).

    Raises: `ValueError` for options outside their ranges, folds trained on one class, and what scikit-learn raises for
    bad data.
    Cost: a hyperiteration takes some tens to hundreds of products with X and X^T a fold, from the solutions of the
    last; memory O(K d C) numbers besides X, in float64. A sparse X of more than four million entries is not made dense
    and not centred.
    Reference: Pedregosa 2016, Algorithm 1; Franceschi et al. 2018, App. B.
    Do not use it for unregularised models, or without a grouped splitter where samples depend on each other.

    >>> X = np.random.default_rng(0).normal(size=(80, 4))
    >>> model = HypergradientLogisticRegression().fit(X, np.where(X[:, 0] > 0, "up", "down"))
    >>> print(model.predict([[2.0, 0, 0, 0]]), model.predict_proba([[2.0, 0, 0, 0]]).round(2))
    ['up'] [[0. 1.]]
    """

    def __init__(
        self,
        penalty="one",
        *,
        cv=5,
        fit_intercept=True,
        alpha_bounds=(1e-8, 1e8),
        shrinkage=3.0,
        max_iter=100,
        tol=1e-5,
        parallel=None,
        class_weight=None,
    ):
        super().__init__(
            penalty,
            cv=cv,
            fit_intercept=fit_intercept,
            alpha_bounds=alpha_bounds,
            shrinkage=shrinkage,
            max_iter=max_iter,
            tol=tol,
            parallel=parallel,
        )
        self.class_weight = class_weight

    def fit(self, X, y, sample_weight=None, groups=None):
        """Tune and train.

        Arguments:
            X: [n_samples, n_features], dense or sparse.
            y: [n_samples], labels of two classes or more.
            sample_weight: [n_samples], s >= 0; in training and validation.
            groups: [n_samples], for a grouped splitter.
        """
        self._check_options()
        table: Any = validate_data(self, X, y, accept_sparse="csr", dtype=np.float64)
        X, y = table
        check_classification_targets(y)
        self._groups(X.shape[1])
        self.classes_, label = np.unique(y, return_inverse=True)
        s = example_weights(sample_weight, X)
        weight = compute_class_weight(self.class_weight, classes=self.classes_, y=y, sample_weight=s)
        if not (np.isfinite(weight).all() and (weight >= 0).all()):
            raise ValueError(f"class_weight is {self.class_weight!r}; weights of classes must be finite and >= 0")
        s = s * weight[label]
        _check_several(self.classes_, label, s)
        train, validation = fold_weights(self.cv, X, y, s, groups, classifier=True)
        seen, validation = _seen_classes(label, len(self.classes_), train, validation)
        self._fit(dense_if_small(X), label, s, train, validation, seen)
        return self

    def _fit(self, x, label, s, train, validation, seen) -> None:
        y, reference = np.eye(len(self.classes_))[label], NEVER
        if len(self.classes_) == 2:
            y, seen, reference = y[:, 1:], np.ones((len(train), 1)), 0.0
        mean = np.zeros(x.shape[1])
        if self.fit_intercept and not scipy.sparse.issparse(x):
            mean = (s @ x) / s.sum()
            x = x - mean
        share = (s @ y) / s.sum()
        evaluate = NewtonFolds(
            cross_entropy, x, y, share * (1 - share), s, train, validation, seen,
            intercept=self.fit_intercept, reference=reference, parallel=self.parallel,
        )  # fmt: skip
        validated = int(np.count_nonzero(validation.any(0)))
        coef, intercept = evaluate.refit(self._search(evaluate, mean_square(x, s), validated, 1.0, 1.0))
        self.coef_, self.intercept_ = coef.T, intercept - mean @ coef

    def decision_function(self, X):
        """X w + b: [n_samples] for two classes (positive for the second), else [n_samples, n_classes]."""
        z = self._linear(X)
        return z[:, 0] if len(self.classes_) == 2 else z

    def predict(self, X):
        """The most probable class; [n_samples]."""
        z = self.decision_function(X)
        return self.classes_[(z > 0).astype(int) if z.ndim == 1 else np.argmax(z, 1)]

    def predict_proba(self, X):
        """Probabilities of the classes; [n_samples, n_classes]."""
        z = self.decision_function(X)
        return np.stack([expit(-z), expit(z)], 1) if z.ndim == 1 else softmax(z, 1)

    def predict_log_proba(self, X):
        """Their logarithms, finite where the probabilities round to 0."""
        z = self.decision_function(X)
        return np.stack([log_expit(-z), log_expit(z)], 1) if z.ndim == 1 else log_softmax(z, 1)


def _check_several(classes: np.ndarray, label: np.ndarray, s: np.ndarray) -> None:
    left = np.flatnonzero(np.bincount(label, s, len(classes)))
    if len(left) < 2:
        raise ValueError(
            "This solver needs samples of at least 2 classes in the data, but the data contains only one class"
            f" (with sample_weight > 0): {classes[left[0]]!r}"
        )


def _seen_classes(
    label: np.ndarray, count: int, train: np.ndarray, validation: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """([K, C], 1 where a fold trains on a class, validation weights without samples of classes unseen in a fold)."""
    seen: Any = np.stack([np.bincount(label, row, count) > 0 for row in train])
    alone = np.flatnonzero(seen.sum(1) < 2)
    if alone.size:
        raise ValueError(
            f"fold {alone[0]} is trained on one class only: use a stratified splitter, fewer folds or more samples"
        )
    unseen = ~seen[:, label] & (validation > 0)
    if unseen.any():
        warnings.warn(
            f"{np.count_nonzero(unseen)} samples are of classes that their fold is not trained on, and are not "
            "validated in it: use fewer folds, or a stratified splitter",
            UserWarning,
            stacklevel=3,
        )
        validation = np.where(unseen, 0.0, validation)
        if not validation.any():
            raise ValueError("no fold validates on a class that it is trained on: use a stratified splitter")
        validation = validation / validation.sum()
    return seen.astype(float), validation
