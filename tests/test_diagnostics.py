"""A healthy problem is called healthy; each planted fault is named."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hyperax as hx
from hyperax.diagnostics import diagnose
from problems import quadratic

LAM, TARGET = jnp.array([1.0, 2.0]), jnp.array([0.3, -1.0])


def of(method, dynamics=None, problem=None):
    return hx.hypergradient(problem or quadratic(), dynamics or hx.GradientDescent(0.4), method)


@pytest.mark.parametrize("method", [hx.Reverse(40), hx.Forward(40), hx.Truncated(40, 40)], ids=str)
def test_a_healthy_problem_needs_no_advice(method):
    found = diagnose(of(method), LAM, TARGET)
    assert found.advice == ()
    assert max(found.relative_errors) < 1e-7
    # L has curvatures 1 and 2: with step 0.4 the slow direction contracts by 0.6, from |w_0 - lam_1| = 1.
    assert found.inner.rate == pytest.approx(0.6, rel=1e-3)
    assert found.inner.distance == pytest.approx(0.6**40, rel=1e-2)
    assert found.inner.gradient_norm == pytest.approx(0.6**40, rel=1e-2)
    assert found.inner.last_step == pytest.approx(0.4 * 0.6**39, rel=1e-2)
    h = of(method)(LAM, TARGET)
    assert (found.value, found.gradient_norm) == pytest.approx((float(h.value), float(jnp.linalg.norm(h.grad))))
    assert found.memory is None or found.memory > 0
    assert 0 < found.seconds < 1
    assert str(found).endswith("nothing looks wrong")
    assert "in float64" in str(found)


def test_directions_are_a_function_of_the_key():
    along = lambda seed: diagnose(of(hx.Reverse(5)), LAM, TARGET, key=jax.random.key(seed), directions=2).directional
    assert along(1) == along(1) != along(2)
    assert len(along(1)) == 2


def test_float32_is_judged_by_its_own_precision():
    found = diagnose(of(hx.Reverse(40)), LAM.astype(jnp.float32), TARGET.astype(jnp.float32))
    assert found.advice == ()
    assert found.dtype == "float32"
    assert 1e-9 < max(found.relative_errors) < 1e-2
    assert "in float32" in str(found)


def test_a_converged_run_has_no_rate_of_rounding_errors():
    found = diagnose(of(hx.Reverse(200)), LAM, TARGET)
    assert (found.inner.rate, found.inner.distance, found.advice) == (None, None, ())
    assert "contraction rate unknown" in str(found)


def test_a_step_beyond_two_over_nu_is_named():
    found = diagnose(of(hx.Reverse(20), hx.GradientDescent(1.1)), LAM, TARGET)
    assert found.inner.rate == pytest.approx(1.2, rel=1e-2)
    assert found.inner.distance == float("inf")
    (sentence,) = found.advice
    assert "does not contract" in sentence
    assert "below 2 / nu" in sentence


def test_overflow_is_named():
    found = diagnose(of(hx.Reverse(2000), hx.GradientDescent(3.0)), LAM, TARGET)
    assert found.advice[0].startswith("The value is not finite")
    assert "smaller step size" in found.advice[0]


def test_a_gradient_that_is_not_finite_is_named():
    problem = hx.Problem(
        inner=lambda w, lam, d: jnp.sum((w - lam) ** 2),
        outer=lambda w, lam, d: jnp.sum(jnp.sqrt(jnp.abs(w) * 0.0)) + jnp.sum(w),
        init=lambda lam, d: jnp.zeros(2),
    )
    found = diagnose(of(hx.Reverse(20), problem=problem), LAM)
    assert found.advice[0].startswith("The gradient is not finite")


@pytest.mark.parametrize(
    ("step", "remedy"), [(0.2, "use more steps ("), (0.01, "use more steps, or momentum (HeavyBall)")]
)
def test_an_unconverged_run_is_named(step, remedy):
    found = diagnose(of(hx.Reverse(10), hx.GradientDescent(step), quadratic((1.0, 1.0))), LAM, TARGET)
    (sentence,) = found.advice
    assert "from the inner solution" in sentence
    assert remedy in sentence
    assert found.inner.rate == pytest.approx(1 - step)
    assert found.inner.distance == pytest.approx((1 - step) ** 10 * float(jnp.linalg.norm(LAM)))


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (hx.Truncated(40, 1), ("Truncated", "by design", "Reverse(steps=40)")),
        (hx.FirstOrder(40), ("FirstOrder", "by design", "Reverse(steps=40)")),
    ],
    ids=str,
)
def test_an_approximation_is_named_neutrally(method, words):
    problem = hx.Problem(
        inner=quadratic().inner,
        outer=lambda w, lam, d: jnp.sum((w - d) ** 2) + jnp.sum(lam**3),
        init=quadratic().init,
    )
    found = diagnose(of(method, problem=problem), LAM, TARGET)
    (sentence,) = found.advice
    assert all(word in sentence for word in words)
    assert "wrong" not in sentence


@jax.custom_vjp
def wrong_square(x):
    return jnp.sum(x**2)


wrong_square.defvjp(lambda x: (jnp.sum(x**2), x), lambda x, g: (1.9 * g * x,))


@pytest.mark.parametrize("where", ["inner", "outer"])
def test_a_wrong_derivative_is_named(where):
    """In E the first derivative is wrong; in L the second, that of the gradient which the dynamics follows."""
    if where == "outer":
        problem = hx.Problem(quadratic().inner, lambda w, lam, d: wrong_square(w - d), quadratic().init)
    else:
        stopped = lambda w, lam, d: jnp.sum(w * jax.lax.stop_gradient(w)) / 2 - w @ lam
        problem = hx.Problem(stopped, quadratic().outer, quadratic().init)
    found = diagnose(of(hx.Reverse(40), problem=problem), LAM, TARGET)
    assert found.advice[0].startswith("Finite differences disagree, by up to ")
    assert "the method is exact, so a function is differentiated wrongly" in found.advice[0]


@pytest.mark.parametrize("parallel", [None, 2])
def test_the_worst_task_is_shown(parallel):
    problem = hx.Problem(
        inner=lambda w, lam, d: 0.5 * d["slow"] * jnp.sum((w - lam) ** 2),
        outer=lambda w, lam, d: 0.5 * jnp.sum((w - d["target"]) ** 2) + 0.0 * jax.lax.pmean(jnp.sum(w), hx.TASKS),
        init=quadratic().init,
    )
    data = {"slow": jnp.array([1.0, 0.9, 0.1, 1.1]), "target": jnp.arange(8.0).reshape(4, 2)}
    f = hx.mean_over_tasks(of(hx.Reverse(40), problem=problem), parallel)
    found = diagnose(f, LAM, data)
    assert (found.tasks, found.worst_task) == (4, 2)
    assert found.inner.rate == pytest.approx(0.96)
    assert max(found.relative_errors) < 1e-7
    assert found.value == pytest.approx(float(f(LAM, data).value))
    assert "task 2 of 4" in str(found)
    (sentence,) = found.advice
    assert "momentum" in sentence


def test_mini_batches_are_not_judged_by_their_steps():
    noisy = hx.Problem(
        inner=lambda w, lam, d: 0.5 * jnp.sum((w - lam * d) ** 2),
        outer=quadratic().outer,
        init=quadratic().init,
        batch=lambda d, t: 1.0 + 0.5 * jnp.sin(t),
    )
    found = diagnose(of(hx.Reverse(20), problem=noisy), LAM, TARGET)
    assert found.batches
    assert found.advice == ()


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_few_steps(steps):
    direct = hx.Problem(
        quadratic().inner, lambda w, lam, d: jnp.sum((w - d) ** 2) + jnp.sum(lam**2), lambda lam, d: 0.5 * lam
    )
    found = diagnose(of(hx.Reverse(steps), problem=direct), LAM, TARGET)
    assert (found.inner.rate is None) == (steps < 2)
    assert max(found.relative_errors) < 1e-7
    w = of(hx.Reverse(steps), problem=direct)(LAM, TARGET).state.w
    assert found.inner.gradient_norm == pytest.approx(float(jnp.linalg.norm(jnp.array([1.0, 2.0]) * (w - LAM))))
    assert str(found)


def test_lam_may_have_functions_and_dynamics_a_memory():
    problem = hx.Problem(
        inner=lambda w, lam, d: 0.5 * jnp.sum((w - lam["map"](lam["x"])) ** 2),
        outer=lambda w, lam, d: jnp.sum((w - d) ** 2),
        init=lambda lam, d: jnp.zeros(2),
    )
    adam = hx.Optax(optax.adam(0.01, eps_root=1e-6))
    found = diagnose(of(hx.Reverse(30), adam, problem), {"x": LAM, "map": jnp.tanh}, TARGET)
    assert max(found.relative_errors) < 1e-6


def test_what_it_refuses():
    f = of(hx.Reverse(3))
    with pytest.raises(
        ValueError, match="diagnose measures a program, so it cannot be part of one: call it outside jit"
    ):
        jax.jit(lambda lam: diagnose(f, lam, TARGET).value)(LAM)
    with pytest.raises(ValueError, match=r"diagnose needs what hypergradient\(...\) .* not function"):
        diagnose(lambda lam, data: None, LAM, TARGET)
    with pytest.raises(ValueError, match="directions must be a whole number, at least 1"):
        diagnose(f, LAM, TARGET, directions=0)
    with pytest.raises(ValueError, match="epsilon is -1"):
        diagnose(f, LAM, TARGET, epsilon=-1.0)
    with pytest.raises(ValueError, match="lam has type int"):
        diagnose(f, 3, TARGET)
    with pytest.raises(hx.UnusedLeafWarning):
        diagnose(of(hx.Reverse(0)), LAM, TARGET)


def test_epsilon_is_the_callers_if_given():
    found = diagnose(of(hx.Reverse(5)), LAM, TARGET, epsilon=1e-3)
    assert found.epsilon == 1e-3
    np.testing.assert_allclose(found.directional, found.finite_differences, rtol=1e-7)
