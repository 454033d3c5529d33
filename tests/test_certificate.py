"""A healthy problem is called healthy, whatever the method; each planted fault is named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hyperax as hx
from hyperax import certify
from hyperax.methods.closed_form import ClosedForm
from hyperax.methods.doubling import Doubling
from hyperax.methods.evolution_strategy import EvolutionStrategy
from hyperax.methods.finite_difference import FiniteDifference
from hyperax.methods.implicit import Implicit
from hyperax.methods.real_time import RealTime
from hyperax.methods.reversible import Reversible
from problems import quadratic

LAM, TARGET = jnp.array([1.0, 2.0]), jnp.array([0.3, -1.0])
QUADRATIC = quadratic()
STEPS = 40


def descent(step_size):
    """Gradient descent; an array as step size is an argument of the compiled programs, so that they are shared."""
    return hx.GradientDescent(jnp.asarray(step_size))


DESCENT, HEAVY_BALL = descent(0.4), hx.HeavyBall(jnp.asarray(0.3), jnp.asarray(0.4))


def of(method, dynamics=DESCENT, problem=QUADRATIC):
    return hx.hypergradient(problem, dynamics, method)


HEALTHY = {
    "Reverse": of(hx.Reverse(40)),
    "Reverse in segments, with momentum": of(hx.Reverse(40, segment="sqrt"), HEAVY_BALL),
    "Forward": of(hx.Forward(40)),
    "Doubling": of(Doubling(40)),
    "Reversible": of(Reversible(40, lowest_momentum=0.25), HEAVY_BALL),
    "Truncated": of(hx.Truncated(40, 40)),
    "Truncated, some": of(hx.Truncated(40, 10)),
    "Implicit": of(Implicit(40)),
    "ClosedForm": of(ClosedForm(lambda lam, data: lam), None),
    "RealTime": of(RealTime(40, every=40)),
    "FiniteDifference": of(FiniteDifference(40, window=40)),
    "EvolutionStrategy": of(EvolutionStrategy(40, pairs=200, sigma=1e-3)),
}
VERDICTS = {
    "Truncated, some": "An approximation of the gradient of f_T, by design: off by 0.",
    "Implicit": "The gradient of f to ",
    "ClosedForm": "The gradient of f to ",
    "RealTime": "Online; in its first call the gradient of the value to ",
    "FiniteDifference": "",
    "EvolutionStrategy": "An approximation of the gradient of f_T, by design: off by ",
}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_problem_needs_no_advice(name):
    found = certify(HEALTHY[name], LAM, TARGET)
    assert found.advice == ()
    assert str(found).endswith("nothing looks wrong")
    assert found.verdict.startswith(VERDICTS.get(name, "The gradient of f_T to "))
    if found.target in ("f_T", "f"):
        assert max(c.relative_error for c in found.comparisons) < 1e-6
        for c in found.comparisons:
            np.testing.assert_allclose(c.hypergradient, c.other, rtol=1e-6)


def test_what_is_measured():
    found = certify(HEALTHY["Reverse"], LAM, TARGET)
    run, curvature = found.inner.run, found.inner.curvature
    # L has curvatures 1 and 2: with step 0.4 the slow direction contracts by 0.6, from |w_0 - lam_1| = 1.
    assert run.rate == pytest.approx(0.6, rel=1e-3)
    assert (run.distance, run.extrapolated) == pytest.approx((0.6**40, 0.6**40), rel=1e-2)
    assert run.gradient_norm == pytest.approx(0.6**40, rel=1e-2)
    assert run.next_step == pytest.approx(0.4 * 0.6**40, rel=1e-2)
    np.testing.assert_allclose(run.solution, LAM, rtol=1e-12)
    assert (curvature.mu, curvature.nu, curvature.condition) == pytest.approx((1.0, 2.0, 2.0))
    assert (curvature.step_size, curvature.limit, curvature.exact) == pytest.approx((0.4, 1.0, True))
    h = HEALTHY["Reverse"](LAM, TARGET)
    assert (found.value, found.gradient_norm) == pytest.approx((float(h.value), float(jnp.linalg.norm(h.grad))))
    assert found.memory is None or found.memory > 0
    assert 0 < found.seconds < 1
    momentum = certify(HEALTHY["Reversible"], LAM, TARGET)
    assert momentum.inner.curvature.limit == pytest.approx(1.4)


def test_directions_are_a_function_of_the_seed():
    found = lambda seed: certify(HEALTHY["Reverse"], LAM, TARGET, seed=seed, directions=2).comparisons
    along = lambda seed: [c.hypergradient for c in found(seed)]
    assert along(1) == along(1) != along(2)
    assert len(along(1)) == 2


def test_float32_is_checked_in_float64():
    with jax.enable_x64(False):
        lam, data = jnp.asarray(LAM, jnp.float32), jnp.asarray(TARGET, jnp.float32)
        found = certify(HEALTHY["Reverse"], lam, data)
    assert (found.dtype, found.measured_in, found.advice) == ("float32", "float64", ())
    assert max(c.relative_error for c in found.comparisons) < 1e-8
    assert 1e-9 < found.rounding < 1e-5


def test_objectives_that_insist_on_float32():
    lam, data = LAM.astype(jnp.float32), TARGET.astype(jnp.float32)
    inside = hx.Problem(
        inner=lambda w, lam, d: 0.5 * jnp.sum((w - lam.astype(jnp.float32)) ** 2),
        outer=lambda w, lam, d: 0.5 * jnp.sum((w - d) ** 2),
        init=lambda lam, d: jnp.zeros(2, jnp.float32),
    )
    found = certify(of(hx.Reverse(30), problem=inside), lam, data)
    assert (found.advice, found.measured_in) == ((), "float32")
    assert max(c.relative_error for c in found.comparisons) < 1e-2

    refuses = hx.Problem(
        inside.inner, lambda w, lam, d: jnp.sum(jax.lax.sub(w, d) ** 2), lambda lam, d: jnp.zeros(2, jnp.float32)
    )
    found = certify(of(hx.Reverse(30), problem=refuses), lam, data)
    assert (found.advice, found.measured_in) == ((), "float32")
    assert "does not run in float64: " in found.notes[-1]


# Planted faults


@pytest.mark.parametrize("step", [0.2, 0.01])
def test_an_unconverged_inner_loop(step):
    dynamics = descent(step)
    found = certify(of(hx.Reverse(10), dynamics), LAM, TARGET)
    (sentence,) = found.advice
    assert "from the inner solution" in sentence
    assert "fine if f_T is what you minimise" in sentence
    assert ("momentum (HeavyBall)" in sentence) == (step == 0.01)
    assert "not yet close to f" in found.verdict
    left = LAM * (1 - step * np.array([1.0, 2.0])) ** 10
    assert found.inner.run.distance == pytest.approx(float(jnp.linalg.norm(left)))

    found = certify(of(Implicit(10), dynamics), LAM, TARGET)
    (sentence,) = found.advice
    assert found.verdict.startswith("The gradient of neither f nor f_T")
    assert "needs the inner solution, and w_T is not there" in sentence


@pytest.mark.parametrize(
    ("dynamics", "limit"), [(descent(1.1), 1.0), (hx.HeavyBall(jnp.asarray(1.6), jnp.asarray(0.5)), 1.5)]
)
def test_a_step_size_beyond_two_over_nu(dynamics, limit):
    found = certify(of(hx.Reverse(STEPS), dynamics), LAM, TARGET)
    (sentence,) = found.advice
    assert f"is beyond {limit:.3g}, the limit 2 / nu" in sentence
    assert "assumption (vi)" in sentence
    assert found.inner.curvature.limit == pytest.approx(limit)


def test_overflow():
    found = certify(of(hx.Reverse(STEPS), descent(1e10)), LAM, TARGET)
    (sentence,) = found.advice
    assert "The value is not finite: the inner run overflows (The step size 1e+10 is beyond 1" in sentence
    assert found.verdict.startswith("Not usable")


def test_a_gradient_that_is_not_finite():
    problem = hx.Problem(
        QUADRATIC.inner, lambda w, lam, d: jnp.sum(jnp.sqrt(jnp.abs(w) * 0.0)) + jnp.sum(w), QUADRATIC.init
    )
    (sentence,) = certify(of(hx.Reverse(20), problem=problem), LAM).advice
    assert sentence.startswith("The gradient is not finite")


def detached(w, lam, d):
    decay = jax.lax.stop_gradient(lam["decay"]) + 1e-9 * lam["decay"]
    return 0.5 * jnp.sum((w - lam["centre"]) ** 2) + 0.5 * decay * jnp.sum(w**2)


@pytest.mark.parametrize("method", [hx.Reverse(60), Implicit(60)], ids=str)
def test_a_detached_leaf_of_lam(method):
    problem = hx.Problem(detached, lambda w, lam, d: 0.5 * jnp.sum((w - d) ** 2), lambda lam, d: jnp.zeros(2))
    found = certify(of(method, problem=problem), {"centre": LAM, "decay": jnp.asarray(0.5)}, TARGET)
    (sentence,) = found.advice
    assert "Finite differences of" in sentence
    assert "along lam['decay'] the hypergradient is" in sentence
    assert "lam['centre']" not in sentence
    assert "stop_gradient" in sentence
    assert found.verdict.startswith("Wrong")


def test_a_detached_leaf_of_little_effect():
    problem = hx.Problem(
        inner=lambda w, lam, d: 0.5 * jnp.sum((w - lam["centre"] - 1e-7 * jax.lax.stop_gradient(lam["shift"])) ** 2),
        outer=lambda w, lam, d: jnp.sum((w - d) ** 2) + 1e-12 * lam["shift"],
        init=lambda lam, d: jnp.zeros(2),
    )
    lam = {"centre": LAM, "shift": jnp.asarray(1.0)}
    (sentence,) = certify(of(hx.Reverse(60), problem=problem), lam, TARGET).advice
    assert "disagree, by 1e+02 %: along lam['shift'] the hypergradient is" in sentence
    assert "lam['centre']" not in sentence


@jax.custom_vjp
def wrong_square(x):
    return jnp.sum(x**2)


wrong_square.defvjp(lambda x: (jnp.sum(x**2), x), lambda x, g: (1.9 * g * x,))


def test_a_wrong_rule():
    problem = hx.Problem(QUADRATIC.inner, lambda w, lam, d: wrong_square(w - d), QUADRATIC.init)
    found = certify(of(hx.Reverse(40), problem=problem), LAM, TARGET)
    (sentence,) = found.advice
    assert "a custom_jvp or custom_vjp rule" in sentence
    assert "no forward mode" in found.other_method
    assert all(np.isnan(c.other) for c in found.comparisons)


# Minimisers w = lam and w = -lam, of the same height or tilted; w_0 is in the data.
WELLS = of(
    hx.Reverse(200),
    descent(0.05),
    hx.Problem(
        inner=lambda w, lam, d: (w**2 - lam**2) ** 2 + d["tilt"] * w,
        outer=lambda w, lam, d: (w - 2.0) ** 2,
        init=lambda lam, d: d["start"],
    ),
)


def in_wells(start, tilt, **options):
    return certify(WELLS, jnp.asarray(1.2), {"start": jnp.asarray(start), "tilt": jnp.asarray(tilt)}, **options)


def test_two_minimisers():
    (sentence,) = in_wells(-0.5, 0.0).advice
    assert "more than one minimiser: one at a distance of 2.4 from w*" in sentence
    assert "E = 0.64 in place of 10.24" in sentence
    assert "Assumption (iii)" in sentence
    assert in_wells(-0.5, 0.0, starts=0).advice == ()


def test_a_lower_minimiser():
    (sentence,) = in_wells(1.0, 0.3).advice
    assert "Assumption (vi)" in sentence
    found = in_wells(-1.0, 0.3)
    assert found.advice == ()
    assert "L has local minimisers besides w*" in found.notes[0]


KINKS = {
    "abs": lambda w, lam: jnp.sum(jnp.abs(w - 1.0)),
    "relu": lambda w, lam: jnp.sum(jax.nn.relu(lam - 2.0) * w),
    "max": lambda w, lam: jnp.max(w - jnp.array([0.0, 1.0])) + jnp.sum(w**2),
    "round": lambda w, lam: jnp.sum(w) + jnp.round(w[0] - 0.5),
}
KINKED = of(
    hx.Reverse(5),
    problem=hx.Problem(
        quadratic((1.0, 1.0)).inner,
        lambda w, lam, d: jnp.sum(d * jnp.stack([kink(w, lam) for kink in KINKS.values()])),
        lambda lam, d: 1.0 * lam,
    ),
)


@pytest.mark.parametrize("which", range(len(KINKS)), ids=KINKS)
def test_a_kink(which):
    found = certify(KINKED, LAM, jnp.eye(len(KINKS))[which])
    (sentence,) = found.advice
    assert "kink or a jump" in sentence
    assert found.verdict.startswith("Not a gradient")


def test_a_kink_elsewhere_does_no_harm():
    assert certify(KINKED, jnp.array([1.1, 2.3]), jnp.ones(len(KINKS))).advice == ()


def test_a_kink_along_the_run():
    lasso = hx.Problem(
        inner=lambda w, lam, d: 0.5 * jnp.sum((w - d) ** 2) + lam * jnp.sum(jnp.abs(w)),
        outer=lambda w, lam, d: jnp.sum((w - 1.0) ** 2),
        init=lambda lam, d: jnp.zeros(2) + 0.8,
    )
    found = certify(of(hx.Reverse(100), problem=lasso), jnp.asarray(1.0), jnp.array([3.0, 0.4]))
    assert any("L has a kink there, which the iterates jump across" in sentence for sentence in found.advice)


def test_a_wrong_closed_form():
    half = ClosedForm(lambda lam, data: 0.5 * lam)
    found = certify(of(half, None), LAM, TARGET)
    (sentence,) = found.advice
    assert found.verdict == "Wrong: the closed form is no solution of the inner problem."
    assert "The closed form is not the minimiser of L: |grad_w L| is 2.06 at solve(lam)" in sentence
    assert found.inner.run.distance == pytest.approx(float(jnp.linalg.norm(LAM)) / 2)


# The gradient at w[1] = 0 is 0, whatever the data: the Hessian there is diag(1, data).
SADDLE = of(
    Implicit(60),
    problem=hx.Problem(
        inner=lambda w, lam, d: 0.5 * (w[0] - lam) ** 2 + 0.5 * d * w[1] ** 2 + 0.25 * w[1] ** 4,
        outer=lambda w, lam, d: jnp.sum((w - 2.0) ** 2),
        init=lambda lam, d: jnp.zeros(2),
    ),
)


def test_an_indefinite_hessian():
    found = certify(SADDLE, jnp.asarray(0.7), jnp.asarray(-0.5))
    assert any("indefinite at w (mu = -0.5, nu = 1)" in sentence for sentence in found.advice)


def test_a_singular_hessian():
    found = certify(SADDLE, jnp.asarray(0.7), jnp.asarray(0.0))
    assert any("singular" in sentence and "assumption (iii)" in sentence for sentence in found.advice)


# Neutral


@pytest.mark.parametrize("method", [hx.Truncated(40, 1), hx.FirstOrder(40)], ids=str)
def test_an_approximation_is_named_neutrally(method):
    problem = hx.Problem(
        QUADRATIC.inner, lambda w, lam, d: jnp.sum((w - d) ** 2) + 0.1 * jnp.sum(lam**3), QUADRATIC.init
    )
    found = certify(of(method, problem=problem), LAM, TARGET)
    assert "by design" in found.verdict
    assert all("by design" in sentence and "Reverse" in sentence for sentence in found.advice)
    assert not any("wrong" in sentence for sentence in (*found.advice, *found.notes))


def test_mini_batches_are_not_judged_by_their_steps():
    noisy = hx.Problem(
        inner=lambda w, lam, d: 0.5 * jnp.sum((w - lam * d) ** 2),
        outer=QUADRATIC.outer,
        init=QUADRATIC.init,
        batch=lambda d, t: 1.0 + 0.5 * jnp.sin(t),
    )
    found = certify(of(hx.Reverse(20), problem=noisy), LAM, TARGET)
    assert found.batches
    assert found.advice == ()
    assert "mini-batches" in found.notes[0]


def test_the_worst_task_is_shown():
    problem = hx.Problem(
        inner=lambda w, lam, d: 0.5 * d["slow"] * jnp.sum((w - lam) ** 2),
        outer=lambda w, lam, d: 0.5 * jnp.sum((w - d["target"]) ** 2) + 0.0 * jax.lax.pmean(jnp.sum(w), hx.TASKS),
        init=QUADRATIC.init,
    )
    data = {"slow": jnp.array([1.0, 0.9, 0.1, 1.1]), "target": jnp.arange(8.0).reshape(4, 2)}
    f = hx.mean_over_tasks(of(hx.Reverse(40), problem=problem), parallel=2)
    found = certify(f, LAM, data)
    assert (found.tasks, found.worst_task) == (4, 2)
    assert found.inner.run.rate == pytest.approx(0.96)
    assert found.inner.curvature.nu == pytest.approx(0.1)
    assert max(c.relative_error for c in found.comparisons) < 1e-7
    assert found.value == pytest.approx(float(f(LAM, data).value))
    assert "task 2 of 4" in str(found)
    (sentence,) = found.advice
    assert "momentum" in sentence


def test_implicit_over_tasks():
    found = certify(hx.mean_over_tasks(of(Implicit(40))), LAM, jnp.arange(6.0).reshape(3, 2))
    assert (found.advice, found.against, found.tasks) == ((), "f", 3)
    assert max(c.relative_error for c in found.comparisons) < 1e-6


def test_a_warm_start_is_judged_with_its_carry():
    f = of(Implicit(10, warm_start=True), descent(0.2))
    first = f(LAM, TARGET)
    assert "neither" in certify(f, LAM, TARGET).verdict
    carry = first.carry
    for _ in range(8):
        carry = f(LAM, TARGET, carry).carry
    assert certify(f, LAM, TARGET, carry).advice == ()


def test_no_steps():
    direct = hx.Problem(
        QUADRATIC.inner, lambda w, lam, d: jnp.sum((w - d) ** 2) + jnp.sum(lam**2), lambda lam, d: 0.5 * lam
    )
    found = certify(of(hx.Reverse(0), problem=direct), LAM, TARGET)
    assert found.inner.run.rate is None
    assert max(c.relative_error for c in found.comparisons) < 1e-7


def test_a_large_inner_problem():
    """Past d = 400 the Hessian is not formed."""
    curvature = np.concatenate([[0.5, 2.0], np.linspace(0.9, 1.1, 498)])
    problem = quadratic(curvature)
    lam = jnp.linspace(-1.0, 1.0, 500)
    found = certify(of(Implicit(60), problem=problem), lam, jnp.zeros(500), starts=0, directions=1)
    assert found.advice == ()
    assert not found.inner.curvature.exact
    assert (found.inner.curvature.mu, found.inner.curvature.nu) == pytest.approx((0.5, 2.0), rel=1e-6)
    assert max(c.relative_error for c in found.comparisons) < 1e-6


def test_bad_arguments():
    f = HEALTHY["Reverse"]
    with pytest.raises(ValueError, match="cannot be part of one: call it outside jit"):
        jax.jit(lambda lam: certify(f, lam, TARGET).value)(LAM)
    with pytest.raises(ValueError, match=r"certify needs what hypergradient\(...\) .* not function"):
        certify(lambda lam, data: None, LAM, TARGET)
    with pytest.raises(ValueError, match="directions must be a whole number, at least 1"):
        certify(f, LAM, TARGET, directions=0)
    with pytest.raises(ValueError, match="starts must be a whole number, at least 0"):
        certify(f, LAM, TARGET, starts=-1)
    with pytest.raises(ValueError, match="epsilon is -1"):
        certify(f, LAM, TARGET, epsilon=-1.0)
    with pytest.raises(ValueError, match="lam has type int"):
        certify(f, 3, TARGET)
    with pytest.raises(hx.UnusedLeafWarning):
        certify(of(hx.Reverse(0)), LAM, TARGET)
