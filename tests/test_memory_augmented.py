"""The memory-augmented network against its equations, written out step by step, and by hand."""

from dataclasses import replace
from functools import cache

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hyperax as hx
from hyperax.fewshot.episodes import Episode
from hyperax.fewshot.learners.memory_augmented import MemoryAugmented
from hyperax.fewshot.learners.sequences import sequence_order
from hyperax.fewshot.networks import PerImage, encode
from problems import small_net

SHAPE, WAYS = (9, 9, 1), 4
SIZES = {"units": 5, "slots": 6, "width": 3, "heads": 2, "scale": 3.0}
LEARNER = MemoryAugmented(WAYS, "support", decay=0.7, **SIZES)
DRAW = np.random.default_rng(0)
IMAGES = jnp.asarray(DRAW.integers(0, 256, (16, *SHAPE)), jnp.uint8)
LABELS = jnp.repeat(jnp.arange(WAYS, dtype=jnp.int32), 2)
# Classes of 1, 2 and 1 images, and the fourth is not in the task: what is padding are other images.
REAL = np.array([0, 2, 3, 5])
PADDED = Episode(IMAGES[:8], LABELS, IMAGES[8:], LABELS, jnp.zeros(8, bool).at[REAL].set(True), LABELS < 3)
EPISODE = Episode(IMAGES[:8][REAL], LABELS[REAL], IMAGES[8:14], LABELS[:6])


@cache
def lam():
    """In float64."""
    return jax.tree.map(lambda x: x.astype(jnp.float64), LEARNER.lam(small_net(), SHAPE, jax.random.key(5)))


@eqx.filter_jit
def logits_of(learner, lam, episode):
    prepared = learner.prepare(lam, episode)
    return learner.logits(learner.init(lam, prepared), lam, prepared)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def affine(layer, x):
    return np.asarray(layer.weight) @ x + np.asarray(layer.bias)


def control(features, label, hidden, cell, reads):
    lstm = lam()["controller"]
    inputs = np.concatenate([features, label, reads.ravel()])
    gates = np.asarray(lstm.weight_ih) @ inputs + np.asarray(lstm.weight_hh) @ hidden + np.asarray(lstm.bias)
    i, f, g, o = np.split(gates, 4)
    cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(cell), cell


def read(key, memory):
    lengths = np.linalg.norm(key) * np.linalg.norm(memory, axis=1)
    scores = np.exp(3.0 * np.where(lengths > 0, memory @ key / np.where(lengths > 0, lengths, 1), 0))
    return scores / scores.sum()


def plain(episode, offset):
    """The logits, by the equations of the paper with a loop over steps, heads and slots."""
    scaled = lambda images: images.astype(jnp.float32) / 255
    support, query = encode(lam()["network"], scaled(episode.support), scaled(episode.query), "support")
    support, query = np.asarray(support), np.asarray(query)
    mean, scale = support.mean(0), np.sqrt(support.var(0).mean() + 1e-3)
    support, query = (support - mean) / scale, (query - mean) / scale
    order = np.asarray(sequence_order(episode.support))
    support, labels = support[order], np.eye(WAYS)[np.asarray(episode.support_labels)[order]]
    hidden, cell, reads = np.zeros(5), np.zeros(5), np.zeros((2, 3))
    memory, addresses, usage = np.zeros((6, 3)), np.zeros((2, 6)), np.zeros(6)
    steps = [*zip(support, labels, strict=True)]
    if offset:
        steps = [*zip(support, [np.zeros(WAYS), *labels[:-1]], strict=True), (np.zeros(support.shape[1]), labels[-1])]
    for features, label in steps:
        hidden, cell = control(features, label, hidden, cell, reads)
        keys, gates = affine(lam()["keys"], hidden).reshape(2, 3), sigmoid(affine(lam()["gates"], hidden))
        least = np.argsort(usage, kind="stable")[:2]
        writes = gates[:, None] * addresses
        for head in range(2):
            writes[head, least[head]] += 1 - gates[head]
            memory[least[head]] = 0
        for head in range(2):
            for slot in range(6):
                memory[slot] += writes[head, slot] * keys[head]
        addresses = np.stack([read(key, memory) for key in keys])
        reads = addresses @ memory
        usage = 0.7 * usage + addresses.sum(0) + writes.sum(0)
    found = []
    for one in query:
        h, _ = control(one, np.zeros(WAYS), hidden, cell, reads)
        r = np.stack([read(key, memory) for key in affine(lam()["keys"], h).reshape(2, 3)]) @ memory
        found.append(affine(lam()["output"], np.concatenate([h, r.ravel()])))
    return np.stack(found)


@pytest.mark.parametrize("offset", [False, True])
def test_the_learner_is_its_equations_and_padding_has_no_part(offset):
    learner, expected = replace(LEARNER, offset=offset), plain(EPISODE, offset)
    np.testing.assert_allclose(logits_of(learner, lam(), EPISODE), expected, rtol=1e-10)
    np.testing.assert_allclose(logits_of(learner, lam(), PADDED)[:6], expected, rtol=1e-10)


def test_writing_and_reading_by_hand():
    """A key of (1, 0) and a gate of one half at both steps, whatever the LSTM says; the scale makes e^cos a 2."""
    learner = MemoryAugmented(2, units=1, slots=3, width=2, heads=1, decay=0.5, scale=float(np.log(2)), offset=True)
    start = learner.lam(PerImage(jnp.ravel), (1, 1, 1), jax.random.key(0))
    start = jax.tree.map(lambda x: jnp.zeros_like(x) if eqx.is_array(x) else x, start)
    start["keys"] = eqx.tree_at(lambda keys: keys.bias, start["keys"], jnp.array([1.0, 0.0], jnp.float32))
    image = jnp.zeros((1, 1, 1, 1), jnp.uint8)
    prepared = learner.prepare(start, Episode(image, jnp.zeros(1, int), image, jnp.zeros(1, int)))
    w = learner.init(start, prepared)
    # Step 1 writes half of the key to slot 0; its cosine is 1, those of empty slots 0: attention 2 : 1 : 1.
    first, used = np.array([2, 1, 1]) / 4, np.array([0.5 + 0.5, 0.25, 0.25])
    # Step 2: slots 1 and 2 are used least and alike, so the first of them; all cosines are 1 then.
    writes = first / 2 + np.array([0, 0.5, 0])
    rows = np.array([0.5, 0, 0]) + writes
    np.testing.assert_allclose(w.rows, np.stack([rows, 0 * rows], 1), rtol=1e-6)
    np.testing.assert_allclose(w.addresses, np.full((1, 3), 1 / 3), rtol=1e-6)
    np.testing.assert_allclose(w.reads, [[rows.mean(), 0]], rtol=1e-6)
    np.testing.assert_allclose(w.usage, used / 2 + 1 / 3 + writes, rtol=1e-6)


def test_the_least_used_row_is_cleared_before_it_is_written_to():
    """With one slot, all that was there is gone at each step, but for what the gate lets through."""
    learner = MemoryAugmented(2, units=1, slots=1, width=1, heads=1)
    start = learner.lam(PerImage(jnp.ravel), (1, 1, 1), jax.random.key(0))
    start = jax.tree.map(lambda x: jnp.zeros_like(x) if eqx.is_array(x) else x, start)
    start["keys"] = eqx.tree_at(lambda keys: keys.bias, start["keys"], jnp.ones(1, jnp.float32))
    image = jnp.zeros((3, 1, 1, 1), jnp.uint8)
    w = learner.init(start, learner.prepare(start, Episode(image, jnp.zeros(3, int), image, jnp.zeros(3, int))))
    np.testing.assert_allclose(w.rows, [[1.0]])  # half by where it has read, half as the least used


def test_query_images_and_the_order_of_the_support_set_do_not_matter_to_others():
    before = logits_of(LEARNER, lam(), EPISODE)
    after = logits_of(LEARNER, lam(), EPISODE._replace(query=EPISODE.query.at[1].set(IMAGES[15])))
    np.testing.assert_array_equal(np.delete(before, 1, 0), np.delete(after, 1, 0))
    assert np.abs(before[1] - after[1]).max() > 1e-8
    turned = EPISODE._replace(support=EPISODE.support[::-1], support_labels=EPISODE.support_labels[::-1])
    np.testing.assert_allclose(logits_of(LEARNER, lam(), turned), before, rtol=1e-10)
    last = sequence_order(EPISODE.support)[-1]
    relabelled = EPISODE._replace(support_labels=EPISODE.support_labels.at[last].set(3))
    assert np.abs(logits_of(LEARNER, lam(), relabelled) - before).max() > 1e-8


def test_it_learns_to_look_up():
    """Two kinds of images; which of them has which label is new in each task."""
    learner = MemoryAugmented(2, units=8, slots=6, width=4, heads=1)
    kinds = jnp.asarray([[255, 0], [0, 255]], jnp.uint8).reshape(2, 1, 2, 1)
    labels = jnp.array([[0, 1], [1, 0]])
    episodes = Episode(*(jnp.stack([x, x]) if x is kinds else x for x in (kinds, labels, kinds, labels)))
    start = learner.lam(PerImage(jnp.ravel), (1, 2, 1), jax.random.key(0))
    f = hx.mean_over_tasks(learner.hypergradient(learner.method(3)))
    h = hx.minimize(f, start, data=episodes, optimizer=optax.adam(3e-2), steps=100, dispatch=50)
    assert h.history[0]["value"] > 0.6
    assert h.history[-1]["value"] < 0.05
    assert h.history[-1]["metrics"]["accuracy"] == 1.0


def test_gradients_in_float32():
    """Of blank images, of tasks with and without padding: finite, and the mean over the tasks."""
    start = LEARNER.lam(PerImage(jnp.ravel), SHAPE, jax.random.key(0))
    start = jax.tree.map(lambda x: x.astype(jnp.float32) if eqx.is_array(x) else x, start)
    whole = PADDED._replace(support_mask=jnp.ones(8, bool), query_mask=jnp.ones(8, bool))
    blank = PADDED._replace(support=PADDED.support.at[2:].set(0))
    tasks = jax.tree.map(lambda *x: jnp.stack(x), blank, whole)
    h = eqx.filter_jit(hx.mean_over_tasks(LEARNER.hypergradient(LEARNER.method(0))))(start, tasks)
    assert all(np.isfinite(leaf).all() and np.any(leaf != 0) for leaf in jax.tree.leaves(h.grad))
    assert np.all(h.info["inner_gradient"] < 1e-5)  # w is the argmin of L
    of_three, of_four = (
        np.log(jax.nn.softmax(logits_of(LEARNER, start, blank)[:6, :3])),
        logits_of(LEARNER, start, whole),
    )
    losses = [np.mean(x[np.arange(len(x)), LABELS[: len(x)]]) for x in (of_three, np.log(jax.nn.softmax(of_four)))]
    np.testing.assert_allclose(h.value, -np.mean(losses), rtol=1e-5)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: MemoryAugmented(5, units=0), "units must be a whole number, at least 1; it is 0"),
        (lambda: MemoryAugmented(5, slots=3), "4 heads write to 3 slots: each needs one of its own"),
        (lambda: MemoryAugmented(5, decay=1.5), "decay is 1.5; it must be from 0"),
        (lambda: MemoryAugmented(5, scale=0.0), "scale is 0.0; it must be positive"),
        (lambda: MemoryAugmented(5).lam(small_net()), r"needs the number of features .* pass image_shape="),
        (lambda: MemoryAugmented(5).lam(small_net(), SHAPE), r"draws its controller: pass key=jax.random.key\(seed\)"),
        (
            lambda: MemoryAugmented(5, **SIZES).prepare(lam(), EPISODE),
            "output is for 4 classes and the learner for 5: .* train it on episodes of as many ways",
        ),
    ],
    ids=range(7),
)
def test_errors(make, match):
    with pytest.raises(ValueError, match=match):
        make()
