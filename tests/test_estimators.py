"""What the estimators share: scikit-learn's tools around them, bad input, float64 whatever JAX is set to."""

import pickle
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, KFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import hyperax.estimators
from hyperax.estimators import HypergradientLogisticRegression, HypergradientRidge

RNG = np.random.default_rng(0)
X = RNG.normal(size=(50, 5))
Y = X[:, 0] + 0.5 * RNG.normal(size=50)
BOTH = [(HypergradientRidge, Y), (HypergradientLogisticRegression, Y > 0)]
both = pytest.mark.parametrize(("kind", "y"), BOTH, ids=["ridge", "logistic"])


@both
def test_scikit_learn_tools(kind, y):
    pipeline = make_pipeline(StandardScaler(), kind())
    assert cross_val_score(pipeline, X, y, cv=KFold(3)).min() > 0.4
    search = GridSearchCV(kind(), {"penalty": ["one", "per-feature"]}, cv=KFold(2)).fit(X, y)
    assert search.best_params_["penalty"] in ("one", "per-feature")
    model = clone(kind()).set_params(penalty=np.array([0, 0, 1, 1, 1])).fit(X, y)
    copy = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(copy.predict(X), model.predict(X))
    assert not any(isinstance(value, jax.Array) for value in vars(model).values())


@both
def test_precision_and_threads(kind, y):
    model = kind("per-feature").fit(X, y)
    assert model.coef_.dtype == np.float64

    def fit(enabled):
        with jax.enable_x64(enabled):
            return kind("per-feature").fit(X.astype(np.float32).astype(float), y).coef_

    with ThreadPoolExecutor(3) as pool:
        same = list(pool.map(fit, [False, True, False]))
    for coef in same:
        np.testing.assert_allclose(coef, same[0], rtol=1e-12)
        np.testing.assert_allclose(coef, model.coef_, rtol=1e-3, atol=1e-4)


def test_feature_names():
    pandas = pytest.importorskip("pandas")
    model = HypergradientRidge().fit(pandas.DataFrame(X, columns=list("abcde")), Y)
    assert model.feature_names_in_.tolist() == list("abcde")


BAD_DATA = [
    (lambda x, y: (np.where(x == x[0, 0], np.nan, x), y, None), "contains NaN"),
    (lambda x, y: (np.where(x == x[0, 0], np.inf, x), y, None), "contains infinity"),
    (lambda x, y: (x[:3], y[:3], None), "Cannot have number of splits|one class|cannot be greater"),
    (lambda x, y: (x, y, np.ones(3)), "sample_weight.shape"),
    (lambda x, y: (x, y, -np.ones(len(y))), "Negative values"),
    (lambda x, y: (x, y, np.zeros(len(y))), "sample_weight|Sample weights"),
    (lambda x, y: (np.full(x.shape, "a"), y, None), "could not convert string to float"),
    (lambda x, y: (x, y[:-1], None), "inconsistent numbers of samples"),
]


@both
@pytest.mark.parametrize(("bad", "words"), BAD_DATA, ids=[words[:12] for _, words in BAD_DATA])
def test_bad_data(kind, y, bad, words):
    x, y, weights = bad(X, y)
    with pytest.raises(ValueError, match=words):
        kind().fit(x, y, weights)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alpha_bounds": (-1.0, 1.0)}, "regularisers cannot be negative"),
        ({"alpha_bounds": (2.0, 1.0)}, "low < high"),
        ({"alpha_bounds": "wide"}, "two numbers"),
        ({"alpha_bounds": 1.0}, "two numbers"),
        ({"penalty": "l1"}, "per-feature"),
        ({"penalty": [0, 1]}, "each of the 5 features"),
        ({"penalty": np.zeros(5)}, "whole number"),
        ({"cv": 1}, "at least 2"),
        ({"cv": [(np.arange(50), [])]}, "no examples on one side"),
        ({"tol": 0.0}, "'tol' parameter of Hypergradient"),
        ({"shrinkage": -1.0}, "'shrinkage' parameter of"),
        ({"max_iter": 0}, "'max_iter' parameter of"),
        ({"parallel": 1.5}, "'parallel' parameter of"),
        ({"fit_intercept": "no"}, "'fit_intercept' parameter of"),
    ],
)
@both
def test_bad_options(kind, y, options, words):
    with pytest.raises(ValueError, match=words):
        kind(**options).fit(X, y)


def test_one_class():
    with pytest.raises(ValueError, match="only one class"):
        HypergradientLogisticRegression().fit(X, np.ones(50))
    with pytest.raises(ValueError, match="Unknown label type"):
        HypergradientLogisticRegression().fit(X, Y)


def test_negative_class_weights():
    with pytest.raises(ValueError, match="weights of classes must be finite and >= 0"):
        HypergradientLogisticRegression(class_weight={0: -1.0, 1: 1.0}).fit(X, X[:, 0] > 0)


def test_weight_zero_on_a_side():
    weights = np.ones(50)
    weights[:25] = 0
    pairs = [(np.arange(25), np.arange(25, 50))]
    with pytest.raises(ValueError, match="fold 0 is trained on samples of weight 0"):
        HypergradientRidge(cv=pairs).fit(X, Y, weights)
    with pytest.raises(ValueError, match="the folds validate on"):
        HypergradientRidge(cv=pairs).fit(X, Y, 1 - weights)


def test_names():
    assert set(hyperax.estimators.__all__) >= {"HypergradientRidge", "HypergradientLogisticRegression"}
    with pytest.raises(AttributeError, match="no attribute 'Lasso'"):
        _ = hyperax.estimators.Lasso
