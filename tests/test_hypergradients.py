"""The one table: every exact method x dynamics x entry of lam agrees with Reverse, finite differences and a plain loop.

A new exact method is one new row of EXACT; a new dynamics is one new row of `problems.dynamics_table`.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hyperax as hx
from problems import (
    DYNAMICS,
    ENTRIES,
    SIZE,
    STEPS,
    TASKS,
    assert_trees_close,
    case,
    quadratic,
    reference,
    regression_data,
    reverse,
)

# A method as a function of T. Segments of T = 6 and chunks of m = 19 that leave a rest come with every dynamics, ...
EXACT = {
    "Reverse": lambda steps: hx.Reverse(steps),
    "Reverse(segment leaves a rest)": lambda steps: hx.Reverse(steps, segment=4),
    "Truncated(window T)": lambda steps: hx.Truncated(steps, window=steps),
    "Forward(chunk leaves a rest)": lambda steps: hx.Forward(steps, chunk=4),
}
# ... the other ways to cut T or m with one of them.
EXTREME = {
    "Reverse(segment 1)": lambda steps: hx.Reverse(steps, segment=1),
    "Reverse(segment divides)": lambda steps: hx.Reverse(steps, segment=3),
    "Reverse(segment over T)": lambda steps: hx.Reverse(steps, segment=steps + 5),
    "Forward": lambda steps: hx.Forward(steps),
    "Forward(chunk 1)": lambda steps: hx.Forward(steps, chunk=1),
    "Forward(chunk over m)": lambda steps: hx.Forward(steps, chunk=100),
    "RealTime(one hyperiteration)": lambda steps: hx.RealTime(steps, every=steps),
    "RealTime(one window)": lambda steps: hx.RealTime(steps, every=steps, window=steps),
    # Up to its resolution; `test_reversible.py` has the other ways into f_T. `test_doubling.py` has quadratic problems.
    "Reversible": lambda steps: hx.Reversible(steps, lowest_momentum=0.3),
}
# The mini-batches of the table are drawn from a key inside the data; the other rows see all of it.
BATCHED = ("GradientDescent", "Optax(sgd)")


def test_the_rows_are_what_they_say():
    assert STEPS % 3 == 0
    assert STEPS % 4 != 0
    assert SIZE % 4 != 0


@pytest.mark.parametrize(
    ("name", "dynamics"), [*((n, d) for d in DYNAMICS for n in EXACT), *((n, "HeavyBall") for n in EXTREME)]
)
def test_every_method_with_every_dynamics(name, dynamics):
    key = ("all", dynamics, dynamics in BATCHED)
    problem, phi, lam = case(*key)
    h = hx.hypergradient(problem, phi, {**EXACT, **EXTREME}[name](STEPS))(lam, regression_data())
    value, gradient = reference(*key)
    assert_trees_close(h.value, value, 1e-12 if name != "Reversible" else 1e-10)
    assert_trees_close(h.grad, gradient, 1e-6)
    assert_trees_close(h.grad, reverse(*key).grad, 1e-9)
    # In fixed point the state is that of `Reverse` up to the resolution.
    assert_trees_close(h.state, reverse(*key).state, 1e-12 if name != "Reversible" else 1e-10)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("name", ["Reverse(segment leaves a rest)", "Forward(chunk leaves a rest)"])
def test_each_entry_of_lam_alone(name, entry):
    problem, phi, lam = case(entry, "HeavyBall", False)
    h = hx.hypergradient(problem, phi, EXACT[name](STEPS))(lam, regression_data())
    together = reverse("all", "HeavyBall", False).grad
    assert_trees_close(h.grad, {entry: together[entry]}, 1e-9)


@pytest.mark.parametrize(
    ("name", "parallel"),
    [("Reverse", None), ("Reverse", 1), ("Truncated(window T)", 2), ("Forward(chunk leaves a rest)", 2)],
)
def test_the_mean_over_tasks(name, parallel):
    problem, phi, lam = case("all", "GradientDescent", True)
    h = hx.mean_over_tasks(hx.hypergradient(problem, phi, EXACT[name](STEPS)), parallel)(lam, regression_data(TASKS))
    alone = one_by_one()
    assert_trees_close(h.grad, jax.tree.map(lambda *leaves: sum(leaves) / TASKS, *(a.grad for a in alone)), 1e-9)
    assert_trees_close(h.value, sum(a.value for a in alone) / TASKS, 1e-12)
    assert_trees_close(h.state, jax.tree.map(lambda *leaves: jnp.stack(leaves), *(a.state for a in alone)), 1e-12)
    assert len({float(a.value) for a in alone}) == TASKS


@cache
def one_by_one():
    problem, phi, lam = case("all", "GradientDescent", True)
    single = hx.hypergradient(problem, phi, hx.Reverse(STEPS))
    return [single(lam, jax.tree.map(lambda x, j=j: x[j], regression_data(TASKS))) for j in range(TASKS)]


@pytest.mark.parametrize("name", EXACT)
def test_printed_values_of_heavy_ball(name):
    v1, v2 = jnp.array([[1.0, -1.0, 1.0], [2.0, 10.0, 2.0]]), jnp.array([-1.0, 1.0, 0.2])
    problem = hx.Problem(
        inner=lambda w, lam, d: jnp.mean(w[0] ** 2) + jnp.sum(lam["weights"] * w[1] ** 2),
        outer=lambda w, lam, d: jnp.mean(w[0] * w[1]),
        init=lambda lam, d: (v1, v2),
    )
    dynamics = hx.HeavyBall(lambda lam: lam["step"], lambda lam: lam["momentum"])
    lam = {"weights": jnp.ones(3), "step": 0.1, "momentum": 0.5}
    h = hx.hypergradient(problem, dynamics, EXACT[name](10))(lam)
    printed = {"weights": [-0.018393531, 0.055180617, 0.0036787055], "step": 0.5387225, "momentum": -0.076542258}
    for entry, value in printed.items():
        np.testing.assert_allclose(h.grad[entry], value, rtol=1e-6)  # printed by a float32 program


@pytest.mark.parametrize("name", EXACT)
def test_many_steps_give_the_implicit_gradient(name):
    b, c = jnp.array([0.0, -1.0, 12.0, 18.0]), jnp.array([0.1, -1.1, 12.1, 18.1])
    problem = hx.Problem(
        inner=lambda w, e, d: jnp.sum(e * w**2 + (w - b) ** 2),
        outer=lambda w, e, d: jnp.sum((w - c) ** 2),
        init=lambda e, d: jnp.zeros(4),
    )
    e = jnp.array([3.0, 1.1, 1.0, 0.1])
    h = hx.hypergradient(problem, hx.GradientDescent(0.2), EXACT[name](200))(e)
    np.testing.assert_allclose(h.state.w, b / (1 + e), rtol=1e-12)
    np.testing.assert_allclose(h.grad, -2 * (b / (1 + e) - c) * b / (1 + e) ** 2, rtol=1e-10)
    np.testing.assert_allclose(h.grad, [0, 0.2829068, 36.6, 51.6605], rtol=2e-6)


def test_example_3_4_approaches_the_closed_form_at_the_rate_of_remark_3_3():
    draw = np.random.default_rng(1)
    x, y, x_outer, y_outer = (jnp.asarray(draw.normal(size=shape)) for shape in ((6, 3), (6, 2), (6, 3), (6, 2)))
    feature_map, rho = jnp.asarray(np.eye(3) + 0.3 * draw.normal(size=(3, 3))), 0.5
    loss = lambda w, h: jnp.sum((y_outer - x_outer @ h @ w) ** 2)
    problem = hx.Problem(
        inner=lambda w, h, d: jnp.sum((y - x @ h @ w) ** 2) + rho * jnp.sum(w**2),
        outer=lambda w, h, d: loss(w, h),
        init=lambda h, d: jnp.zeros((3, 2)),
    )

    def closed_form(h):
        z = x @ h
        return jnp.linalg.solve(z.T @ z + rho * jnp.eye(3), z.T @ y)

    z = np.asarray(x) @ np.asarray(feature_map)
    curvature = np.linalg.eigvalsh(2 * z.T @ z + 2 * rho * np.eye(3))
    mu, nu = float(curvature[0]), float(curvature[-1])
    rate, dynamics = (nu - mu) / (nu + mu), hx.GradientDescent(2 / (mu + nu))
    exact = jax.jit(jax.grad(lambda h: loss(closed_form(h), h)))(feature_map)
    solution = jax.jit(closed_form)(feature_map)
    horizon = int(np.ceil(np.log(1e-3) / np.log(rate)))  # three digits of w
    distances = []
    for steps in (horizon, 2 * horizon):
        h = hx.hypergradient(problem, dynamics, hx.Reverse(steps))(feature_map)
        to_solution = np.linalg.norm(h.state.w - solution)
        assert to_solution <= rate**steps * np.linalg.norm(solution) * (1 + 1e-6)
        distances.append(np.linalg.norm(h.grad - exact) / np.linalg.norm(exact))
    # The derivative's error is T rate^T, so twice the steps square it up to that factor.
    assert distances[1] < 5e-4
    assert 0.2 < distances[1] / distances[0] / (2 * rate**horizon) < 2.0


def test_figure_2_the_dynamics_choose_among_two_minimisers():
    problem = hx.Problem(
        inner=lambda w, lam, d: (w**2 - lam**2) ** 2,  # minimisers lam and -lam
        outer=lambda w, lam, d: (w - 2.0) ** 2,  # prefers lam
        init=lambda lam, d: d,
    )
    f = hx.hypergradient(problem, hx.GradientDescent(0.05), hx.Reverse(200))
    lam = jnp.asarray(1.2)
    found, missed = f(lam, jnp.asarray(-0.5)), f(lam, jnp.asarray(0.5))
    np.testing.assert_allclose([found.value, found.grad], [(lam + 2) ** 2, 2 * (lam + 2)], rtol=1e-9)
    np.testing.assert_allclose([missed.value, missed.grad], [(lam - 2) ** 2, 2 * (lam - 2)], rtol=1e-9)


def test_truncation_error_decays_with_the_window():
    a, target = np.array([1.0, 2.5]), jnp.array([0.3, -1.0])
    problem = quadratic(a)
    lam = jnp.array([1.0, 2.0])
    for window in (0, 1, 4, 12):
        h = hx.hypergradient(problem, hx.GradientDescent(0.2), hx.Truncated(40, window))
        h = h(lam, target) if window else silently(h, lam, target)
        # The last K steps have d w_T / d lam = 1 - (1 - eta a)^K.
        expected = (h.state.w - target) * (1 - (1 - 0.2 * a) ** window)
        np.testing.assert_allclose(h.grad, expected, rtol=1e-9, atol=1e-12)


def silently(f, *arguments):
    with pytest.warns(hx.UnusedLeafWarning):
        return f(*arguments)


def test_a_window_of_zero_leaves_the_direct_gradient():
    problem, phi, lam = case("all", "GradientDescent", False)
    h = silently(hx.hypergradient(problem, phi, hx.Truncated(STEPS, 0)), lam, regression_data())
    prepared = lambda lam: problem.prepare(lam, regression_data())
    direct = jax.jit(jax.grad(lambda lam: problem.outer(h.state.w, lam, prepared(lam))))(lam)
    assert_trees_close(h.grad, direct, 1e-12)
    np.testing.assert_allclose(h.value, reverse("all", "GradientDescent", False).value, rtol=1e-12)


def test_first_order_is_approx_for_a_hyper_representation():
    problem, phi, lam = case("prepare", "HeavyBall", False)
    h = hx.hypergradient(problem, phi, hx.FirstOrder(STEPS))(lam, regression_data())
    approx = jax.grad(lambda lam: problem.outer(h.state.w, lam, problem.prepare(lam, regression_data())))(lam)
    assert_trees_close(h.grad, approx, 1e-12)
    np.testing.assert_allclose(h.value, reverse("prepare", "HeavyBall", False).value, rtol=1e-12)
    exact = reverse("prepare", "HeavyBall", False).grad["prepare"]
    assert np.linalg.norm(h.grad["prepare"] - exact) > 1e-2 * np.linalg.norm(exact)


def test_first_order_is_first_order_maml_for_an_initialisation():
    # L = (a / 2)(w - b)^2 from lam: w_T = b + (1 - eta a)^T (lam - b); MAML has that power in the gradient, FOMAML not.
    a, b, eta, steps, lam, target = 2.0, 1.0, 0.1, 3, 4.0, 0.5
    problem = hx.Problem(
        inner=lambda w, lam, d: a / 2 * (w - b) ** 2, outer=lambda w, lam, d: (w - d) ** 2, init=lambda lam, d: lam
    )
    power = (1 - eta * a) ** steps
    last = b + power * (lam - b)
    first_order = hx.hypergradient(problem, hx.GradientDescent(eta), hx.FirstOrder(steps))(lam, target)
    exact = hx.hypergradient(problem, hx.GradientDescent(eta), hx.Reverse(steps))(lam, target)
    np.testing.assert_allclose(first_order.grad, 2 * (last - target), rtol=1e-12)
    np.testing.assert_allclose(exact.grad, 2 * (last - target) * power, rtol=1e-12)


@pytest.mark.parametrize(
    "method", [hx.Reverse(0), hx.Reverse(0, segment=2), hx.Truncated(0, 0), hx.Forward(0)], ids=str
)
def test_no_steps_leave_the_initial_point(method):
    problem, phi, lam = case("init", "HeavyBall", False)
    h = hx.hypergradient(problem, phi, method)(lam, regression_data())
    outer = lambda lam: problem.outer(lam["init"], lam, problem.prepare(lam, regression_data()))
    value, gradient = jax.value_and_grad(outer)(lam)
    assert_trees_close((h.value, h.grad, h.state.w), (value, gradient, lam["init"]), 1e-12)


def test_mini_batches_differ_from_step_to_step():
    with_batches, _, lam = case("all", "GradientDescent", True)
    data = with_batches.prepare(lam, regression_data())
    chosen = {tuple(np.asarray(with_batches.batch(data, t)["chosen"])) for t in range(1, STEPS + 1)}
    assert len(chosen) > STEPS // 2
