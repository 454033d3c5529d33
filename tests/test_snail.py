"""SNAIL against its equations, written out position by position for each query image."""

from functools import cache

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hyperax as hx
from hyperax.fewshot.episodes import Episode
from hyperax.fewshot.learners.sequences import CausalAttention, sequence_order
from hyperax.fewshot.learners.snail import SNAIL
from hyperax.fewshot.networks import PerImage, encode
from problems import small_net

SHAPE, WAYS = (9, 9, 1), 4
SIZES = {"embedding": 3, "filters": 2, "attention": ((2, 3), (3, 2))}
LEARNER = SNAIL(WAYS, "support", **SIZES)
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


def affine(layer, x):
    bias = 0 if layer.bias is None else np.asarray(layer.bias)
    return np.asarray(layer.weight) @ x + bias


def plain_block(block, u, t):
    """What a block adds at position t of the sequence u, the first t of which it may see."""
    if isinstance(block, CausalAttention):
        asked = affine(block.query, u[t])
        scores = [asked @ affine(block.key, u[s]) / np.sqrt(len(asked)) for s in range(t + 1)]
        p = np.exp(scores) / np.sum(np.exp(scores))
        return sum(p[s] * affine(block.value, u[s]) for s in range(t + 1))
    before = u[t - block.dilation] if t >= block.dilation else np.zeros_like(u[t])
    both = affine(block.now, u[t]) + affine(block.before, before)
    content, gate = both[: len(both) // 2], both[len(both) // 2 :]
    return np.tanh(content) / (1 + np.exp(-gate))


def plain(episode):
    """The logits of a sequence of its own for each query image."""
    scaled = lambda images: images.astype(jnp.float32) / 255
    support, query = encode(lam()["network"], scaled(episode.support), scaled(episode.query), "support")
    support, query = np.asarray(support), np.asarray(query)
    mean, scale = support.mean(0), np.sqrt(support.var(0).mean() + 1e-3)
    support, query = (support - mean) / scale, (query - mean) / scale
    order = np.asarray(sequence_order(episode.support))
    found = []
    for one in query:
        rows = [*support[order], one]
        labels = [*np.eye(WAYS)[np.asarray(episode.support_labels)[order]], np.zeros(WAYS)]
        u = [np.concatenate([affine(lam()["embedding"], x), y]) for x, y in zip(rows, labels, strict=True)]
        for block in lam()["blocks"]:
            u = [np.concatenate([u[t], plain_block(block, u, t)]) for t in range(len(u))]
        found.append(affine(lam()["output"], u[-1]))
    return np.stack(found)


def test_the_learner_is_its_equations_and_padding_has_no_part():
    expected = plain(EPISODE)
    np.testing.assert_allclose(logits_of(LEARNER, lam(), EPISODE), expected, rtol=1e-10)
    np.testing.assert_allclose(logits_of(LEARNER, lam(), PADDED)[:6], expected, rtol=1e-10)


def test_attention_by_hand():
    """Scores 0 and log 3 of the second position: one part of the first, three of itself."""
    one, zero = jnp.ones((1, 1)), jnp.zeros(1)
    attention = CausalAttention(1, 1, 1, jnp.float64, jax.random.key(0))
    attention = jax.tree.unflatten(jax.tree.structure(attention), [one, zero] * 3)
    second = np.sqrt(np.log(3.0))
    sequence = jnp.array([[0.0], [second]])
    np.testing.assert_allclose(attention.along(sequence, jnp.ones(2, bool)), [[0.0], [0.75 * second]], rtol=1e-12)
    after = attention.after(sequence, jnp.array([False, True]), jnp.array([[second], [0.0]]))
    np.testing.assert_allclose(after, [[second], [0.5 * second]], rtol=1e-12)


def test_the_support_set_does_not_see_what_comes_later():
    prepared = LEARNER.prepare(lam(), EPISODE)
    other = prepared._replace(support=prepared.support.at[2].add(1.0), query=prepared.query + 1.0)
    states = jax.jit(jax.vmap(lambda prepared: LEARNER.init(lam(), prepared)))
    first, second = states(jax.tree.map(lambda *x: jnp.stack(x), prepared, other))
    np.testing.assert_array_equal(first[:2], second[:2])
    assert np.all(np.abs(first[2:] - second[2:]).max(1) > 1e-6)


def test_query_images_and_the_order_of_the_support_set_do_not_matter_to_others():
    before = logits_of(LEARNER, lam(), EPISODE)
    after = logits_of(LEARNER, lam(), EPISODE._replace(query=EPISODE.query.at[1].set(IMAGES[15])))
    np.testing.assert_array_equal(np.delete(before, 1, 0), np.delete(after, 1, 0))
    assert np.abs(before[1] - after[1]).max() > 1e-6
    turned = EPISODE._replace(support=EPISODE.support[::-1], support_labels=EPISODE.support_labels[::-1])
    np.testing.assert_allclose(logits_of(LEARNER, lam(), turned), before, rtol=1e-10)
    relabelled = EPISODE._replace(support_labels=(EPISODE.support_labels + 1) % WAYS)
    assert np.abs(logits_of(LEARNER, lam(), relabelled) - before).max() > 1e-6


def test_it_learns_to_look_up():
    """Two kinds of images; which of them has which label is new in each task."""
    learner = SNAIL(2, embedding=4, filters=4, attention=((4, 4), (4, 4)))
    kinds = jnp.asarray([[255, 0], [0, 255]], jnp.uint8).reshape(2, 1, 2, 1)
    labels = jnp.array([[0, 1], [1, 0]])
    episodes = Episode(*(jnp.stack([x, x]) if x is kinds else x for x in (kinds, labels, kinds, labels)))
    start = learner.lam(PerImage(jnp.ravel), (1, 2, 1), jax.random.key(0))
    f = hx.mean_over_tasks(learner.hypergradient(learner.method(3)))
    h = hx.minimize(f, start, data=episodes, optimizer=optax.adam(2e-2), steps=60, dispatch=20)
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


def test_the_published_sizes():
    """The channels that App. A's blocks add up to, for 5 ways of 1 shot and of 5."""
    for shots, dilations in ((1, [1, 2, 4]), (5, [1, 2, 4, 8, 16])):
        make = lambda key, shots=shots: SNAIL(5, shots=shots).lam(PerImage(jnp.ravel), (2, 2, 64), key)
        made = eqx.filter_eval_shape(make, jax.random.key(0))
        convolutions = [block for block in made["blocks"] if not isinstance(block, CausalAttention)]
        assert [block.dilation for block in convolutions] == 2 * dilations
        channels = 64 + 5 + 32 + 128 + 256 + 2 * 128 * len(dilations)
        assert made["output"].weight.shape == (5, channels)
        assert made["embedding"].weight.shape == (64, 256)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: SNAIL(5, shots=0), "shots must be a whole number, at least 1; it is 0"),
        (lambda: SNAIL(5, filters=0), "filters must be a whole number, at least 1; it is 0"),
        (lambda: SNAIL(5, attention=()), "attention is empty"),
        (lambda: SNAIL(5, attention=((4, 0),)), "a size in attention must be a whole number, at least 1; it is 0"),
        (lambda: SNAIL(5).lam(small_net()), r"SNAIL needs the number of features .* pass image_shape="),
        (lambda: SNAIL(5).lam(small_net(), SHAPE), r"SNAIL draws its layers: pass key=jax.random.key\(seed\) to lam"),
        (
            lambda: SNAIL(5, **SIZES).prepare(lam(), EPISODE),
            "output is for 4 classes and the learner for 5: .* train it on episodes of as many ways",
        ),
    ],
    ids=range(7),
)
def test_errors(make, match):
    with pytest.raises(ValueError, match=match):
        make()
