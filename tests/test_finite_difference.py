"""Differences for second derivatives: DARTS written out, and the error in epsilon."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hyperax as hx
from hyperax.methods.finite_difference import FiniteDifference
from problems import STEPS, TASKS, assert_trees_close, case, quadratic, regression_data, reverse

silently = pytest.mark.filterwarnings("ignore::hyperax.UnusedLeafWarning")  # Phi_0, behind the window


@silently
def test_one_step_is_darts_written_out():
    problem, _, lam = case("all", "GradientDescent", False)
    eta, epsilon = 0.1, 0.05
    h = hx.hypergradient(problem, hx.GradientDescent(eta), FiniteDifference(1, 1, epsilon))
    h = h({**lam, "init": jnp.array([0.3, -0.2, 0.5])}, regression_data())

    # eq. 7-8, with all of lam but Phi_0's in place of alpha, and L and E as functions of (w, lam) alone.
    inner = lambda w, lam: problem.inner(w, lam, problem.prepare(lam, regression_data()))
    outer = lambda w, lam: problem.outer(w, lam, problem.prepare(lam, regression_data()))

    @jax.jit
    def darts(w, lam):
        after = w - eta * jax.grad(inner)(w, lam)
        u, direct = jax.grad(outer, argnums=(0, 1))(after, lam)
        short = epsilon / jnp.linalg.norm(u)
        plus, minus = (jax.grad(inner, argnums=1)(w + sign * short * u, lam) for sign in (1, -1))
        return after, jax.tree.map(lambda d, p, m: d - eta * (p - m) / (2 * short), direct, plus, minus)

    after, expected = darts(lam["init"], lam)
    np.testing.assert_allclose(h.state.w, after, rtol=1e-12)
    for entry in ("steps", "prepare", "outer"):
        assert_trees_close(h.grad[entry], expected[entry], 1e-10)
    assert np.all(np.asarray(h.grad["prepare"]) != 0)


@silently
def test_the_error_is_of_second_order_in_epsilon():
    problem, phi, lam = case("all", "HeavyBall", True)
    of = lambda method: hx.hypergradient(problem, phi, method)(lam, regression_data())
    exact, *approximate = map(of, (hx.Truncated(STEPS, 3), *(FiniteDifference(STEPS, 3, e) for e in (4e-3, 2e-3))))
    flat = lambda h: np.concatenate([np.ravel(x) for x in jax.tree.leaves(h.grad)])
    errors = [np.linalg.norm(flat(h) - flat(exact)) for h in approximate]
    assert errors[1] < 1e-4 * np.linalg.norm(flat(exact))
    np.testing.assert_allclose(errors[0] / errors[1], 4.0, rtol=1e-2)
    assert_trees_close((approximate[0].value, approximate[0].state), (exact.value, exact.state), 1e-12)


def test_it_is_exact_for_a_quadratic_and_over_the_whole_run_it_is_reverse():
    problem, lam = quadratic((1.0, 2.5)), jnp.array([1.0, -2.0])
    target = jnp.array([0.3, -1.0])
    of = lambda method: hx.hypergradient(problem, hx.HeavyBall(0.2, 0.5), method)(lam, target)
    assert_trees_close(of(FiniteDifference(9, 9, 0.5)).grad, of(hx.Reverse(9)).grad, 1e-11)
    assert_trees_close(of(FiniteDifference(9, 4, 0.5)).grad, of(hx.Truncated(9, 4)).grad, 1e-11)


def test_the_whole_run_with_every_way_into_lam():
    problem, phi, lam = case("all", "Optax(adam)", False)
    h = hx.hypergradient(problem, phi, FiniteDifference(STEPS, STEPS, 1e-5))(lam, regression_data())
    assert_trees_close(h.grad, reverse("all", "Optax(adam)", False).grad, 1e-7)


def test_the_mean_over_tasks():
    problem, phi, lam = case("prepare", "GradientDescent", True)
    mean = lambda method: hx.mean_over_tasks(hx.hypergradient(problem, phi, method), parallel=2)
    h, exact = (mean(m)(lam, regression_data(TASKS)) for m in (FiniteDifference(3, 2, 1e-5), hx.Truncated(3, 2)))
    assert_trees_close(h.grad, exact.grad, 1e-7)


@jax.custom_vjp
def once(w):
    """w^3 whose derivative has none."""
    return jnp.sum(w**3)


@jax.custom_vjp
def slope(w, ct):
    return 3 * ct * w**2


def refuse(*arguments):
    raise AssertionError("a second derivative was asked for")


slope.defvjp(lambda w, ct: (refuse(), None), refuse)
once.defvjp(lambda w: (once(w), w), lambda w, ct: (slope(w, ct),))


def test_no_second_derivative_is_taken():
    problem = hx.Problem(
        lambda w, lam, d: lam * once(w), lambda w, lam, d: jnp.sum(w**2), lambda lam, d: jnp.array([0.5, 1.0])
    )
    lam, dynamics = jnp.asarray(0.7), hx.GradientDescent(0.1)
    h = hx.hypergradient(problem, dynamics, FiniteDifference(2, 2, 1e-4))(lam)
    known = hx.Problem(lambda w, lam, d: lam * jnp.sum(w**3), problem.outer, problem.init)
    assert_trees_close(h.grad, hx.hypergradient(known, dynamics, hx.Reverse(2))(lam).grad, 1e-8)
    with pytest.raises(AssertionError, match="second derivative"):
        hx.hypergradient(problem, dynamics, hx.Reverse(2))(lam)


@pytest.mark.parametrize("factor", [0.0, 1e-30, 1e30])
def test_float32_with_cotangents_of_any_size(factor):
    problem = hx.Problem(
        inner=lambda w, lam, d: jnp.sum(jnp.cosh(w - lam)),
        outer=lambda w, lam, d: d * jnp.sum((w - 1.0) ** 2),
        init=lambda lam, d: jnp.zeros(3, jnp.float32),
    )
    lam, d = jnp.asarray([0.5, 1.0, -0.5], jnp.float32), jnp.asarray(factor, jnp.float32)
    h = hx.hypergradient(problem, hx.GradientDescent(0.2), FiniteDifference(3, 3))(lam, d)
    exact = hx.hypergradient(problem, hx.GradientDescent(0.2), hx.Reverse(3))(lam, d)
    assert h.grad.dtype == jnp.float32
    assert_trees_close(h.grad, exact.grad, 2e-4)  # epsilon = 0.01 with third derivatives of size one, and rounding


def test_what_cannot_be_is_said():
    for arguments, message in (
        ((3, 4), "longer than the run"),
        ((3, -1), "window must be"),
        ((-1, 0), "steps must be"),
        ((3, 1, 0.0), "epsilon is 0.0"),
        ((3, 1, float("nan")), "epsilon is nan"),
        ((3, 1, None), "epsilon is None"),
    ):
        with pytest.raises(ValueError, match=message):
            FiniteDifference(*arguments)
