"""The outer loop: it converges, repeats itself bit for bit, stops for the right reason, and refuses what cannot run."""

import io
import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hyperax as hx
from hyperax.checkpoint import Checkpoint
from hyperax.constraints import Positive
from hyperax.minimize import minimize
from hyperax.problem import Hypergradient
from hyperax.progress import ProgressDisplay
from hyperax.stopping import DivergenceWarning, GradientTolerance, Plateau, Validation


class Fake:
    """f(lam) = ||lam["a"] - data||^2 + (lam["b"] + 1)^2, with a carry that counts calls and an attribute, traces."""

    def __init__(self):
        self.traces = 0

    def init(self, lam, data):
        return {"calls": 0}

    def __call__(self, lam, data=None, carry=None):
        self.traces += 1
        f = lambda lam: jnp.sum((lam["a"] - data) ** 2) + (lam["b"] + 1) ** 2
        value, grad = jax.value_and_grad(f)(lam)
        metrics = {"distance": jnp.abs(lam["a"] - data), "count": carry["calls"]}
        return Hypergradient(value, grad, None, {"metrics": metrics}, {"calls": carry["calls"] + 1})


LAM = {"a": jnp.array([3.0, -2.0, 1.0]), "b": 4.0}
TARGET = np.array([1.0, 2.0, 3.0])


def noisy(key, data):
    return data + 0.1 * jax.random.uniform(key, data.shape)


def quadratic(lam, data=None, carry=None):
    value, grad = jax.value_and_grad(lambda lam: jnp.sum((lam - 1.0) ** 2))(lam)
    return Hypergradient(value, grad, None, {}, carry)


def same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_converges(dtype):
    lam = jax.tree.map(lambda x: jnp.asarray(x, dtype), LAM)
    solution = minimize(Fake(), lam, data=TARGET.astype(dtype), optimizer=optax.adam(0.1), steps=500)
    np.testing.assert_allclose(solution.lam["a"], TARGET, atol=1e-3)
    np.testing.assert_allclose(solution.lam["b"], -1.0, atol=1e-3)
    assert solution.lam["b"].dtype == dtype
    assert solution.stopped == "completed 500 hyperiterations"
    assert solution.steps == len(solution.history) == 500
    assert solution.value == solution.history[-1]["value"] < 1e-5
    assert solution.carry["calls"] == 500
    assert solution.timings[-1]["step"] == 500
    same(lam, jax.tree.map(lambda x: jnp.asarray(x, dtype), LAM))  # the user's arrays were not donated


def test_a_step_is_the_optimizer_on_the_hypergradient():
    optimizer, lam = optax.adam(optax.linear_schedule(0.5, 0.0, 10)), jnp.array([3.0, 0.0])
    state, expected = optimizer.init(lam), lam
    for _ in range(7):
        updates, state = optimizer.update(quadratic(expected).grad, state, expected)
        expected = optax.apply_updates(expected, updates)
    solution = minimize(quadratic, lam, optimizer=optimizer, steps=7)
    np.testing.assert_allclose(solution.lam, expected, rtol=1e-14)
    assert solution.history[0] == {
        "step": 1,
        "value": 5.0,
        "gradient_norm": pytest.approx(20**0.5),
        "metrics": {},
    }


def test_optimizers_that_ask_for_the_value():
    optimizer = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=2))
    np.testing.assert_allclose(minimize(quadratic, 3.0, optimizer=optimizer, steps=100).lam, 1.0, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"sample": noisy, "key": jax.random.key(5)}], ids=["constant", "sampled"])
def test_dispatch_changes_nothing(options):
    fake, common = Fake(), dict(data=TARGET, optimizer=optax.adam(0.1), steps=60, record_every=7, **options)
    solutions = [minimize(fake, LAM, dispatch=dispatch, **common) for dispatch in (1, 7, 50)]
    interrupted = minimize(fake, LAM, dispatch=50, callbacks=lambda progress: None, **common)
    for solution in (*solutions[1:], interrupted):
        # To the bit; up to rounding where newer compilers round a loop otherwise than a single step.
        for a, b in zip(*(jax.tree.leaves((x.lam, x.history)) for x in (solution, solutions[0])), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-14 if jax.__version_info__ >= (0, 11) else 0, atol=0)
    assert [record["step"] for record in solution.history] == [7, 14, 21, 28, 35, 42, 49, 56, 60]


def test_samples_are_a_function_of_the_key_and_the_number():
    keys = []

    def sample(key, data):
        jax.debug.callback(lambda k: keys.append(tuple(k.tolist())), jax.random.key_data(key))
        return noisy(key, data)

    fake, key = Fake(), jax.random.key(1)
    common = {"data": TARGET, "sample": sample, "optimizer": optax.sgd(0.1), "steps": 6}
    first = minimize(fake, LAM, key=key, **common)
    jax.effects_barrier()
    expected = {tuple(jax.random.key_data(jax.random.fold_in(key, k)).tolist()) for k in range(6)}
    assert set(keys) == expected
    assert minimize(fake, LAM, key=key, **common).history == first.history
    assert minimize(fake, LAM, key=jax.random.key(2), **common).history != first.history
    legacy = minimize(fake, LAM, key=jax.random.PRNGKey(1), **common)
    assert legacy.history == first.history


def test_records_are_means():
    fake, common = Fake(), {"data": TARGET, "optimizer": optax.sgd(0.1), "steps": 10}
    each, means = (minimize(fake, LAM, record_every=record_every, **common) for record_every in (1, 4))
    assert [record["step"] for record in means.history] == [4, 8, 10]
    for record, part in zip(means.history, (each.history[:4], each.history[4:8], each.history[8:]), strict=True):
        assert record["value"] == np.mean([r["value"] for r in part])
        assert record["metrics"]["distance"] == np.mean([r["metrics"]["distance"] for r in part])
        assert record["gradient_norm"] == part[-1]["gradient_norm"]
    assert each.history[0]["metrics"] == {"distance": 8 / 3, "count": 0.0}  # averaged over the leading axis


@pytest.mark.parametrize("dispatch", [1, 16])
def test_traced_once(dispatch):
    fake = Fake()
    common = {"data": TARGET, "optimizer": optax.adam(0.1), "dispatch": dispatch}
    minimize(fake, LAM, steps=40, validation=Validation(lambda lam: 1.0, every=7), **common)
    assert fake.traces == 1
    minimize(fake, LAM, steps=50, **common)
    assert fake.traces == 1


def test_data_are_arguments_not_constants():
    fake, optimizer = Fake(), optax.sgd(0.1)
    ends = [minimize(fake, LAM, data=TARGET + i, optimizer=optimizer, steps=100).lam["a"] for i in range(2)]
    assert fake.traces == 1
    np.testing.assert_allclose(ends[1] - ends[0], 1.0, atol=1e-6)


class Network(eqx.Module):
    layer: eqx.nn.Linear
    activation: object
    name: str = "network"


def test_lam_may_be_a_module():
    network = Network(eqx.nn.Linear(2, 1, key=jax.random.key(0)), jnp.tanh)
    loss = lambda network, x: jnp.sum(network.activation(network.layer(x)) ** 2)
    hypergradient = lambda lam, data, carry: Hypergradient(*eqx.filter_value_and_grad(loss)(lam, data), None, {}, carry)
    solution = minimize(hypergradient, network, data=jnp.ones(2), optimizer=optax.adam(0.1), steps=100)
    assert solution.lam.activation is jnp.tanh
    assert solution.value < 1e-4


class TestValidation:
    def test_best_iterate_is_kept(self):
        seen = []

        def score(lam):
            seen.append(float(lam))
            return (lam - 2.0) ** 2, {"lam": lam}

        solution = minimize(quadratic, 3.0, optimizer=optax.sgd(0.05), steps=30, validation=Validation(score, 4))
        assert [record["step"] for record in solution.history if "score" in record] == [4, 8, 12, 16, 20, 24, 28, 30]
        best = min(seen, key=lambda lam: (lam - 2.0) ** 2)
        assert float(solution.lam) == best != float(solution.last_lam)
        assert solution.best == {"step": 8, "score": (best - 2.0) ** 2}
        assert solution.history[3]["validation"] == {"lam": seen[0]}
        assert solution.history[3]["score"] == (seen[0] - 2.0) ** 2

    def test_patience(self):
        scores = itertools.chain([5.0, 3.0, 4.0, float("nan"), 3.0], itertools.repeat(0.0))
        validation = Validation(lambda lam: next(scores), every=2, patience=3)
        solution = minimize(quadratic, 3.0, optimizer=optax.sgd(0.05), steps=100, validation=validation)
        assert solution.steps == 10
        assert solution.best == {"step": 4, "score": 3.0}
        assert solution.stopped == "patience: no validation score below 3.0 (step 4) in 3 evaluations"

    def test_the_last_iterate_is_validated_when_a_rule_stops(self):
        validation = Validation(lambda lam: float(lam), every=1000)
        solution = minimize(
            quadratic,
            3.0,
            optimizer=optax.sgd(0.3),
            steps=500,
            validation=validation,
            callbacks=GradientTolerance(1e-3),
        )
        assert solution.steps < 500
        assert solution.best["step"] == solution.steps

    def test_bad_answers(self):
        with pytest.raises(ValueError, match="return a number, or a pair"):
            minimize(quadratic, 3.0, optimizer=optax.sgd(0.1), steps=1, validation=Validation(lambda lam: "good", 1))
        with pytest.raises(ValueError, match="count from 1"):
            Validation(lambda lam: 1.0, every=0)


class TestCallbacks:
    def test_gradient_tolerance(self):
        solution = minimize(quadratic, 3.0, optimizer=optax.sgd(0.3), steps=500, callbacks=GradientTolerance(1e-6))
        assert solution.stopped.startswith("gradient tolerance")
        assert solution.history[-1]["gradient_norm"] <= 1e-6 < solution.history[-2]["gradient_norm"]

    def test_plateau(self):
        solution = minimize(quadratic, 3.0, optimizer=optax.sgd(0.5), steps=500, callbacks=[Plateau(3)])
        assert solution.stopped.startswith("plateau")
        assert solution.steps == 6  # min(4, 0, 0) = min(0, 0, 0)

    def test_what_they_see_and_what_they_may_say(self):
        seen = []

        def callback(progress):
            seen.append((progress.step, progress.value, progress.lam(), progress.history[-1]["step"], progress.steps))
            assert progress.rate > 0
            return "enough" if progress.step == 9 else None

        solution = minimize(
            quadratic, jnp.array([3.0]), optimizer=optax.sgd(0.1), steps=30, record_every=3, callbacks=callback
        )
        assert solution.stopped == "enough"
        assert [(step, last, steps) for step, _, _, last, steps in seen] == [(3, 3, 30), (6, 6, 30), (9, 9, 30)]
        np.testing.assert_array_equal(seen[-1][2], solution.lam)  # copies outlive the donation of lam
        assert seen[0][2] > seen[1][2] > seen[2][2]

    def test_bad_answers(self):
        with pytest.raises(ValueError, match="a callback returned True"):
            minimize(quadratic, 3.0, optimizer=optax.sgd(0.1), steps=1, callbacks=lambda progress: True)


def exploding(bad_value, bad_grad, at):
    def hypergradient(lam, data=None, carry=None):
        h = quadratic(lam)
        late = carry >= at
        value = jnp.where(late, bad_value, h.value)
        return Hypergradient(value, jnp.where(late, bad_grad, h.grad), None, {}, carry + 1)

    class Counting:
        init = staticmethod(lambda lam, data: jnp.asarray(0))
        __call__ = staticmethod(hypergradient)

    return Counting()


class TestDivergence:
    @pytest.mark.parametrize("dispatch", [1, 64])
    @pytest.mark.parametrize(
        ("value", "grad", "reason"),
        [
            (float("nan"), 1.0, "f_T is not finite"),
            (1.0, float("inf"), "the hypergradient is not finite"),
            (5e6, 1.0, "divergence_factor"),
        ],
    )
    def test_stops_at_the_last_good_iterate(self, value, grad, reason, dispatch):
        common = {"optimizer": optax.sgd(0.1), "dispatch": dispatch}
        with pytest.warns(DivergenceWarning, match=reason):
            solution = minimize(exploding(value, grad, at=5), 3.0, steps=1000, **common)
        # Iterates 0..4 have good values; 5 does not.
        good = minimize(quadratic, 3.0, steps=4, **common)
        assert float(solution.lam) == float(solution.last_lam) == float(good.lam)
        assert solution.steps == len(solution.history) == 5
        assert solution.stopped.startswith("diverged at step 6")
        assert "2/nu" in solution.stopped
        assert solution.carry == 5

    def test_an_update_that_is_not_finite(self):
        with pytest.warns(DivergenceWarning, match="update made lam not finite"):
            solution = minimize(quadratic, 3.0, optimizer=optax.sgd(float("inf")), steps=3)
        assert float(solution.lam) == 3.0
        assert solution.history == []
        assert solution.value is None

    def test_a_learning_rate_that_is_too_large(self):
        with pytest.warns(DivergenceWarning, match="smaller outer learning rate"):
            solution = minimize(quadratic, 3.0, optimizer=optax.sgd(2.0), steps=1000, record_every=10)
        assert np.isfinite(solution.lam)
        assert all(np.isfinite(record["value"]) for record in solution.history)
        assert solution.steps < 30

    def test_the_best_is_kept(self):
        validation = Validation(lambda lam: lam, every=2)
        with pytest.warns(DivergenceWarning) as caught:
            solution = minimize(
                exploding(float("nan"), 1.0, at=5), 3.0, optimizer=optax.sgd(0.1), steps=10, validation=validation
            )
        assert solution.best["step"] == 4
        assert caught[0].filename == __file__


def test_accumulated_gradients():
    solution = minimize(quadratic, 1.0, optimizer=optax.MultiSteps(optax.sgd(0.1), 2), steps=4)
    np.testing.assert_allclose(solution.lam, minimize(quadratic, 1.0, optimizer=optax.sgd(0.1), steps=2).lam)


def test_diverged_from_the_start():
    with pytest.warns(DivergenceWarning, match=r"There is no good lam.*hx\.certify"):
        minimize(exploding(jnp.nan, 1.0, 0), 1.0, optimizer=optax.sgd(0.1), steps=3)


def test_no_steps():
    solution = minimize(Fake(), LAM, data=TARGET, optimizer=optax.sgd(0.1), steps=0)
    same(solution.lam, jax.tree.map(jnp.asarray, LAM))
    assert (solution.value, solution.best, solution.history, solution.steps) == (None, None, [], 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": -1}, "steps is -1; use an integer, at least 0"),
        ({"steps": 1.5}, "steps is 1.5"),
        ({"dispatch": 0}, "dispatch is 0"),
        ({"record_every": 0}, "record_every is 0"),
        ({"hypergradient": 3}, "hypergradient is 3; use hx.hypergradient"),
        ({"optimizer": 0.1}, "optimizer is 0.1; use an optax transformation"),
        ({"sample": noisy}, "sample needs a key"),
        ({"sample": 3, "key": jax.random.key(0)}, "sample is 3"),
        ({"key": jax.random.key(0)}, "key is used by sample alone"),
        ({"validation": lambda lam: 1.0}, r"use Validation\(function"),
        ({"callbacks": [3]}, "callback 3 is not a function"),
        ({"checkpoint": "runs"}, r"use Checkpoint\(directory"),
        ({"resume": True}, r"resume=True needs a checkpoint"),
        ({"resume": 400, "checkpoint": Checkpoint("nowhere", 1)}, "resume is 400"),
        ({"resume": True, "checkpoint": Checkpoint("nowhere", 1)}, "no checkpoint in nowhere"),
        ({"lam": {}}, "nothing to differentiate or optimise"),
        ({"lam": {"f": jnp.tanh}}, "nothing to differentiate or optimise"),
        ({"lam": {"n": jnp.arange(3), "a": 1.0}}, r"lam\['n'\] has type int.*convert it to float.*move it into data"),
        ({"lam": {"n": 3, "a": 1.0}}, r"lam\['n'\] has type int; only floating-point"),
        ({"lam": [1j * jnp.ones(2)]}, "real and imaginary"),
        ({"lam": {"key": jax.random.key(0), "a": 1.0}}, r"lam\['key'\] has type key"),
    ],
)
def test_bad_input(change, message):
    arguments = {"hypergradient": quadratic, "lam": 1.0, "optimizer": optax.sgd(0.1), "steps": 1, **change}
    with pytest.raises(ValueError, match=message):
        minimize(arguments.pop("hypergradient"), arguments.pop("lam"), **arguments)


def test_bad_hypergradients():
    vector = lambda lam, data, carry: Hypergradient(lam, lam, None, {}, carry)
    missing = lambda lam, data, carry: Hypergradient(jnp.sum(lam["a"]), {"a": lam["a"], "b": None}, None, {}, carry)
    forgetful = lambda lam, data, carry: Hypergradient(jnp.sum(lam), lam, None, {}, None)
    with pytest.raises(ValueError, match=r"value has shape \(2,\)"):
        minimize(vector, jnp.ones(2), optimizer=optax.sgd(0.1), steps=1)
    with pytest.raises(ValueError, match="must be a pytree like lam"):
        minimize(missing, LAM, optimizer=optax.sgd(0.1), steps=1)
    with pytest.raises(ValueError, match="returned a carry of structure"):
        minimize(forgetful, 1.0, optimizer=optax.sgd(0.1), steps=1)


def test_with_a_method_of_the_library():
    x, y = jax.random.normal(jax.random.key(0), (30, 4)), jnp.arange(30.0) % 7
    problem = hx.Problem(
        inner=lambda w, lam, d: jnp.mean((d["x"] @ w - d["y"]) ** 2) + lam["decay"] * jnp.sum(w**2),
        outer=lambda w, lam, d: (jnp.mean((x @ w - y) ** 2), {"norm": jnp.sum(w**2)}),
        init=lambda lam, d: jnp.zeros(4),
        has_metrics=True,
    )
    episodes = lambda key, d: jax.tree.map(lambda a: a[jax.random.randint(key, (3, 8), 0, 30)], d)
    single = hx.hypergradient(problem, hx.GradientDescent(0.1), hx.Reverse(steps=20))
    for method in (single, hx.mean_over_tasks(single)):
        tasks = {} if method is single else {"sample": episodes, "key": jax.random.key(1)}
        solution = minimize(
            method,
            {"decay": 0.5},
            data={"x": x, "y": y},
            optimizer=optax.adam(0.1),
            steps=20,
            constraint={"decay": Positive()},
            record_every=10,
            **tasks,
        )
        assert [record["step"] for record in solution.history] == [10, 20]
        assert solution.history[0]["metrics"]["norm"] > 0
        assert solution.lam["decay"] > 0


class Terminal(io.StringIO):
    def isatty(self):
        return True


class TestDisplay:
    def test_plain_lines_outside_a_terminal(self, capsys):
        validation = Validation(lambda lam: 0.5, every=10)
        minimize(quadratic, 3.0, optimizer=optax.sgd(0.1), steps=30, validation=validation, progress=True)
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 3
        assert lines[-1].startswith("step 30/30 | ")
        assert "validation 0.5" in lines[-1]
        minimize(quadratic, 3.0, optimizer=optax.sgd(0.1), steps=30, callbacks=lambda progress: "now", progress=True)
        assert capsys.readouterr().err.startswith("step 1/30 | ")

    def test_bar_in_a_terminal(self):
        pytest.importorskip("rich")
        file = Terminal()
        with ProgressDisplay(10, file=file) as display:
            display.update(5, value=0.25, score=None, seconds=1.0)
            display.update(10, value=0.25, score=0.5, seconds=2.0)
        assert "10/10" in file.getvalue()

    def test_advice_without_rich(self, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "rich.console", None)
        with pytest.raises(ValueError, match=r"pip install hyperax\[progress\]"):
            ProgressDisplay(10, file=Terminal())
