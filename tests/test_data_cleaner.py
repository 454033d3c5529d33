"""DataCleaner: its weights are those of the equations, it finds wrong labels, and scikit-learn's tools accept it."""

import numpy as np
import pytest
import scipy.optimize
from scipy.special import logsumexp
from sklearn.linear_model import RidgeClassifier
from sklearn.model_selection import cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.tree import DecisionTreeClassifier
from sklearn.utils.estimator_checks import check_estimator

from hyperax.estimators.cleaning import clean
from hyperax.estimators.data_cleaner import DataCleaner


def blobs(n=120, wrong=0.3, seed=0):
    """(x, given, true): three classes in the plane, the first labels of a random order replaced by another."""
    draw = np.random.default_rng(seed)
    true = np.arange(n) % 3
    x = np.array([[0.0, 0.0], [3.0, 0.0], [0.0, 3.0]])[true] + 0.6 * draw.normal(size=(n, 2))
    given, replaced = true.copy(), draw.permutation(n)[: round(wrong * n)]
    given[replaced] = (given[replaced] + draw.integers(1, 3, len(replaced))) % 3
    return x, given, true


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.SkipTestWarning")
def test_check_estimator():
    check_estimator(DataCleaner())


def test_harm_is_the_derivative_of_the_validation_error():
    """Against differences of E at minimisers found by scipy, in float64; weights that do not move."""
    x, given, true = blobs(24)
    x, y, x_val, y_val = x[:14], given[:14], x[14:], true[14:]
    R, l2 = 8.0, 0.05
    found = clean(x, y, x_val, y_val, total=R, l2=l2, hyperiterations=60, step_size=0.0)
    scale = np.linalg.norm(x - x.mean(0), 2) / np.sqrt(len(x))
    table = lambda z: np.column_stack([(z - x.mean(0)) / scale, np.ones(len(z))])
    losses = lambda w, z, y: logsumexp(table(z) @ w, axis=1) - (table(z) @ w)[np.arange(len(y)), y]

    def error(lam):
        inner = lambda w: lam @ losses(w.reshape(3, 3), x, y) / R + 0.5 * l2 * w @ w
        w = scipy.optimize.minimize(inner, np.zeros(9), tol=1e-12).x.reshape(3, 3)
        return losses(w, x_val, y_val).mean()

    lam = np.full(14, R / 14)
    np.testing.assert_allclose(found.weights, lam, rtol=1e-6)
    assert found.values[-1] == pytest.approx(error(lam), rel=1e-4)
    for i in (0, 5, 13):
        step = 1e-2 * np.eye(14)[i]
        slope = (error(lam + step) - error(lam - step)) / 2e-2
        assert found.harm[i] == pytest.approx(R * slope, rel=1e-2, abs=1e-4), i


@pytest.fixture(scope="module")
def fitted():
    x, given, true = blobs(150)
    trusted = np.arange(150) % 5 == 0
    y = np.where(trusted, true, given)
    return x, np.array(["a", "b", "c"])[y], true, trusted, y != true


def test_suspects_are_the_wrong_labels(fitted):
    x, y, true, trusted, wrong = fitted
    cleaner = DataCleaner().fit(x, y, trusted=trusted)
    found = np.isin(np.arange(150), cleaner.suspects_)
    assert (found & wrong).sum() > 0.95 * wrong.sum()
    assert wrong[cleaner.suspects_[:20]].all()
    assert (cleaner.weights_[trusted] == 1).all()
    np.testing.assert_array_equal(cleaner.kept_, ~found)
    assert (np.diff(cleaner.weights_[cleaner.suspects_]) >= 0).all()
    assert (cleaner.weights_[cleaner.suspects_] < 1e-3).all()
    assert cleaner.validation_curve_[-1] < 0.5 * cleaner.validation_curve_[0]
    assert cleaner.n_hyperiterations_ == len(cleaner.validation_curve_) == 30
    assert cleaner.score(x, np.array(["a", "b", "c"])[true]) > 0.95


def test_the_budget_bounds_the_weights(fitted):
    x, y, _, trusted, wrong = fitted
    cleaner = DataCleaner(budget=0.25).fit(x, y, trusted=trusted)
    judged = cleaner.weights_[~trusted]
    assert judged.sum() <= 30 * (1 + 1e-5)
    assert judged.min() >= 0
    assert judged.max() <= 1
    assert np.isin(np.flatnonzero(wrong), cleaner.suspects_).mean() > 0.95
    assert wrong[cleaner.suspects_[: wrong.sum()]].mean() > 0.9  # many weights are 0; the order still tells them apart


def test_without_trusted_examples_a_share_of_each_class_is_drawn(fitted):
    x, y, *_ = fitted
    cleaner = DataCleaner(validation=0.4).fit(x, y)
    assert cleaner.trusted_.sum() == sum(round(0.4 * (y == label).sum()) for label in "abc")
    assert not cleaner.trusted_[cleaner.suspects_].any()
    np.testing.assert_array_equal(cleaner.weights_, DataCleaner(validation=0.4).fit(x, y).weights_)


def test_in_a_pipeline_and_in_cross_validation(fitted):
    x, y, _, trusted, wrong = fitted
    pipeline = make_pipeline(StandardScaler(), DataCleaner(RidgeClassifier()))
    pipeline.fit(1000 * x, y, datacleaner__trusted=trusted)
    assert wrong[pipeline[-1].suspects_[:20]].all()
    assert pipeline.predict(1000 * x).shape == y.shape
    assert hasattr(pipeline, "decision_function")
    assert not hasattr(pipeline, "predict_proba")
    scores = cross_validate(DataCleaner(), x, y, cv=2, params={"trusted": trusted}, error_score="raise")
    assert len(scores["test_score"]) == 2


def test_fit_resample_drops_the_suspects(fitted):
    x, y, _, trusted, _ = fitted
    cleaner = DataCleaner(DecisionTreeClassifier(random_state=0))
    kept, labels = cleaner.fit_resample(x.tolist(), list(y), trusted)
    assert isinstance(kept, list)
    np.testing.assert_array_equal(kept, x[cleaner.kept_])
    np.testing.assert_array_equal(labels, y[cleaner.kept_])
    assert len(kept) == 150 - len(cleaner.suspects_) < 150
    assert cleaner.estimator_.score(kept, labels) == 1.0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"validation": 1.0}, "'validation' parameter of DataCleaner"),
        ({"budget": 1.5}, "'budget' parameter of"),
        ({"budget": -0.5}, "'budget' parameter of"),
        ({"l2": 0.0}, "'l2' parameter of"),
        ({"threshold": "low"}, "'threshold' parameter of"),
        ({"hyperiterations": 0}, "'hyperiterations' parameter of"),
    ],
)
def test_settings_that_cannot_be(settings, words):
    with pytest.raises(ValueError, match=words):
        DataCleaner(**settings).fit(np.eye(4), [0, 1, 0, 1])


@pytest.mark.parametrize(
    ("trusted", "words"),
    [
        ([True, False], "inconsistent numbers of samples"),
        ([False] * 4, "marks none"),
        ([True] * 4, "marks all"),
        ([0, 1, 2, 3], "np.isin"),
    ],
)
def test_masks_that_cannot_be(trusted, words):
    with pytest.raises(ValueError, match=words):
        DataCleaner().fit(np.eye(4), [0, 1, 0, 1], trusted=trusted)


def test_a_class_without_trusted_samples():
    x = np.repeat(np.eye(3), 4, axis=0)
    with pytest.warns(UserWarning, match=r"no sample of these classes is trusted: \['c'\]"):
        DataCleaner().fit(x, np.repeat(list("abc"), 4), trusted=np.isin(np.arange(12), [0, 4]))


def test_classes_with_one_sample_each_cannot_be_split():
    with pytest.raises(ValueError, match="no class has two samples"):
        DataCleaner().fit(np.eye(3), [0, 1, 2])
