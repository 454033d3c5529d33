"""Learners of an initialisation against plain loops that know nothing of the core, and against each other."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hyperax as hx
from hyperax.fewshot.episodes import Episode
from hyperax.fewshot.layers import BatchNorm, Convolution, own_moments
from hyperax.fewshot.learners.hyper_representation import Classifier, HyperRepresentation
from hyperax.fewshot.learners.initialisation import Initialisation
from hyperax.fewshot.learners.learner import unit
from hyperax.fewshot.learners.maml import anil, imaml, in_depth, in_width, maml, meta_sgd
from hyperax.fewshot.learners.partition import (
    LastStages,
    ShareOfFilters,
    adapted_part,
    masks_of,
    merged,
    shared_stages,
)
from hyperax.fewshot.learners.reptile import reptile
from hyperax.fewshot.networks import C4L, OmniglotNet, ResidualNet, Stage, stages_of, through
from problems import assert_trees_close, small_net

WAYS, SHAPE, ETA, RHO = 3, (9, 9, 1), 0.3, 2.0
RNG = np.random.default_rng(7)


class TwoStages(eqx.Module):
    """9 - 3 - 2 pixels, 2 and 2 filters, 8 features."""

    convolutions: tuple[Convolution, ...]
    normalisations: tuple[BatchNorm, ...]

    def __call__(self, images, moments=own_moments):
        return through(self.stages, images, moments).reshape(len(images), -1)

    @property
    def stages(self):
        return tuple(Stage(*layer, pooled=False) for layer in zip(self.convolutions, self.normalisations, strict=True))


def float64(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float64), tree)


NET = float64(
    TwoStages(
        (Convolution(1, 2, jax.random.key(1), stride=3), Convolution(2, 2, jax.random.key(2), stride=2)),
        (BatchNorm(jnp.array([0.3, 0.2])), BatchNorm(jnp.array([0.1, 0.4]))),
    )
)
HEAD = Classifier(jnp.asarray(RNG.normal(size=(WAYS, 8))), jnp.asarray(RNG.normal(size=WAYS)))
LAM = {"network": NET, "head": HEAD}


def images(count):
    """Black and white, so that a division by 255 has no rounding to differ in."""
    return jnp.asarray(255 * RNG.integers(0, 2, (count, *SHAPE)), jnp.uint8)


def labels(each, ways=WAYS):
    return jnp.repeat(jnp.arange(ways, dtype=jnp.int32), each)


EPISODE = Episode(images(6), labels(2), images(12), labels(4))


def plain_loss(p, x, y):
    """Without this package: XLA's convolution, the mean and variance of the set, ReLU, twice; softmax regression."""
    x = unit(x)
    for kernel, shift, stride in ((p["k1"], p["b1"], 3), (p["k2"], p["b2"], 2)):
        x = jax.lax.conv_general_dilated(
            x.astype(kernel.dtype), kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = (x - x.mean((0, 1, 2))) / jnp.sqrt(x.var((0, 1, 2)) + 1e-3) + shift
        x = jnp.maximum(x, 0)
    logits = x.reshape(len(x), -1) @ p["W"].T + p["c"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


gradient_by_hand = jax.jit(jax.grad(plain_loss))


@jax.jit
def by_hand(p, eta, second, episode):
    """(f_2, its gradients in p and eta), with eta zero where p is not adapted; second = 0 drops second derivatives."""

    def value(p, eta):
        w = p
        for _ in range(2):
            g = jax.grad(plain_loss)(w, episode.support, episode.support_labels)
            g = jax.tree.map(lambda x: second * x + (1 - second) * jax.lax.stop_gradient(x), g)
            w = jax.tree.map(lambda w, eta, g: w - eta * g, w, eta, g)
        return plain_loss(w, episode.query, episode.query_labels)

    return jax.value_and_grad(value, (0, 1))(p, eta)


def flat(lam):
    """A tree like lam with the names of the plain loop; what is not there is `None`."""
    net, head = lam["network"], lam.get("head", Classifier(None, None))
    return {
        "k1": net.convolutions[0].weight,
        "k2": net.convolutions[1].weight,
        "b1": net.normalisations[0].beta,
        "b2": net.normalisations[1].beta,
        "W": head.weight,
        "c": head.bias,
    }


def etas(**changed):
    return jax.tree.map(lambda x: jnp.full_like(x, ETA), flat(LAM)) | {
        name: jnp.broadcast_to(ETA * jnp.asarray(value, jnp.float64), flat(LAM)[name].shape)
        for name, value in changed.items()
    }


ZERO = flat(LAM) | {"W": jnp.zeros((WAYS, 8)), "c": jnp.zeros(WAYS)}
BODY = {"k1": 0, "b1": 0, "k2": 0, "b2": 0}
HALF = [1, 0]
CASES = {
    "maml": (maml(WAYS, ETA, head="learned"), {}),
    "first order": (maml(WAYS, ETA, first_order=True, head="learned"), {}),
    "anil": (anil(WAYS, ETA), BODY),
    "in depth": (in_depth(WAYS, 1, ETA, head="learned"), {"k1": 0, "b1": 0}),
    "in width": (in_width(WAYS, 0.5, ETA, head="learned"), {"k1": HALF, "b1": HALF, "k2": HALF, "b2": HALF}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_hypergradient_is_that_of_a_plain_unrolled_loop(name):
    learner, changed = CASES[name]
    h = learner.hypergradient(learner.method(2))(LAM, EPISODE)
    value, (expected, _) = by_hand(flat(LAM), etas(**changed), 0.0 if name == "first order" else 1.0, EPISODE)
    np.testing.assert_allclose(h.value, value, rtol=1e-12)
    assert_trees_close(flat(h.grad), expected, rtol=1e-9)
    assert isinstance(h.grad["network"], TwoStages)


def test_first_order_is_the_gradient_of_the_query_loss_at_the_adapted_parameters():
    learner = CASES["first order"][0]
    h = learner.hypergradient(hx.FirstOrder(2))(LAM, EPISODE)
    at_w = gradient_by_hand(flat(h.state.w), EPISODE.query, EPISODE.query_labels)
    assert_trees_close(flat(h.grad), at_w, rtol=1e-9)


def test_meta_sgd_learns_a_step_size_for_each_parameter():
    learner = meta_sgd(WAYS, ETA, head="learned")
    lam = learner.lam(NET, SHAPE)
    assert jax.tree.structure(lam["step_sizes"]) == jax.tree.structure(LAM)
    lam = jax.tree.map(lambda x: jnp.asarray(RNG.uniform(0.1, 0.5, x.shape)), lam) | LAM
    h = learner.hypergradient(learner.method(2))(lam, EPISODE)
    value, (starts, rates) = by_hand(flat(LAM), flat(lam["step_sizes"]), 1.0, EPISODE)
    np.testing.assert_allclose(h.value, value, rtol=1e-12)
    assert_trees_close(flat(h.grad), starts, rtol=1e-9)
    assert_trees_close(flat(h.grad["step_sizes"]), rates, rtol=1e-9)
    assert learner.constraint() is None


def test_with_a_head_at_zero_the_labels_share_their_step_sizes():
    learner = meta_sgd(WAYS, ETA, adapted=LastStages(1))
    lam = learner.lam(NET, SHAPE)
    sizes = lam["step_sizes"]
    assert sizes["network"].convolutions[0].weight is None
    assert sizes["head"].weight.shape == (1, 8)
    h = learner.hypergradient(learner.method(2))(lam, EPISODE)
    value, (starts, rates) = by_hand(ZERO, etas(k1=0, b1=0), 1.0, EPISODE)
    np.testing.assert_allclose(h.value, value, rtol=1e-7)  # the initial step sizes are float32
    for name in BODY:
        assert_trees_close(flat(h.grad)[name], starts[name], rtol=1e-6)
    assert_trees_close(h.grad["step_sizes"]["head"].weight[0], rates["W"].sum(0), rtol=1e-6)
    assert_trees_close(flat(h.grad["step_sizes"])["k2"], rates["k2"], rtol=1e-6)


def test_a_head_at_zero_without_adapted_network_is_the_hyper_representation():
    one, other = anil(WAYS, ETA, head="zero"), HyperRepresentation(WAYS, step_size=ETA)
    lam = one.lam(NET)
    assert set(lam) == {"network"}
    results = [learner.hypergradient(learner.method(2))(lam, EPISODE) for learner in (one, other)]
    assert_trees_close(results[0].grad, results[1].grad, rtol=1e-10)
    np.testing.assert_allclose(results[0].value, results[1].value, rtol=1e-12)


@eqx.filter_jit
def adapted_and_asked(learner, lam, episode, steps):
    adapted = learner.adapt(lam, episode.support, episode.support_labels, steps, episode.support_mask)
    return learner.predict(lam, adapted, episode.query)


def test_one_learned_row_repeated_is_a_head_at_zero():
    """The softmax does not see what all rows have in common, so there is no setting for it."""
    row = Classifier(jnp.broadcast_to(HEAD.weight[:1], (WAYS, 8)), jnp.broadcast_to(HEAD.bias[:1], (WAYS,)))
    learned = CASES["maml"][0]
    h = learned.hypergradient(hx.Reverse(2))({"network": NET, "head": row}, EPISODE)
    value, (zero, _) = by_hand(ZERO, etas(), 1.0, EPISODE)
    np.testing.assert_allclose(h.value, value, rtol=1e-12)
    for name in BODY:
        assert_trees_close(flat(h.grad)[name], zero[name], rtol=1e-9)
    np.testing.assert_allclose(h.grad["head"].weight.sum(0), np.zeros(8), atol=1e-14)


def test_with_a_head_at_zero_the_order_of_the_classes_does_not_matter():
    order = jnp.array([2, 0, 1])
    renamed = EPISODE._replace(support_labels=order[EPISODE.support_labels])
    ask = lambda episode: adapted_and_asked(maml(WAYS, 1.0), {"network": NET}, episode, 3)
    np.testing.assert_allclose(ask(renamed)[:, order], ask(EPISODE), atol=1e-12)


@pytest.mark.parametrize("statistics", ["set", "support"])
def test_adapt_and_predict_agree_with_accuracies_at_other_steps_than_in_training(statistics):
    learner = maml(WAYS, 1.0, statistics=statistics)
    lam = {"network": NET}
    accuracies = eqx.filter_jit(learner.accuracies)(lam, EPISODE, 6)
    assert len(set(accuracies.tolist())) > 1
    probabilities = adapted_and_asked(learner, lam, EPISODE, 3)
    assert accuracies[2] == pytest.approx(np.mean(jnp.argmax(probabilities, -1) == EPISODE.query_labels))
    if statistics == "support":  # of classes and images that are not there, nothing is seen
        of_five = adapted_and_asked(maml(5, 1.0, statistics=statistics), lam, PADDED, 3)
        np.testing.assert_allclose(of_five[:12, :WAYS], probabilities, atol=1e-12)


def padded(episode, ways):
    """The same episode in the shape of one with more classes: other images where there is nothing."""
    more = lambda x, each: jnp.concatenate([x, images(each * ways - len(x))])
    there = lambda each: jnp.arange(each * ways) < each * WAYS
    support, query = more(episode.support, 2), more(episode.query, 4)
    return Episode(support, labels(2, ways), query, labels(4, ways), there(2), there(4))


PADDED = padded(EPISODE, 5)
EPISODE_OF_FIVE = Episode(images(10), labels(2, 5), images(20), labels(4, 5))


def test_tasks_of_three_and_five_classes_in_one_mini_batch():
    f = in_depth(5, 1, ETA).hypergradient(hx.FirstOrder(2))
    five = EPISODE_OF_FIVE._replace(support_mask=jnp.ones(10, bool), query_mask=jnp.ones(20, bool))
    mixed = hx.mean_over_tasks(f)({"network": NET}, jax.tree.map(lambda *x: jnp.stack(x), PADDED, five))
    one, other = f({"network": NET}, PADDED), f({"network": NET}, five)
    assert_trees_close(mixed.grad, jax.tree.map(lambda a, b: (a + b) / 2, one.grad, other.grad), rtol=1e-10)
    value, (expected, _) = by_hand(ZERO, etas(k1=0, b1=0), 0.0, EPISODE)
    np.testing.assert_allclose(one.value, value, rtol=1e-12)
    for name in BODY:
        assert_trees_close(flat(one.grad)[name], expected[name], rtol=1e-9)


def test_imaml_is_the_derivative_of_a_converged_run():
    # A smooth network: at a kink of a ReLU the inner gradient would not vanish.
    learner = Initialisation(WAYS, proximity=RHO, step_size=0.05)
    lam = {"network": small_net()}
    unrolled = learner.hypergradient(hx.Reverse(600))(lam, EPISODE)
    implicit = imaml(WAYS, RHO, 0.05, solver_steps=100)
    h = implicit.hypergradient(implicit.method(600))(lam, EPISODE)
    assert h.info["inner_gradient"] < 1e-10
    np.testing.assert_allclose(h.value, unrolled.value, rtol=1e-12)
    assert_trees_close(h.grad, unrolled.grad, rtol=1e-7)


def test_reptile_points_from_the_last_iterate_to_the_first():
    learner = reptile(WAYS, ETA, optimizer=hx.GradientDescent, head="learned", batch_size=3)
    h = learner.hypergradient(learner.method(3))(LAM, EPISODE)
    w = flat(LAM)
    for rows in ([0, 2, 4], [1, 3, 5], [0, 2, 4]):  # one image of every class a step
        rows = np.array(rows)
        g = gradient_by_hand(w, EPISODE.support[rows], EPISODE.support_labels[rows])
        w = jax.tree.map(lambda w, g: w - ETA * g, w, g)
    assert_trees_close(flat(h.grad), jax.tree.map(jnp.subtract, flat(LAM), w), rtol=1e-9)
    np.testing.assert_allclose(h.value, plain_loss(w, EPISODE.query, EPISODE.query_labels), rtol=1e-10)
    # Of a padded episode the images that are there take turns, and the published optimizer is Adam.
    learner = reptile(5, 0.01, batch_size=3)
    batch = eqx.filter_jit(lambda d: learner._batch(learner.prepare(LAM, d), 3))(PADDED)
    np.testing.assert_array_equal(jnp.argmax(batch.support_targets.one_hot, -1), [0, 1, 2])
    assert isinstance(learner.dynamics, hx.Adam)
    nothing = reptile(WAYS, adapted=False)
    with pytest.warns(hx.UnusedLeafWarning, match="convolutions"):
        nothing.hypergradient(nothing.method(1)).check({"network": NET}, EPISODE)


@pytest.mark.parametrize(
    ("network", "stages"),
    [(OmniglotNet(SHAPE, jax.random.key(0), 2), 4), (C4L((16, 16, 1), jax.random.key(0), 2), 4), (small_net(), 1)],
)
def test_stages_with_nothing_adapted_are_shared(network, stages):
    assert len(stages_of(network)) == stages
    assert shared_stages(masks_of(True, network)) == 0
    assert shared_stages(masks_of(False, network)) == stages
    for count in range(1, stages + 1):
        assert shared_stages(masks_of(LastStages(count), network)) == stages - count


def test_a_filter_may_return_a_prefix():
    shift = lambda net: eqx.tree_at(
        lambda n: n.normalisations, jax.tree.map(lambda _: False, net), (BatchNorm(True), False)
    )
    masks = masks_of(shift, NET)
    assert jax.tree.leaves(masks) == [False, False, True, False]
    own = adapted_part(masks, NET)
    assert len(jax.tree.leaves(own)) == 1
    changed = merged(masks, jax.tree.map(lambda x: x + 1, own), NET)
    assert_trees_close(changed.normalisations[0].beta, NET.normalisations[0].beta + 1, rtol=0)
    assert changed.convolutions == NET.convolutions


def test_filters_of_the_residual_net_by_their_shapes():
    network = eqx.filter_eval_shape(lambda key: ResidualNet((16, 16, 1), key), jax.random.key(0))
    network = jax.tree.map(lambda x: np.zeros(x.shape), network)
    mask = LastStages(2)(network)
    assert jax.tree.leaves(mask.blocks[:3]) == [False] * 21
    assert jax.tree.leaves((mask.blocks[3], mask.widen, mask.narrow)) == [True] * 9
    width = ShareOfFilters(0.25)(network)
    assert int(width.narrow.weight.sum()) == 128


def test_what_is_wrong_is_said_before_long_work():
    with pytest.raises(ValueError, match="unknown head 'one row': use 'zero' or 'learned'"):
        Initialisation(WAYS, head="one row")
    with pytest.raises(ValueError, match="use True, False or a function of the network"):
        Initialisation(WAYS, adapted="all")
    for wrong in ({"proximity": 0.0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Initialisation(WAYS, **wrong)
    with pytest.raises(ValueError, match="adapts nothing of the network: use adapted=False"):
        Initialisation(WAYS, adapted=lambda net: False).lam(NET)
    with pytest.raises(ValueError, match="a tree like the network, or a prefix"):
        Initialisation(WAYS, adapted=lambda net: (True, False)).lam(NET)
    for mask in (np.ones(3, bool), 1.0):
        with pytest.raises(ValueError, match="True, False or a boolean array"):
            Initialisation(WAYS, adapted=lambda net, mask=mask: jax.tree.map(lambda _: mask, net)).lam(NET)
    with pytest.raises(ValueError, match="has 2 stages, and the last 3"):
        in_depth(WAYS, stages=3).lam(NET)
    for wrong in (lambda: LastStages(0), lambda: ShareOfFilters(0.0)):
        with pytest.raises(ValueError, match="must be"):
            wrong()
    with pytest.raises(ValueError, match="give the images' shape"):
        anil(WAYS).lam(NET)
    with pytest.raises(ValueError, match="lam's head is for 3 classes and the learner for 5"):
        anil(5).hypergradient(hx.Reverse(1))(LAM, EPISODE)
