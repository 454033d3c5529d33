"""tune: the right gradient through a user's loop, the right batches, an honest result, and refusals before any work."""

import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hyperax as hx
from hyperax.constraints import Logarithmic, Projected
from hyperax.minimize import minimize
from hyperax.tuning import Hyperparameter, log_scale, logit_scale, piecewise_schedule, tune

T, SIZE = 6, 3
KEY = jax.random.key(3)


class Line(eqx.Module):
    """A model with something that is no array in it."""

    weight: jax.Array
    bias: jax.Array
    activation: object = jnp.tanh

    def __call__(self, x):
        return self.activation(x @ self.weight) + self.bias


def validation_loss(model, d):
    return jnp.mean((model(d["x"]) - d["y"]) ** 2)


def training_loss(model, batch, h, key):
    """Noise on the inputs, two weighted losses, decay of each layer."""
    x = batch["x"] + h["noise"] * jax.random.normal(key, batch["x"].shape)
    error = model(x) - batch["y"]
    losses = jnp.stack([jnp.mean(error**2), jnp.mean(error**4)])
    decay = h["decay"]["weight"] * jnp.sum(model.weight**2) + h["decay"]["bias"] * jnp.sum(model.bias**2)
    return h["losses"] @ losses + decay


def optimizer(h):
    rate, momentum = (piecewise_schedule(h[name], T) for name in ("step_size", "momentum"))
    return optax.inject_hyperparams(optax.sgd)(learning_rate=rate, momentum=momentum)


H = {
    "step_size": logit_scale([0.05, 0.04, 0.03], high=0.5),
    "momentum": logit_scale([0.3, 0.5]),
    "decay": {"weight": log_scale(0.1), "bias": log_scale(0.2)},
    "losses": jnp.array([1.0, 0.1]),
    "noise": Hyperparameter(0.1, Projected(hx.Box(0.0, 1.0))),
}
draw = np.random.default_rng(0)
X = draw.normal(size=(22, 2))
Y = np.tanh(X @ [1.0, -2.0]) + 0.3
DATA, VALIDATION = {"x": X[:10], "y": Y[:10]}, {"x": X[10:], "y": Y[10:]}
MODEL = Line(jnp.array([0.1, 0.2]), jnp.zeros(()))


def tuned(**changes):
    arguments = {"data": DATA, "validation_data": VALIDATION, "steps": T, "batch_size": SIZE, "key": KEY}
    functions = {"training_loss": training_loss, "validation_loss": validation_loss, "params": MODEL}
    return tune(**functions | {"optimizer": optimizer, "hyperparameters": H} | arguments | changes)


@pytest.fixture(scope="module")
def result():
    return tuned(hyperiterations=20, evaluate_every=5)


def test_the_hypergradient_is_that_of_the_training_run(result):
    train = result.train
    h = train.like
    found = hx.hypergradient(train.problem, train.dynamics, hx.Reverse(T, segment="sqrt"))(h, train.data)
    assert float(found.value) == pytest.approx(train(h).validation, rel=1e-12)
    leaves, structure = jax.tree.flatten(h)
    for i, (leaf, grad) in enumerate(zip(leaves, jax.tree.leaves(found.grad), strict=True)):
        for index in np.ndindex(leaf.shape):
            at = lambda e, i=i, leaf=leaf, index=index: (
                train(jax.tree.unflatten(structure, [*leaves[:i], leaf.at[index].add(e), *leaves[i + 1 :]])).validation
            )
            assert (at(1e-5) - at(-1e-5)) / 2e-5 == pytest.approx(float(grad[index]), rel=1e-6, abs=1e-9)
            assert abs(float(grad[index])) > 1e-7  # every entry does something


def test_what_is_found_is_what_is_returned(result):
    assert result.after < result.before
    assert result.after == result.train(result.hyperparameters).validation
    assert result.before == result.train(H).validation
    assert result.after == min(record["score"] for record in result.history if "score" in record)
    assert len(result.history) == 20
    assert result.stopped == "completed 20 hyperiterations"
    assert result.params.activation is jnp.tanh
    h = result.hyperparameters
    assert bool(jnp.all((h["step_size"] > 0) & (h["step_size"] < 0.5)))
    assert 0 <= float(h["noise"]) <= 1
    # A number counts for a whole schedule; other keys and parameters are other runs.
    constant = h | {"momentum": 0.5, "step_size": 0.05}
    whole = h | {"momentum": jnp.full(2, 0.5), "step_size": jnp.full(3, 0.05)}
    assert result.train(constant).validation == result.train(whole).validation
    assert result.train(H, key=jax.random.key(8)).validation != result.before
    assert result.train(H, params=Line(jnp.ones(2), jnp.ones(()))).validation != result.before
    with pytest.raises(ValueError, match=r"hyperparameters\['step_size'\] has shape \[2\]; give a number, or \[3\]"):
        result.train(h | {"step_size": jnp.ones(2)})
    with pytest.raises(ValueError, match="params differ"):
        result.train(h, params=Line(jnp.ones(3), jnp.ones(())))


def test_batches(result):
    """Those of hx.minibatch, every example at most once an epoch; fresh ones for each hyperiteration, or the same."""
    problem, data = result.train.problem, result.train.data
    batches = problem.prepare(None, data).batches
    expected = [hx.minibatch(jax.random.fold_in(data.key, 0), t, 10, 9)[:3] for t in (1, 2)]
    np.testing.assert_array_equal(batches[jnp.array([0, 3])], jnp.stack(expected))
    assert len(np.unique(batches[:3])) == 9
    np.testing.assert_array_equal(problem.batch(problem.prepare(None, data), 4).examples["x"], X[batches[3]])

    assert result.history[0]["value"] not in (result.before, result.history[1]["value"])
    upwards = optax.sgd(-1.0)
    same = tuned(hyperiterations=2, outer_optimizer=upwards, fresh_batches=False)
    assert same.history[0]["value"] == pytest.approx(same.before, rel=1e-12)
    assert same.history[1]["value"] > same.before == same.after
    assert same.stopped.endswith("no evaluation was better than the initial hyperparameters, which are returned")


def test_real_time_and_numbers_kept_by_the_optimizer():
    """One run by default; what only the optimizer's first state sees cannot move during it, and is refused."""
    online = hx.RealTime(T, every=2)
    loss = lambda w, d: jnp.mean((d["x"] @ w - d["y"]) ** 2)
    plain = {"training_loss": lambda w, batch, h: loss(w, batch), "validation_loss": loss, "params": np.zeros(2)}
    plain |= {"hyperparameters": log_scale(0.1), "steps": None, "batch_size": None, "method": online}
    found = tuned(**plain, optimizer=optax.sgd)
    assert len(found.history) == T // 2
    assert int(found.solution.carry.t) == T
    assert found.history[-1]["value"] != found.after < found.before  # trained anew

    kept = lambda h: optax.inject_hyperparams(optax.sgd)(learning_rate=h)
    with pytest.raises(ValueError, match="not in the optimizer's init"):
        tuned(**plain, optimizer=kept)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 11}, "batch_size is 11 and data has 10 examples"),
        ({"key": None}, "pass key="),
        ({"key": 0}, "key is 0; pass key="),
        ({"validation_data": None}, "validation_data is None; give arrays"),
        ({"data": DATA | {"x": np.full((10, 2), np.nan)}}, r"data\['x'\] contains NaN or infinity"),
        ({"data": DATA | {"x": X}}, "one leading axis of examples"),
        ({"hyperparameters": H | {"lost": 1.0}}, r"hyperparameters\['lost'\] does not reach f_T"),
        ({"hyperparameters": H | {"whole": jnp.ones(2, int)}}, r"hyperparameters\['whole'\] has type int"),
        ({"hyperparameters": {}}, "hyperparameters has no floating-point leaf"),
        ({"method": hx.Forward(T)}, "give steps .* or a method"),
        ({"steps": None, "method": hx.Implicit(T)}, "Implicit follows no training run"),
        ({"steps": None, "method": hx.ClosedForm(lambda lam, data: lam)}, "ClosedForm follows no training run"),
        ({"steps": None, "method": hx.RealTime(None)}, "RealTime has steps=None"),
        ({"steps": None, "method": hx.Truncated(T, 1)}, r"do not reach|does not reach"),
        ({"optimizer": optax.sgd(0.1)}, "optimizer is a .*; use a function of the hyperparameters"),
        ({"optimizer": lambda h: optax.adam(h["step_size"][0], b1=h["momentum"][0])}, "eps_root"),
        ({"training_loss": lambda model, batch: 0.0}, "they take 2 and 2 arguments"),
        ({"training_loss": lambda model, batch, h: batch["y"]}, "inner objective must be a floating-point scalar"),
        ({"hyperiterations": 1.5}, "hyperiterations must be a whole number"),
        ({"evaluate_every": 0}, "both count from 1"),
        ({"samples": 3}, "tune has no option samples"),
    ],
)
def test_refusals(changes, message, monkeypatch):
    monkeypatch.setattr(sys.modules["hyperax.tuning.tune"], "minimize", pytest.fail)
    if "method" in changes and isinstance(changes["method"], hx.Truncated):
        # What enters the first state alone is behind the window.
        kept = lambda h: optax.inject_hyperparams(optax.sgd)(learning_rate=h["step_size"][0])
        changes = changes | {"optimizer": kept}
    with pytest.raises(ValueError, match=message):
        tuned(**changes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: log_scale(0.0), r"value = 0.0 is not inside Logarithmic\(\)"),
        (lambda: logit_scale([0.5, 1.0]), r"value\[1\] = 1.0 is not inside Box"),
        (lambda: log_scale(np.nan), "starts at a finite number"),
        (lambda: log_scale("0.1m"), "a number or an array of numbers"),
        (lambda: Hyperparameter(0.1, "positive"), "use a set"),
        (lambda: piecewise_schedule(0.1, 5), "knots of shape"),
    ],
)
def test_hyperparameters_are_checked_where_they_are_made(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_schedule():
    knots, steps = np.array([0.3, 0.1, 0.5, 0.2]), 11
    schedule = piecewise_schedule(knots, steps)
    expected = np.interp(np.arange(14), np.linspace(0, steps - 1, 4), knots)
    np.testing.assert_allclose([schedule(t) for t in range(14)], expected, rtol=1e-12)
    assert [float(piecewise_schedule(jnp.array([0.5]), 1)(t)) for t in (0, 3)] == [0.5, 0.5]


def test_logarithmic():
    set_ = Logarithmic()
    lam = jnp.array([1e-300, 1e-3, 1.0, 1e300])
    np.testing.assert_allclose(set_.forward(set_.inverse(lam)), lam, rtol=1e-12)
    assert set_.forward(jnp.array([-1e9]))[0] > 0
    # One step of the outer loop: u - rate * lam * gradient.
    answer = lambda lam, data, carry: hx.Hypergradient(lam**2, 2 * lam, None, {}, carry)
    solution = minimize(answer, 2.0, constraint=set_, optimizer=optax.sgd(0.1), steps=1)
    assert float(solution.lam) == pytest.approx(2.0 * np.exp(-0.1 * 2.0 * 4.0), rel=1e-12)
