"""Each dynamics against its equation, written out; settings in all their forms."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hyperax as hx

CURVATURE = {"a": jnp.array([1.0, 3.0]), "b": jnp.array(2.0)}
START = {"a": jnp.array([1.0, -2.0]), "b": jnp.array(0.5)}
PROBLEM = hx.Problem(
    inner=lambda w, lam, d: sum(jnp.sum(c * x**2) / 2 for c, x in zip(CURVATURE.values(), w.values(), strict=True)),
    outer=lambda w, lam, d: jnp.sum(w["a"]) * lam["x"],
    init=lambda lam, d: START,
)
LAM = {"x": jnp.asarray(0.1)}


def last(dynamics, steps=4, lam=LAM):
    return hx.rollout(PROBLEM, dynamics, steps, lam)[0]


def close(one, other):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), one, other)


def heavy_ball(rate, momentum, steps=4):
    w = {name: np.asarray(x) for name, x in START.items()}
    m = {name: 0.0 * x for name, x in w.items()}
    for t in range(1, steps + 1):
        for name in w:
            m[name] = momentum(name, t) * m[name] + np.asarray(CURVATURE[name]) * w[name]
            w[name] = w[name] - rate(name, t) * m[name]
    return w


# (a setting, what it is for parameter `name` at step t)
SETTINGS = {
    "number": (0.1, lambda name, t: 0.1),
    "array": (jnp.asarray(0.1), lambda name, t: 0.1),
    "of lam": (lambda lam: lam["x"], lambda name, t: 0.1),
    "of lam and t": (lambda lam, t: lam["x"] / t, lambda name, t: 0.1 / t),
    "with an option": (lambda lam, scale=2.0: scale * lam["x"], lambda name, t: 0.2),
    "per parameter": ({"a": 0.1, "b": 0.3}, lambda name, t: {"a": 0.1, "b": 0.3}[name]),
    "per entry": (
        {"a": jnp.array([0.1, 0.2]), "b": 0.3},
        lambda name, t: {"a": np.array([0.1, 0.2]), "b": 0.3}[name],
    ),
    "per parameter of lam and t": (
        lambda lam, t: {"a": lam["x"] / t, "b": 0.0},
        lambda name, t: 0.1 / t if name == "a" else 0.0,
    ),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings(setting):
    given, meant = SETTINGS[setting]
    close(last(hx.GradientDescent(given)).w, heavy_ball(meant, lambda name, t: 0.0))
    close(last(hx.HeavyBall(given, 0.6)).w, heavy_ball(meant, lambda name, t: 0.6))
    close(last(hx.HeavyBall(0.15, given)).w, heavy_ball(lambda name, t: 0.15, meant))


def test_a_velocity_takes_the_current_step_size():
    """m <- mu m + g, w <- w - eta_t m: the old velocity is scaled by the new step size."""
    state = last(hx.HeavyBall(lambda lam, t: jnp.where(t == 1, 0.1, 0.0), 0.9), steps=2)
    close(state.w, heavy_ball(lambda name, t: 0.1 if t == 1 else 0.0, lambda name, t: 0.9, 1))
    assert np.all(state.auxiliary["a"] != 0)


@pytest.mark.parametrize(
    "optimizer", [optax.sgd(0.1, momentum=0.5), optax.adam(0.1), optax.adamw(0.1)], ids=["sgd", "adam", "adamw"]
)
def test_optax(optimizer):
    w, memory = START, optimizer.init(START)
    for _ in range(4):
        updates, memory = optimizer.update(jax.grad(PROBLEM.inner)(w, LAM, None), memory, w)
        w = optax.apply_updates(w, updates)
    close(last(hx.Optax(optimizer)).w, w)
    close(last(hx.Optax(lambda lam: optimizer)).w, w)


def test_optax_momentum_is_heavy_ball():
    close(last(hx.Optax(optax.sgd(0.1, momentum=0.5))).w, last(hx.HeavyBall(0.1, 0.5)).w)


def test_observations_are_those_of_shorter_runs():
    _, seen = hx.rollout(PROBLEM, hx.HeavyBall(0.1, 0.5), 3, LAM, observe=lambda w: w["a"])
    np.testing.assert_allclose(seen, [last(hx.HeavyBall(0.1, 0.5), t).w["a"] for t in (1, 2, 3)], rtol=1e-12)
    state, seen = hx.rollout(PROBLEM, hx.GradientDescent(0.1), 0, LAM, observe=lambda w: w["a"])
    close(state.w, START)
    assert seen.shape == (0, 2)


def test_mini_batches_are_counted_from_one():
    problem = hx.Problem(
        inner=lambda w, lam, d: -w * d, outer=lambda w, lam, d: w, init=lambda lam, d: 0.0, batch=lambda d, t: d[t - 1]
    )
    _, seen = hx.rollout(problem, hx.GradientDescent(1.0), 3, None, jnp.array([1.0, 10.0, 100.0]), observe=lambda w: w)
    np.testing.assert_allclose(seen, [1.0, 11.0, 111.0])


def test_float32_is_kept_with_float64_settings():
    problem = hx.Problem(lambda w, lam, d: jnp.sum(w**2), lambda w, lam, d: w, lambda lam, d: jnp.ones(2, jnp.float32))
    for dynamics in (
        hx.GradientDescent(lambda lam: lam),
        hx.GradientDescent(lambda lam: jnp.stack([lam, lam])),
        hx.HeavyBall(lambda lam: lam, lambda lam: lam),
    ):
        assert hx.rollout(problem, dynamics, 2, jnp.float64(0.1))[0].w.dtype == jnp.float32
