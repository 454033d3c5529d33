"""Learned optimizers: exact derivatives through every rule, each method on them, and what the rules promise."""

from functools import cache
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hyperax as hx
from hyperax.dynamics.dynamics import InnerGradient
from hyperax.dynamics.learned_optimizer import LearnedOptimizer
from hyperax.learned_optimizers import (
    HierarchicalRule,
    Inputs,
    LSTMRule,
    PerceptronRule,
    StepSizeRule,
    UpdateRule,
)
from hyperax.learned_optimizers.preprocessing import log_and_sign
from problems import assert_trees_close

KEY = jax.random.key(0)
W = {"bias": jnp.asarray([0.5]), "weight": jnp.asarray([[1.0, -2.0]])}
DATA = {"scale": jnp.asarray(1.0), "target": jnp.asarray([0.3, -0.4, 1.2])}


def bowl(w, lam, d):
    """A bowl that is no quadratic, with the coordinates coupled: derivatives of every order are there."""
    x = jnp.concatenate([w["bias"], w["weight"][0]]) - d["target"]
    return d["scale"] * (jnp.sum(jnp.asarray([1.0, 3.0, 0.5]) * x**2) + 0.1 * jnp.sum(x) ** 4)


PROBLEM = hx.Problem(inner=bowl, outer=bowl, init=lambda lam, d: W)
PHI = LearnedOptimizer(lambda lam: lam["rule"])
RULES = {
    "step sizes": lambda: StepSizeRule(W, 0.02),
    "a step size a leaf, no momentum": lambda: StepSizeRule(W, 0.02, momentum=None, per_leaf=True),
    "perceptron": lambda: PerceptronRule(KEY, width=4, depth=1),
    "lstm": lambda: LSTMRule(KEY, units=3),
    "hierarchical": lambda: HierarchicalRule(KEY, 3, 2, 2, scales=2),
}


@cache
def rule_of(name):
    return RULES[name]()


def direction(lam, seed):
    """A random tangent of lam."""
    random = np.random.default_rng(seed)
    draw = lambda leaf: jnp.asarray(random.normal(size=leaf.shape))
    return jax.tree.map(draw, eqx.filter(lam, eqx.is_inexact_array))


def inner(one, other):
    """The inner product of two trees."""
    return sum(np.vdot(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


def moved(lam, tangent, by):
    return eqx.apply_updates(lam, jax.tree.map(lambda x: jnp.asarray(by * np.asarray(x)), tangent))


def test_a_hundred_steps_of_the_lstm_have_one_hypergradient_in_reverse_in_segments_and_forward():
    lam = {"rule": LSTMRule(KEY)}
    # Large readouts, so that all of the network counts; of the size of a trained one.
    lam = eqx.tree_at(lambda lam: lam["rule"].weight, lam, replace_fn=lambda a: 10 * a)
    whole, segmented = (hx.hypergradient(PROBLEM, PHI, hx.Reverse(100, segment=k)) for k in (None, 10))
    h, again = whole(lam, DATA), segmented(lam, DATA)
    assert inner(h.grad, h.grad) > 1e-4
    difference = jax.tree.map(np.subtract, h.grad, again.grad)
    assert inner(difference, difference) <= 1e-16 * inner(h.grad, h.grad)

    value = lambda lam: whole.value(lam, DATA, ())[0]
    forward = eqx.filter_jit(lambda tangent: eqx.filter_jvp(value, (lam,), (tangent,)))
    for seed in range(3):
        tangent = direction(lam, seed)
        f, slope = forward(tangent)
        np.testing.assert_allclose(f, h.value, rtol=1e-12)
        np.testing.assert_allclose(slope, inner(h.grad, tangent), rtol=1e-8)


@pytest.mark.parametrize("name", RULES)
def test_a_rule_has_the_right_derivative_and_a_finite_one_where_gradients_vanish(name):
    lam = {"rule": rule_of(name)}
    f = hx.hypergradient(PROBLEM, PHI, hx.Reverse(4))
    h, tangent, step = f(lam, DATA), direction(lam, 1), 1e-5
    rise = f(moved(lam, tangent, step), DATA).value - f(moved(lam, tangent, -step), DATA).value
    np.testing.assert_allclose(inner(h.grad, tangent), rise / (2 * step), rtol=1e-6)
    assert h.value < 1.02 * bowl(W, None, DATA)  # untrained, it does no harm
    assert jax.tree.map(jnp.shape, h.state.w) == jax.tree.map(jnp.shape, W)

    flat = f(lam, DATA | {"scale": jnp.asarray(0.0)})
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((flat.grad, flat.state)))


@pytest.mark.parametrize("name", RULES)
def test_w_keeps_its_types_whatever_those_of_the_rule(name):
    lam = {"rule": rule_of(name)}
    assert all(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(eqx.filter(lam, eqx.is_array)))
    for types in ({"bias": jnp.float32, "weight": jnp.float32}, {"bias": jnp.float32, "weight": jnp.float64}):
        start = lambda lam, d, types=types: jax.tree.map(jnp.astype, W, types)
        problem = hx.Problem(inner=bowl, outer=bowl, init=start)
        run = lambda d, problem=problem: hx.rollout(problem, PHI, 2, lam, d)[0]
        state = jax.eval_shape(run, DATA)  # refuses a state that changes its types
        assert jax.tree.map(lambda leaf: leaf.dtype, state.w) == jax.tree.map(jnp.dtype, types)
        assert {leaf.dtype for leaf in jax.tree.leaves(state.auxiliary)} <= set(map(jnp.dtype, types.values()))


def test_truncated_and_real_time_follow_the_memory_of_the_rule():
    lam = {"rule": LSTMRule(KEY, units=2, layers=1)}
    method = lambda method: hx.hypergradient(PROBLEM, PHI, method)
    truncated = method(hx.Truncated(4, 2))(lam, DATA)
    _, values = hx.rollout(PROBLEM, PHI, 4, lam, DATA, observe=lambda w: bowl(w, lam, DATA))
    np.testing.assert_allclose(truncated.value, values[-1], rtol=1e-12)

    online = method(hx.RealTime(4, every=2, window=2))
    carry = online.init(lam, DATA)
    for t in (2, 4):
        h = online(lam, DATA, carry)
        carry = h.carry
        assert h.info["step"] == t
    assert_trees_close((h.value, h.grad, h.state), (truncated.value, truncated.grad, truncated.state), 1e-12)


def by_hand(rule, w, detached, steps=2):
    """E after a few steps, written out, the inner gradient (and value) detached or not."""
    memory = rule.init(w)
    for t in range(1, steps + 1):
        value, gradient = jax.value_and_grad(bowl)(w, None, DATA)
        if detached:
            value, gradient = jax.lax.stop_gradient((value, gradient))
        update, memory = rule.update(Inputs(w, gradient, value), memory, jnp.asarray(t))
        w = jax.tree.map(jnp.add, w, update)
    return bowl(w, None, DATA)


class ValueRule(UpdateRule):
    """Steps as long as the inner objective is large, and momentum."""

    log_step: jax.Array
    momentum: jax.Array
    uses_value: ClassVar[bool] = True

    def init(self, w):
        return jax.tree.map(jnp.zeros_like, w)

    def update(self, inputs, memory, t):
        step = jnp.exp(self.log_step) * jnp.sqrt(inputs.value)
        memory = jax.tree.map(lambda m, g: self.momentum * m - step * g, memory, inputs.gradient)
        return memory, memory


VALUE_RULE = ValueRule(jnp.asarray(-5.0), jnp.asarray(0.5))


@pytest.mark.parametrize(
    ("rule", "method", "detached", "tolerance"),
    [
        (VALUE_RULE, hx.Reverse(2), False, 1e-10),
        (VALUE_RULE, hx.FirstOrder(2), True, 1e-10),
        (VALUE_RULE, hx.FiniteDifference(2, window=2, epsilon=1e-4), False, 1e-5),
        (LSTMRule(KEY, units=2, layers=1), hx.FirstOrder(2), True, 1e-10),
    ],
)
def test_gradient_and_value_are_the_methods_to_differentiate(rule, method, detached, tolerance):
    h = hx.hypergradient(PROBLEM, PHI, method)({"rule": rule}, DATA)
    expected = eqx.filter_jit(eqx.filter_grad(lambda rule: by_hand(rule, W, detached)))(rule)
    assert_trees_close(h.grad["rule"], expected, tolerance)


def test_a_gradient_of_your_own_needs_the_value_only_if_the_rule_does():
    slope = lambda w, lam: jax.grad(bowl)(w, lam, DATA)
    lam, t = {"rule": StepSizeRule(W)}, jnp.asarray(1)
    state = PHI.step(slope, PHI.init(W, lam), lam, t)
    assert state.w["bias"] != W["bias"]
    lam = {"rule": VALUE_RULE}
    with pytest.raises(ValueError, match=r"ValueRule uses the value.*InnerGradient"):
        PHI.step(slope, PHI.init(W, lam), lam, t)
    gradient = InnerGradient(jax.value_and_grad(lambda w, lam: bowl(w, lam, DATA)))
    assert PHI.step(gradient, PHI.init(W, lam), lam, t).w["bias"] != W["bias"]


def test_an_evolution_strategy_finds_the_direction():
    lam = {"rule": StepSizeRule(W, 0.02, momentum=None, per_leaf=True)}
    exact = hx.hypergradient(PROBLEM, PHI, hx.Reverse(3))(lam, DATA).grad
    estimate = hx.hypergradient(PROBLEM, PHI, hx.EvolutionStrategy(3, pairs=100, sigma=0.01))(lam, DATA).grad
    assert inner(exact, estimate) > 0.9 * np.sqrt(inner(exact, exact) * inner(estimate, estimate))


def test_step_sizes_are_momentum_with_a_rate_for_each_parameter():
    rule = StepSizeRule(W, 0.02, momentum=0.5)
    rule = eqx.tree_at(lambda rule: rule.log_step["weight"], rule, jnp.log(jnp.asarray([[0.1, 0.2]])))
    w, m = {k: np.asarray(x) for k, x in W.items()}, dict.fromkeys(W, 0.0)
    rates = {"bias": 0.02, "weight": np.asarray([[0.1, 0.2]])}
    for _ in range(2):
        g = jax.grad(bowl)(w, None, DATA)
        m = {k: 0.5 * m[k] + g[k] for k in w}
        w = {k: w[k] - rates[k] * m[k] for k in w}
    assert_trees_close(hx.rollout(PROBLEM, PHI, 2, {"rule": rule}, DATA)[0].w, w, 1e-12)
    with pytest.raises(ValueError, match="like w"):
        rule.update(Inputs(W["bias"], W["bias"]), jnp.zeros(1), jnp.asarray(1))


def test_the_lstm_is_that_of_the_paper():
    rule, g = LSTMRule(KEY, units=3), np.asarray([0.7, -1e-7, 0.0])
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    x = np.stack([[np.log(0.7) / 10, -1.0, -1.0], [1.0, -1e-7 * np.exp(10), 0.0]], 1)
    states, expected = [(0.0 * x[:, :1] * np.ones(3),) * 2] * 2, []
    for _ in range(2):
        below, following = x, []
        for cell, (h, c) in zip(rule.cells, states, strict=True):
            gates = below @ np.asarray(cell.weight_ih).T + h @ np.asarray(cell.weight_hh).T + np.asarray(cell.bias)
            i, f, new, o = np.split(gates, 4, 1)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(new)
            below = sigmoid(o) * np.tanh(c)
            following.append((below, c))
        states = following
        expected.append(0.1 * (below @ np.asarray(rule.weight)[0]))
    w, memory, update = jnp.zeros(3), rule.init(jnp.zeros(3)), eqx.filter_jit(rule.update)
    for t, u in enumerate(expected, 1):
        found, memory = update(Inputs(w, jnp.asarray(g)), memory, jnp.asarray(t))
        np.testing.assert_allclose(found, u, rtol=1e-12, atol=1e-15)


def test_the_preprocessing_is_continuous_and_its_derivative_bounded():
    at = np.exp(-10.0)
    g = jnp.asarray([0.0, at * (1 - 1e-9), at * (1 + 1e-9), -1.0, 1e30, 1e-40])
    x = log_and_sign(g)
    np.testing.assert_allclose(x[1], x[2], rtol=1e-8)
    np.testing.assert_allclose(x[jnp.asarray([0, 3])], [[-1.0, 0.0], [0.0, -1.0]], atol=1e-12)
    slopes = jax.jit(jax.vmap(jax.jacfwd(log_and_sign)))(g)
    assert np.isfinite(slopes).all()
    assert np.abs(slopes).max() <= np.exp(10.0) * (1 + 1e-9)


@pytest.mark.parametrize("name", ["lstm", "perceptron", "hierarchical"])
def test_coordinates_of_a_leaf_are_treated_alike(name):
    rule, g = rule_of(name), jnp.asarray([0.7, -2.0, 0.01])

    @jax.jit
    def two_steps(w, g):
        first, memory = rule.update(Inputs(w, g), rule.init(w), jnp.asarray(1))
        return first, rule.update(Inputs(w, -2 * g), memory, jnp.asarray(2))[0]

    w, order = jnp.asarray([1.0, 0.0, -1.0]), jnp.asarray([2, 0, 1])
    expected = jax.tree.map(lambda u: u[order], two_steps(w, g))
    assert_trees_close(two_steps(w[order], g[order]), expected, 1e-10)
    assert not np.allclose(*expected)


def test_the_untrained_hierarchy_takes_normalised_steps_downhill_in_each_tensor():
    rule = rule_of("hierarchical")
    g = {"bias": jnp.asarray([1e-3]), "weight": jnp.asarray([[50.0, -20.0]])}
    update, memory = eqx.filter_jit(rule.update)(Inputs(W, g), rule.init(W), jnp.asarray(1))
    for name, u in update.items():
        np.testing.assert_allclose(jnp.sqrt(jnp.mean(u**2)), 0.01, rtol=1e-4)
        assert (u * g[name] < 0).all()
    assert memory.tensors.shape == (2, 2)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LearnedOptimizer(StepSizeRule(W)), "give a function of lam"),
        (lambda: LearnedOptimizer().init(W, {"rule": StepSizeRule(W)}), "say which"),
        (lambda: StepSizeRule(W, 0.0), "start from a positive one"),
        (lambda: StepSizeRule(W, momentum=1.0), "leave it out with None"),
        (lambda: StepSizeRule({"n": 3}), "no floating-point array"),
        (lambda: LSTMRule(KEY, units=0), "units must be a whole number"),
        (lambda: LSTMRule(KEY, p=0.0), "both must be positive"),
        (lambda: PerceptronRule(KEY, decays=(1.0,)), "below 1"),
        (lambda: PerceptronRule(KEY, floor=0.0), "must all be positive"),
        (lambda: HierarchicalRule(KEY, scales=0), "scales must be a whole number"),
        (lambda: HierarchicalRule(KEY, step_size=-1.0), "start from a positive one"),
    ],
)
def test_wrong_settings_are_advised(build, message):
    with pytest.raises(ValueError, match=message):
        build()
