"""Gradients from values alone: unbiased, with the variance that theory gives, for objectives without derivative."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hyperax as hx
from hyperax.methods.evolution_strategy import EvolutionStrategy
from problems import quadratic

SLOPE = np.array([1.0, -2.0, 0.5, 0.0])
LINEAR = hx.Problem(
    lambda w, lam, d: jnp.sum(w**2), lambda w, lam, d: jnp.sum(SLOPE * lam["x"]) + d, lambda lam, d: jnp.zeros(2)
)
LAM = {"x": jnp.array([0.3, 0.1, -0.2, 1.0])}


def estimates(problem, dynamics, method, lam, data, count):
    """The gradients of hyperiterations 0, ..., count - 1 at the same lam."""
    f = hx.hypergradient(problem, dynamics, method)
    numbers = jnp.arange(count, dtype=jnp.int32)
    return jax.jit(jax.vmap(lambda k: f(lam, data, k).grad))(numbers)


def test_mean_and_variance_for_a_linear_objective():
    pairs, count = 5, 4000
    method = EvolutionStrategy(0, pairs, sigma=0.3)
    g = np.asarray(estimates(LINEAR, hx.GradientDescent(0.1), method, LAM, jnp.asarray(7.0), count)["x"])
    variance = (np.sum(SLOPE**2) + SLOPE**2) / pairs
    assert np.all(np.abs(g.mean(0) - SLOPE) < 4 * np.sqrt(variance / count))
    np.testing.assert_allclose(g.var(0), variance, rtol=0.15)


def test_it_is_unbiased_for_a_quadratic():
    problem, lam, target = quadratic((1.0, 2.5)), jnp.array([1.0, -2.0]), jnp.array([0.3, -1.0])
    exact = hx.hypergradient(problem, hx.GradientDescent(0.2), hx.Reverse(4))(lam, target)
    method = EvolutionStrategy(4, 8, sigma=0.5)
    g = np.asarray(estimates(problem, hx.GradientDescent(0.2), method, lam, target, 1000))
    assert np.all(np.abs(g.mean(0) - exact.grad) < 4 * g.std(0) / np.sqrt(len(g)))
    assert np.all(g.std(0) / np.sqrt(len(g)) < 0.1 * np.abs(exact.grad))
    h = hx.hypergradient(problem, hx.GradientDescent(0.2), method)(lam, target)
    np.testing.assert_allclose(h.value, exact.value, rtol=1e-12)
    np.testing.assert_allclose(h.state.w, exact.state.w, rtol=1e-12)


def test_the_directions():
    def f(carry, **more):
        f = hx.hypergradient(LINEAR, hx.GradientDescent(0.1), EvolutionStrategy(0, 5, 0.3, **more))
        assert not f.remembers_tasks
        return f(LAM, 1.0, f.init(LAM, 1.0) if carry is None else carry)

    first = f(None)
    second = f(first.carry)
    assert (first.carry, second.carry) == (1, 2)
    assert np.all(first.grad["x"] != second.grad["x"])
    np.testing.assert_array_equal(f(None).grad["x"], first.grad["x"])
    assert np.all(f(None, seed=1).grad["x"] != first.grad["x"])
    # Chunks that leave a rest give the same directions.
    np.testing.assert_allclose(f(None, chunk=2).grad["x"], first.grad["x"], rtol=1e-12)


def threshold():
    """Points on a line, labelled by their sign; w goes to the boundary lam, and all is right at lam = 0."""
    x = jnp.linspace(-2.0, 2.0, 41)
    wrong = lambda w, lam, d: jnp.mean(((d > w) != (d > 0.01)).astype(jnp.float64))
    return hx.Problem(lambda w, lam, d: (w - lam) ** 2, wrong, lambda lam, d: jnp.zeros(())), x


def test_the_number_of_errors_has_a_gradient():
    problem, x = threshold()
    lam, dynamics = jnp.asarray(1.5), hx.GradientDescent(0.3)
    f = hx.hypergradient(problem, dynamics, EvolutionStrategy(5, 64, sigma=0.3))
    h = f(lam, x)  # w = 0.99 lam: a part of w / 4 is wrong
    np.testing.assert_allclose(h.value, 14 / 41, rtol=1e-12)
    assert 0.15 < h.grad < 0.35
    with pytest.warns(hx.UnusedLeafWarning):
        assert hx.hypergradient(problem, dynamics, hx.Reverse(5))(lam, x).grad == 0
    solution = hx.minimize(f, lam, data=x, optimizer=optax.adam(0.1), steps=60)
    assert solution.history[-1]["value"] < 0.03


def test_a_resumed_run_goes_on_with_the_next_directions(tmp_path):
    problem, x = threshold()
    f = hx.hypergradient(problem, hx.GradientDescent(0.3), EvolutionStrategy(3, 4, sigma=0.3))
    sgd = optax.sgd(0.1)
    run = lambda steps, **more: hx.minimize(f, 1.5, data=x, optimizer=sgd, steps=steps, dispatch=2, **more)
    whole = run(4)
    checkpoint = hx.Checkpoint(tmp_path, every=2)
    run(2, checkpoint=checkpoint)
    resumed = run(4, checkpoint=checkpoint, resume=True)
    assert float(resumed.lam) == float(whole.lam)
    assert whole.carry == 4


def test_the_mean_over_tasks():
    f = hx.hypergradient(LINEAR, hx.GradientDescent(0.1), EvolutionStrategy(0, 5, 0.3))
    h = hx.mean_over_tasks(f)(LAM, jnp.array([1.0, 2.0, 6.0]))
    np.testing.assert_allclose(h.grad["x"], f(LAM, 1.0).grad["x"], rtol=1e-9)
    np.testing.assert_allclose(h.value, np.sum(SLOPE * LAM["x"]) + 3.0, rtol=1e-12)
    np.testing.assert_array_equal(h.carry, [1, 1, 1])


def test_what_cannot_be_is_said():
    for arguments, message in (
        ((-1, 4, 0.1), "steps must be"),
        ((5, 0, 0.1), "pairs must be"),
        ((5, 4, 0.0), "sigma is 0.0"),
        ((5, 4, "0.1"), "sigma is '0.1'"),
        ((5, 4, 0.1, 0.5), "seed must be"),
        ((5, 4, 0.1, 0, 0), "chunk must be"),
    ):
        with pytest.raises(ValueError, match=message):
            EvolutionStrategy(*arguments)
