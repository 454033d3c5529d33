"""Online hypergradients: exact for lam that stands still, the RTHO recursion for lam that moves."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hyperax as hx
from hyperax.methods.real_time import RealTime
from problems import STEPS, TASKS, assert_trees_close, case, quadratic, regression_data

A, TARGET, ETA = np.array([1.0, 2.5]), jnp.array([0.3, -1.0]), 0.2


@cache
def at_every_step(dynamics, batches):
    """(f_t, its gradient) for t = 1, ..., T: one plain run, differentiated in reverse."""
    problem, phi, lam = case("all", dynamics, batches)

    def values(lam):
        outer = lambda w: problem.outer(w, lam, problem.prepare(lam, regression_data()))
        return hx.rollout(problem, phi, STEPS, lam, regression_data(), observe=outer)[1]

    return jax.jit(lambda lam: (values(lam), jax.jacrev(values)(lam)))(lam)


@pytest.mark.parametrize(("dynamics", "every"), [("GradientDescent", 1), ("HeavyBall", 2), ("Optax(adam)", 3)])
def test_for_lam_that_stands_still_it_is_exact_at_every_step(dynamics, every):
    key = ("all", dynamics, dynamics == "GradientDescent")
    problem, phi, lam = case(*key)
    f = hx.hypergradient(problem, phi, RealTime(STEPS, every))
    carry = f.init(lam, regression_data())
    values, gradients = at_every_step(*key[1:])
    for t in (*range(every, STEPS + 1, every), every):  # and once more from the beginning
        h = f(lam, regression_data(), carry)
        carry = h.carry
        assert h.info["step"] == t
        assert_trees_close(h.value, values[t - 1], 1e-12)
        assert_trees_close(h.grad, jax.tree.map(lambda x, t=t: x[t - 1], gradients), 1e-9)


def test_a_window_is_truncation():
    problem, phi, lam = case("prepare", "GradientDescent", True)  # mini-batches and a schedule: t goes on
    f = hx.hypergradient(problem, phi, RealTime(6, every=3, window=2))
    carry = f.init(lam, regression_data())
    expected = hx.hypergradient(problem, phi, hx.Truncated(6, 2))(lam, regression_data())
    for t in (3, 6, 3, 6):
        h = f(lam, regression_data(), carry)
        carry = h.carry
        assert h.info["step"] == t
        if t == 6:
            assert_trees_close((h.value, h.grad, h.state), (expected.value, expected.grad, expected.state), 1e-12)
    assert h.carry.tangents == ()


def by_hand(lams, steps, every, window=None, warm=False):
    """(w_t, Z_t, t) at every call, of gradient descent on L = (1/2) a (w - lam)^2 from 0, coordinate by coordinate."""
    w, z, t, seen = np.zeros(2), np.zeros(2), 0, []
    for lam in lams:
        if t == steps:
            w, z, t = (w if warm else np.zeros(2)), np.zeros(2), 0
        for i in range(every):
            if window is not None and i <= every - window:
                z = np.zeros(2)
            w, z, t = w - ETA * A * (w - lam), (1 - ETA * A) * z + ETA * A, t + 1
        seen.append((w, z, t))
    return seen


LAMS = np.random.default_rng(3).normal(size=(7, 2))


@pytest.mark.parametrize(
    ("steps", "warm", "window"),
    [(6, False, None), (6, True, None), (None, False, None), (6, False, 1), (6, True, 2), (None, True, 2)],
)
def test_the_recursion_for_lam_that_moves(steps, warm, window):
    f = hx.hypergradient(quadratic(A), hx.GradientDescent(ETA), RealTime(steps, 2, window, warm))

    def call(carry, lam):
        h = f(lam, TARGET, carry)
        return h.carry, (h.value, h.grad, h.state.w, h.info["step"])

    # A scan: so the carry keeps its structure, shapes and types.
    first = f.init(jnp.asarray(LAMS[0]), TARGET)
    values, grads, ws, ts = jax.lax.scan(call, first, jnp.asarray(LAMS))[1]
    for value, grad, w, t, expected in zip(values, grads, ws, ts, by_hand(LAMS, steps, 2, window, warm), strict=True):
        np.testing.assert_allclose(w, expected[0], rtol=1e-12)
        np.testing.assert_allclose(value, 0.5 * np.sum((expected[0] - TARGET) ** 2), rtol=1e-12)
        np.testing.assert_allclose(grad, expected[1] * (expected[0] - TARGET), rtol=1e-12)
        assert t == expected[2]


def test_a_new_run_begins_at_phi_0_of_the_lam_of_now_with_its_derivative():
    problem = hx.Problem(
        inner=lambda w, lam, d: 0.5 * jnp.sum((w - d) ** 2),
        outer=lambda w, lam, d: jnp.sum(w**2),
        init=lambda lam, d: lam**2,
    )
    for window in (None, 2):
        f = hx.hypergradient(problem, hx.GradientDescent(0.5), RealTime(2, 2, window))
        carry = f.init(jnp.asarray(3.0), jnp.asarray(1.0))
        for lam in (2.0, -1.5):  # w_2 = d + (lam^2 - d) / 4
            h = f(lam, jnp.asarray(1.0), carry)
            carry = h.carry
            w = 1.0 + (lam**2 - 1.0) / 4
            np.testing.assert_allclose([h.state.w, h.grad], [w, 2 * w * lam / 2], rtol=1e-12)


def test_a_state_with_integers_and_branches_in_float32():
    def inner(w, lam, d):
        # A branch and a loop: what is shared by all tangents stays shared.
        bent = jax.lax.cond(w[0] > 0, lambda w: w**2, lambda w: 3 * w**2, w)
        return jnp.sum(jax.lax.fori_loop(0, 2, lambda i, x: x * (1 + lam["decay"] * i), bent) - w)

    problem = hx.Problem(inner, lambda w, lam, d: jnp.sum((w - 1) ** 2), lambda lam, d: jnp.ones(2, jnp.float32))
    dynamics = hx.Optax(lambda lam: optax.adam(lam["rate"], eps_root=1e-4))
    lam = {"decay": jnp.float32(0.5), "rate": jnp.float32(0.3)}
    f = hx.hypergradient(problem, dynamics, RealTime(6, 3))
    carry, grads = jax.lax.scan(lambda c, _: (f(lam, None, c).carry, f(lam, None, c).grad), f.init(lam), jnp.arange(2))
    exact = jax.jit(jax.grad(lambda lam: problem.outer(hx.rollout(problem, dynamics, 6, lam)[0].w, lam, None)))(lam)
    assert_trees_close(jax.tree.map(lambda x: x[-1], grads), exact, 1e-5)
    assert carry.state.w.dtype == jnp.float32
    assert carry.state.auxiliary[0].count == 6


@pytest.mark.parametrize(("window", "parallel"), [(None, None), (None, 1), (1, 2)])
def test_the_mean_over_tasks(window, parallel):
    single = hx.hypergradient(quadratic(A), hx.GradientDescent(ETA), RealTime(4, 2, window))
    mean, tasks = hx.mean_over_tasks(single, parallel), jnp.asarray(np.random.default_rng(4).normal(size=(TASKS, 2)))
    carry = mean.init(jnp.asarray(LAMS[0]), tasks)
    for lam, (w, z, t) in zip(LAMS[:4], by_hand(LAMS[:4], 4, 2, window), strict=True):
        h = mean(jnp.asarray(lam), tasks, carry)
        carry = h.carry
        np.testing.assert_allclose(h.grad, np.mean(z * (w - tasks), axis=0), rtol=1e-12)
        np.testing.assert_array_equal(h.info["step"], np.full(TASKS, t))


def ridge():
    draw = np.random.default_rng(5)
    w = draw.normal(size=4)
    x, x_val = draw.normal(size=(2, 12, 4))
    noise, noise_val = draw.normal(size=(2, 12))
    data = {"x": x, "y": x @ w + noise, "x_val": x_val, "y_val": x_val @ w + noise_val}
    problem = hx.Problem(
        inner=lambda w, lam, d: jnp.mean((d["x"] @ w - d["y"]) ** 2) + jnp.exp(lam) * jnp.sum(w**2),
        outer=lambda w, lam, d: jnp.mean((d["x_val"] @ w - d["y_val"]) ** 2),
        init=lambda lam, d: jnp.zeros(4),
    )

    def exact(lam):
        w = np.linalg.solve(x.T @ x / 12 + np.exp(lam) * np.eye(4), x.T @ data["y"] / 12)
        return np.mean((x_val @ w - data["y_val"]) ** 2)

    return problem, data, exact


@pytest.mark.parametrize("method", [RealTime(None, 2), RealTime(200, 5, warm_restart=True), RealTime(None, 20, 20)])
def test_minimize_finds_the_best_ridge_parameter(method):
    problem, data, exact = ridge()
    f = hx.hypergradient(problem, hx.GradientDescent(0.1), method)
    solution = hx.minimize(f, 1.5, data=data, optimizer=optax.adam(0.05), steps=400, record_every=20)
    best = min(exact(x) for x in np.linspace(-6.0, 2.0, 401))
    assert exact(float(solution.lam)) - best < 0.01 * (exact(1.5) - best)
    assert abs(solution.history[-1]["value"] - best) < 0.01 * (exact(1.5) - best)
    if method.steps is None:
        assert solution.carry.t == 400 * method.every


def test_what_cannot_be_is_said():
    for arguments, message in (
        ({"steps": 10, "every": 3}, "multiple of every=3"),
        ({"steps": 0}, "at least 1"),
        ({"steps": None, "every": 0}, "every must be"),
        ({"steps": 8, "every": 4, "window": 5}, "longer than the every=4 steps"),
        ({"steps": 8, "every": 4, "window": 0}, "window must be"),
    ):
        with pytest.raises(ValueError, match=message):
            RealTime(**arguments)
    f = hx.hypergradient(quadratic(), hx.GradientDescent(0.1), RealTime(4))
    assert f.remembers_tasks
    with pytest.raises(ValueError, match="remembers the inner variables"):
        hx.minimize(
            f,
            jnp.ones(2),
            data=TARGET,
            sample=lambda key, data: data,
            key=jax.random.key(0),
            optimizer=optax.sgd(0.1),
            steps=2,
        )


def test_a_leaf_that_nothing_uses_is_named():
    problem = hx.Problem(lambda w, lam, d: (w - lam["used"]) ** 2, lambda w, lam, d: w, lambda lam, d: jnp.zeros(()))
    f = hx.hypergradient(problem, hx.GradientDescent(0.1), RealTime(4))
    with pytest.warns(hx.UnusedLeafWarning, match=r"lam\['idle'\] does not reach"):
        h = f({"used": jnp.asarray(1.0), "idle": jnp.asarray(1.0)})
    np.testing.assert_allclose([h.grad["used"], h.grad["idle"]], [0.2, 0.0], rtol=1e-12)


def test_a_window_names_what_only_phi_0_uses():
    problem = hx.Problem(lambda w, lam, d: w**2 * lam["decay"], lambda w, lam, d: w, lambda lam, d: lam["start"])
    lam = {"decay": jnp.asarray(1.0), "start": jnp.asarray(1.0)}
    with pytest.warns(hx.UnusedLeafWarning, match=r"lam\['start'\] does not reach"):
        hx.hypergradient(problem, hx.GradientDescent(0.1), RealTime(4, every=2, window=1))(lam)
