"""A hypergradient is a function: compiled once, transformed like any other, on any lam and in any precision."""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hyperax as hx
from problems import assert_trees_close, differences


def simple_problem(calls=None):
    def inner(w, lam, data):
        if calls is not None:
            calls.append("inner")
        return jnp.sum((w - data) ** 2) + jnp.sum(jnp.exp(lam) * w**2)

    def outer(w, lam, data):
        if calls is not None:
            calls.append("outer")
        return jnp.sum((w - 1.0) ** 2)

    return hx.Problem(inner, outer, lambda lam, data: jnp.zeros_like(data))


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("start", [0.5, np.array([0.5, 0.2]), jnp.asarray(0.5)], ids=["float", "numpy", "jax"])
def test_the_second_call_does_not_trace_again(start, mean):
    calls, data = [], jnp.ones((2, 2)) if mean else jnp.ones(2)
    f = hx.hypergradient(simple_problem(calls), hx.GradientDescent(0.1), hx.Reverse(3))
    f = hx.mean_over_tasks(f) if mean else f
    h = f(start, data)
    assert {"inner", "outer"} == set(calls)
    calls.clear()
    f(h.grad, data + 1)
    f(h.grad + 1.0, data)
    assert calls == []


@pytest.mark.parametrize("method", [hx.Reverse(4), hx.Forward(4)], ids=["Reverse", "Forward"])
def test_transformations_apply(method):
    f = hx.hypergradient(simple_problem(), hx.GradientDescent(0.1), method)
    lams, data = jnp.array([0.1, -0.4, 0.8]), jnp.array([2.0, -1.0])
    alone = [f(lam, data) for lam in lams]
    np.testing.assert_allclose(jax.jit(f)(lams[0], data).grad, alone[0].grad, rtol=1e-12)
    mapped = jax.vmap(f, in_axes=(0, None))(lams, data)
    np.testing.assert_allclose(mapped.grad, [h.grad for h in alone], rtol=1e-12)
    np.testing.assert_allclose(mapped.state.w, [h.state.w for h in alone], rtol=1e-12)
    np.testing.assert_allclose(jax.grad(lambda lam: f(lam, data).value)(lams[0]), alone[0].grad, rtol=1e-12)
    step = 1e-5
    second = (f(lams[0] + step, data).grad - f(lams[0] - step, data).grad) / (2 * step)
    np.testing.assert_allclose(jax.grad(lambda lam: f(lam, data).grad)(lams[0]), second, rtol=1e-7)


def test_hyperiterations_in_a_scan_are_those_of_a_loop():
    f = hx.hypergradient(simple_problem(), hx.HeavyBall(0.1, 0.5), hx.Reverse(4))
    data, lam = jnp.array([2.0, -1.0]), jnp.array(0.3)
    update = lambda lam, data: lam - 0.1 * f(lam, data).grad
    scanned, _ = jax.lax.scan(lambda lam, _: (update(lam, data), None), lam, length=3)
    for _ in range(3):
        lam = update(lam, data)
    np.testing.assert_allclose(scanned, lam, rtol=1e-12)


@pytest.mark.parametrize(
    "method", [hx.Reverse(4, segment=3), hx.Truncated(4, 2), hx.Forward(4), hx.FirstOrder(4)], ids=str
)
def test_float32_stays_float32(method):
    problem = hx.Problem(
        inner=lambda w, lam, d: jnp.sum((w - d) ** 2 * lam["weights"]),
        outer=lambda w, lam, d: jnp.sum((w - 1) ** 2) + jnp.sum(lam["weights"]) * lam["rate"],
        init=lambda lam, d: jnp.zeros_like(d),
    )
    dynamics = hx.HeavyBall(lambda lam: lam["rate"], 0.9)
    lam = {"weights": jnp.ones(2, jnp.float32), "rate": jnp.float32(0.1)}
    for f, data in [
        (hx.hypergradient(problem, dynamics, method), jnp.ones(2, jnp.float32)),
        (hx.mean_over_tasks(hx.hypergradient(problem, dynamics, method), 1), jnp.ones((2, 2), jnp.float32)),
    ]:
        h = f(lam, data)
        assert {leaf.dtype for leaf in jax.tree.leaves((h.value, h.grad, h.state))} == {jnp.dtype("float32")}


class Map(eqx.Module):
    """A module with a function, a static field and a leaf that is not an array."""

    weight: jax.Array
    activation: Callable
    power: int = eqx.field(static=True)

    def __call__(self, x):
        return self.activation(self.weight * x) ** self.power


@pytest.mark.parametrize("method", [hx.Reverse(3), hx.Forward(3, chunk=2)], ids=["Reverse", "Forward"])
def test_lam_may_be_modules_and_nested_dicts_with_python_numbers(method):
    lam = {"map": Map(jnp.array([0.5, -0.3]), jnp.tanh, 2), "settings": {"decay": 0.3, "rates": [0.1, np.float64(0.2)]}}
    problem = hx.Problem(
        inner=lambda w, lam, d: jnp.sum((lam["map"](d) * w - 1) ** 2) + lam["settings"]["decay"] * jnp.sum(w**2),
        outer=lambda w, lam, d: jnp.sum((lam["map"](d) * w - 2) ** 2),
        init=lambda lam, d: jnp.zeros(2),
    )
    dynamics = hx.GradientDescent(lambda lam: jnp.stack(lam["settings"]["rates"]))
    data = jnp.array([1.0, 2.0])
    h = hx.hypergradient(problem, dynamics, method)(lam, data)
    assert h.grad["map"].activation is None
    floats, rest = eqx.partition(lam, eqx.is_inexact_array_like)
    one = lambda floats: hx.rollout(problem, dynamics, 3, eqx.combine(floats, rest), data)[0].w
    value = lambda floats: problem.outer(one(floats), eqx.combine(floats, rest), data)
    _, gradient = differences(jax.jit(jax.vmap(value)), floats)
    assert_trees_close(h.grad, gradient, 1e-7)


def test_metrics_come_with_the_value():
    problem = hx.Problem(
        inner=lambda w, lam, d: (w - lam) ** 2,
        outer=lambda w, lam, d: (w * d, {"distance": jnp.abs(w - lam)}),
        init=lambda lam, d: jnp.zeros(()),
        has_metrics=True,
    )
    f = hx.hypergradient(problem, hx.GradientDescent(0.25), hx.Reverse(2))
    np.testing.assert_allclose(f(8.0, jnp.asarray(1.0)).info["metrics"]["distance"], 2.0)
    mean = hx.mean_over_tasks(f)(8.0, jnp.array([1.0, 3.0]))
    np.testing.assert_allclose(mean.info["metrics"]["distance"], [2.0, 2.0])
    np.testing.assert_allclose(mean.value, 12.0)
