"""Joint descent (Classic) against a plain loop, and what its carry holds."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hyperax as hx
from hyperax.checkpoint import Checkpoint
from hyperax.fewshot.episodes import Episode
from hyperax.fewshot.learners.classic import Joint
from hyperax.fewshot.learners.hyper_representation import HyperRepresentation
from hyperax.fewshot.learners.learner import unit
from problems import assert_trees_close, small_net

WAYS, TASKS, PERIOD, ETA, RATE = 2, 2, 3, 0.4, 0.3
LABELS = jnp.array([0, 0, 1, 1], jnp.int32)
# One object: a second run does not compile again.
OPTIMIZER = optax.sgd(RATE)


def pool(count=5):
    """Episodes whose query sets are their support sets, with a task axis."""
    images = jnp.asarray(np.random.default_rng(3).integers(0, 256, (count, 4, 9, 9, 1)), jnp.uint8)
    labels = jnp.tile(LABELS, (count, 1))
    return Episode(images, labels, images, labels)


def two(key, episodes):
    chosen = jax.random.choice(key, len(episodes.support), (TASKS,), replace=False)
    return jax.tree.map(lambda x: x[chosen], episodes)


LEARNER = HyperRepresentation(WAYS, step_size=ETA)
MEAN = hx.mean_over_tasks(LEARNER.hypergradient(Joint(PERIOD)))


def train(steps, parallel=None, **arguments):
    mean = hx.mean_over_tasks(MEAN.hypergradient, parallel=parallel)
    key, lam = jax.random.key(2), LEARNER.lam(small_net())
    settings = {"optimizer": OPTIMIZER, "dispatch": 1, **arguments}
    return hx.minimize(mean, lam, data=pool(), sample=two, key=key, steps=steps, **settings)


def joint_descent(steps):
    """(f, network) before every step, of plain gradient descent in (network, w^1, ..., w^N) together."""

    def task_loss(network, w, episode):
        logits = network(unit(episode.support)) @ w["weight"].T + w["bias"]
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, episode.support_labels))

    gradients = jax.jit(jax.value_and_grad(task_loss, argnums=(0, 1)))
    network, seen = small_net(), []
    for k in range(steps):
        if k % PERIOD == 0:
            tasks = two(jax.random.fold_in(jax.random.key(2), k), pool())
            ws = [{"weight": jnp.zeros((WAYS, 18)), "bias": jnp.zeros(WAYS)} for _ in range(TASKS)]
        found = [gradients(network, w, jax.tree.map(lambda x, j=j: x[j], tasks)) for j, w in enumerate(ws)]
        seen.append((np.mean([value for value, _ in found]), network))
        ws = [jax.tree.map(lambda w, g: w - ETA * g, w, of_w) for w, (_, (_, of_w)) in zip(ws, found, strict=True)]
        of_network = jax.tree.map(lambda *g: sum(g) / TASKS, *(g for _, (g, _) in found))
        network = jax.tree.map(lambda x, g: x - RATE * g, network, of_network)
    return [*seen, (None, network)], ws


@pytest.mark.parametrize("parallel", [None, 1])
def test_it_is_joint_gradient_descent(parallel):
    networks = []
    note = lambda progress: networks.append(jax.tree.map(np.asarray, progress.lam()["network"]))
    solution = train(2 * PERIOD, parallel, callbacks=note)
    expected, ws = joint_descent(2 * PERIOD)
    np.testing.assert_allclose([r["value"] for r in solution.history], [f for f, _ in expected[:-1]], rtol=1e-10)
    assert len(networks) == 2 * PERIOD
    for network, (_, by_hand) in zip(networks, expected[1:], strict=True):
        assert_trees_close(network, by_hand, 1e-10)
    assert solution.carry.t.tolist() == [0, 0]
    w = solution.carry.state.w
    assert_trees_close(w._asdict(), jax.tree.map(lambda *x: jnp.stack(x), *ws), 1e-10, 1e-15)
    # What the last period learned from is what its first hyperiteration drew.
    drawn = two(jax.random.fold_in(jax.random.key(2), PERIOD), pool())
    jax.tree.map(np.testing.assert_array_equal, solution.carry.data, drawn)


def test_a_resumed_run_is_the_run(tmp_path):
    alone = train(5)
    train(4, checkpoint=Checkpoint(tmp_path, every=2))  # ends in the middle of a period
    resumed = train(5, checkpoint=Checkpoint(tmp_path, every=2), resume=True)
    jax.tree.map(np.testing.assert_array_equal, (resumed.lam, resumed.carry), (alone.lam, alone.carry))
    assert resumed.history == alone.history
    assert resumed.carry.t.tolist() == [2, 2]


def test_the_carry_keeps_the_data_and_the_state_for_a_period():
    problem = hx.Problem(
        inner=lambda w, lam, d: 0.5 * (w - d["offset"] - lam) ** 2 + 0.0 * d["power"],
        outer=lambda w, lam, d: jnp.nan * w,  # E is not looked at
        init=lambda lam, d: lam**2,
        prepare=lambda lam, d: {**d, "offset": d["x"] * lam},
    )
    f = hx.hypergradient(problem, hx.HeavyBall(0.25, 0.5), Joint(2))
    assert not f.remembers_tasks
    data = lambda x: {"x": jnp.asarray(x), "key": jax.random.key(0), "power": 2, "none": None}
    lam, v, carry = 0.5, 0.0, f.init(0.5, data(9.0))
    for k, x in enumerate([1.0, 7.0, 3.0, 8.0]):
        h = f(lam, data(x), carry)
        if k % 2 == 0:
            used, w, v = x, lam**2, 0.0
        residual = w - used * lam - lam
        np.testing.assert_allclose([h.value, h.grad], [0.5 * residual**2, -residual * (used + 1)], rtol=1e-12)
        v = 0.5 * v + residual
        w -= 0.25 * v
        np.testing.assert_allclose(h.state.w, w, rtol=1e-12)
        assert (h.info["step"], h.carry.t, h.carry.data["x"]) == (k % 2 + 1, (k + 1) % 2, used)
        carry, lam = h.carry, lam + 0.1


def test_what_it_cannot_do_is_said():
    with pytest.raises(ValueError, match="period must be a whole number, at least 2"):
        Joint(1)
    learner = HyperRepresentation(WAYS, learn_step_size=True)
    episode = jax.tree.map(lambda x: x[0], pool())
    with pytest.warns(hx.UnusedLeafWarning, match=r"lam\['step_size'\] does not reach"):
        learner.hypergradient(Joint(3)).check(learner.lam(small_net()), episode)
