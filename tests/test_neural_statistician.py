"""The neural statistician against its formulas written out plainly, in float64, with and without padding."""

from functools import cache, partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hyperax as hx
from hyperax.fewshot.episodes import Episode
from hyperax.fewshot.learners import neural_statistician
from hyperax.fewshot.learners.latent_variables import Gaussian, Perceptron, divergence, gaussian, hashes
from hyperax.fewshot.learners.learner import unit
from hyperax.fewshot.learners.neural_statistician import NeuralStatistician
from hyperax.fewshot.networks import encode
from problems import assert_trees_close, small_net

SHAPE, QUERIES, SIZES = (9, 9, 1), 2, {"context": 3, "latent": 2, "hidden": 4}
DRAW = np.random.default_rng(3)
TINY = partial(NeuralStatistician, **SIZES)


def images(*shape):
    """Black and white, so that a division by 255 has no rounding to differ in."""
    return jnp.asarray(255 * DRAW.integers(0, 2, (*shape, *SHAPE)), jnp.uint8)


# Two classes with 1 and 2 support images, and the same among 3 classes with 2 shots, padded with other images.
THERE = np.array([[True, False], [True, True], [False, False]])
PADDED = Episode(
    images(6),
    jnp.repeat(jnp.arange(3, dtype=jnp.int32), 2),
    images(6),
    jnp.repeat(jnp.arange(3, dtype=jnp.int32), QUERIES),
    jnp.asarray(THERE.reshape(-1)),
    jnp.asarray(np.repeat([True, True, False], QUERIES)),
)
REAL = np.flatnonzero(THERE)
EPISODE = Episode(
    PADDED.support[REAL], PADDED.support_labels[REAL], PADDED.query[: 2 * QUERIES], PADDED.query_labels[: 2 * QUERIES]
)
LABELS, QUERY_LABELS = np.asarray(EPISODE.support_labels), np.asarray(EPISODE.query_labels)


@cache
def lam():
    made = TINY(2).lam(small_net(), SHAPE, jax.random.key(4))
    return jax.tree.map(lambda x: x + 0.1 * jnp.asarray(DRAW.normal(size=x.shape)), made)


def dense(perceptron, x):
    for index, (weight, bias) in enumerate(zip(perceptron.weights, perceptron.biases, strict=True)):
        x = (np.maximum(x, 0) if index else x) @ np.asarray(weight) + np.asarray(bias)
    return x


def halves(x):
    mean, raw = np.split(x, 2)
    return mean, 8 * np.tanh(raw / 8)


def kl(p, q):
    (m, v), (n, u) = ((mean, np.exp(log_variance)) for mean, log_variance in (p, q))
    return 0.5 * np.sum(np.log(u / v) + v / u + (m - n) ** 2 / u - 1)


def statistic(lam, rows):
    """q(c | D) of the features of D, an image at a time."""
    embedded = [np.maximum(dense(lam["embed"], row), 0) for row in rows]
    return halves(dense(lam["context"], np.append(np.mean(embedded, 0), np.log(len(rows)))))


def features(lam, episode):
    return map(np.asarray, encode(lam["network"], unit(episode.support), unit(episode.query)))


def test_divergence_of_gaussians():
    p, q = Gaussian(jnp.array([1.0, 0.0]), jnp.log(jnp.array([1.0, 4.0]))), Gaussian(jnp.zeros(2), jnp.zeros(2))
    np.testing.assert_allclose(divergence(p, q), 0.5 * (1 + (4 - 1 - np.log(4))), rtol=1e-12)
    np.testing.assert_allclose(divergence(q, p), 0.5 * (1 + (1 / 4 - 1 + np.log(4))), rtol=1e-12)
    np.testing.assert_allclose(p.at(jnp.array([2.0, -1.0])), [3.0, -2.0])
    extreme = gaussian(jnp.array([1e4, -1e4, 1e9, -1e9], jnp.float32))
    assert np.isfinite(divergence(extreme, jax.tree.map(lambda x: x[::-1], extreme)))


def test_an_image_is_classified_by_the_divergence_of_its_posterior_from_those_of_the_classes():
    support, query = features(lam(), EPISODE)
    classes = [statistic(lam(), support[label == LABELS]) for label in range(2)]
    expected = [[-kl(of_class, statistic(lam(), [row])) for of_class in classes] for row in query]

    @jax.jit
    def asked(lam):
        learner = TINY(2)
        prepared = learner.prepare(lam, EPISODE)
        w = learner.init(lam, prepared)
        moved = Gaussian(w.mean + 1.0, w.log_variance.at[0].add(2.0))
        return w, learner.logits(w, lam, prepared), learner.inner(moved, lam, prepared)

    w, logits, distance = asked(lam())
    np.testing.assert_allclose(logits, expected, rtol=1e-9)
    np.testing.assert_allclose(w.mean, [mean for mean, _ in classes], rtol=1e-9)
    np.testing.assert_allclose(distance, 3 + 3 * 4 / 2, rtol=1e-9)


def plain_bound(lam, episode, for_c, for_z):
    """The bound per image, a set and an image at a time, of this noise for c and z, with all images shown."""
    support, query = features(lam, episode)
    rows, pixels = np.concatenate([support, query]), np.concatenate([episode.support, episode.query])
    labels, total = np.concatenate([LABELS, QUERY_LABELS]), 0.0
    for label in range(2):
        chosen = np.flatnonzero(labels == label)
        q_c = statistic(lam, rows[chosen])
        c = q_c[0] + np.exp(q_c[1] / 2) * for_c[label]
        total -= kl(q_c, (np.zeros(3), np.zeros(3)))
        for i in chosen:
            q_z = halves(dense(lam["latent"], np.append(rows[i], c)))
            z = q_z[0] + np.exp(q_z[1] / 2) * for_z[i, :2]
            p = 1 / (1 + np.exp(-dense(lam["decoder"], np.append(z, c))))
            x = pixels[i].reshape(-1) / 255
            total += np.sum(x * np.log(p) + (1 - x) * np.log(1 - p)) - kl(q_z, halves(dense(lam["prior"], c)))
    return total / len(labels)


def test_the_objective_is_the_bound_and_the_weighted_cross_entropy(monkeypatch):
    draws = {3: DRAW.normal(size=(2, 3)), 2: DRAW.normal(size=(7, 3))}  # of c, of z and what is shown
    draw = lambda numbers, key, size, dtype: jnp.asarray(draws[2 if len(numbers) == 7 else 3])
    monkeypatch.setattr(neural_statistician, "noise_from", draw)

    @jax.jit
    def asked(lam):
        learner = TINY(2, kept=1.0, classification_weight=3.0)
        prepared = learner.prepare(lam, EPISODE)
        w = learner.init(lam, prepared)
        return learner.outer(w, lam, prepared), learner.logits(w, lam, prepared)

    (value, metrics), logits = asked(lam())
    expected = plain_bound(lam(), EPISODE, draws[3], draws[2])
    np.testing.assert_allclose(metrics["bound"], expected, rtol=1e-9)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, QUERY_LABELS).mean()
    np.testing.assert_allclose(value, 3.0 * loss - metrics["bound"], rtol=1e-12)
    np.testing.assert_allclose(metrics["accuracy"], np.mean(np.argmax(logits, 1) == QUERY_LABELS))


WEIGHTED = TINY(2, classification_weight=1.0)
evaluate = jax.jit(WEIGHTED.hypergradient(WEIGHTED.method(0)).evaluate)


def test_order_changes_nothing():
    """With noise and what is shown drawn from the images."""
    h = evaluate(lam(), EPISODE, ())
    assert h.info["inner_gradient"] < 1e-12
    support, query = DRAW.permutation(3), DRAW.permutation(2 * QUERIES)
    mixed = Episode(
        EPISODE.support[support], EPISODE.support_labels[support], EPISODE.query[query], EPISODE.query_labels[query]
    )
    again = evaluate(lam(), mixed, ())
    np.testing.assert_allclose(again.value, h.value, rtol=1e-10)
    assert_trees_close(again.grad, h.grad, 1e-8, 1e-12)


def test_padding_has_no_part_and_tasks_of_different_size_are_mapped_together():
    whole = PADDED._replace(support_mask=jnp.ones(6, bool), query_mask=jnp.ones(6, bool))
    learner = TINY(3, classification_weight=1.0)
    mean = hx.mean_over_tasks(learner.hypergradient(learner.method(0)))
    of_both = jax.jit(lambda *episodes: mean.evaluate(lam(), jax.tree.map(lambda *x: jnp.stack(x), *episodes), ()))
    h, padded = evaluate(lam(), EPISODE, ()), of_both(PADDED, PADDED)
    np.testing.assert_allclose(padded.value, h.value, rtol=1e-10)
    assert_trees_close(padded.grad, h.grad, 1e-8, 1e-12)
    both, larger = of_both(PADDED, whole), of_both(whole, whole)
    np.testing.assert_allclose(both.value, (h.value + larger.value) / 2, rtol=1e-10)
    assert_trees_close(both.grad, jax.tree.map(lambda a, b: (a + b) / 2, h.grad, larger.grad), 1e-8, 1e-12)


def test_noise_is_another_in_another_episode_and_part_of_a_set_is_shown():
    learner = TINY(2)
    members = jnp.asarray([[True] * 400 + [False] * 4, [False] * 400 + [True] * 4])
    uniform = jnp.asarray(np.append(DRAW.uniform(size=400), [0.9, 0.7, 0.8, 0.95]))
    shown = np.asarray(learner._shown(uniform, members))
    assert shown[1].nonzero()[0].tolist() == [401]  # none is below 1/2: the lowest
    np.testing.assert_array_equal(shown[0, :400], np.asarray(uniform[:400]) < 0.5)
    assert len(set(np.asarray(hashes(images(50))).tolist())) == 50

    # With features and decoder that no image reaches, one pixel moves the likelihood by what its bias says; the rest of
    # what changes is the noise of c.
    constant = jax.tree.map(jnp.zeros_like, lam()["decoder"].weights)
    decoder = eqx.tree_at(lambda d: d.weights, lam()["decoder"], constant)
    blind = lam() | {"network": jax.tree.map(jnp.zeros_like, lam()["network"]), "decoder": decoder}
    changed = EPISODE._replace(query=EPISODE.query.at[-1, 0, 0, 0].add(128))
    by_pixel = (float(changed.query[-1, 0, 0, 0]) - float(EPISODE.query[-1, 0, 0, 0])) / 255 * decoder.biases[-1][0] / 7
    first, second = (evaluate(blind, episode, ()).info["metrics"]["bound"] for episode in (EPISODE, changed))
    assert abs(second - first - by_pixel) > 1e-4


def test_it_learns_in_float32():
    """Stripes that lie or stand: E falls, the images of a class gather, and no gradient is lost."""
    stripes = np.zeros((2, 6, *SHAPE), np.uint8)
    for shift in range(6):
        stripes[0, shift, shift % 3 :: 3], stripes[1, shift, :, shift % 3 :: 3] = 40 * shift + 50, 40 * shift + 50
    support, query = (jnp.asarray(part.reshape(-1, *SHAPE)) for part in np.split(stripes, [2], axis=1))
    labels = lambda each: jnp.repeat(jnp.arange(2, dtype=jnp.int32), each)
    episode = jax.tree.map(lambda x: x[None], Episode(support, labels(2), query, labels(4)))
    learner = NeuralStatistician(2, context=4, latent=2, hidden=16, classification_weight=10.0)
    lam = learner.lam(jax.tree.map(lambda x: x.astype(jnp.float32), small_net()), SHAPE, jax.random.key(0))
    f, adam, history = hx.mean_over_tasks(learner.hypergradient(learner.method(0))), optax.adam(1e-2), []

    @jax.jit
    def step(lam, state, episode):
        h = f.evaluate(lam, episode, ())
        updates, state = adam.update(h.grad, state)
        return optax.apply_updates(lam, updates), state, h

    state = adam.init(lam)
    for _ in range(60):
        lam, state, h = step(lam, state, episode)
        history.append((h.value, h.info["metrics"]["bound"][0], h.info["metrics"]["accuracy"][0]))
    (first, first_bound, _), (last, last_bound, accuracy) = history[0], history[-1]
    assert (last < first, last_bound > first_bound + 5, accuracy == 1) == (True, True, True), (history[0], history[-1])
    assert h.value.dtype == jnp.float32
    blank = step(lam, state, jax.tree.map(jnp.zeros_like, episode))[2]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((blank.value, blank.grad)))


def test_a_perceptron_is_its_layers():
    perceptron = Perceptron((2, 3, 1), jax.random.key(0), jnp.float64)
    x = DRAW.normal(size=(5, 2))
    np.testing.assert_allclose(perceptron(jnp.asarray(x)), dense(perceptron, x), rtol=1e-12)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: NeuralStatistician(5, context=0), "context must be a whole number, at least 1; it is 0"),
        (lambda: NeuralStatistician(5, kept=0.0), "kept is 0.0, a probability of images to be shown: use 1"),
        (lambda: NeuralStatistician(5, classification_weight=-1.0), "it must not be negative: 0 is the paper's"),
        (lambda: TINY(5).lam(small_net()), "NeuralStatistician needs the number of features for its perceptrons"),
        (lambda: TINY(5).lam(small_net(), SHAPE), r"pass key=jax.random.key\(seed\) to lam"),
    ],
    ids=range(5),
)
def test_errors(make, match):
    with pytest.raises(ValueError, match=match):
        make()
