"""Metric learners and closed-form ground learners against formulas written out plainly, with and without padding."""

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
from hyperax.fewshot.layers import own_moments
from hyperax.fewshot.learners.cosine import CosineClassifier
from hyperax.fewshot.learners.learner import OnFeatures
from hyperax.fewshot.learners.matching import Matching
from hyperax.fewshot.learners.prototypical import Prototypical
from hyperax.fewshot.learners.ridge import RidgeClassifier
from hyperax.fewshot.learners.siamese import Siamese
from hyperax.fewshot.networks import encode
from hyperax.fewshot.targets import Targets
from problems import SmallNet, assert_trees_close, small_net

STEPS = 2  # T, of the one learner that takes inner steps
RATE = 0.01
DESCENT = optax.sgd(RATE)
TRACES = []
SHAPE = (9, 9, 1)
DRAW = np.random.default_rng(0)


def images(*shape):
    return jnp.asarray(DRAW.integers(0, 256, (*shape, *SHAPE)), jnp.uint8)


# Three classes with 1, 2 and 1 support images, and the same among 5 classes with 2 shots: what is padding are other
# images, so that none may count.
COUNTS, QUERIES = (1, 2, 1), 2
PADDED_SUPPORT, PADDED_QUERY = images(5, 2), images(5, QUERIES)
THERE = np.arange(2) < np.array([*COUNTS, 0, 0])[:, None]
PADDED = Episode(
    PADDED_SUPPORT.reshape(-1, *SHAPE),
    jnp.repeat(jnp.arange(5, dtype=jnp.int32), 2),
    PADDED_QUERY.reshape(-1, *SHAPE),
    jnp.repeat(jnp.arange(5, dtype=jnp.int32), QUERIES),
    jnp.asarray(THERE.reshape(-1)),
    jnp.asarray(np.repeat(np.arange(5) < 3, QUERIES)),
)
REAL = np.flatnonzero(THERE)
EPISODE = Episode(
    PADDED.support[REAL], PADDED.support_labels[REAL], PADDED.query[: 3 * QUERIES], PADDED.query_labels[: 3 * QUERIES]
)
WHOLE = PADDED._replace(support_mask=jnp.ones(10, bool), query_mask=jnp.ones(10, bool))
stacked = lambda *episodes: jax.tree.map(lambda *x: jnp.stack(x), *episodes)
LABELS, ONE_HOT = np.asarray(EPISODE.support_labels), np.eye(3)[EPISODE.support_labels]
QUERY_LABELS = np.asarray(EPISODE.query_labels)


def loss_of(logits):
    chosen = logits[np.arange(len(logits)), QUERY_LABELS]
    return jnp.mean(jnp.log(jnp.exp(logits).sum(1)) - chosen)


def cosine(a, b):
    return a @ b.T / (jnp.linalg.norm(a, axis=1)[:, None] * jnp.linalg.norm(b, axis=1))


def means(support):
    return jnp.stack([support[np.flatnonzero(label == LABELS)].mean(0) for label in range(3)])


def prototypical(lam, support, query):
    logits = -((query[:, None] - means(support)) ** 2).sum(-1)
    return loss_of(logits), logits


def matching(lam, support, query, scale=1.0):
    attention = jnp.exp(scale * cosine(query, support))
    logits = jnp.log(attention / attention.sum(1, keepdims=True) @ ONE_HOT)
    return loss_of(logits), logits


def lstm(cell, x, h, c):
    gates = x @ cell.weight_ih.T + h @ cell.weight_hh.T + cell.bias
    i, f, g, o = jnp.split(gates, 4, axis=-1)
    sigmoid = lambda x: 1 / (1 + jnp.exp(-x))
    c = sigmoid(f) * c + sigmoid(i) * jnp.tanh(g)
    return sigmoid(o) * jnp.tanh(c), c


def full_context(lam, support, query):
    def read(cell, sequence):
        step = lambda state, x: (lstm(cell, x, *state),) * 2
        zero = jnp.zeros(support.shape[1])
        return jax.lax.scan(step, (zero, zero), sequence)[1][0]

    g = support + read(lam["forward"], support) + read(lam["backward"], support[::-1])[::-1]
    h = c = jnp.zeros_like(query)
    for _ in range(2):
        scores = jnp.exp(h @ g.T)
        read = scores / scores.sum(1, keepdims=True) @ g
        h, c = lstm(lam["attention"], jnp.concatenate([query, read], 1), h, c)
        h = h + query
    return matching(lam, g, h, scale=5.0)


def siamese(lam, support, query):
    s = jnp.abs(query[:, None] - support[None]) @ lam["weights"] + lam["bias"]
    p = 1 / (1 + jnp.exp(-s))
    same = QUERY_LABELS[:, None] == LABELS
    of_same = -(jnp.log(p) * same).sum(1) / same.sum(1)
    of_different = -(jnp.log(1 - p) * ~same).sum(1) / (~same).sum(1)
    logits = jnp.stack([s[:, label == LABELS].max(1) for label in range(3)], axis=1)
    return jnp.mean(of_same + of_different) / 2, logits


def ridge(lam, support, query):
    gram = support.T @ support + lam["penalty"] * jnp.eye(support.shape[1])
    logits = lam["scale"] * query @ jnp.linalg.solve(gram, support.T @ ONE_HOT)
    return loss_of(logits), logits


def cosine_classifier(lam, support, query):
    w = means(support / jnp.linalg.norm(support, axis=1, keepdims=True))

    def inner(w):
        logits = lam["scale"] * cosine(support, w)
        return jnp.mean(jnp.log(jnp.exp(logits).sum(1)) - (logits * ONE_HOT).sum(1))

    for _ in range(STEPS):
        w = w - 0.1 * jax.grad(inner)(w)
    logits = lam["scale"] * cosine(query, w)
    return loss_of(logits), logits


CASES = {
    "prototypical": (Prototypical, {}, prototypical),
    "matching": (Matching, {"scale": 1.0}, matching),
    "full-context": (Matching, {"full_context": True, "processing_steps": 2, "scale": 5.0}, full_context),
    "siamese": (Siamese, {}, siamese),
    "ridge": (RidgeClassifier, {"penalty": 2.0}, ridge),
    "cosine": (CosineClassifier, {}, cosine_classifier),
}


class Counted(SmallNet):
    """Counts how often it is traced."""

    def __call__(self, images, moments=own_moments):
        TRACES.append(1)
        return super().__call__(images, moments)


def lam_of(learner):
    """In float64, with what starts alike in all features disturbed."""
    net = small_net()
    lam = learner.lam(Counted(net.convolution, net.normalisation), SHAPE, jax.random.key(5))
    lam = jax.tree.map(lambda x: x.astype(jnp.float64), lam)
    if "weights" in lam:
        lam["weights"] = lam["weights"] * jnp.linspace(0.5, 2.0, len(lam["weights"]))
    return lam


@cache
def plain(case):
    """(lam, f, its gradient, logits, accuracy) by the plain formula, without padding."""
    make, options, formula = CASES[case]
    lam = lam_of(make(3, **options))

    def value(lam, episode):
        scaled = lambda images: images.astype(jnp.float32) / 255
        support, query = encode(lam["network"], scaled(episode.support), scaled(episode.query))
        return formula(lam, support, query)

    (value, logits), gradient = jax.jit(jax.value_and_grad(value, has_aux=True))(lam, EPISODE)
    return lam, value, gradient, logits, np.mean(np.argmax(logits, 1) == QUERY_LABELS)


@pytest.mark.parametrize("case", [case for case in CASES if case != "full-context"])  # it compiles long
def test_a_learner_is_its_formula(case):
    make, options, _ = CASES[case]
    learner = make(3, **options)
    lam, value, gradient, _, accuracy = plain(case)
    h = learner.hypergradient(learner.method(STEPS))(lam, EPISODE)
    np.testing.assert_allclose(h.value, value, rtol=1e-12)
    assert_trees_close(h.grad, gradient, 1e-9, 1e-12)
    np.testing.assert_allclose(h.info["metrics"]["accuracy"], accuracy, rtol=1e-6)
    if not learner.adapts:
        assert h.info["inner_gradient"] < 1e-12  # the formula minimises L


@pytest.mark.parametrize("case", CASES)
def test_padding_has_no_part_and_tasks_of_different_size_train_together(case):
    make, options, _ = CASES[case]
    wide = make(5, **options)
    lam, value, gradient, logits, accuracy = plain(case)

    # One step of gradient descent shows the gradient of the padded episode; then tasks of 3 and of 5 ways together.
    f = hx.mean_over_tasks(wide.hypergradient(wide.method(STEPS)))
    train = lambda tasks, steps: hx.minimize(
        f, lam, data=tasks, optimizer=DESCENT, steps=steps, constraint=wide.constraint(), dispatch=1
    )
    once = train(stacked(PADDED, PADDED), 1)
    np.testing.assert_allclose(once.value, value, rtol=1e-12)
    np.testing.assert_allclose(once.history[0]["metrics"]["accuracy"], accuracy, rtol=1e-6)
    moved = {name: jax.tree.map(jnp.subtract, lam[name], once.lam[name]) for name in lam}
    for name in (wide.constraint() or {}).keys() - {"network"}:  # kept positive by descent in its logarithm
        moved[name] = jnp.log(lam[name] / once.lam[name]) / lam[name]
    assert_trees_close(moved, jax.tree.map(lambda g: RATE * g, gradient), 1e-9, 1e-12)
    traced = len(TRACES)
    values = [record["value"] for record in train(stacked(PADDED, WHOLE), 4).history]
    assert np.all(np.diff(values) < 0), values
    assert len(TRACES) == traced  # other masks, the same program

    @eqx.filter_jit
    def asked(lam, support, query):
        adapted = wide.adapt(lam, support, PADDED.support_labels, STEPS, PADDED.support_mask)
        episode = Episode(support, PADDED.support_labels, query, EPISODE.query_labels, PADDED.support_mask)
        return wide.predict(lam, adapted, query), wide.accuracies(lam, episode, STEPS)

    predicted, accuracies = asked(lam, PADDED.support, EPISODE.query)
    np.testing.assert_allclose(predicted[:, :3], jax.nn.softmax(logits), rtol=1e-9)
    assert not predicted[:, 3:].any()
    assert accuracies.shape == (STEPS,)
    np.testing.assert_allclose(accuracies[-1], accuracy, rtol=1e-6)


def test_closed_form_is_reverse_of_no_steps():
    learner = Prototypical(3)
    lam = lam_of(learner)
    closed = learner.hypergradient(learner.method(7))(lam, EPISODE)
    assert isinstance(learner.method(7), hx.ClosedForm)
    assert_trees_close(closed.grad, learner.hypergradient(hx.Reverse(0))(lam, EPISODE).grad, 1e-14)


def test_ridge_is_what_gradient_descent_and_the_implicit_function_theorem_say():
    learner = RidgeClassifier(3, penalty=2.0)
    lam = lam_of(learner)
    closed = learner.hypergradient(learner.method(0))(lam, EPISODE)
    from_zero = replace(learner.problem, init=lambda lam, prepared: jnp.zeros((3, prepared.support.shape[1])))
    implicit = hx.hypergradient(from_zero, hx.GradientDescent(0.01), hx.Implicit(1200))(lam, EPISODE)
    assert_trees_close(implicit.state.w, closed.state.w, 1e-10)
    assert_trees_close(closed.grad, implicit.grad, 1e-8)


@pytest.mark.parametrize("features", [3, 20], ids=["features", "images"])
def test_ridge_solves_the_smaller_system(features):
    """Both forms with padding, against NumPy's least squares on the stacked system."""
    H, labels, there = np.random.default_rng(1).normal(size=(12, features)), np.arange(12) % 3, np.arange(12) < 8
    targets = Targets(jnp.eye(4)[labels], jnp.asarray(there / 8))
    prepared = OnFeatures(jnp.asarray(H), targets, jnp.asarray(H), targets)
    w = RidgeClassifier(4).init({"penalty": jnp.asarray(0.7)}, prepared)
    stacked = np.concatenate([H[there], np.sqrt(0.7) * np.eye(features)])
    right = np.concatenate([np.eye(4)[labels[there]], np.zeros((features, 4))])
    np.testing.assert_allclose(w.T, np.linalg.lstsq(stacked, right)[0], atol=1e-12)
    assert not w[3].any()


def test_prototypes_by_cosine():
    support, query = np.split(np.random.default_rng(1).normal(size=(len(LABELS) + 5, 18)), [len(LABELS)])
    of_support = Targets(jnp.asarray(ONE_HOT))
    prepared = OnFeatures(jnp.asarray(support), of_support, jnp.asarray(query), of_support)
    learner = Prototypical(3, distance="cosine")
    prototypes = np.stack([support[label == LABELS].mean(0) for label in range(3)])
    lengths = np.linalg.norm(query, axis=1)[:, None] * np.linalg.norm(prototypes, axis=1)
    logits = learner.logits(learner.init({}, prepared), {}, prepared)
    np.testing.assert_allclose(logits, query @ prototypes.T / lengths - 1, rtol=1e-12)


def test_zero_features_in_float32():
    """Blank images under a network without shifts, and a class that is not there: all gradients are finite."""
    there = jnp.ones(len(LABELS), bool)
    blank = EPISODE._replace(support=EPISODE.support.at[0].set(0), query=EPISODE.query.at[1].set(0), support_mask=there)
    learners = [Matching(4), Siamese(4), CosineClassifier(4)]

    @jax.jit
    def gradients():
        found = {}
        for learner in learners:
            lam = learner.lam(Scaled(jnp.ones(81, jnp.float32)), SHAPE, jax.random.key(0))
            h = learner.hypergradient(learner.method(1)).evaluate(lam, blank, ())
            found[type(learner).__name__] = h.value, h.grad
        return found

    for name, (value, grad) in gradients().items():
        assert value.dtype == jnp.float32, name
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((value, grad))), name


class Scaled(eqx.Module):
    """A weight for each pixel."""

    weight: jax.Array

    def __call__(self, images, moments=own_moments):
        return self.weight * images.reshape(len(images), -1)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Prototypical(5, distance="manhattan"), "unknown distance 'manhattan': use 'euclidean' or 'cosine'"),
        (lambda: Matching(5, scale=0.0), "scale is 0.0; it must be positive"),
        (lambda: Matching(5, processing_steps=0), "processing_steps must be a whole number, at least 1; it is 0"),
        (
            lambda: Matching(5, full_context=True).lam(small_net()),
            r"full_context needs the number of features for its LSTMs: pass image_shape=\(height, width, channels\)",
        ),
        (lambda: Matching(5, full_context=True).lam(small_net(), SHAPE), r"pass key=jax.random.key\(seed\) to lam"),
        (lambda: Siamese(5).lam(small_net()), "Siamese needs the number of features for its weights: pass image_shape"),
        (lambda: RidgeClassifier(5, penalty=-1.0), "penalty is -1.0; it must be positive"),
        (lambda: RidgeClassifier(5, scale=0.0), "scale is 0.0; it must be positive"),
        (lambda: CosineClassifier(5, scale=-2.0), "scale is -2.0; it must be positive"),
    ],
    ids=range(9),
)
def test_errors(make, match):
    with pytest.raises(ValueError, match=match):
        make()
