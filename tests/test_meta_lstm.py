"""Meta-LSTM against loops written out plainly, in float64, finite differences, and plain gradient descent."""

from functools import cache

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hyperax as hx
from hyperax.dynamics.learned_optimizer import LearnedOptimizer
from hyperax.fewshot.episodes import Episode
from hyperax.fewshot.learners.initialisation import Initialisation
from hyperax.fewshot.learners.maml import maml
from hyperax.fewshot.learners.meta_lstm import meta_lstm
from hyperax.learned_optimizers.meta_lstm_rule import MetaLSTMRule
from hyperax.learned_optimizers.update_rule import Inputs
from problems import assert_trees_close, differences, small_net

DRAW = np.random.default_rng(5)
SHAPE, UNITS, T = (9, 9, 1), 2, 3
TARGET = {"a": jnp.asarray(DRAW.normal(size=2)), "b": jnp.asarray(DRAW.normal())}


def quartic(w, lam, target):
    """Neither its gradient nor its value has one sign, and coordinates meet."""
    difference = jnp.append(w["a"] - target["a"], w["b"] - target["b"])
    return jnp.sum(difference**2) + 0.1 * jnp.prod(difference) - 0.3


PROBLEM = hx.Problem(quartic, quartic, init=lambda lam, target: lam["start"])
DYNAMICS = LearnedOptimizer(lambda lam: lam["rule"])


@cache
def lam():
    """All parameters disturbed, so that each of them matters."""
    rule = MetaLSTMRule(jax.random.key(1), units=UNITS, step_size=0.1, decay=0.05)
    rule = jax.tree.map(lambda x: x + 0.2 * jnp.asarray(DRAW.normal(size=x.shape)), rule)
    return {"start": {"a": jnp.asarray(DRAW.normal(size=2)), "b": jnp.asarray(0.3)}, "rule": rule}


def preprocessed(x):
    return (np.log(abs(x)) / 10, np.sign(x)) if abs(x) >= np.exp(-10) else (-1, np.exp(10) * x)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def by_hand(rule, w, gradients, values):
    """A coordinate and a step at a time, with gradients and values given; w after each step."""
    cell, run = rule.cell, []
    states = [(np.zeros(UNITS), np.zeros(UNITS), 0.0, 0.0) for _ in w]
    for g, value in zip(gradients, values, strict=True):
        for j, (h, c, f, i) in enumerate(states):
            x = np.array([*preprocessed(g[j]), *preprocessed(value)])
            parts = np.split(cell.weight_ih @ x + cell.weight_hh @ h + cell.bias, 4)
            c = sigmoid(parts[1]) * c + sigmoid(parts[0]) * np.tanh(parts[2])
            h = sigmoid(parts[3]) * np.tanh(c)
            gate = lambda of, last: sigmoid(of.of_hidden @ h + of.of_w * w[j] + of.of_previous * last + of.bias)  # noqa: B023
            f, i = float(gate(rule.forget, f)), float(gate(rule.take, i))
            states[j] = (h, c, f, i)
            w[j] = f * w[j] - i * g[j]
        run.append(w.copy())
    return np.array(run)


def test_the_update_is_the_plain_loop():
    """Small and vanishing gradients among them: both branches of the preprocessing."""
    rule, start = jax.tree.map(np.asarray, lam()["rule"]), np.array([0.5, -0.2, 1.0])
    gradients = np.array([[0.3, -1e-6, 0.0], [-2.0, 1e-9, 4e-5], [1.5, 0.2, -0.7]])
    values = np.array([0.7, -0.1, 1e-7])

    @jax.jit
    def run(rule, gradients, values):
        w = {"a": jnp.asarray(start[:2]), "b": jnp.asarray(start[2])}
        memory, seen = rule.init(w), []
        for t in range(3):
            g = {"a": gradients[t, :2], "b": gradients[t, 2]}
            update, memory = rule.update(Inputs(w, g, values[t]), memory, jnp.asarray(t + 1))
            w = jax.tree.map(jnp.add, w, update)
            seen.append(jnp.append(w["a"], w["b"]))
        return jnp.stack(seen)

    np.testing.assert_allclose(
        run(lam()["rule"], gradients, values), by_hand(rule, start, gradients, values), rtol=1e-10
    )


@cache
def hypergradient(method):
    return jax.jit(hx.hypergradient(PROBLEM, DYNAMICS, method).evaluate)(lam(), TARGET, ())


def end(lam, gradient_of):
    """w_T by a loop that knows nothing of dynamics and methods."""
    w = lam["start"]
    memory = lam["rule"].init(w)
    for t in range(1, T + 1):
        value, g = gradient_of(jax.value_and_grad(lambda w: quartic(w, None, TARGET))(w))
        update, memory = lam["rule"].update(Inputs(w, g, value), memory, t)
        w = jax.tree.map(jnp.add, w, update)
    return quartic(w, None, TARGET)


def test_the_hypergradient_against_finite_differences():
    values = jax.jit(jax.vmap(lambda lam: end(lam, lambda both: both)))
    value, expected = differences(values, lam())
    h = hypergradient(hx.Reverse(T))
    np.testing.assert_allclose(h.value, value, rtol=1e-12)
    assert_trees_close(h.grad, expected, 1e-7, 1e-9)
    assert all(np.any(np.abs(leaf) > 1e-6) for leaf in jax.tree.leaves(h.grad))


def test_first_order_keeps_the_derivative_of_start_and_rule():
    expected = jax.jit(jax.grad(lambda lam: end(lam, jax.lax.stop_gradient)))(lam())
    h = hypergradient(hx.FirstOrder(T))
    assert_trees_close(h.grad, expected, 1e-10, 1e-14)
    assert np.all(np.asarray(h.grad["rule"].cell.weight_ih) != 0)
    exact = hypergradient(hx.Reverse(T)).grad["rule"].take.bias
    assert abs(h.grad["rule"].take.bias - exact) > 1e-4 * abs(exact)


def images(*shape):
    return jnp.asarray(DRAW.integers(0, 256, (*shape, *SHAPE)), jnp.uint8)


LABELS = lambda each: jnp.repeat(jnp.arange(2, dtype=jnp.int32), each)
EPISODE = Episode(images(4), LABELS(2), images(6), LABELS(3))


def forced(rule, eta):
    """The rule whose gates are f = 1 and i = eta whatever it sees."""
    zero = jax.tree.map(jnp.zeros_like, rule)
    biases = lambda rule: (rule.forget.bias, rule.take.bias)
    return eqx.tree_at(biases, zero, (jnp.asarray(800.0), jnp.log(jnp.asarray(eta / (1 - eta)))))


def test_with_its_gates_forced_it_is_gradient_descent():
    plain, learned = maml(2, 0.25), meta_lstm(2, units=UNITS, first_order=False)
    start = learned.lam(small_net(), SHAPE, jax.random.key(0))
    start["rule"] = forced(start["rule"], 0.25)

    @jax.jit
    def both(lam):
        f = lambda learner, lam: learner.hypergradient(learner.method(2)).evaluate(lam, EPISODE, ())
        return f(learned, lam), f(plain, {"network": lam["network"]})

    h, expected = both(start)
    np.testing.assert_allclose(h.value, expected.value, rtol=1e-12)
    assert_trees_close(h.state.w, expected.state.w, 1e-10, 1e-14)
    assert_trees_close(h.grad["network"], expected.grad["network"], 1e-8, 1e-12)


def test_it_learns_in_float32_with_padding():
    """Images that are brighter on the left or on the right, either of them the first class: f falls."""
    learner = meta_lstm(3, units=4, step_size=0.1)
    network = jax.tree.map(lambda x: x.astype(jnp.float32), small_net())
    lam = learner.lam(network, SHAPE, jax.random.key(0))
    lam = jax.tree.map(lambda x: x.astype(jnp.float32), lam)
    bright = np.random.default_rng(0).integers(0, 150, (3, 4, *SHAPE)).astype(np.uint8)
    bright[0, :, :, :4] += 100
    bright[1, :, :, 5:] += 100
    tasks = np.stack([bright, bright[[1, 0, 2]]])  # the third class is padding
    mask = np.tile(np.repeat([True, True, False], 2), (2, 1))
    part = lambda images: jnp.asarray(images.reshape(2, 6, *SHAPE))
    labels = jnp.tile(jnp.repeat(jnp.arange(3, dtype=jnp.int32), 2), (2, 1))
    episodes = Episode(
        part(tasks[:, :, :2]), labels, part(tasks[:, :, 2:]), labels, jnp.asarray(mask), jnp.asarray(mask)
    )
    f, adam, values = hx.mean_over_tasks(learner.hypergradient(learner.method(3))), optax.adam(3e-2), []

    @jax.jit
    def step(lam, state, episodes):
        h = f.evaluate(lam, episodes, ())
        updates, state = adam.update(h.grad, state)
        return optax.apply_updates(lam, updates), state, h

    state = adam.init(lam)
    for _ in range(30):
        lam, state, h = step(lam, state, episodes)
        values.append(float(h.value))
    assert values[0] < np.log(3) - 0.2  # the class that is not there has no part
    assert values[-1] < 0.7 * values[0], values
    blank = step(lam, state, episodes._replace(support=jnp.zeros_like(episodes.support)))[2]
    assert all(np.isfinite(leaf).all() and leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(blank.grad))


def test_what_it_is_made_of():
    learner = meta_lstm(5, head="learned", units=3)
    made = jax.eval_shape(lambda: learner.lam(small_net(), SHAPE, jax.random.key(0)))
    assert sorted(made) == ["head", "network", "rule"]
    assert made["rule"].cell.hidden_size == 3
    assert learner.method(4) == hx.FirstOrder(4)
    rule = MetaLSTMRule(jax.random.key(0), step_size=0.2, decay=0.1)
    w = jnp.asarray([2.0])
    update = jax.jit(lambda w: rule.update(Inputs(w, w / 2000, jnp.sum(w)), rule.init(w), jnp.asarray(1))[0])(w)
    np.testing.assert_allclose(update, -0.1 * w - 0.2e-3, rtol=0.1)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: MetaLSTMRule(jax.random.key(0), units=0), "units must be a whole number, at least 1; it is 0"),
        (lambda: MetaLSTMRule(jax.random.key(0), step_size=1.0), "step_size is 1.0; a gate lies between 0 and 1"),
        (lambda: MetaLSTMRule(jax.random.key(0), decay=0), "decay is 0; a gate lies between 0 and 1"),
        (lambda: MetaLSTMRule(jax.random.key(0), p=0.0), "p is 0.0; it must be positive"),
        (lambda: meta_lstm(5).lam(small_net(), SHAPE), r"a rule draws its parameters: pass key=jax.random.key\(seed\)"),
        (lambda: meta_lstm(5, learn_step_sizes=True), "a learned rule takes the place of the inner optimizer"),
        (lambda: Initialisation(5, rule=MetaLSTMRule, optimizer=hx.Adam), "leave `optimizer` and `learn_step_sizes`"),
    ],
    ids=range(7),
)
def test_errors(make, match):
    with pytest.raises(ValueError, match=match):
        make()
