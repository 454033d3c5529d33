"""Meta networks: Algorithm 1 written out plainly, padding, gradients, fast weights, and that they learn."""

from functools import cache

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hyperax as hx
from hyperax.fewshot.episodes import Episode
from hyperax.fewshot.learners.fast_weights import GradientLSTM, GradientMLP, P
from hyperax.fewshot.learners.learner import OnFeatures
from hyperax.fewshot.learners.meta_networks import FastWeights, Layers, MetaNetworks
from hyperax.fewshot.networks import PerImage, encode
from hyperax.fewshot.targets import Targets
from hyperax.learned_optimizers.preprocessing import log_and_sign
from problems import small_net

SHAPE, WAYS, UNITS, HIDDEN = (9, 9, 1), 3, 4, 6
LEARNER = MetaNetworks(WAYS, units=UNITS, hidden=HIDDEN, scale=2.0)
stacked = lambda *episodes: jax.tree.map(lambda *x: jnp.stack(x), *episodes)
relu = lambda x: np.maximum(x, 0)


@cache
def drawn():
    """lam in float64, of NumPy's numbers, with fast weights large enough to matter."""

    def shapes(key):
        lam = LEARNER.lam(small_net(), SHAPE, key)
        lam["task"] = GradientLSTM(HIDDEN, key, 0.3, jnp.float64)
        lam["example"] = {name: GradientMLP(HIDDEN, key, 0.3, jnp.float64) for name in ("dense", "top")}
        return lam

    draw = np.random.default_rng(2)
    return jax.tree.map(lambda x: 0.5 * draw.normal(size=x.shape), jax.eval_shape(shapes, jax.random.key(0)))


def episode(seed, there=None, masked=False):
    """Two images of each of three classes; `there` of them are."""
    draw = np.random.default_rng(seed)
    images = lambda count: jnp.asarray(draw.integers(0, 256, (count, *SHAPE)), jnp.uint8)
    there = np.ones(6, bool) if there is None else np.asarray(there)
    labels = jnp.arange(WAYS, dtype=jnp.int32)
    masks = (jnp.asarray(there), jnp.asarray(np.repeat(there.reshape(3, 2).any(1), 2))) if masked else ()
    return Episode(images(6), jnp.repeat(labels, 2), images(6), jnp.repeat(labels, 2), *masks)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def two_numbers(g, p=7.0):
    return (np.log(abs(g)) / p, np.sign(g)) if abs(g) >= np.exp(-p) else (-1.0, np.exp(p) * g)


def mlp(m, g):
    """One weight of one gradient."""
    x = np.array(two_numbers(g))
    for weight, bias in zip(m.weights[:-1], m.biases[:-1], strict=True):
        x = relu(np.asarray(weight) @ x + bias)
    return m.scale * float((np.asarray(m.weights[-1]) @ x + m.biases[-1])[0])


def lstm(d, gradients):
    """One weight of the gradients of all images, in their order."""
    h = c = np.zeros(HIDDEN)
    for g in gradients:
        gates = np.asarray(d.cell.weight_ih) @ two_numbers(g) + np.asarray(d.cell.weight_hh) @ h + d.cell.bias
        i, f, g, o = np.split(gates, 4)
        sigmoid = lambda x: 1 / (1 + np.exp(-x))
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
    return d.scale * float(np.asarray(d.readout) @ h + d.bias)


def gradients(slow, z, label, classes):
    """Of -log softmax at the label, among the classes of the task, by the chain rule."""
    dense, top = np.asarray(slow.dense), np.asarray(slow.top)
    v = relu(dense @ z)
    error = np.zeros(WAYS)
    error[classes] = softmax((top @ v)[classes])
    error[label] -= 1
    return np.outer((top.T @ error) * (v > 0), z), np.outer(error, v)


def plainly(lam, support, labels, query, scale):
    """Algorithm 1, an image and a weight at a time: Q*, and the logits of the query images."""
    classes = np.unique(labels)
    first = [np.flatnonzero(labels == label)[0] for label in classes]
    of_q = np.stack([gradients(lam["representation"], support[i], labels[i], classes)[0] for i in first])
    fast = np.apply_along_axis(lambda g: lstm(lam["task"], g), 0, of_q)
    slow = np.asarray(lam["representation"].dense)
    u = lambda z: relu(slow @ z) + relu(fast @ z)

    of_b = [gradients(lam["base"], z, label, classes) for z, label in zip(support, labels, strict=True)]
    made = lambda name, g: np.vectorize(lambda g: mlp(lam["example"][name], g))(g)
    memory = [(made("dense", dense), made("top", top)) for dense, top in of_b]
    index = [u(z) for z in support]

    logits = []
    for z in query:
        r = u(z)
        a = softmax(scale * np.array([r @ i / (np.linalg.norm(r) * np.linalg.norm(i)) for i in index]))
        dense, top = (sum(weight * fast[part] for weight, fast in zip(a, memory, strict=True)) for part in (0, 1))
        v = relu(np.asarray(lam["base"].dense) @ z) + relu(dense @ z)
        logits.append((np.asarray(lam["base"].top) + top) @ v)
    return fast, np.stack(logits)


@eqx.filter_jit
def found(lam, task):
    prepared = LEARNER.prepare(lam, task)
    w = LEARNER.init(lam, prepared)
    return w.representation, LEARNER.logits(w, lam, prepared), LEARNER.outer(w, lam, prepared)


# All there; one image of the first class, two of the second, none of the third, and what is padding comes first.
@pytest.mark.parametrize("there", [[True] * 6, [False, True, True, True, False, False]], ids=["whole", "padded"])
def test_it_is_algorithm_1(there):
    lam, chosen = drawn(), np.asarray(there)
    task = episode(1, there, masked=True)
    representation, logits, (value, metrics) = found(lam, task)
    labels = np.repeat(np.arange(WAYS), 2)
    of_query = np.isin(labels, labels[chosen])
    unit = lambda images: images.astype(jnp.float32) / 255
    support, query = encode(lam["network"], unit(task.support[chosen]), unit(task.query[of_query]))
    fast, expected = plainly(lam, np.asarray(support), labels[chosen], np.asarray(query), LEARNER.scale)
    np.testing.assert_allclose(representation, fast, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(logits[of_query], expected, rtol=1e-9, atol=1e-12)
    classes = np.unique(labels[chosen])
    at = np.searchsorted(classes, labels[of_query])
    losses = [-np.log(softmax(row[classes])[i]) for row, i in zip(expected, at, strict=True)]
    np.testing.assert_allclose(value, np.mean(losses), rtol=1e-9)
    right = np.argmax(expected[:, classes], 1) == at
    np.testing.assert_allclose(metrics["accuracy"], np.mean(right), rtol=1e-6)


def test_a_query_image_reads_the_fast_weights_of_the_support_image_that_is_like_it():
    """Two support images, two units, no slow weights on top: by hand."""
    learner = MetaNetworks(2, units=2, hidden=1, scale=1.0)
    lam = {"representation": Layers(jnp.eye(2), jnp.zeros((2, 2))), "base": Layers(jnp.eye(2), jnp.zeros((2, 2)))}
    top = jnp.array([[[1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 3.0]]])
    dense = jnp.stack([jnp.zeros((2, 2)), jnp.array([[0.0, 2.0], [0.0, -1.0]])])
    w = FastWeights(jnp.zeros((2, 2)), Layers(dense, top), jnp.eye(2))
    blank = jnp.zeros((2, 1, 1, 2), jnp.uint8)
    prepared = learner.prepare({"network": PerImage(jnp.ravel)}, Episode(blank, jnp.arange(2), blank, jnp.arange(2)))
    logits = jax.jit(learner.logits)(w, lam, prepared._replace(query=jnp.array([[0.0, 1.0]])))
    # cosines 0 and 1: a = (1, e) / (1 + e). v = (0, 1) + relu(a_2 (2, -1)) = (2 a_2, 1): logits = (a_1 2 a_2, a_2 3).
    a = np.array([1, np.e]) / (1 + np.e)
    np.testing.assert_allclose(logits, [[2 * a[0] * a[1], 3 * a[1]]], rtol=1e-12)


@eqx.filter_jit
def over_tasks(lam, tasks):
    h = hx.mean_over_tasks(LEARNER.hypergradient(LEARNER.method(7))).evaluate(lam, tasks, ())
    return h.value, h.grad, h.info["metrics"]["accuracy"]


def test_gradients_over_tasks_are_finite_differences_and_padding_has_no_part():
    lam = drawn()
    there = np.array([True, True, True, False, False, False])
    tasks = stacked(episode(1, masked=True), episode(2, there, masked=True))
    value, grad, accuracy = over_tasks(lam, tasks)
    assert accuracy.shape == (2,)
    leaves, tree = jax.tree.flatten(lam)
    slopes = jax.tree.leaves(grad)
    assert all(np.any(slope) for slope in slopes)  # second derivatives included, all are reached
    draw = np.random.default_rng(4)
    direction = [draw.normal(size=x.shape) for x in leaves]
    moved = lambda t: over_tasks(tree.unflatten([x + t * d for x, d in zip(leaves, direction, strict=True)]), tasks)[0]
    slope = sum(np.vdot(g, d) for g, d in zip(slopes, direction, strict=True))
    np.testing.assert_allclose((moved(1e-7) - moved(-1e-7)) / 2e-7, slope, rtol=1e-5)

    other = episode(5)
    missing = ~np.repeat(there.reshape(3, 2).any(1), 2)
    changed = tasks._replace(
        support=tasks.support.at[1].set(jnp.where(there[:, None, None, None], tasks.support[1], other.support)),
        query=tasks.query.at[1].set(jnp.where(missing[:, None, None, None], other.query, tasks.query[1])),
    )
    again = over_tasks(lam, changed)
    np.testing.assert_allclose(again[0], value, rtol=1e-12)
    for old, new in zip(slopes, jax.tree.leaves(again[1]), strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-8, atol=1e-10)


def test_it_learns():
    """Two labellings of the same three patterns: only the support set tells which one it is."""
    lam, draw = drawn(), np.random.default_rng(0)
    patterns = draw.integers(0, 200, (3, 1, *SHAPE))
    images = lambda order: jnp.asarray(patterns[order] + draw.integers(0, 50, (3, 2, *SHAPE)), jnp.uint8)
    task = lambda order: episode(0, masked=True)._replace(
        support=images(order).reshape(6, *SHAPE), query=images(order).reshape(6, *SHAPE)
    )
    tasks = stacked(task([0, 1, 2]), task([1, 2, 0]))
    before, _, accuracy = over_tasks(lam, tasks)
    assert np.mean(accuracy) < 0.9
    leaves, tree = jax.tree.flatten(lam)
    for t in range(40):  # Adam without bias corrections, in NumPy: nothing more to compile
        value, grad, accuracy = over_tasks(tree.unflatten(leaves), tasks)
        slopes = [np.asarray(g) for g in jax.tree.leaves(grad)]
        m, v = ([0.0] * len(leaves),) * 2 if t == 0 else (m, v)
        m = [0.5 * a + 0.5 * g for a, g in zip(m, slopes, strict=True)]
        v = [0.9 * a + 0.1 * g**2 for a, g in zip(v, slopes, strict=True)]
        leaves = [x - 0.01 * a / (np.sqrt(b) + 1e-8) for x, a, b in zip(leaves, m, v, strict=True)]
    assert value < before / 5, (before, value)
    assert np.mean(accuracy) > 0.95


def test_features_that_are_zero_in_float32():
    """Blank images: chance, with finite gradients."""
    learner = MetaNetworks(2, units=2, hidden=2)
    targets = Targets(jnp.eye(2, dtype=jnp.float32))

    @jax.jit
    def found(key):
        lam = learner.lam(PerImage(jnp.ravel), (1, 3, 1), key)
        blank = jnp.zeros((2, 3), jnp.float32)
        prepared = OnFeatures(blank, targets, blank, targets)
        del lam["network"]
        return jax.value_and_grad(lambda lam: learner.outer(learner.init(lam, prepared), lam, prepared)[0])(lam)

    value, grad = found(jax.random.key(0))
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, np.log(2), rtol=1e-6)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(grad))


def test_gradients_of_any_size():
    g = jnp.array([1.0, -np.exp(-3.5), np.exp(-8.0), 0.0])
    np.testing.assert_allclose(log_and_sign(g, P), [two_numbers(x) for x in np.asarray(g)], atol=1e-12)
    slope = jax.grad(lambda g: log_and_sign(g, P)[..., 0].sum() + log_and_sign(g, P)[..., 1].sum())(g)
    np.testing.assert_allclose(slope, [1 / 7, -np.exp(3.5) / 7, np.exp(7.0), np.exp(7.0)], rtol=1e-12)


def test_ways_are_fixed():
    lam = eqx.filter_eval_shape(lambda key: MetaNetworks(5).lam(small_net(), SHAPE, key), jax.random.key(0))
    learner = MetaNetworks(3)
    with pytest.raises(ValueError, match="lam's output layers are for 5 classes and the learner for 3: their number"):
        eqx.filter_eval_shape(learner.hypergradient(learner.method(0)).evaluate, lam, episode(0), ())


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: MetaNetworks(5, units=0), "units must be a whole number, at least 1; it is 0"),
        (lambda: MetaNetworks(5, hidden=True), "hidden must be a whole number, at least 1; it is True"),
        (lambda: GradientMLP(3, jax.random.key(0)), "hidden is 3; it must be even"),
        (lambda: MetaNetworks(5, scale=0.0), "scale is 0.0; it must be a number > 0"),
        (lambda: MetaNetworks(5).lam(small_net()), "MetaNetworks needs the number of features for its dense layers"),
        (
            lambda: MetaNetworks(5).lam(small_net(), SHAPE),
            "draws its dense layers: pass key=jax.random.key",
        ),
    ],
    ids=range(6),
)
def test_errors(make, match):
    with pytest.raises(ValueError, match=match):
        make()
