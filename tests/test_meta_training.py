"""Training of learned optimizers: the objective, runs that go on, horizons, resume; explosions are noticed."""

import warnings
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hyperax as hx
from hyperax.dynamics.learned_optimizer import LearnedOptimizer
from hyperax.explosion import ExplodingHypergradientWarning, GradientExplosion
from hyperax.learned_optimizers import LSTMRule, MetaTraining, StepSizeRule
from problems import assert_trees_close


def bowl(w, lam, d):
    return jnp.sum(d["curvature"] * (w - d["target"]) ** 2)


def draw(key, data):
    """A bowl of the widths in `data`, somewhere."""
    return {"curvature": data, "target": jax.random.normal(key, data.shape)}


PROBLEM = hx.Problem(inner=bowl, outer=bowl, init=lambda lam, d: jnp.zeros_like(d["target"]))
PHI = LearnedOptimizer()
DATA = jnp.asarray([1.0, 4.0])
LAM = StepSizeRule(jnp.zeros(2), 0.05, momentum=0.5)


def training(problem=PROBLEM, **settings):
    return MetaTraining(problem, PHI, draw, **{"tasks": 3, "seed": 7} | settings)


def task(born, slot, seed=7):
    """The task of the run that began in hyperiteration `born`, as the docstring says it is drawn."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), born), slot)
    return draw(jax.random.split(key)[0], DATA)


@partial(jax.jit, static_argnums=3)
def along(lam, born, slot, steps):
    """(w_T, E(w_1), ..., E(w_T)) of a run."""
    d = task(born, slot)
    state, values = hx.rollout(PROBLEM, PHI, steps, lam, d, observe=lambda w: bowl(w, lam, d))
    return state.w, values


@cache
def mean_over_six_steps():
    """(the mean over the three tasks of hyperiteration 1, its gradient)."""
    mean = lambda lam: jnp.mean(jnp.stack([along(lam, 1, slot, 6)[1] for slot in range(3)]))
    return jax.jit(jax.value_and_grad(mean))(LAM)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"window": 6, "staggered": False},
        {"norms": True, "parallel": 1},
        {"parallel": 1, "segment": 2},
    ],
)
def test_a_window_of_the_whole_horizon_is_the_mean_over_all_steps(settings):
    f = training(horizon=6, **settings)
    h = f(LAM, DATA)
    h = f(LAM, DATA, h.carry)  # of fresh tasks
    value, grad = mean_over_six_steps()
    np.testing.assert_allclose(h.value, value, rtol=1e-12)
    assert_trees_close(h.grad, grad, 1e-11)
    metrics = h.info["metrics"]
    np.testing.assert_allclose(metrics["run_end"], [along(LAM, 1, slot, 6)[1][-1] for slot in range(3)], rtol=1e-12)
    assert metrics["horizon"].tolist() == [6, 6, 6]
    assert int(h.carry.k) == 2
    if f.norms:  # three norms, whose vectors have the mean `grad`
        assert 0 < metrics["median_norm"] <= metrics["largest_norm"]
        assert (
            optax.tree.norm(grad) <= metrics["largest_norm"] <= 3 * optax.tree.norm(grad) + 2 * metrics["median_norm"]
        )


def test_runs_go_on_from_window_to_window_and_then_begin_again():
    f = training(horizon=6, window=3, staggered=False)
    carry, seen = f.init(LAM, DATA), []
    for _ in range(3):
        seen.append(f(LAM, DATA, carry))
        carry = seen[-1].carry
    assert [h.info["step"].tolist() for h in seen] == [[3] * 3, [6] * 3, [3] * 3]
    for slot in range(3):
        (w, values), (again, _) = along(LAM, 0, slot, 6), along(LAM, 2, slot, 3)
        for h, expected in zip(seen, (along(LAM, 0, slot, 3)[0], w, again), strict=True):
            np.testing.assert_allclose(h.state.w[slot], expected, rtol=1e-12)
        np.testing.assert_allclose(seen[1].info["metrics"]["run_end"][slot], values[-1], rtol=1e-12)
        np.testing.assert_allclose(seen[2].info["metrics"]["run_end"][slot], values[-1], rtol=1e-12)
    means = [jnp.mean(along(LAM, 0, slot, 6)[1][3:]) for slot in range(3)]
    np.testing.assert_allclose(seen[1].value, np.mean(means), rtol=1e-12)

    # What came before the window is a constant: the state it begins with.
    state = jax.tree.map(lambda x: x[0], seen[0].state)

    def windowed(lam):
        at = state
        gradient = lambda w, lam: jax.grad(bowl)(w, lam, task(0, 0))
        values = []
        for t in (4, 5, 6):
            at = PHI.step(gradient, at, lam, jnp.asarray(t))
            values.append(bowl(at.w, lam, task(0, 0)))
        return jnp.mean(jnp.stack(values))

    one = training(horizon=6, window=3, staggered=False, tasks=1)
    h = one(LAM, DATA, one(LAM, DATA).carry)
    assert_trees_close(h.grad, jax.jit(jax.grad(windowed))(LAM), 1e-11)


def test_at_the_end_and_first_order_it_is_the_method_of_that_name():
    h = training(horizon=3, tasks=1, at_end=True, first_order=True)(LAM, DATA)
    expected = hx.hypergradient(PROBLEM, PHI, hx.FirstOrder(3))(LAM, task(0, 0))
    assert_trees_close((h.value, h.grad), (expected.value, expected.grad), 1e-12)


def test_slots_begin_staggered():
    f = training(horizon=8, window=2, tasks=4)
    carry, steps = f.init(LAM, DATA), []
    for _ in range(5):
        h = f(LAM, DATA, carry)
        carry = h.carry
        steps.append(h.info["step"].tolist())
    assert steps == [[2, 2, 2, 2], [2, 4, 4, 4], [4, 2, 6, 6], [6, 4, 2, 8], [8, 6, 4, 2]]
    assert carry.ended.tolist() == [2, 1, 1, 1]
    assert h.info["horizon"].tolist() == [8, 8, 8, 8]


def test_horizons_are_log_uniform_and_a_curriculum_lets_them_grow():
    f = training(horizon=(10, 1000), window=10, tasks=2000, curriculum=50)
    horizons = jax.jit(lambda born: f._horizons(jnp.full(2000, born)))
    early, half, late = (np.asarray(horizons(born)) for born in (1, 25, 400))
    assert (late % 10 == 0).all()
    assert late.min() == 10
    assert 900 < late.max() <= 1000
    assert abs(np.mean(np.log10(late)) - 2.0) < 0.05  # between 10^1 and 10^3
    assert 90 < half.max() <= 100
    assert early.max() <= 20
    assert (horizons(400) == late).all()
    assert (horizons(401) != late).any()
    first = training(horizon=(10, 1000), window=10, tasks=4)._horizons(jnp.zeros(4, jnp.int32))
    assert (first >= 10).all()


def test_a_resumed_training_sees_the_same_tasks_and_ends_with_the_same_numbers(tmp_path):
    f = training(horizon=(2, 8), window=2, curriculum=4)
    run = lambda steps, **more: hx.minimize(f, LAM, data=DATA, optimizer=optax.adam(0.05), steps=steps, **more)
    whole = run(9)
    run(4, checkpoint=hx.Checkpoint(tmp_path, every=2))
    resumed = run(9, checkpoint=hx.Checkpoint(tmp_path, every=2), resume=True)
    assert resumed.history == whole.history
    assert_trees_close(resumed.lam, whole.lam, 0.0)
    assert set(whole.history[0]["metrics"]) == {"run_end", "horizon"}
    with pytest.raises(ValueError, match="remembers"):
        run(9, sample=lambda key, data: data, key=jax.random.key(0))


def test_a_small_lstm_learns_to_lower_quadratics():
    f = training(horizon=(5, 20), window=5, tasks=8, first_order=True)
    lam = LSTMRule(jax.random.key(1), units=6, layers=1)
    held_out = training(horizon=20, tasks=16, seed=8, at_end=True)
    data = jnp.linspace(0.5, 2.0, 5)
    solution = hx.minimize(f, lam, data=data, optimizer=optax.adam(0.02), steps=80)
    assert held_out(solution.lam, data).value < 0.3 * held_out(lam, data).value


def unstable():
    """Gradient descent on w^2 / 2, and an outer objective that asks for longer steps until they exceed 2."""
    problem = hx.Problem(
        inner=lambda w, lam, d: w**2 / 2, outer=lambda w, lam, d: w**2 - lam, init=lambda lam, d: jnp.asarray(1.0)
    )
    return hx.hypergradient(problem, hx.GradientDescent(step_size=lambda lam: lam), hx.Reverse(60))


def follow(steps, **settings):
    callback = GradientExplosion(**settings)
    optimizer = optax.chain(optax.clip(1.0), optax.sgd(0.1))
    start = jnp.asarray(0.5)
    return hx.minimize(
        unstable(), start, optimizer=optimizer, steps=steps, callbacks=callback, divergence_factor=float("inf")
    )


def test_an_inner_run_that_becomes_unstable_is_noticed_once_with_advice():
    with pytest.warns(
        ExplodingHypergradientWarning, match="MetaTraining.*clip_by_global_norm.*EvolutionStrategy"
    ) as seen:
        solution = follow(30)
    assert [str(w.filename) == __file__ for w in seen] == [True]
    assert solution.steps == 30
    with pytest.warns(ExplodingHypergradientWarning):
        stopped = follow(30, stop=True)
    assert 14 < stopped.steps < 20
    assert stopped.stopped.startswith("exploding hypergradient: norm")
    assert f"at step {stopped.steps}, and 1 is the median" in stopped.stopped


def test_a_healthy_run_is_left_alone():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert follow(12, after=2).steps == 12
        solution = hx.minimize(
            training(horizon=6), LAM, data=DATA, optimizer=optax.adam(0.01), steps=30, callbacks=GradientExplosion()
        )
    assert solution.steps == 30


def test_what_is_not_finite_explodes_and_does_not_enter_the_median():
    rule = GradientExplosion(after=2, stop=True)
    said = []
    norms = [1.0, np.nan, 1.0, 50.0, 1000.0]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for i in range(len(norms)):
            history = [{"gradient_norm": norm} for norm in norms[: i + 1]]
            said.append(rule(hx.Progress(i, 9, 0.0, {}, norms[i], None, history, 1.0, 1.0, lambda: None)) is not None)
    assert said == [False, True, False, False, True]
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"problem": None, "horizon": 8}, "problem must be a Problem"),
        ({"horizon": 0}, "horizon must be a whole number"),
        ({"horizon": (2, 4, 8), "window": 2}, "a pair"),
        ({"horizon": (8, 4), "window": 2}, "the highest horizon must be a whole number, at least 8"),
        ({"horizon": (4, 8)}, "need a window"),
        ({"horizon": 7, "window": 2}, "not multiples of window=2"),
        ({"horizon": 8, "window": 2, "curriculum": 5}, r"give horizon=\(low, high\)"),
        ({"horizon": 8, "window": 0}, "window must be a whole number"),
        ({"horizon": 8, "tasks": 0}, "tasks must be a whole number"),
        ({"horizon": 8, "parallel": 2}, "let `parallel` divide them"),
    ],
)
def test_wrong_settings_are_advised(settings, message):
    with pytest.raises(ValueError, match=message):
        training(**settings)


def test_wrong_explosions_are_advised():
    for settings, message in (({"factor": 1.0}, "above 1"), ({"after": 0}, "after must be")):
        with pytest.raises(ValueError, match=message):
            GradientExplosion(**settings)
