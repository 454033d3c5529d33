"""Adam that can be differentiated: Optax's numbers, and derivatives that are never NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hyperax as hx
from hyperax.dynamics.adam import Adam
from hyperax.methods.finite_difference import FiniteDifference
from hyperax.methods.real_time import RealTime
from problems import assert_trees_close, differences

SETTINGS = {"step_size": 0.1, "b1": 0.8, "b2": 0.95, "eps": 1e-2, "weight_decay": 0.03}
OF_LAM = Adam(**{name: (lambda lam, name=name: lam[name]) for name in SETTINGS})
START = np.array([1.0, -2.0, 0.5])


# Three parameters with an L2 penalty; a curvature of zero makes a dead one.
PROBLEM = hx.Problem(
    inner=lambda w, lam, a: jnp.sum(a * (w**2 + 0.1 * w**4 + lam["l2"] * w**2)),
    outer=lambda w, lam, a: jnp.sum((w - 0.3) ** 2),
    init=lambda lam, a: lam["init"],
)
CURVATURE = jnp.array([1.0, 3.0, 0.2])


def lam_of(dtype=np.float64, init=START, **changed):
    lam = {**SETTINGS, "l2": 0.1, "init": init, **changed}
    return {name: jnp.asarray(x, dtype) for name, x in lam.items()}


def test_it_is_optax_adam_with_eps_in_the_root():
    lam = lam_of()
    mine = hx.rollout(PROBLEM, OF_LAM, 7, lam, CURVATURE)[0]
    rate, b1, b2, eps, decay = SETTINGS.values()
    transformation = optax.adamw(rate, b1=b1, b2=b2, eps=0.0, eps_root=eps**2, weight_decay=decay)
    theirs = hx.rollout(PROBLEM, hx.Optax(transformation), 7, lam, CURVATURE)[0]
    moments = theirs.auxiliary[0]
    assert_trees_close(mine, hx.State(theirs.w, (moments.mu, moments.nu)), 1e-12)


def test_settings_of_every_kind():
    lam = lam_of()
    w = {"a": jnp.array([1.0, -2.0]), "b": jnp.array(0.5)}
    problem = hx.Problem(
        lambda w, lam, d: jnp.sum(w["a"] ** 2) + w["b"] ** 2, lambda w, lam, d: w["b"], lambda lam, d: w
    )
    dynamics = Adam(
        step_size=lambda lam, t: {"a": lam["step_size"] / t, "b": 0.2},
        b1={"a": jnp.array([0.5, 0.0]), "b": 0.9},
        b2=lambda lam: lam["b2"],
        eps=1e-3,
    )
    found = hx.rollout(problem, dynamics, 3, lam)[0].w
    for name, entry, start, rate, b1 in (
        ("a", 0, 1.0, lambda t: 0.1 / t, 0.5),
        ("a", 1, -2.0, lambda t: 0.1 / t, 0.0),
        ("b", (), 0.5, lambda t: 0.2, 0.9),
    ):
        x, m, v = start, 0.0, 0.0
        for t in (1, 2, 3):
            g = 2 * x
            m, v = b1 * m + (1 - b1) * g, 0.95 * v + 0.05 * g**2
            x = x - rate(t) * (m / (1 - b1**t)) / np.sqrt(v / (1 - 0.95**t) + 1e-6)
        np.testing.assert_allclose(found[name][entry], x, rtol=1e-12)
    with pytest.raises(ValueError, match="b1 must be a number or a pytree like w"):
        hx.rollout(problem, Adam(0.1, b1={"a": 0.9}), 3, lam)


def test_every_derivative_against_differences():
    lam, steps = lam_of(), 5
    value = lambda lam: PROBLEM.outer(hx.rollout(PROBLEM, OF_LAM, steps, lam, CURVATURE)[0].w, lam, CURVATURE)

    f_T, gradient = differences(jax.jit(jax.vmap(value)), lam)
    h = hx.hypergradient(PROBLEM, OF_LAM, hx.Reverse(steps))(lam, CURVATURE)
    assert_trees_close((h.value, h.grad), (f_T, gradient), 1e-6)
    assert all(np.all(np.abs(x) > 1e-6) for x in jax.tree.leaves(h.grad))
    assert_trees_close(hx.hypergradient(PROBLEM, OF_LAM, hx.Forward(steps))(lam, CURVATURE).grad, h.grad, 1e-9)


METHODS = {
    "Reverse": hx.Reverse(4),
    "Forward": hx.Forward(4),
    "Truncated": hx.Truncated(4, 2),
    "FirstOrder": hx.FirstOrder(4),
    "FiniteDifference": FiniteDifference(4, 4),
    "RealTime": RealTime(8, 4),
}


def finite(grad):
    return all(np.all(np.isfinite(x)) for x in jax.tree.leaves(grad))


@pytest.mark.filterwarnings("ignore::hyperax.UnusedLeafWarning")
@pytest.mark.parametrize("method", METHODS)
def test_a_dead_unit_and_a_gradient_of_zero_give_numbers(method):
    # One parameter is dead, one starts where its gradient is zero; then all are dead.
    lam = lam_of(np.float32, [0.5, 0.0, -1.0], eps=1e-8)
    for curvature in ((1.0, 1.0, 0.0), (0.0, 0.0, 0.0)):
        h = hx.hypergradient(PROBLEM, OF_LAM, METHODS[method])(lam, jnp.asarray(curvature, jnp.float32))
        assert finite((h.value, h.grad)), h.grad


def test_eps_outside_the_root_gives_none():
    naive = hx.Optax(lambda lam: optax.adam(lam["step_size"], lam["b1"], lam["b2"], 1e-8))
    lam = {name: x for name, x in lam_of().items() if name in ("step_size", "b1", "b2", "l2", "init")}
    assert not finite(hx.hypergradient(PROBLEM, naive, hx.Reverse(4))(lam, jnp.array([1.0, 1.0, 0.0])).grad)


def test_gradients_of_any_size_in_float32():
    f = hx.hypergradient(PROBLEM, OF_LAM, hx.Reverse(4))
    for factor in (0.0, 1e-30, 1e-18, 1e-8, 1.0, 1e8, 1e15, 1e18):
        for eps in (1e-30, 1e-15, 1e-8):  # the first counts as 1e-15
            for b1, b2 in ((0.9, 0.999), (0.0, 0.0)):
                lam = lam_of(np.float32, eps=eps, b1=b1, b2=b2)
                h = f(lam, jnp.full(3, factor, jnp.float32))
                assert finite((h.value, h.grad)), (factor, eps, b1, h.grad)
    # Where the gradient is far over eps, a step does not depend on its size.
    large, larger = (f(lam_of(np.float32), jnp.full(3, x, jnp.float32)) for x in (1e8, 1e12))
    np.testing.assert_allclose(large.state.w, larger.state.w, rtol=1e-5)
    np.testing.assert_allclose(large.grad["b2"], larger.grad["b2"], rtol=1e-3)


def test_the_derivative_at_zero_memory_and_after_many_steps():
    # At b1 = b2 = 0 from the right: b^t has a derivative there.
    lam = lam_of(b1=0.0, b2=0.0)
    h = hx.hypergradient(PROBLEM, OF_LAM, hx.Reverse(5))(lam, CURVATURE)
    value = jax.jit(lambda lam: PROBLEM.outer(hx.rollout(PROBLEM, OF_LAM, 5, lam, CURVATURE)[0].w, lam, CURVATURE))
    for name in ("b1", "b2"):
        at = lambda b, name=name: value({**lam, name: jnp.asarray(b)})
        difference = (-3 * at(0.0) + 4 * at(1e-5) - at(2e-5)) / 2e-5
        np.testing.assert_allclose(h.grad[name], difference, rtol=1e-5)
    # A small step size: at the minimiser the derivative of a step is eta / eps, and its powers are no numbers.
    lam = lam_of(np.float32, step_size=1e-5, b1=0.9, b2=0.999, eps=1e-8)
    h = hx.hypergradient(PROBLEM, OF_LAM, hx.Reverse(20_000))(lam, CURVATURE.astype(jnp.float32))
    assert finite((h.value, h.grad)), h.grad
    assert h.state.w.dtype == jnp.float32


def test_ranges_are_checked():
    for arguments, message in (
        ({"step_size": -0.1}, "step_size is -0.1"),
        ({"b1": 1.0}, "b1 is 1; it must be at least 0 and below 1"),
        ({"b2": -0.1}, "b2 is -0.1"),
        ({"eps": 0.0}, "eps is 0; it must be at least 1e-15"),
        ({"weight_decay": -1.0}, "weight_decay is -1"),
        ({"b1": lambda lam, t, more: lam}, "3 arguments"),
    ):
        with pytest.raises(ValueError, match=message):
            Adam(**{"step_size": 0.1, **arguments})
