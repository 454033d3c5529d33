"""Multiclass training against plain JAX, the images that it draws, the readouts, and nearest neighbours."""

from functools import cache

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hyperax as hx
from hyperax.fewshot.episodes import Episode, Episodes
from hyperax.fewshot.evaluation import accuracies_by_steps, nearest_neighbour_accuracies
from hyperax.fewshot.image_batches import ImageBatch, ImageBatches
from hyperax.fewshot.image_classes import ImageClasses
from hyperax.fewshot.learners.hyper_representation import Classifier, HyperRepresentation
from hyperax.fewshot.learners.learner import unit
from hyperax.fewshot.learners.nearest_neighbour import NearestNeighbour
from hyperax.fewshot.learners.partition import LastStages
from hyperax.fewshot.learners.pretrained import Multiclass, Readout, fine_tuning
from hyperax.fewshot.networks import PerImage
from problems import assert_trees_close, small_net

COUNTS = (4, 6, 5)
LEARNER = Multiclass(len(COUNTS))
PIXELS = PerImage(jnp.ravel)


def textures():
    """Classes of 9 x 9 noise about a pattern of their own; the first pixel numbers the image."""
    draw, number, classes = np.random.default_rng(0), 0, {}
    for name, count in zip("abc", COUNTS, strict=True):
        pattern = draw.integers(40, 216, (9, 9))
        classes[name] = np.clip(pattern + draw.integers(-40, 40, (count, 9, 9)), 0, 255)
        classes[name][:, 0, 0] = number + np.arange(count)
        number += count
    return ImageClasses.from_lists(classes)


CLASSES = textures()
LABELS = np.repeat(np.arange(3), COUNTS)


# Compiled once: operation by operation takes longer.
encoded = eqx.filter_jit(lambda network, images: network(unit(images)))
predicted = eqx.filter_jit(lambda lam, images: jnp.argmax(lam["head"](lam["network"](unit(images))), 1))
sample = eqx.filter_jit(lambda batches, key: batches.sample(key, CLASSES))
held_out_batches = eqx.filter_jit(lambda batches, key: batches.held_out_batches(key, CLASSES))


@cache
def initial():
    lam = LEARNER.lam(small_net(), CLASSES.image_shape, jax.random.key(0))
    assert lam["head"].weight.shape == (3, 18)
    assert lam["head"].weight.std() > 0.1
    return jax.tree.map(lambda x: x.astype(jnp.float64), lam)


def test_the_gradient_is_that_of_the_cross_entropy_of_the_batch():
    batch, lam = sample(ImageBatches(7), jax.random.key(1)), initial()

    def by_hand(lam, batch):
        logits = lam["network"](unit(batch.images)) @ lam["head"].weight.T + lam["head"].bias
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean(), logits

    (value, logits), gradient = jax.jit(jax.value_and_grad(by_hand, has_aux=True))(lam, batch)
    h = LEARNER.hypergradient()(lam, batch)
    np.testing.assert_allclose(h.value, value, rtol=1e-12)
    assert_trees_close(h.grad, gradient, 1e-10)
    assert h.info["metrics"]["accuracy"] == np.mean(np.argmax(logits, 1) == batch.labels)


def test_it_learns_the_classes_and_images_that_it_has_not_seen():
    batches, lam = ImageBatches(8, held_out=2), initial()
    batches.check(CLASSES)
    solution = hx.minimize(
        LEARNER.hypergradient(),
        lam,
        data=CLASSES,
        sample=batches.sample,
        key=jax.random.key(2),
        optimizer=optax.adam(0.02),
        steps=60,
        record_every=20,
    )
    values = [record["value"] for record in solution.history]
    assert values[-1] < 0.1 < 0.3 < values[0]
    assert solution.history[-1]["metrics"]["accuracy"] > 0.99
    score = lambda lam: LEARNER.held_out_accuracy(lam, ImageBatches(4, held_out=2), CLASSES, jax.random.key(3))
    assert score(solution.lam) == 1.0
    # Of the untrained one: by hand, batch by batch, the images that fill the last batch left out.
    held_out, right = held_out_batches(ImageBatches(4, held_out=2), jax.random.key(3)), []
    for images, labels, mask in zip(held_out.images, held_out.labels, held_out.mask, strict=True):
        right.extend(np.equal(predicted(lam, images), labels)[np.asarray(mask)])
    assert len(right) == 6
    np.testing.assert_allclose(score(lam), np.mean(right))
    assert np.mean(right) < 1


def test_held_out_images_are_never_drawn_and_the_others_uniformly():
    number = lambda images: np.asarray(images)[..., 0, 0, 0].ravel()
    batch = sample(ImageBatches(4000, held_out=2), jax.random.key(4))
    drawn, times = np.unique(number(batch.images), return_counts=True)
    assert drawn.tolist() == [0, 1, 4, 5, 6, 7, 10, 11, 12]
    assert np.all(np.abs(times - 4000 / 9) < 5 * np.sqrt(4000 / 9))
    np.testing.assert_array_equal(batch.labels, LABELS[number(batch.images)])

    held_out = held_out_batches(ImageBatches(4, held_out=2), jax.random.key(5))
    seen = number(held_out.images)[np.ravel(held_out.mask)]
    assert sorted(seen) == [2, 3, 8, 9, 13, 14] != seen.tolist()
    assert np.sum(held_out.mask, 1).tolist() == [4, 2]
    np.testing.assert_array_equal(np.ravel(held_out.labels), LABELS[number(held_out.images)])
    everything = sample(ImageBatches(4000), jax.random.key(4))
    assert len(np.unique(number(everything.images))) == 15
    assert everything.mask is None


def test_readouts():
    lam, images = initial(), CLASSES.images[:5]
    features, head = np.asarray(encoded(small_net(), images)), jax.tree.map(np.asarray, lam["head"])
    logits = features @ head.weight.T + head.bias
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    centred = logits - logits.mean(1, keepdims=True)
    for layer, expected in (("conv", features), ("linear", centred), ("softmax", probabilities)):
        network = Readout(**lam, layer=layer)
        np.testing.assert_allclose(encoded(network, images), expected, rtol=1e-7)
    # The moments of the caller go down to the network.
    given = eqx.filter_jit(lambda network: network(unit(images), lambda x: (jnp.zeros(2), jnp.full(2, 0.5))))
    np.testing.assert_allclose(given(Readout(**lam, layer="conv")), given(small_net()), rtol=1e-7)
    # A readout is a network for softmax regression: its first step from w = 0 is known.
    episode = Episode(CLASSES.images[2:6], jnp.array([0, 0, 1, 1]), CLASSES.images[:8], jnp.asarray(LABELS[:8]))
    learner = HyperRepresentation(2, step_size=0.5)
    w = eqx.filter_jit(learner.adapt)({"network": network}, *episode[:2], steps=1).w
    seen = np.asarray(encoded(network, episode.support))
    np.testing.assert_allclose(w.weight[0], 0.5 * (seen[:2].sum(0) - seen[2:].sum(0)) / 8, rtol=1e-6)


def nearest(network, episode):
    """The class of the nearest support image, in NumPy."""
    support, query = (np.asarray(encoded(network, x)) for x in (episode.support, episode.query))
    return np.asarray(episode.support_labels)[np.linalg.norm(query[:, None] - support[None], axis=-1).argmin(1)]


def test_nearest_neighbours():
    learner, lam = NearestNeighbour(3), {"network": small_net()}
    draw = np.random.default_rng(6)
    images = lambda count: jnp.asarray(draw.integers(0, 256, (count, 9, 9, 1)), jnp.uint8)
    episode = Episode(images(6), jnp.arange(6) // 2, images(40), jnp.arange(40) % 3)
    expected = nearest(small_net(), episode)
    found = eqx.filter_jit(learner.accuracies)(lam, episode, 2)
    np.testing.assert_allclose(found, [np.mean(expected == episode.query_labels)] * 2)
    adapted = eqx.filter_jit(learner.adapt)(lam, *episode[:2], steps=0)
    probabilities = eqx.filter_jit(learner.predict)(lam, adapted, episode.query)
    np.testing.assert_array_equal(np.argmax(probabilities, 1), expected)
    assert learner.lam(small_net()).keys() == lam.keys()


def test_what_is_not_there_is_no_neighbour():
    learner, lam, draw = NearestNeighbour(3), {"network": PIXELS}, np.random.default_rng(7)
    images = lambda count: draw.integers(0, 256, (count, 3, 3, 1)).astype(np.uint8)
    support, query, labels = images(6), images(40), np.arange(40) % 2
    keep = np.array([0, 2, 3])  # one of the first class, both of the second, none of the third
    expected = nearest(PIXELS, Episode(support[keep], np.array([0, 1, 1]), query, labels))
    there = np.isin(np.arange(6), keep), np.arange(40) < 20
    episode = jax.tree.map(jnp.asarray, Episode(support, np.arange(6) // 2, query, labels, *there))

    @eqx.filter_jit
    def run(lam, episode):
        prepared = learner.prepare(lam, episode)
        w = learner.init(lam, prepared)
        return learner.logits(w, lam, prepared), learner.inner(w, lam, prepared), *learner.outer(w, lam, prepared)

    logits, inner, loss, metrics = run(lam, episode)
    np.testing.assert_array_equal(np.argmax(logits, 1), expected)
    assert inner == 0
    assert np.isfinite(loss)
    np.testing.assert_allclose(metrics["accuracy"], np.mean(expected[:20] == labels[:20]), rtol=1e-6)
    assert 0 < metrics["accuracy"] < 1


def test_fine_tuning_moves_the_network_and_a_new_head():
    draw = np.random.default_rng(9)
    images = lambda count: jnp.asarray(draw.integers(0, 256, (count, 9, 9, 1)), jnp.uint8)
    episode = Episode(images(4), jnp.arange(4) // 2, images(40), jnp.arange(40) % 2)
    learner, lam = fine_tuning(ways=2, step_size=0.5), {"network": small_net()}

    def loss(w, episode):
        logits = w["head"](w["network"](unit(episode.support)))
        return optax.softmax_cross_entropy_with_integer_labels(logits, episode.support_labels).mean()

    gradient, by_hand = eqx.filter_jit(jax.grad(loss)), []
    w = {"network": small_net(), "head": Classifier(jnp.zeros((2, 18)), jnp.zeros(2))}
    for _ in range(3):
        w = jax.tree.map(lambda w, g: w - 0.5 * g, w, gradient(w, episode))
        by_hand.append(np.mean(np.equal(predicted(w, episode.query), episode.query_labels)))
    np.testing.assert_allclose(eqx.filter_jit(learner.accuracies)(lam, episode, 3), by_hand, rtol=1e-6)
    assert len(set(by_hand)) > 1
    assert_trees_close(eqx.filter_jit(learner.adapt)(lam, *episode[:2], steps=3).w, w, 1e-6)
    assert fine_tuning(5, 0.1, stages=1).adapted == LastStages(1)


def test_on_pixels_they_are_the_baseline():
    episodes, key = Episodes(ways=2, shots=2, queries=2), jax.random.key(7)
    noise = np.random.default_rng(8).integers(0, 256, (3, 5, 4, 4))
    classes = ImageClasses.from_lists(dict(zip("abc", noise, strict=True)))
    found = accuracies_by_steps(NearestNeighbour(2), {"network": PIXELS}, episodes, classes, key, 20, 1)[:, 0]
    np.testing.assert_allclose(found, nearest_neighbour_accuracies(episodes, classes, key, 20))
    assert len(set(found.tolist())) > 2


def test_what_is_wrong_is_said():
    for make, message in (
        (lambda: ImageBatches(0), "size must be a whole number, at least 1"),
        (lambda: ImageBatches(4, held_out=-1), "held_out must be"),
        (lambda: ImageBatches(4, held_out=4).check(CLASSES), "class 'a' of this set has 4 images and 4 of them"),
        (lambda: ImageBatches(4).held_out_batches(jax.random.key(0), CLASSES), "no images are held out"),
        (lambda: Multiclass(1), "classes must be a whole number, at least 2"),
        (lambda: LEARNER.lam(PIXELS, None, jax.random.key(0)), "needs the number of features for its head"),
        (lambda: Readout(PIXELS, Classifier(jnp.zeros((3, 81)), jnp.zeros(3)), "logits"), "no layer 'logits'"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
    batch = ImageBatch(jnp.zeros((2, 9, 9, 1), jnp.uint8), jnp.array([0, 2]), jnp.array([True, False]))
    assert LEARNER.prepare(initial(), batch).targets.weights.tolist() == [1.0, 0.0]
