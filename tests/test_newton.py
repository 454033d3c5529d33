"""Newton's method as a dynamics: it converges where a full step would not, and serves `Implicit`."""

import jax.numpy as jnp
import numpy as np
import pytest

import hyperax as hx
from hyperax.dynamics.newton import Newton

# The gradient of log cosh is tanh: full steps from |w| > 1.1 diverge.
PROBLEM = hx.Problem(
    inner=lambda w, lam, d: jnp.sum(jnp.logaddexp(w - d, d - w)) + 0.5e-3 * jnp.sum(jnp.exp(lam) * w**2),
    outer=lambda w, lam, d: jnp.sum(w**2),
    init=lambda lam, d: jnp.full(3, 8.0),
)
DATA = jnp.asarray([0.5, -1.0, 2.0])


def test_steps_are_shortened_where_full_ones_diverge():
    state, path = hx.rollout(PROBLEM, Newton(), 12, jnp.zeros(3), DATA, observe=lambda w: PROBLEM.inner(w, 0.0, DATA))
    np.testing.assert_allclose(jnp.tanh(state.w - DATA) + 1e-3 * state.w, 0.0, atol=1e-12)
    assert np.all(np.diff(path) <= 1e-12)
    full = 8.0 - (jnp.tanh(8.0 - DATA) + 8e-3) / (1 / jnp.cosh(8.0 - DATA) ** 2 + 1e-3)
    assert PROBLEM.inner(full, 0.0, DATA) > PROBLEM.inner(jnp.full(3, 8.0), 0.0, DATA)


def test_implicit_hypergradient():
    f = hx.hypergradient(PROBLEM, Newton(tolerance=1e-12), hx.Implicit(30, tolerance=lambda k: 1e-12))
    lam = jnp.asarray([0.0, 1.0, 2.0])
    h = f(lam, DATA)
    assert h.info["inner_steps"] < 30
    differences = [(f(lam + e, DATA).value - f(lam - e, DATA).value) / 2e-4 for e in 1e-4 * jnp.eye(3)]
    np.testing.assert_allclose(h.grad, differences, rtol=1e-5)


def test_steps_stay_where_the_objective_is_defined():
    entropy = lambda w: jnp.sum(w * jnp.log(w) - 0.1 * w)  # the full step from 3 is to -2.7, where the slope is NaN
    problem = hx.Problem(lambda w, lam, d: entropy(w), lambda w, lam, d: 0.0, lambda lam, d: jnp.full(2, 3.0))
    state, _ = hx.rollout(problem, Newton(), 20, jnp.zeros(()), None)
    np.testing.assert_allclose(state.w, np.exp(-0.9), rtol=1e-6)


def test_nothing_moves_within_the_tolerance():
    state, _ = hx.rollout(PROBLEM, Newton(tolerance=10.0), 2, jnp.zeros(3), DATA)
    np.testing.assert_array_equal(state.w, 8.0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tolerance": -1.0}, "tolerance is -1.0"),
        ({"forcing": 0.0}, "forcing is 0.0"),
        ({"forcing": 1.0}, "below 1"),
        ({"max_steps": 0}, "max_steps must be"),
    ],
)
def test_options_are_checked(options, words):
    with pytest.raises(ValueError, match=words):
        Newton(**options)
