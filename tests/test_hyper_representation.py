"""The hyper-representation against a plain unrolled loop that knows nothing of the core."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hyperax as hx
from hyperax.fewshot.episodes import Episode
from hyperax.fewshot.learners.hyper_representation import HyperRepresentation
from hyperax.fewshot.networks import encode
from problems import small_net

NET = small_net()
WAYS = 2
EPISODE = Episode(
    jnp.asarray(np.random.default_rng(3).integers(0, 256, (4, 9, 9, 1)), jnp.uint8),
    jnp.array([0, 0, 1, 1], jnp.int32),
    jnp.asarray(np.random.default_rng(4).integers(0, 256, (40, 9, 9, 1)), jnp.uint8),
    jnp.arange(40, dtype=jnp.int32) % 2,
)


def by_hand(network, step_size, steps, statistics="set"):
    """f_T for one episode, without hyperax' core: features, a Python loop of descent, the query's cross-entropy."""
    scaled = lambda images: images.astype(jnp.float64) / 255
    support, query = encode(network, scaled(EPISODE.support), scaled(EPISODE.query), statistics)
    one_hot = jax.nn.one_hot(EPISODE.support_labels, WAYS)
    weight, bias = jnp.zeros((support.shape[1], WAYS)), jnp.zeros(WAYS)
    for _ in range(steps):
        residual = (jax.nn.softmax(support @ weight + bias) - one_hot) / len(support)
        weight, bias = weight - step_size * support.T @ residual, bias - step_size * residual.sum(0)
    logits = query @ weight + bias
    return optax.softmax_cross_entropy_with_integer_labels(logits, EPISODE.query_labels).mean(), logits


@pytest.mark.parametrize(("statistics", "learned"), [("set", False), ("support", True)])
def test_the_hypergradient_is_that_of_a_plain_unrolled_loop(statistics, learned):
    learner = HyperRepresentation(WAYS, statistics, step_size=0.4, learn_step_size=learned)
    lam = {**learner.lam(NET), **({"step_size": jnp.float64(0.4)} if learned else {})}
    assert set(learner.lam(NET)) == set(lam)
    f = learner.hypergradient(hx.Reverse(3))
    h = f(lam, EPISODE)

    def value(lam):
        return by_hand(lam["network"], lam.get("step_size", 0.4), 3, statistics)

    (expected, logits), gradient = jax.jit(jax.value_and_grad(value, has_aux=True))(lam)
    np.testing.assert_allclose(h.value, expected, rtol=1e-6)
    scale = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(gradient))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6 * scale), h.grad, gradient)
    accuracy = np.mean(np.argmax(logits, -1) == EPISODE.query_labels)
    np.testing.assert_allclose(h.info["metrics"]["accuracy"], accuracy, rtol=1e-6)
    many = hx.mean_over_tasks(f)(lam, jax.tree.map(lambda x: jnp.stack([x, x]), EPISODE))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6 * scale), many.grad, gradient)


def test_the_learned_step_size_by_finite_differences():
    learner = HyperRepresentation(WAYS, learn_step_size=True)
    f = learner.hypergradient(hx.Reverse(3))
    at = lambda step: f({"network": NET, "step_size": jnp.float64(step)}, EPISODE)
    difference = (at(0.4 + 1e-4).value - at(0.4 - 1e-4).value) / 2e-4
    np.testing.assert_allclose(at(0.4).grad["step_size"], difference, rtol=1e-5)
    assert learner.lam(NET)["step_size"] == np.float32(0.1)
    assert set(learner.constraint()) == {"network", "step_size"}
    assert HyperRepresentation(WAYS).constraint() is None


def test_accuracies_on_the_way_are_those_of_shorter_runs():
    learner = HyperRepresentation(WAYS, step_size=1.0)
    lam = learner.lam(NET)
    accuracies = eqx.filter_jit(learner.accuracies)(lam, EPISODE, 4)
    assert accuracies.shape == (4,)
    for t in (1, 4):
        _, outcome = eqx.filter_jit(learner.hypergradient(hx.Reverse(t)).value)(lam, EPISODE, ())
        np.testing.assert_allclose(accuracies[t - 1], outcome.info["metrics"]["accuracy"], rtol=1e-6)
    assert len(set(accuracies.tolist())) > 1
