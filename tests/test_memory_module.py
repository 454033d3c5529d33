"""The memory module: its update and its loss by hand, padding, gradients, and that it learns."""

from dataclasses import replace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hyperax as hx
from hyperax.fewshot.episodes import Episode
from hyperax.fewshot.learners.learner import OnFeatures
from hyperax.fewshot.learners.memory_module import MemoryModule
from hyperax.fewshot.networks import PerImage
from hyperax.fewshot.targets import Targets
from problems import small_net

SHAPE = (9, 9, 1)
# Five images in the plane, and what a memory of three slots makes of each: a key for class 0; one for class 1; the
# second image of class 1 is averaged with it; class 2 takes the last slot; class 2 again, but next to the key of class
# 0, takes the oldest slot, which is that of class 0.
SHOWN = np.array([[2.0, 0.0], [0.0, 1.0], [0.6, 0.8], [-3.0, 0.0], [0.96, 0.28]])
LABELS = np.array([0, 1, 1, 2, 2])
AVERAGE = np.array([1.0, 3.0]) / np.sqrt(10)


def on_features(support, labels, query, query_labels, ways, there=None):
    weights = None if there is None else jnp.asarray(there / there.sum())
    of = lambda labels, weights: Targets(jnp.eye(ways)[labels], weights)
    return OnFeatures(jnp.asarray(support), of(labels, weights), jnp.asarray(query), of(query_labels, None))


@pytest.mark.parametrize("padded", [False, True])
def test_memory_and_loss_by_hand(padded):
    learner = MemoryModule(3, size=None, slots=3, centred=False)
    shown, labels, there = SHOWN, LABELS, None
    if padded:  # between the images, others that are not there
        shown, labels, there = np.full((10, 2), 5.0), np.full(10, 2), np.arange(10) % 2 == 1
        shown[there], labels[there] = SHOWN, LABELS
    query, query_labels = np.array([[0.0, 4.0], [0.5, 0.0], [1.0, 0.5]]), np.array([1, 1, 0])
    prepared = on_features(shown, labels, query, query_labels, 3, there)

    @jax.jit
    def found(prepared):
        w = learner.init({}, prepared)
        strict = replace(learner, margin=0.9)
        losses = learner.outer(w, {}, prepared), strict.outer(w, {}, prepared)[0], learner.inner(w, {}, prepared)
        return w, losses, learner.logits(w, {}, prepared)

    w, ((value, metrics), of_strict, of_support), logits = found(prepared)
    np.testing.assert_allclose(w.keys, [[0.96, 0.28], AVERAGE, [-1, 0]], atol=1e-15)
    np.testing.assert_array_equal(w.values, np.eye(3)[[2, 1, 2]])
    np.testing.assert_array_equal(w.ages, [0, 2, 1])

    # The first is safe by more than the margin, the second is nearer to class 2, the third is of a class without a key.
    np.testing.assert_allclose(value, (0 + (0.96 - AVERAGE[0] + 0.1) + 0) / 3, rtol=1e-12)
    np.testing.assert_allclose(metrics["accuracy"], 1 / 3, rtol=1e-6)
    np.testing.assert_allclose(logits[:2, 1:], 40 * np.array([[AVERAGE[1], 0.28], [AVERAGE[0], 0.96]]), rtol=1e-12)
    assert jnp.argmax(logits, 1).tolist() == [1, 2, 2]
    assert not np.exp(logits[:, 0]).any()  # nothing remembers class 0
    np.testing.assert_allclose(of_strict, (0.9 + 0.28 - AVERAGE[1] + 0.96 - AVERAGE[0] + 0.9) / 3, rtol=1e-12)
    # Of the images shown, the first has no key any more, the others are safe.
    np.testing.assert_allclose(of_support, 0, atol=1e-12)


def test_nothing_is_forgotten_with_a_slot_for_each_image_and_what_all_features_share_has_no_part():
    draw = np.random.default_rng(0)
    support, labels = draw.normal(size=(8, 5)), np.arange(8) % 4
    of = lambda support: on_features(support, labels, support, labels, 4)
    many, few = MemoryModule(4, size=None, slots=11), MemoryModule(4, size=None)
    w, wider = jax.jit(lambda a, b: (few.init({}, a), many.init({}, b)))(of(support), of(support + 10))
    assert w.keys.shape == (8, 5)
    np.testing.assert_allclose(np.linalg.norm(w.keys, axis=1), w.values.sum(1) > 0, rtol=1e-12)
    assert np.all(w.values.sum(0) >= 1)
    np.testing.assert_allclose(w.centre, support.mean(0), rtol=1e-12)
    np.testing.assert_allclose(wider.keys[:8], w.keys, rtol=1e-9)  # neither do more slots change anything
    assert not wider.values[8:].any()


def episode(seed, there=None):
    draw = np.random.default_rng(seed)
    images = lambda count: jnp.asarray(draw.integers(0, 256, (count, *SHAPE)), jnp.uint8)
    masks = () if there is None else (jnp.asarray(np.repeat(there, 2)), jnp.asarray(np.repeat(there, 3)))
    labels = jnp.arange(3, dtype=jnp.int32)
    return Episode(images(6), jnp.repeat(labels, 2), images(9), jnp.repeat(labels, 3), *masks)


def test_gradients_over_tasks_are_finite_differences_and_padding_has_no_part():
    learner = MemoryModule(3, size=4, margin=0.3)
    lam = learner.lam(small_net(), SHAPE, jax.random.key(3))
    assert lam["projection"].shape == (4, 18)
    f = hx.mean_over_tasks(learner.hypergradient(learner.method(7)))

    @eqx.filter_jit
    def found(lam, tasks):
        h = f.evaluate(lam, tasks, ())
        return h.value, h.grad, h.info["metrics"]["accuracy"]

    all_there, two = np.ones(3, bool), np.arange(3) < 2
    stacked = lambda *episodes: jax.tree.map(lambda *x: jnp.stack(x), *episodes)
    tasks = stacked(episode(1, all_there), episode(2, two))
    value, grad, accuracy = found(lam, tasks)
    assert accuracy.shape == (2,)

    draw = np.random.default_rng(4)
    direction = jax.tree.map(lambda x: jnp.asarray(draw.normal(size=x.shape)), lam)
    moved = lambda t: found(jax.tree.map(lambda x, d: x + t * d, lam, direction), tasks)[0]
    slope = sum(jnp.vdot(g, d) for g, d in zip(jax.tree.leaves(grad), jax.tree.leaves(direction), strict=True))
    assert value > 0
    assert abs(slope) > 1e-4
    np.testing.assert_allclose((moved(1e-6) - moved(-1e-6)) / 2e-6, slope, rtol=1e-6)

    # What is padding may be any image.
    other = episode(5)
    changed = episode(2, two)._replace(
        support=jnp.concatenate([tasks.support[1, :4], other.support[4:]]),
        query=jnp.concatenate([tasks.query[1, :6], other.query[6:]]),
    )
    again = found(lam, stacked(episode(1, all_there), changed))
    for old, new in zip(jax.tree.leaves((value, grad)), jax.tree.leaves(again[:2]), strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-10, atol=1e-12)


def test_it_learns_which_pixels_count():
    """Of sixteen pixels the first four tell three classes apart, and the others vary by more."""
    draw = np.random.default_rng(0)
    centres = draw.uniform(60, 200, (40, 3, 1, 4))  # 40 tasks
    signal = np.broadcast_to(centres, (40, 3, 4, 4)) + draw.normal(size=(40, 3, 4, 4))
    images = jnp.asarray(np.concatenate([signal, draw.uniform(0, 255, (40, 3, 4, 12))], -1), jnp.uint8)
    images, labels = images.reshape(40, 3, 4, 4, 4, 1), jnp.arange(3, dtype=jnp.int32)
    flat = lambda x: x.reshape(40, -1, 4, 4, 1)
    repeated = lambda count: jnp.tile(jnp.repeat(labels, count), (40, 1))
    tasks = Episode(flat(images[:, :, :1]), repeated(1), flat(images[:, :, 1:]), repeated(3))
    learner = MemoryModule(3, size=8)
    lam = learner.lam(PerImage(jnp.ravel), (4, 4, 1), jax.random.key(0))
    f = hx.mean_over_tasks(learner.hypergradient(learner.method(0)))
    history = hx.minimize(f, lam, data=tasks, optimizer=optax.adam(0.02), steps=40, record_every=39).history
    accuracies = [float(np.mean(record["metrics"]["accuracy"])) for record in history]
    assert accuracies[0] < 0.95 < accuracies[-1], accuracies
    assert history[-1]["value"] < history[0]["value"] / 5


def test_keys_that_are_zero_in_float32():
    """Blank images: the loss is the margin, and the gradient finite."""
    learner = MemoryModule(2, size=None)
    targets = Targets(jnp.eye(2, dtype=jnp.float32))

    @jax.jit
    @jax.value_and_grad
    def found(features):
        prepared = OnFeatures(features, targets, features, targets)
        return learner.outer(learner.init({}, prepared), {}, prepared)[0]

    value, grad = found(jnp.zeros((2, 3), jnp.float32))
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, 0.1, rtol=1e-6)
    np.testing.assert_array_equal(grad, 0)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: MemoryModule(5, slots=4), "a memory of 4 slots cannot have a key for each of 5 classes"),
        (lambda: MemoryModule(5, size=0), "size must be a whole number, at least 1; it is 0"),
        (lambda: MemoryModule(5, margin=0.0), "margin is 0.0; it must be a number > 0"),
        (lambda: MemoryModule(5, inverse_temperature=-1.0), "inverse_temperature is -1.0; it must be a number > 0"),
        (lambda: MemoryModule(5).lam(small_net()), "MemoryModule needs the number of features for the dense layer"),
        (lambda: MemoryModule(5).lam(small_net(), SHAPE), r"pass key=jax.random.key\(seed\) to lam"),
    ],
    ids=range(6),
)
def test_errors(make, match):
    with pytest.raises(ValueError, match=match):
        make()
