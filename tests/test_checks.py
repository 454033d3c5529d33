"""What is refused: each message says what is wrong and where. What is warned of: test_unused_leaves.py."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest

import hyperax as hx

LAM = {"a": 0.5, "b": {"c": jnp.array([0.2, 0.3])}}
DATA = jnp.array([1.0, 2.0])
REVERSE = hx.Reverse(3)


def problem(inner=None, outer=None, init=None, **rest):
    return hx.Problem(
        inner or (lambda w, lam, d: jnp.sum((w - d) ** 2) + lam["a"] * jnp.sum(w**2)),
        outer or (lambda w, lam, d: jnp.sum((w - lam["b"]["c"]) ** 2)),
        init or (lambda lam, d: jnp.zeros(2)),
        **rest,
    )


def run(problem, lam=LAM, data=DATA, method=REVERSE, dynamics=None):
    return hx.hypergradient(problem, dynamics or hx.GradientDescent(0.1), method)(lam, data)


# lam.


@pytest.mark.parametrize(
    ("lam", "message"),
    [
        ({**LAM, "n": 3}, r"lam\['n'\] has type int; only floating-point numbers have a hypergradient: convert"),
        ({**LAM, "n": True}, r"lam\['n'\] has type bool"),
        ({**LAM, "n": jnp.arange(2)}, r"lam\['n'\] has type int64"),
        ({**LAM, "n": np.array([True])}, r"lam\['n'\] has type bool"),
        ({**LAM, "n": 1j}, r"lam\['n'\] has type complex"),
        ({**LAM, "n": jnp.ones(2, complex)}, r"lam\['n'\] has type complex128"),
        (None, "lam has no floating-point leaf"),
        ({"f": jnp.tanh}, "lam has no floating-point leaf"),
    ],
)
def test_lam_that_has_no_hypergradient(lam, message):
    with pytest.raises(ValueError, match=message):
        run(problem(), lam)


# Objectives and initial points.


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"inner": lambda w, lam, d: (w - d) ** 2}, r"the inner objective .* it is float64\[2\]: take a sum or a mean"),
        ({"outer": lambda w, lam, d: w}, r"the outer objective .* it is float64\[2\]"),
        ({"outer": lambda w, lam, d: jnp.argmax(w)}, r"the outer objective .* it is int64\[\]"),
        (
            {"outer": lambda w, lam, d: (jnp.sum(w), {"x": w})},
            "it is tuple: .* set has_metrics=True if it returns metrics",
        ),
        ({"outer": lambda w, lam, d: None}, "it is NoneType"),
        ({"has_metrics": True}, r"with has_metrics the outer objective must return a pair \(scalar, dict of arrays\)"),
        ({"has_metrics": True, "outer": lambda w, lam, d: (w, {})}, r"the outer objective .* it is float64\[2\]"),
        ({"init": lambda lam, d: jnp.zeros(2, int)}, "w is int64; inner variables are floating-point numbers"),
        ({"init": lambda lam, d: {"n": 3}}, r"w\['n'\] is int64"),
    ],
)
def test_objectives_that_are_not_scalars(wrong, message):
    with pytest.raises(ValueError, match=message):
        run(problem(**wrong))


class Growing(hx.Dynamics):
    """A dynamics that returns another state than it was given."""

    change: str

    def init(self, w, lam):
        return hx.State(w)

    def step(self, gradient, state, lam, t):
        if self.change == "shape":
            return hx.State(jnp.concatenate([state.w, state.w]))
        return hx.State(state.w, (t,))


@pytest.mark.parametrize("method", [REVERSE, hx.Reverse(3, segment=2), hx.Forward(3), hx.FirstOrder(3)], ids=str)
def test_states_that_change(method):
    data = jnp.ones(2)
    free = problem(
        inner=lambda w, lam, d: jnp.sum(w) * lam["a"], outer=lambda w, lam, d: jnp.sum(w) * jnp.sum(lam["b"]["c"])
    )
    with pytest.raises(ValueError, match=r"state.w is float64\[2\] before a step and float64\[4\] after"):
        run(free, data=data, method=method, dynamics=Growing("shape"))
    with pytest.raises(ValueError, match="a step changes the structure of the state"):
        run(free, data=data, method=method, dynamics=Growing("structure"))


def test_float32_inner_variables_keep_their_type_with_float64_data():
    """Gradients have the type of w and rates are cast to it, so nothing changes from step to step."""
    h = run(problem(init=lambda lam, d: jnp.zeros(2, jnp.float32)))
    assert h.state.w.dtype == jnp.float32


def test_a_float32_state_that_an_optimizer_promotes_is_refused():
    class Promoting(hx.Dynamics):
        def init(self, w, lam):
            return hx.State(w)

        def step(self, gradient, state, lam, t):
            return hx.State(state.w - 0.1 * lam["a"] * gradient(state.w, lam))

    single = problem(init=lambda lam, d: jnp.zeros(2, jnp.float32))
    with pytest.raises(
        ValueError, match=r"float32\[2\] before a step and float64\[2\] after .*a float32 w with a float64 lam"
    ):
        run(single, {"a": jnp.float64(0.5), "b": LAM["b"]}, dynamics=Promoting())


# Methods, dynamics, tasks.


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: hx.Reverse(-1), "steps must be a whole number, at least 0; it is -1"),
        (lambda: hx.Reverse(2.0), "steps must be a whole number, at least 0; it is 2.0"),
        (lambda: hx.Reverse(True), "steps must be a whole number"),
        (lambda: hx.Forward(-1), "steps must be a whole number"),
        (lambda: hx.FirstOrder(-1), "steps must be a whole number"),
        (lambda: hx.Truncated(-1, 0), "steps must be a whole number"),
        (lambda: hx.rollout(problem(), hx.GradientDescent(0.1), -1, LAM, DATA), "steps must be a whole number"),
        (lambda: hx.Reverse(3, segment=0), "segment must be a whole number, at least 1; it is 0"),
        (lambda: hx.Forward(3, chunk=0), "chunk must be a whole number, at least 1; it is 0"),
        (lambda: hx.Truncated(3, 4), "window 4 is longer than the run of 3 steps; use at most 3"),
        (lambda: hx.Truncated(3, -1), "window must be a whole number, at least 0; it is -1"),
        (lambda: hx.GradientDescent(-0.1), "step_size is -0.1; it must be at least 0"),
        (lambda: hx.HeavyBall(-0.1), "step_size is -0.1"),
        (lambda: hx.HeavyBall(0.1, 1.0), "momentum is 1; it must be at least 0 and below 1"),
        (lambda: hx.HeavyBall(0.1, -0.5), "momentum is -0.5"),
        (
            lambda: hx.GradientDescent(lambda lam, t, w: 0.1),
            "step_size is a function of 3 arguments; it must be a number",
        ),
        (lambda: hx.HeavyBall(0.1, lambda: 0.1), "momentum is a function of 0 arguments"),
        (lambda: hx.Optax(0.1), "Optax needs an optax transformation or a function of lam .* not float"),
        (lambda: run(problem(), dynamics=hx.Optax(lambda lam: 0.1)), "the function given to Optax returned float"),
        (
            lambda: hx.hypergradient(problem(), REVERSE, hx.GradientDescent(0.1)),
            "dynamics must be a Dynamics, not Reverse",
        ),
        (lambda: hx.hypergradient(None, hx.GradientDescent(0.1), REVERSE), "problem must be a Problem, not NoneType"),
        (lambda: hx.mean_over_tasks(None), r"mean_over_tasks needs what hypergradient\(...\) returns, not NoneType"),
    ],
)
def test_settings_that_cannot_be(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("rate", [{"w": 0.1}, [0.1, 0.1], jnp.array([0.1, 0.1, 0.1]), jnp.full((3, 2), 0.1)], ids=str)
def test_a_rate_per_parameter_must_be_like_w(rate):
    for dynamics, name in ((hx.GradientDescent(rate), "step_size"), (hx.HeavyBall(0.1, rate), "momentum")):
        with pytest.raises(ValueError, match=f"{name} must be a number or a pytree like w; .* of shapes .* and w is"):
            run(problem(), dynamics=dynamics)


def mean(parallel=None):
    return hx.mean_over_tasks(hx.hypergradient(problem(), hx.GradientDescent(0.1), REVERSE), parallel)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "needs data with at least one array: its leading axis counts the tasks"),
        ({"x": jnp.ones((3, 2)), "y": jnp.ones(())}, r"data\['y'\] has no leading axis and data\['x'\] has 3"),
        ({"x": jnp.ones((3, 2)), "y": jnp.ones((2, 2))}, r"data\['y'\] has 2 tasks and data\['x'\] has 3"),
        (jnp.ones((0, 2)), "must have the tasks on its leading axis, at least one"),
    ],
)
def test_data_without_a_common_task_axis(data, message):
    with pytest.raises(ValueError, match=message):
        mean()(LAM, data)


def test_groups_of_tasks_must_divide_them():
    with pytest.raises(ValueError, match=r"3 tasks .*cannot be run 2 at a time: let `parallel` divide"):
        mean(2)(LAM, jnp.ones((3, 2)))
    for parallel in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="parallel must be a whole number, at least 1"):
            mean(parallel)


def test_arrays_may_be_numpys_and_functions_may_ride_along():
    data = {"x": np.ones((2, 2)), "activation": jnp.tanh}
    used = problem(inner=lambda w, lam, d: jnp.sum((d["activation"](w) - d["x"]) ** 2) * lam["a"])
    f = hx.hypergradient(used, hx.GradientDescent(0.1), REVERSE)
    alone = f(LAM, {**data, "x": data["x"][0]})
    np.testing.assert_allclose(hx.mean_over_tasks(f)(LAM, data).grad["a"], alone.grad["a"], rtol=1e-12)
    assert eqx.is_array(alone.grad["a"])
