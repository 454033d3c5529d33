"""Folds as tasks: the same hypergradient in parallel, one after the other, drawn and sharded; PRESS; refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hyperax as hx

selection = pytest.importorskip("sklearn.model_selection")

N, D = 12, 3
RANDOM = np.random.default_rng(0)
X = jnp.asarray(RANDOM.normal(size=(N, D)))
Y = X @ jnp.array([1.0, -2.0, 0.0]) + jnp.asarray(0.3 * RANDOM.normal(size=N))
LOG_ALPHA = jnp.asarray([0.2, -1.0, 1.5])


def solve(lam, d):
    weighted = d["x"] * d["fold"].train[:, None]
    return jnp.linalg.solve(weighted.T @ d["x"] + jnp.diag(jnp.exp(lam)), weighted.T @ d["y"])


RIDGE = hx.Problem(
    inner=lambda w, lam, d: jnp.sum(d["fold"].train * (d["x"] @ w - d["y"]) ** 2) + jnp.exp(lam) @ w**2,
    outer=lambda w, lam, d: d["fold"].validation_mean((d["x"] @ w - d["y"]) ** 2),
    init=lambda lam, d: jnp.zeros(D),
)
OF_FOLD = hx.hypergradient(RIDGE, None, hx.ClosedForm(solve))


def data(splitter, y=Y, groups=None):
    return {"x": hx.Shared(X), "y": hx.Shared(Y), "fold": hx.folds(splitter, X, y, groups)}


def test_parallel_sequential_sharded_and_full_batch_stochastic_agree():
    of = data(4)
    mesh = jax.make_mesh((2,), ("devices",))
    drawn = hx.sample_tasks(4)(jax.random.key(3), of)
    assert not np.array_equal(drawn["fold"].train, of["fold"].train)
    expected = hx.mean_over_tasks(OF_FOLD)(LOG_ALPHA, of)
    for function, seen in (
        (hx.mean_over_tasks(OF_FOLD, parallel=1), of),
        (hx.mean_over_tasks(OF_FOLD, parallel=2), of),
        (hx.mean_over_tasks(OF_FOLD, mesh=mesh), of),
        (hx.mean_over_tasks(OF_FOLD), drawn),
    ):
        h = function(LOG_ALPHA, seen)
        np.testing.assert_allclose(h.value, expected.value, rtol=1e-9)
        np.testing.assert_allclose(h.grad, expected.grad, rtol=1e-9)


def test_stochastic_folds_lead_where_all_folds_do():
    of, mean = data(4), hx.mean_over_tasks(OF_FOLD)
    options = {"data": of, "optimizer": optax.adam(optax.cosine_decay_schedule(0.2, 200)), "steps": 200}
    whole = hx.minimize(mean, LOG_ALPHA, **options)
    drawn = hx.minimize(mean, LOG_ALPHA, sample=hx.sample_tasks(1), key=jax.random.key(0), **options)
    first, best = (float(mean(lam, of).value) for lam in (LOG_ALPHA, whole.lam))
    assert float(mean(drawn.lam, of).value) < best + 0.1 * (first - best)


def test_leave_one_out_is_press_with_its_derivative():
    def press(lam):
        hat = X @ jnp.linalg.solve(X.T @ X + jnp.diag(jnp.exp(lam)), X.T)
        return jnp.mean(((Y - hat @ Y) / (1 - jnp.diag(hat))) ** 2)

    h = hx.mean_over_tasks(OF_FOLD)(LOG_ALPHA, data(selection.LeaveOneOut()))
    value, grad = jax.value_and_grad(press)(LOG_ALPHA)
    np.testing.assert_allclose(h.value, value, rtol=1e-10)
    np.testing.assert_allclose(h.grad, grad, rtol=1e-9)


class AfterZero:
    """A user's splitter, which looks into the table."""

    def split(self, x, y=None, groups=None):
        yield np.flatnonzero(x[:, 0] <= 0), np.flatnonzero(x[:, 0] > 0)

    def get_n_splits(self, x=None, y=None, groups=None):
        return 1


def test_folds_of_any_kind():
    labels, groups = np.arange(N) % 2, np.repeat(np.arange(4), 3)
    stratified = hx.folds(3, X, labels)
    assert (np.asarray(stratified.validation) @ labels == 2).all()
    numbers = np.arange(N)  # a target, not labels: one of each
    np.testing.assert_array_equal(hx.folds(3, X, numbers).validation, hx.folds(3, X, numbers + 0.5).validation)
    grouped = np.asarray(hx.folds(selection.GroupKFold(2), X, Y, groups).validation)
    assert all(len(set(row[groups == g])) == 1 for row in grouped for g in range(4))
    repeated = hx.folds([([0, 0, 1], [2, 3])], range(4))
    np.testing.assert_array_equal(repeated.train, [[2, 1, 0, 0]])
    np.testing.assert_array_equal(hx.folds(AfterZero(), X).train, [X[:, 0] <= 0])
    by_mask = hx.folds([(labels == 0, labels == 1)], X)
    np.testing.assert_array_equal(by_mask.validation, [labels])
    for fold in (stratified, hx.folds(selection.KFold(5, shuffle=True, random_state=0), X)):
        np.testing.assert_array_equal(fold.train + fold.validation, np.ones(fold.train.shape))
        np.testing.assert_array_equal(fold.validation.sum(0), np.ones(N))


@pytest.mark.parametrize(
    ("splitter", "words"),
    [
        (13, "Cannot have number of splits n_splits=13 greater than the number of samples"),
        ([], "there are no folds"),
        ([([0], [12])], "indices below 12"),
        ([([0.5], [1])], "indices below 12"),
        ([([0, 1], [])], "no examples on one side"),
        ([([0, 1], [1, 2])], "validates on examples that it is trained on"),
        ([3], "must be \\(training indices, validation indices\\)"),
        ("five", "use a number of folds, a splitter"),
    ],
)
def test_refused_folds(splitter, words):
    with pytest.raises(ValueError, match=words):
        hx.folds(splitter, X, Y)


def test_refused_draws_and_certified_shared_data():
    with pytest.raises(ValueError, match="5 tasks cannot be drawn from 4"):
        hx.sample_tasks(5)(jax.random.key(0), data(4))
    with pytest.raises(ValueError, match="`Shared` in it, which is for tasks"):
        OF_FOLD(LOG_ALPHA, {"x": hx.Shared(X)})
    with pytest.raises(ValueError, match="at least one array"):
        hx.mean_over_tasks(OF_FOLD)(LOG_ALPHA, {"x": hx.Shared(X)})
    certificate = hx.certify(hx.mean_over_tasks(OF_FOLD), LOG_ALPHA, data(4))
    assert certificate.tasks == 4
    assert not certificate.advice
