"""The mean over tasks: groups, the named axis, and what comes back a task at a time. Its gradients: the table."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hyperax as hx

PROBLEM = hx.Problem(
    inner=lambda w, lam, d: jnp.sum((w - d["x"]) ** 2) + lam * jnp.sum(w**2),
    outer=lambda w, lam, d: (jnp.sum((w - 1.0) ** 2), {"norm": jnp.linalg.norm(w)}),
    init=lambda lam, d: jnp.zeros(2),
    has_metrics=True,
)
DATA = {"x": jnp.arange(12.0).reshape(6, 2) / 6}
SINGLE = hx.hypergradient(PROBLEM, hx.HeavyBall(0.1, 0.5), hx.Reverse(4))


def alone():
    return [SINGLE(0.5, {"x": x}) for x in DATA["x"]]


@pytest.mark.parametrize("parallel", [None, 1, 2, 3, 6, 50])
def test_groups_keep_tasks_in_order(parallel):
    h = hx.mean_over_tasks(SINGLE, parallel)(0.5, DATA)
    np.testing.assert_allclose(h.grad, np.mean([a.grad for a in alone()]), rtol=1e-12)
    np.testing.assert_allclose(h.value, np.mean([a.value for a in alone()]), rtol=1e-12)
    np.testing.assert_allclose(h.info["metrics"]["norm"], [a.info["metrics"]["norm"] for a in alone()], rtol=1e-12)
    np.testing.assert_allclose(h.state.w, [a.state.w for a in alone()], rtol=1e-12)
    np.testing.assert_allclose(h.state.auxiliary, [a.state.auxiliary for a in alone()], rtol=1e-12)


def test_transformations_apply():
    f = hx.mean_over_tasks(SINGLE, 2)
    lams = jnp.array([0.2, 0.5])
    np.testing.assert_allclose(
        jax.jit(jax.vmap(f, in_axes=(0, None)))(lams, DATA).grad, [f(lam, DATA).grad for lam in lams], rtol=1e-12
    )
    np.testing.assert_allclose(jax.grad(lambda lam: f(lam, DATA).value)(0.5), f(0.5, DATA).grad, rtol=1e-12)


def test_statistics_over_the_tasks_in_parallel():
    shared = hx.Problem(
        inner=PROBLEM.inner,
        outer=lambda w, lam, d: jnp.sum((w - d["center"]) ** 2),
        init=PROBLEM.init,
        prepare=lambda lam, d: {**d, "center": lam * jax.lax.pmean(d["x"], hx.TASKS)},
    )
    f = hx.mean_over_tasks(hx.hypergradient(shared, hx.GradientDescent(0.1), hx.Reverse(3)))

    def by_hand(lam):
        def of_task(x):
            w = jnp.zeros(2)
            for _ in range(3):
                w = w - 0.1 * (2 * (w - x) + 2 * lam * w)
            return jnp.sum((w - lam * jnp.mean(DATA["x"], 0)) ** 2)

        return jnp.mean(jnp.stack([of_task(x) for x in DATA["x"]]))

    value, gradient = jax.value_and_grad(by_hand)(0.5)
    h = f(0.5, DATA)
    np.testing.assert_allclose([h.value, h.grad], [value, gradient], rtol=1e-12)


def test_one_program_for_every_batch_of_tasks():
    traces = []
    counted = hx.Problem(
        lambda *a: traces.append(1) or PROBLEM.inner(*a), PROBLEM.outer, PROBLEM.init, has_metrics=True
    )
    f = hx.mean_over_tasks(hx.hypergradient(counted, hx.GradientDescent(0.1), hx.Reverse(4)), 2)
    f(0.5, DATA)
    assert traces
    traces.clear()
    f(0.7, {"x": DATA["x"] + 1})
    assert not traces


def test_one_task_at_a_time_has_no_axis():
    shared = hx.Problem(
        inner=PROBLEM.inner,
        outer=lambda w, lam, d: jnp.sum((w - jax.lax.pmean(d["x"], hx.TASKS)) ** 2),
        init=PROBLEM.init,
    )
    with pytest.raises(ValueError, match="with parallel=1 there is no such axis"):
        hx.mean_over_tasks(hx.hypergradient(shared, hx.GradientDescent(0.1), hx.Reverse(3)), 1)(0.5, DATA)


def mesh(devices):
    return jax.make_mesh((devices,), ("devices",))


@pytest.mark.parametrize("parallel", [None, 1, 3])
def test_a_mesh_gives_what_one_device_gives(parallel):
    one, two = (hx.mean_over_tasks(SINGLE, parallel, m)(0.5, DATA) for m in (None, mesh(2)))
    assert len(two.state.w.sharding.device_set) == 2
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_minimize_follows_a_mesh():
    solutions = [
        hx.minimize(hx.mean_over_tasks(SINGLE, 1, m), 0.5, data=DATA, optimizer=optax.sgd(0.1), steps=5)
        for m in (None, mesh(2))
    ]
    np.testing.assert_allclose(solutions[0].lam, solutions[1].lam, rtol=1e-12)


def test_a_mesh_that_cannot_share_the_tasks():
    with pytest.raises(ValueError, match="5 tasks cannot be shared by 2 devices"):
        hx.mean_over_tasks(SINGLE, mesh=mesh(2))(0.5, {"x": DATA["x"][:5]})
    with pytest.raises(ValueError, match="3 tasks a device cannot be run 2 at a time"):
        hx.mean_over_tasks(SINGLE, 2, mesh(2))(0.5, DATA)
    with pytest.raises(ValueError, match="one axis"):
        hx.mean_over_tasks(SINGLE, mesh=jax.sharding.Mesh(np.array(jax.devices()).reshape(1, 2), ("a", "b")))


def test_the_first_carry_may_need_the_axis_of_the_tasks():
    """Statistics of the mini-batch in `prepare`, and a method that begins with the inner variables."""
    problem = hx.Problem(
        inner=lambda w, lam, d: jnp.sum((w - lam * d) ** 2),
        outer=lambda w, lam, d: jnp.sum(w**2),
        init=lambda lam, d: 0.0 * d,
        prepare=lambda lam, d: d - jax.lax.pmean(d, hx.TASKS),
    )
    data = jnp.array([[1.0, 2.0], [3.0, 8.0]])
    mean = lambda method: hx.mean_over_tasks(hx.hypergradient(problem, hx.GradientDescent(0.5), method))
    h = mean(hx.Implicit(1, warm_start=True))(2.0, data)
    np.testing.assert_allclose(h.grad, mean(hx.Reverse(1))(2.0, data).grad, rtol=1e-12)
    np.testing.assert_allclose(h.grad, 4 * np.mean(np.sum((data - data.mean(0)) ** 2, 1)), rtol=1e-12)
