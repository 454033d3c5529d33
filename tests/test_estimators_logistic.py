"""`HypergradientLogisticRegression`: its hypergradient, its scale, what it learns beside `LogisticRegressionCV`."""

import jax
import numpy as np
import pytest
import scipy.sparse
from sklearn.linear_model import LogisticRegression, LogisticRegressionCV
from sklearn.metrics import log_loss
from sklearn.model_selection import GroupKFold, LeaveOneOut, StratifiedKFold, StratifiedShuffleSplit
from sklearn.utils.estimator_checks import check_estimator

import hyperax as hx
from hyperax.estimators import HypergradientLogisticRegression, linear_model
from hyperax.estimators.linear_folds import NewtonFolds
from hyperax.estimators.newton_problem import NEVER, FoldData, cross_entropy, newton_hypergradient
from hyperax.estimators.tables import fold_weights
from hyperax.methods.implicit import Memory

RNG = np.random.default_rng(0)
X = RNG.normal(size=(120, 4)) + 1.0
LABEL = np.argmax(X[:, :3] + 0.8 * RNG.normal(size=(120, 3)), 1)
WORDS = np.array(["a", "b", "c"])[LABEL]
BINARY = LABEL == 0
LOG_ALPHA = np.array([0.3, -1.0, 2.0, 0.0])


def folds_of(x, label, parallel=None, weights=None):
    weights = np.ones(len(label)) if weights is None else weights
    train, validation = fold_weights(4, x, label, weights, classifier=True)
    return NewtonFolds(
        cross_entropy, x, np.eye(3)[label], np.full(3, 0.2), weights, train, validation, np.ones((4, 3)),
        intercept=True, reference=NEVER, parallel=parallel,
    )  # fmt: skip


def test_hypergradient_is_that_of_differences():
    evaluate = folds_of(X, LABEL, weights=RNG.uniform(0.1, 1, 120))
    _, slope = evaluate(LOG_ALPHA)
    value = lambda log_alpha: evaluate(log_alpha)[0]
    differences = [(value(LOG_ALPHA + e) - value(LOG_ALPHA - e)) / 2e-3 for e in 1e-3 * np.eye(4)]
    np.testing.assert_allclose(slope, differences, rtol=1e-4, atol=1e-7)


def test_parallel_sequential_and_stochastic_agree():
    fold, _ = folds_of(X, LABEL).fold
    data = lambda fold: FoldData(
        *(hx.Shared(a) for a in (X, np.eye(3)[LABEL])), fold, hx.Shared(np.ones((5, 3))), np.ones((5, 3)),
        hx.Shared(np.asarray(1.0)), hx.Shared(np.asarray(NEVER)),
    )  # fmt: skip
    fold = jax.tree.map(lambda x: x[:, :120], fold)
    given = jax.device_put(data(fold))
    start = Memory(np.zeros((5, 5, 3)), np.zeros((5, 5, 3)), np.zeros(5, np.int32))
    lam = jax.device_put(LOG_ALPHA - np.log(120))
    run = lambda parallel, d: newton_hypergradient(cross_entropy, parallel, 1e-10)(lam, d, start)
    h = run(None, given)
    for other in (run(1, given), run(None, hx.sample_tasks(5)(jax.random.key(0), given))):
        np.testing.assert_allclose(other.value, h.value, rtol=1e-9)
        np.testing.assert_allclose(other.grad, h.grad, rtol=1e-9, atol=1e-11)


def test_sparse_problem_is_the_dense_one():
    (value, slope), (same, near) = (folds_of(x, LABEL)(LOG_ALPHA) for x in (X, scipy.sparse.csr_array(X)))
    np.testing.assert_allclose(same, value, rtol=1e-8)
    np.testing.assert_allclose(near, slope, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("y", [BINARY, WORDS], ids=["binary", "multiclass"])
def test_alpha_is_one_over_c(y):
    weights = RNG.uniform(0.1, 2, 120)
    model = HypergradientLogisticRegression("per-feature").fit(X, y, weights)
    root = np.sqrt(model.alpha_)
    same = LogisticRegression(C=1.0, tol=1e-10, max_iter=10_000).fit(X / root, y, weights)
    np.testing.assert_allclose(model.predict_proba(X), same.predict_proba(X / root), atol=1e-5)
    np.testing.assert_allclose(model.coef_, same.coef_ / root, atol=1e-4)
    np.testing.assert_allclose(model.intercept_, same.intercept_, atol=1e-4)
    np.testing.assert_array_equal(model.classes_, same.classes_)
    np.testing.assert_array_equal(model.predict(X), same.predict(X / root))
    np.testing.assert_allclose(model.predict_log_proba(X), np.log(model.predict_proba(X)), rtol=1e-9)
    assert model.coef_.shape == (1 if y is BINARY else 3, 4)
    assert model.validation_curve_.shape == (model.n_hyperiterations_,)


def test_large_sparse_tables_stay_sparse(monkeypatch):
    monkeypatch.setattr(linear_model, "DENSE", 0)
    model = HypergradientLogisticRegression(cv=4).fit(scipy.sparse.csr_array(X), LABEL)
    same = LogisticRegression(C=1 / model.alpha_, tol=1e-10, max_iter=10_000).fit(X, LABEL)
    np.testing.assert_allclose(model.predict_proba(X), same.predict_proba(X), atol=1e-5)


def test_one_coefficient_is_as_good_as_the_grid():
    splitter = StratifiedKFold(5)
    errors = []
    for C in np.logspace(-2, 2, 9):
        p = np.zeros((120, 3))
        for train, test in splitter.split(X, LABEL):
            p[test] = (
                LogisticRegression(C=C, tol=1e-8, max_iter=1000).fit(X[train], LABEL[train]).predict_proba(X[test])
            )
        errors.append(log_loss(LABEL, p))
    model = HypergradientLogisticRegression(cv=splitter).fit(X, LABEL)
    assert -model.best_score_ <= min(errors) + 1e-6


@pytest.mark.parametrize(
    "cv", [StratifiedShuffleSplit(1, test_size=0.25, random_state=0), GroupKFold(4), LeaveOneOut()]
)
def test_splitters(cv):
    x, y = X[:40], BINARY[:40]
    groups = np.arange(40) % 8 if isinstance(cv, GroupKFold) else None
    model = HypergradientLogisticRegression(cv=cv).fit(x, y, groups=groups)
    assert model.score(x, y) > 0.75


def test_class_weights():
    balanced = HypergradientLogisticRegression(class_weight="balanced").fit(X, BINARY)
    counts = np.bincount(BINARY)
    same = HypergradientLogisticRegression().fit(X, BINARY, (60 / counts)[BINARY.astype(int)])
    np.testing.assert_allclose(balanced.predict_proba(X), same.predict_proba(X), atol=1e-6)


def test_classes_that_a_fold_does_not_know():
    label = LABEL[:60].copy()
    label[label == 2] = 0
    label[7] = 2
    pairs = [(np.arange(30), np.arange(30, 60)), (np.arange(30, 60), np.arange(30))]
    with pytest.warns(UserWarning, match="1 samples are of classes that their fold is not trained on"):
        model = HypergradientLogisticRegression(cv=pairs).fit(X[:60], label)
    assert model.predict_proba(X).shape == (120, 3)
    assert np.isfinite(model.validation_curve_).all()
    first, second = np.flatnonzero(label == 0), np.flatnonzero(label == 1)
    with pytest.raises(ValueError, match="one class only"):
        HypergradientLogisticRegression(cv=[(first, second)]).fit(X[:60], label)


def noise(rng):
    return rng.normal(size=(80, 10)), rng.integers(0, 2, 80)


def unbalanced(rng):
    x = rng.normal(size=(120, 4))
    return x, (x[:, 0] + 0.5 * rng.normal(size=120) > 1.2).astype(int)


def separable(rng):
    x = np.concatenate([rng.normal(size=(80, 3)), np.ones((80, 1))], 1)
    return x, (x[:, 0] > 0).astype(int)


def collinear(rng):
    x = np.repeat(rng.normal(size=(80, 3)), 4, 1) + 1e-3 * rng.normal(size=(80, 12))
    return x, (x[:, 0] + rng.normal(size=80) > 0).astype(int)


@pytest.mark.parametrize("make", [noise, unbalanced, separable, collinear])
@pytest.mark.filterwarnings("ignore:::sklearn")
def test_never_much_worse_than_logistic_regression_cv(make):
    losses = {"one": [], "per-feature": [], "theirs": []}
    theirs = LogisticRegressionCV(Cs=np.logspace(-4, 4, 9), cv=3, scoring="neg_log_loss", max_iter=2000)
    for seed in range(2):
        x, y = make(np.random.default_rng(seed))
        half = len(y) // 2
        for name in losses:
            model = theirs if name == "theirs" else HypergradientLogisticRegression(name)
            losses[name].append(log_loss(y[half:], model.fit(x[:half], y[:half]).predict_proba(x[half:])))
    means = {name: np.mean(values) for name, values in losses.items()}
    assert means["one"] < 1.1 * means["theirs"] + 0.01
    assert means["per-feature"] < 1.2 * means["theirs"] + 0.01


def test_scikit_learn_checks():
    check_estimator(HypergradientLogisticRegression(), on_skip=None)
