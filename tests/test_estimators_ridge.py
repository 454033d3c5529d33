"""`HypergradientRidge`: its hypergradient against PRESS and differences, and what it learns against `RidgeCV`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.model_selection import GroupKFold, KFold, LeaveOneOut, ShuffleSplit
from sklearn.utils.estimator_checks import check_estimator

import hyperax as hx
from hyperax.estimators import HypergradientRidge, linear_model
from hyperax.estimators.linear_folds import NewtonFolds
from hyperax.estimators.newton_problem import half_square
from hyperax.estimators.ridge import _exact
from hyperax.estimators.ridge_problem import ridge_data, ridge_hypergradient
from hyperax.estimators.tables import fold_weights

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 6)) @ np.diag([1.0, 2.0, 0.5, 1.0, 3.0, 1.0]) + 1.0
Y = X[:, :2] @ np.array([1.0, -1.0]) + RNG.normal(size=40)
LOG_ALPHA = np.array([0.3, -1.0, 2.0, 0.0, 5.0, -3.0])


def data_of(x, y, cv, intercept, weights=None):
    weights = np.ones(len(y)) if weights is None else weights
    return ridge_data(x, y.reshape(len(y), -1), *fold_weights(cv, x, y, weights), intercept)


def press(x, y, log_alpha, intercept):
    """The mean of (r_i / (1 - h_i))^2 and its derivative in log alpha: h_i and r from the hat matrix."""
    x = x - intercept * x.mean(0)
    alpha = np.exp(log_alpha)
    u = x @ np.linalg.inv(x.T @ x + np.diag(alpha))  # the derivative of the hat matrix is -alpha_j u_j u_j^T
    hat = u @ x.T + intercept / len(y)
    r, rest = y - hat @ y, 1 - np.diag(hat)
    slope_r = alpha * u * (u.T @ y)
    slope_h = -alpha * u**2
    slope = slope_r / rest[:, None] + (r / rest**2)[:, None] * slope_h
    return np.mean((r / rest) ** 2), 2 * np.mean((r / rest)[:, None] * slope, 0)


@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("wide", [False, True])
def test_leave_one_out_is_press(intercept, wide):
    # Fewer examples than features: the dual system.
    x, y = (X[:5], Y[:5]) if wide else (X, Y)
    h = ridge_hypergradient()(jnp.asarray(LOG_ALPHA), data_of(x, y, LeaveOneOut(), intercept))
    value, slope = press(x, y, LOG_ALPHA, intercept)
    np.testing.assert_allclose(h.value, value, rtol=1e-9)
    np.testing.assert_allclose(h.grad, slope, rtol=1e-9, atol=1e-12)
    assert np.max(h.info["inner_gradient"]) < 1e-9


def test_parallel_sequential_and_stochastic_agree():
    data = data_of(X, Y, 5, True, RNG.uniform(0.1, 1, 40))
    lam = jnp.asarray(LOG_ALPHA)
    h = ridge_hypergradient()(lam, data)
    drawn = hx.sample_tasks(5)(jax.random.key(1), data)
    for other in (ridge_hypergradient(1)(lam, data), ridge_hypergradient()(lam, drawn)):
        np.testing.assert_allclose(other.value, h.value, rtol=1e-12)
        np.testing.assert_allclose(other.grad, h.grad, rtol=1e-9)
    f = lambda lam: ridge_hypergradient()(jnp.asarray(lam), data).value
    differences = [(f(LOG_ALPHA + e) - f(LOG_ALPHA - e)) / 2e-5 for e in 1e-5 * np.eye(6)]
    np.testing.assert_allclose(h.grad, differences, rtol=1e-6, atol=1e-9)


def test_moments_may_be_left_to_the_folds():
    data = data_of(X, Y, 5, True)
    h, other = (ridge_hypergradient()(jnp.asarray(LOG_ALPHA), d) for d in (data, {**data, "moments": None}))
    np.testing.assert_allclose(other.grad, h.grad, rtol=1e-9)


def test_sparse_problem_is_the_dense_one():
    s = RNG.uniform(0.5, 1, 40)
    train, validation = fold_weights(5, X, Y, s)
    exact = _exact(X, Y[:, None], train, validation, True, None)
    evaluate = NewtonFolds(
        half_square, scipy.sparse.csr_array(X), Y[:, None], np.ones(1), s, train, 2 * validation, np.ones((5, 1)),
        intercept=True, reference=0.0, parallel=None,
    )  # fmt: skip
    (value, slope), (same, near) = exact(LOG_ALPHA), evaluate(LOG_ALPHA)
    np.testing.assert_allclose(same, value, rtol=1e-5)
    np.testing.assert_allclose(near, slope, rtol=1e-3, atol=1e-5)


def test_alpha_is_that_of_ridge(monkeypatch):
    weights = RNG.uniform(0.1, 2, 40)
    model = HypergradientRidge("per-feature", cv=KFold(4, shuffle=True, random_state=0)).fit(X, Y, weights)
    assert model.alpha_.shape == (6,)
    # Each column divided by the root of its alpha, and a coefficient of 1.
    scaled = Ridge(alpha=1.0).fit(X / np.sqrt(model.alpha_), Y, weights)
    np.testing.assert_allclose(model.predict(X), scaled.predict(X / np.sqrt(model.alpha_)), rtol=1e-8)
    assert model.validation_curve_.shape == (model.n_hyperiterations_,)
    folds = fold_weights(KFold(4, shuffle=True, random_state=0), X, Y, weights)
    value, _ = _exact(X, Y[:, None], *folds, True, None)(np.log(model.alpha_))
    np.testing.assert_allclose(-model.best_score_, value, rtol=1e-9)
    assert model.best_score_ > -model.validation_curve_[:17].min()
    monkeypatch.setattr(linear_model, "DENSE", 0)
    sparse = HypergradientRidge().fit(scipy.sparse.csr_array(X), Y)
    np.testing.assert_allclose(sparse.predict(X), Ridge(sparse.alpha_).fit(X, Y).predict(X), rtol=1e-4, atol=1e-4)


def test_one_coefficient_is_as_good_as_the_grid():
    grid = RidgeCV(np.logspace(-4, 4, 200), cv=KFold(5), scoring="neg_mean_squared_error").fit(X, Y)
    model = HypergradientRidge().fit(X, Y)
    assert model.best_score_ >= grid.best_score_ - 1e-6
    assert model.n_hyperiterations_ < 40


def test_groups_and_targets():
    targets = np.stack([Y, 2 * Y[::-1]], 1)
    model = HypergradientRidge([7, 7, 7, 2, 2, 2]).fit(X, targets)
    assert model.coef_.shape == (2, 6)
    assert model.predict(X).shape == (40, 2)
    assert len(set(model.alpha_.tolist())) == 2
    assert len(set(model.alpha_[:3].tolist())) == 1
    assert model.score(X, targets) > 0.3


@pytest.mark.parametrize("cv", [LeaveOneOut(), ShuffleSplit(1, test_size=0.25, random_state=0), GroupKFold(4), None])
def test_splitters(cv):
    groups = np.arange(40) // 5 if isinstance(cv, GroupKFold) else None
    assert HypergradientRidge(cv=cv).fit(X, Y, groups=groups).score(X, Y) > 0.4


@pytest.mark.parametrize("penalty", ["one", "per-feature"])
def test_scales_of_x_and_y_change_nothing(penalty):
    model = HypergradientRidge(penalty).fit(X, Y)
    scaled = HypergradientRidge(penalty).fit(100 * X, 1e-3 * Y)
    np.testing.assert_allclose(scaled.predict(100 * X), 1e-3 * model.predict(X), rtol=1e-5)
    np.testing.assert_allclose(scaled.alpha_, 1e4 * model.alpha_, rtol=1e-2)


def noise(rng):
    return rng.normal(size=(60, 12)), rng.normal(size=60)


def collinear(rng):
    x = np.repeat(rng.normal(size=(60, 4)), 3, 1) + 1e-3 * rng.normal(size=(60, 12))
    return x, x[:, 0] + rng.normal(size=60)


def all_useful(rng):
    x = rng.normal(size=(60, 14))
    return x, x @ rng.normal(size=14) / 4 + rng.normal(size=60)


def wide(rng):
    x = rng.normal(size=(20, 14))
    return x, x[:, 0] + rng.normal(size=20)


def one_feature(rng):
    x = rng.normal(size=(60, 1))
    return x, x[:, 0] + rng.normal(size=60)


def constant_feature(rng):
    x = np.concatenate([np.ones((60, 1)), rng.normal(size=(60, 3))], 1)
    return x, x[:, 1] + rng.normal(size=60)


def duplicated(rng):
    x = np.repeat(rng.normal(size=(20, 5)), 3, 0)
    return x, x[:, 0] + np.repeat(rng.normal(size=20), 3)


PATHOLOGICAL = [noise, collinear, all_useful, wide, one_feature, constant_feature, duplicated]


@pytest.mark.parametrize("make", PATHOLOGICAL)
def test_never_much_worse_than_ridge_cv(make):
    errors = {"one": [], "per-feature": [], "RidgeCV": []}
    for seed in range(4):
        x, y = make(np.random.default_rng(seed))
        half = len(y) // 2 if make is not wide else 10
        for name in errors:
            model = RidgeCV(np.logspace(-4, 6, 21)) if name == "RidgeCV" else HypergradientRidge(name)
            errors[name].append(np.mean((model.fit(x[:half], y[:half]).predict(x[half:]) - y[half:]) ** 2))
    means = {name: np.mean(values) for name, values in errors.items()}
    assert means["one"] < 1.15 * means["RidgeCV"]
    assert means["per-feature"] < 1.2 * means["RidgeCV"]


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_shrinkage_keeps_many_coefficients_from_fitting_the_noise_of_the_folds():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(200, 64))
    y = x @ rng.normal(size=64) / 8 + rng.normal(size=200)
    error = lambda model: np.mean((model.fit(x[:64], y[:64]).predict(x[64:]) - y[64:]) ** 2)
    common, guarded = error(HypergradientRidge()), error(HypergradientRidge("per-feature"))
    assert guarded < 1.1 * common
    assert error(HypergradientRidge("per-feature", shrinkage=0)) > 1.3 * common


def test_scikit_learn_checks():
    check_estimator(HypergradientRidge(), on_skip=None)
