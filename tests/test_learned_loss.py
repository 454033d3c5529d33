"""Learned ground losses: they start as cross-entropy, treat classes alike, and have the right hypergradients."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import hyperax as hx
import tiny
from hyperax.experiments import study
from hyperax.experiments.comparison import study as comparison_study
from hyperax.experiments.comparison import training
from hyperax.experiments.learned_loss import LearnedLosses
from hyperax.experiments.learned_loss.entrants import CONDITIONS, Conditions, faster
from hyperax.experiments.learned_loss.figures import slope
from hyperax.fewshot.episodes import Episode, Episodes
from hyperax.fewshot.image_classes import ImageClasses, MetaDataset
from hyperax.fewshot.learners.hyper_representation import HyperRepresentation
from hyperax.fewshot.learners.learned_loss import LearnedLoss
from hyperax.fewshot.learners.losses import CrossEntropy, NetworkLoss, ParametricCrossEntropy
from hyperax.fewshot.learners.regularisers import LearnedL2, TowardsClassMeans
from hyperax.fewshot.noisy_episodes import NoisyEpisodes
from hyperax.fewshot.targets import Targets, cross_entropy, targets_of
from hyperax.rollout import rollout

WAYS, FEATURES = 3, 4
RANDOM = np.random.default_rng(0)
LOGITS = jnp.asarray(3 * RANDOM.normal(size=(6, WAYS)))
LABELS = jnp.array([0, 0, 1, 1, 2, 2])


def double(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float64) if eqx.is_inexact_array(x) else x, tree)


def targets(mask=None):
    images = jnp.zeros((6, 1, 1, 1), jnp.uint8)
    return targets_of(Episode(images, LABELS, images, LABELS, mask, mask), WAYS, jnp.float64)[0]


LOSSES = {
    "cross-entropy": lambda: CrossEntropy(),
    "parametric": lambda: double(ParametricCrossEntropy(classes=WAYS)),
    "network": lambda: double(NetworkLoss(jax.random.key(0), hidden=5)),
    "both": lambda: double(NetworkLoss(jax.random.key(0), 5, ParametricCrossEntropy(smoothing=False))),
}


def moved(tree, size=0.2, seed=1):
    """The module with its parameters somewhere inside of their sets."""
    flat, back = ravel_pytree(tree)
    return back(flat + size * (0.5 + np.random.default_rng(seed).random(flat.shape)))


expected_of = jax.jit(jax.value_and_grad(cross_entropy))
value_and_grad = eqx.filter_jit(lambda loss, logits, of: jax.value_and_grad(loss)(logits, of))


@pytest.mark.parametrize("name", LOSSES)
def test_a_learned_loss_starts_as_cross_entropy(name):
    loss = LOSSES[name]()
    for mask in (None, [1, 1, 1, 0, 0, 0], [1, 0, 1, 1, 1, 0]):
        of = targets(None if mask is None else jnp.array(mask, bool))
        value, grad = value_and_grad(loss, LOGITS, of)
        expected, of_expected = expected_of(LOGITS, of)
        np.testing.assert_allclose(value, expected, rtol=0, atol=1e-12)
        np.testing.assert_allclose(grad, of_expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["parametric", "network", "both"])
def test_images_and_classes_that_are_not_there_have_no_part_in_a_learned_loss(name):
    """The loss of a task of two classes in an episode of three is that of an episode of two."""
    loss = moved(LOSSES[name]())
    mask = jnp.array([1, 1, 1, 0, 0, 0], bool)
    value, grad = value_and_grad(loss, LOGITS, targets(mask))
    base = loss if name == "parametric" else loss.base
    two = eqx.tree_at(lambda x: x.class_weights, base, base.class_weights[:2]) if name == "parametric" else loss
    small = Targets(jax.nn.one_hot(LABELS[:3], 2, dtype=jnp.float64))
    expected, of_small = value_and_grad(two, LOGITS[:3, :2], small)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    np.testing.assert_allclose(grad[:3, :2], of_small, atol=1e-14)
    assert not np.any(grad[3:])
    assert not np.any(grad[:, 2])
    by_lam = ravel_pytree(jax.jit(jax.grad(lambda loss: loss(LOGITS, targets(mask))))(loss))[0]
    assert np.all(np.isfinite(by_lam))


@pytest.mark.parametrize("name", ["parametric", "network", "both"])
def test_classes_are_treated_alike(name):
    loss = moved(LOSSES[name]())
    if name == "parametric":
        loss = eqx.tree_at(lambda x: x.class_weights, loss, jnp.full(WAYS, 1.3))
    order = jnp.array([2, 0, 1])
    of = targets()
    permuted = of._replace(one_hot=of.one_hot[:, order])
    per_image = jax.jit(lambda logits, of: loss.per_image(logits, of))
    np.testing.assert_allclose(per_image(LOGITS[:, order], permuted), per_image(LOGITS, of), rtol=1e-12)
    np.testing.assert_allclose(per_image(LOGITS + 7.0, of), per_image(LOGITS, of), rtol=1e-12)
    assert not np.allclose(per_image(LOGITS, of), CrossEntropy().per_image(LOGITS, of), rtol=1e-2)


def test_the_parametric_loss_by_its_formula():
    tau, epsilon, q, v = 1.7, 0.2, 0.6, np.array([0.5, 1.0, 2.0])
    loss = eqx.tree_at(
        lambda x: (x.temperature, x.smoothing, x.power, x.class_weights),
        LOSSES["parametric"](),
        tuple(map(jnp.asarray, (tau, epsilon, q, v))),
    )
    p = np.exp(LOGITS / tau) / np.exp(LOGITS / tau).sum(1, keepdims=True)
    smoothed = (1 - epsilon) * np.eye(WAYS)[LABELS] + epsilon / WAYS
    expected = v[LABELS] * np.sum(smoothed * (1 - p**q) / q, 1)
    np.testing.assert_allclose(loss.per_image(LOGITS, targets()), expected, rtol=1e-12)
    # Across the border between series and formula, and with its derivatives there.
    first = jax.grad(lambda q: eqx.tree_at(lambda x: x.power, loss, q)(LOGITS, targets()))
    both = jax.jit(lambda q: (first(q), jax.grad(first)(q)))
    for q in (0.0, 1e-3, 0.02, 0.05):
        difference = (both(q + 1e-5)[0] - both(q - 1e-5)[0]) / 2e-5
        np.testing.assert_allclose(both(q)[1], difference, rtol=1e-7)


def episode(ways=WAYS, queries=3, seed=0):
    random = np.random.default_rng(seed)
    images = lambda count: jnp.asarray(random.integers(0, 256, (count, 2, 2, 1)), jnp.uint8)
    repeated = lambda count: jnp.repeat(jnp.arange(ways, dtype=jnp.int32), count)
    return Episode(images(2 * ways), repeated(2), images(queries * ways), repeated(queries))


def ravelled(images, moments):
    return images.reshape(images.shape[0], -1).astype(jnp.float64)


def learned():
    return LearnedLoss(
        WAYS,
        "set",
        lambda key: NetworkLoss(key, 3, ParametricCrossEntropy()),
        TowardsClassMeans,
        step_size=0.5,
        learn_step_size=True,
    )


LEARNER = learned()
HYPERGRADIENT = LEARNER.hypergradient(hx.Reverse(4))


def initial(learner):
    """All of lam but the network, which has nothing to learn here."""
    lam = learner.lam(ravelled, (2, 2, 1), jax.random.key(0))
    return double({name: part for name, part in lam.items() if name != "network"})


def test_the_hypergradient_by_finite_differences():
    data, at = episode(), moved(initial(LEARNER), 0.1)
    f = lambda lam: HYPERGRADIENT(lam | {"network": ravelled}, data)
    flat, back = ravel_pytree(at)
    value = lambda x: float(f(back(x)).value)
    grad = ravel_pytree(eqx.filter(f(at).grad, eqx.is_array))[0]
    assert grad.shape == flat.shape == (3 * 3 + 3 + 6 * 3 + 3 + 3 + 3 + 2 * FEATURES + 1,)
    assert np.all(grad != 0)
    for i in range(len(flat)):
        step = jnp.zeros_like(flat).at[i].set(1e-5)
        np.testing.assert_allclose(grad[i], (value(flat + step) - value(flat - step)) / 2e-5, rtol=1e-5, atol=1e-9)


def test_a_learner_with_all_of_it_starts_as_hyper_representation():
    data, lam = episode(), initial(LEARNER)
    h = HYPERGRADIENT(lam | {"network": ravelled}, data)
    plain = HyperRepresentation(WAYS, step_size=0.5, learn_step_size=True)
    expected = plain.hypergradient(hx.Reverse(4))({"network": ravelled, "step_size": lam["step_size"]}, data)
    np.testing.assert_allclose(h.value, expected.value, rtol=1e-12)
    np.testing.assert_allclose(h.grad["step_size"], expected.grad["step_size"], rtol=1e-10)
    assert np.all(np.asarray(h.grad["regulariser"].pull) != 0)  # nothing waits for something else to move first
    assert np.all(np.asarray(h.grad["regulariser"].strength) != 0)
    assert np.all(np.asarray(h.grad["loss"].last) != 0)
    assert h.grad["loss"].base.power != 0


def test_the_first_step_of_a_learned_loss_is_one_of_cross_entropy_with_another_step_size():
    learner, data = LearnedLoss(WAYS, loss=lambda key: moved(LOSSES["both"](), 0.4)), episode()
    lam = learner.lam(ravelled, (2, 2, 1), jax.random.key(0))

    def rows(learner):
        """[9, ways, features]: w_1, ..., w_9, without what all rows have in common."""
        problem = hx.Problem(learner.inner, learner.outer, learner.init, has_metrics=True)
        run = lambda lam: rollout(problem, learner.dynamics, 9, lam, learner.prepare(lam, data), observe=weight)[1]
        weights = eqx.filter_jit(run)(lam)
        return weights - jnp.mean(weights, 1, keepdims=True)

    weight = lambda w: w.weight
    ratio = rows(learner) / rows(HyperRepresentation(WAYS))
    np.testing.assert_allclose(ratio[0], np.full((WAYS, FEATURES), ratio[0, 0, 0]), rtol=1e-9)
    assert abs(ratio[0, 0, 0] - 1) > 0.05
    assert np.ptp(ratio[8]) > 1e-3  # from the second step on it is another path


def test_a_task_of_two_classes_in_an_episode_of_three():
    learner = LearnedLoss(
        WAYS, loss=lambda key: moved(LOSSES["both"]()), regulariser=lambda size: moved(double(TowardsClassMeans(size)))
    )
    small = LearnedLoss(2, loss=learner.loss, regulariser=learner.regulariser)
    two = episode(2)
    pad = lambda x: jnp.concatenate([x, x[:2]])
    there = lambda x: jnp.arange(len(x) + 2) < len(x)
    masks = there(two.support_labels), there(two.query_labels)
    padded = Episode(pad(two.support), pad(two.support_labels), pad(two.query), pad(two.query_labels), *masks)
    lam = learner.lam(ravelled, (2, 2, 1))
    f = lambda learner, data: jax.jit(lambda data: learner.hypergradient(hx.Reverse(4)).value(lam, data, ()))(data)
    (value, found), (expected, wanted) = f(learner, padded), f(small, two)
    np.testing.assert_allclose(value, expected, rtol=1e-9)
    np.testing.assert_allclose(found.info["metrics"]["accuracy"], wanted.info["metrics"]["accuracy"], rtol=1e-6)


def test_the_sets_of_the_parameters_are_kept():
    lam = initial(LEARNER) | {"network": jnp.zeros(2)}
    push = lambda lam, data, carry: hx.Hypergradient(jnp.zeros(()), jax.tree.map(jnp.ones_like, lam), None, {}, carry)
    kept = hx.minimize(push, lam, optimizer=faster(lambda step: 0.5), steps=3, constraint=LEARNER.constraint()).lam
    loss, regulariser = kept["loss"], kept["regulariser"]
    assert loss.base.smoothing == loss.base.power == 0
    assert 0 < loss.base.temperature < 1
    assert 0 < kept["step_size"] < 0.5
    assert np.all(regulariser.strength == 0)
    assert np.all(regulariser.pull < -1)
    np.testing.assert_allclose(kept["network"], -1.5, rtol=1e-5)
    np.testing.assert_allclose(loss.last, -15, rtol=1e-5)  # ten times the rate


def classes(count=4, images=8):
    return ImageClasses.from_lists({str(i): RANDOM.integers(0, 256, (images, 3, 3)) for i in range(count)})


def test_the_share_of_flipped_labels():
    of, key = classes(), jax.random.key(3)
    noisy, clean = NoisyEpisodes(4, 5, 3, share=0.3), Episodes(4, 5, 3)
    many = eqx.filter_jit(lambda episodes, key: episodes.sample_many(key, of, 400))
    found, expected = many(noisy, key), many(clean, key)
    for name in ("support", "query", "query_labels"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    flipped = np.asarray(found.support_labels != expected.support_labels)
    np.testing.assert_allclose(flipped.mean(), 0.3, atol=4 * (0.3 * 0.7 / flipped.size) ** 0.5)
    to = np.asarray((found.support_labels - expected.support_labels) % 4)[flipped]
    np.testing.assert_allclose(np.bincount(to, minlength=4) / len(to), [0, 1 / 3, 1 / 3, 1 / 3], atol=0.03)
    assert len({tuple(row) for row in flipped.tolist()}) > 300  # each episode has its own
    jax.tree.map(np.testing.assert_array_equal, many(noisy, key), found)  # a function of the key alone
    none = many(NoisyEpisodes(4, 5, 3, share=0), key)
    jax.tree.map(np.testing.assert_array_equal, none, expected)
    whole = many(NoisyEpisodes(4, 5, 3, share=0.9, held_out=False), key)
    np.testing.assert_array_equal(whole.query_labels, np.tile(np.repeat(np.arange(4), 5), (400, 1)))
    assert np.mean(whole.support_labels != whole.query_labels) > 0.8


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: NoisyEpisodes(4, 5, 3, share=1.0), "from 0 to below 1"),
        (lambda: NoisyEpisodes(4, 5, 3, share=True), "from 0 to below 1"),
        (lambda: NoisyEpisodes(4, 5, 3, fewest_ways=2), "counts as absent"),
        (lambda: ParametricCrossEntropy(temperature=False, smoothing=False, power=False), "CrossEntropy()"),
        (lambda: ParametricCrossEntropy(classes=1), "classes must be a whole number, at least 2"),
        (lambda: NetworkLoss(jax.random.key(0), hidden=0), "hidden must be"),
        (lambda: LearnedLoss(2, loss=NetworkLoss).lam(ravelled), "jax.random.key"),
        (lambda: LearnedLoss(2, regulariser=TowardsClassMeans).lam(ravelled), "image_shape"),
        (lambda: TowardsClassMeans(0), "features must be"),
        (lambda: LearnedLosses(noise=1.5), "from 0 to below 1"),
        (lambda: LearnedLosses(inner_steps=0), "inner_steps must be"),
        (lambda: LearnedLosses(filters=0), "filters must be"),
        (lambda: LearnedLosses(learners=("nobody",)), "it has cross-entropy, learned-step-size"),
    ],
)
def test_what_makes_no_sense_is_refused(make, words):
    with pytest.raises(ValueError, match=words.replace("(", r"\(").replace(")", r"\)")):
        make()


def test_the_centre_of_a_learned_l2():
    lam = eqx.tree_at(
        lambda r: (r.strength, r.pull), LearnedL2({"a": jnp.zeros(2)}), ({"a": jnp.array([2.0, 4.0])},) * 2
    )
    lam = eqx.tree_at(lambda r: r.pull, lam, {"a": jnp.array([1.0, -2.0])})
    np.testing.assert_allclose(lam.centre["a"], [0.5, -0.5])
    np.testing.assert_allclose(jax.grad(lam)({"a": jnp.array([0.5, 0.5])})["a"], [0, 4.0])


class Noise:
    def load(self, data_dir=None):
        random = np.random.default_rng(5)
        draw = lambda most, images: random.integers(0, most, (images, tiny.SIDE, tiny.SIDE))
        make = lambda n: ImageClasses.from_lists({f"{n}-{i}": draw(60, 1) + draw(190, 5) for i in range(n)})
        return MetaDataset("Noise", make(4), make(3), make(2), {"name": "noise"})


def test_the_recipe_from_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(comparison_study, "_DATASETS", {"glyphs": Noise})
    monkeypatch.setattr(training, "make_network", lambda name, shape, key, filters: tiny.Network(shape, key))
    monkeypatch.setitem(CONDITIONS, "glyphs", Conditions(2, 0.1))
    config = LearnedLosses(
        settings=("2way-3shot",),
        learners=("network-loss",),
        queries=2,
        validations=1,
        validation_episodes=4,
        test_episodes=4,
        inner_steps=2,
    )
    summary = study.run(config, tmp_path / "run")
    (row,) = summary["table"]["rows"]
    assert row[1] == "Network loss"
    assert row[6] == "2"
    assert row[8] == "2-way 3-shot, 2 queries a class, T = 2"
    learned = dict(np.load(tmp_path / "run" / "arrays" / "2way-3shot-network-loss.npz"))
    assert learned["slope"].shape == (100,)
    assert np.any(learned["slope"] != slope(CrossEntropy(), 2))  # that of the trained loss, not of the first
    assert (tmp_path / "run" / "figures" / "slopes.png").exists()


def test_the_table_of_the_recipe():
    """Each row beside cross-entropy, and beside the control; the headline is of the noisy tasks."""
    config, measured = LearnedLosses(inner_steps=2, learners=("cross-entropy", "learned-step-size", "network-loss")), {}
    for setting in config.chosen_settings():
        for at, entrant in enumerate(config.chosen_entrants()):
            found = 0.5 + 0.1 * at + np.array([-0.01, 0.01]) * (at + 1)
            test = {"what": "test", "setting": setting.name, "entrant": entrant.name, "accuracy": found.mean()}
            test |= {"training": entrant.training.name, "ci95": 0.1, "steps": 2, "statistics": "set"}
            test["overlapping"] = {"accuracy": 0.5, "ci95": 0.1}
            trained = {"what": "training", "setting": setting.name, "training": entrant.training.name}
            trained |= {"hyperiterations": 2, "best": 2, "stopped": "completed 2 hyperiterations"}
            part = measured.setdefault(f"{setting.name}-{entrant.training.name}", study.Part([trained], {}))
            measured[f"{setting.name}-{entrant.training.name}"] = study.Part(
                [*part.records, test], {**part.arrays, entrant.name: found}
            )
    summary = config.summarise(measured)
    names = ["Cross-entropy", "Cross-entropy, best T", "Learned step size", "Network loss"]
    assert [row[1] for row in summary["table"]["rows"]] == 2 * names
    assert summary["headline"]["number"].startswith("+30.00 ±")
    text = summary["headline"]["text"]
    assert "5-way 5-shot, 30 % of the support labels flipped, T = 2" in text
    assert "; minus a learned step size +10.00 ± " in text
    assert "5-way 1-shot, clean labels; 5-way 5-shot, 30 %" in summary["notes"][0]
    assert "5-way 1-shot, clean labels, minus a learned step size: Cross-entropy -20.00 ±" in summary["notes"][-2]
    clean, noisy = (config.episodes(setting) for setting in config.chosen_settings())
    assert (clean, noisy) == (NoisyEpisodes(5, 1, 10, share=0.0), NoisyEpisodes(5, 5, 10, share=0.3))
    alone = config.headline([(test, found)])
    assert alone["number"] == "80.00 ± 10.00 %"


def test_every_row_of_the_recipe_can_be_traced():
    config, shape, key = LearnedLosses(inner_steps=2), (4, 4, 1), jax.random.key(0)
    of = ImageClasses.from_lists({str(i): np.zeros((20, 4, 4)) for i in range(6)})
    setting = config.chosen_settings()[1]
    data = config.episodes(setting).sample(key, of)
    for entrant in config.entrants():
        learner = entrant.learner(setting.ways)
        lam = learner.lam(tiny.Network(shape, key), shape, key)
        h = learner.hypergradient(learner.method(2))
        assert eqx.filter_eval_shape(lambda lam, h=h: h.value(lam, data, ())[0], lam).shape == ()
        assert entrant.most_steps in (None, 30)
