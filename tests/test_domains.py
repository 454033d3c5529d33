"""Tasks of different structure: the mean over domains by hand, stems and filters, mixed ways."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hyperax as hx
import tiny
from hyperax.domains import mean_over_domains
from hyperax.fewshot import layers
from hyperax.fewshot.domains import (
    DomainEpisodes,
    DomainNets,
    FirstStages,
    MixedEpisodes,
    Resized,
    Stem,
    own_stem,
)
from hyperax.fewshot.episodes import Episode, Episodes
from hyperax.fewshot.image_classes import ImageClasses
from hyperax.fewshot.learners.hyper_representation import HyperRepresentation
from hyperax.fewshot.learners.partition import LastStages, adapted_part, masks_of, merged
from hyperax.fewshot.networks import OmniglotNet
from hyperax.tasks import mean_over_tasks
from problems import assert_trees_close

# Two domains whose data, inner variables, T and dynamics differ, and which share one entry of lam.
PROBLEM = hx.Problem(
    inner=lambda w, lam, d: jnp.sum((w * lam["own"] - d) ** 2) + lam["shared"] * jnp.sum(w**2),
    outer=lambda w, lam, d: (jnp.sum((w - lam["shared"]) ** 2 * jnp.mean(d)), {"norm": jnp.sum(w**2)}),
    init=lambda lam, d: jnp.zeros(d.shape),
    has_metrics=True,
)
DOMAINS = {"line": (0.1, 3, (4, 1)), "plane": (0.05, 2, (2, 3))}
LAM = {"shared": jnp.asarray(0.3), "own": {"line": jnp.asarray([0.5]), "plane": jnp.asarray([0.2, -0.4, 0.9])}}
TASKS = {name: jnp.asarray(np.random.default_rng(0).normal(size=shape)) for name, (_, _, shape) in DOMAINS.items()}
of_domain = lambda lam, domain: {"shared": lam["shared"], "own": lam["own"][domain]}


def functions(method=hx.Reverse, mesh=None):
    return {
        name: mean_over_tasks(hx.hypergradient(PROBLEM, hx.GradientDescent(rate), method(steps)), mesh=mesh)
        for name, (rate, steps, _) in DOMAINS.items()
    }


@jax.jit
@jax.value_and_grad
def by_hand(lam, shares):
    """f, the descent written out; nothing of the library."""
    total = 0.0
    for name, (rate, steps, _) in DOMAINS.items():
        own, values = lam["own"][name], []
        for d in TASKS[name]:
            w = jnp.zeros(d.shape)
            for _ in range(steps):
                w = w - rate * (2 * own * (w * own - d) + 2 * lam["shared"] * w)
            values.append(jnp.sum((w - lam["shared"]) ** 2 * jnp.mean(d)))
        total = total + shares[name] * sum(values) / len(values)
    return total


def test_the_mean_over_domains_is_the_weighted_mean_of_all():
    shares = {"line": 0.75, "plane": 0.25}
    both_modes = functions() | {"plane": functions(hx.Forward)["plane"]}
    h = mean_over_domains(both_modes, of_domain, {"plane": 2.0, "line": 6.0})(LAM, TASKS)
    value, gradient = by_hand(LAM, shares)
    np.testing.assert_allclose(h.value, value, rtol=1e-13)
    assert_trees_close(h.grad, gradient, rtol=1e-12)
    values = {name: h.info["metrics"][f"{name}/value"] for name in DOMAINS}
    np.testing.assert_allclose(sum(shares[name] * values[name] for name in DOMAINS), value, rtol=1e-13)
    assert h.info["metrics"]["plane/norm"].shape == (2,)
    assert h.state["line"].w.shape == (4, 1)


def test_minimize_draws_tasks_of_every_domain_and_records_each():
    def sample(key, tasks):
        return {name: x[jax.random.permutation(key, len(x))[:2]] for name, x in tasks.items()}

    f = mean_over_domains(functions(), of_domain)
    solution = hx.minimize(
        f, LAM, data=TASKS, sample=sample, key=jax.random.key(0), optimizer=optax.sgd(0.1), steps=3, dispatch=2
    )
    assert set(solution.history[-1]["metrics"]) == {"line/value", "line/norm", "plane/value", "plane/norm"}
    assert all(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (LAM, solution.lam)), strict=True))
    warm = mean_over_domains(functions(lambda steps: hx.Implicit(steps, warm_start=True)), of_domain)
    assert set(eqx.filter_eval_shape(warm, LAM, TASKS).carry) == set(DOMAINS)
    with pytest.raises(ValueError, match="remembers the inner variables"):
        hx.minimize(warm, LAM, data=TASKS, sample=sample, key=jax.random.key(0), optimizer=optax.sgd(0.1), steps=1)


def test_tasks_of_every_domain_are_shared_over_a_mesh():
    mesh = jax.make_mesh((2,), ("devices",))
    f = mean_over_domains(functions(mesh=mesh), of_domain)
    assert f.mesh is not None
    h = f(LAM, TASKS)
    assert len(h.state["line"].w.sharding.device_set) == 2
    value, gradient = by_hand(LAM, {"line": 0.5, "plane": 0.5})
    np.testing.assert_allclose(h.value, value, rtol=1e-12)
    assert_trees_close(h.grad, gradient, rtol=1e-12)
    with pytest.raises(ValueError, match="different meshes"):
        mean_over_domains({"line": functions()["line"], "plane": functions(mesh=mesh)["plane"]}, of_domain)


def test_what_makes_no_sense_is_refused_with_the_name_of_the_domain():
    f = mean_over_domains(functions(), of_domain)
    with pytest.raises(ValueError, match="domains are line, plane and data are those of line:"):
        f(LAM, {"line": TASKS["line"]})
    with pytest.raises(ValueError, match="in the domain 'plane': data has no leading axis"):
        f(LAM, TASKS | {"plane": jnp.asarray(1.0)})
    with pytest.raises(ValueError, match="positive number for each of the domains line, plane"):
        mean_over_domains(functions(), of_domain, {"line": 1.0, "plane": 0.0})
    with pytest.raises(ValueError, match="one domain at least"):
        mean_over_domains({})
    with pytest.raises(ValueError, match="the domain 'line' has a function"):
        mean_over_domains({"line": of_domain})  # pyright: ignore[reportArgumentType]
    more = LAM | {"own": LAM["own"] | {"space": jnp.zeros(4)}}
    with pytest.warns(hx.UnusedLeafWarning, match=r"lam\['own'\]\['space'\] does not reach"):
        f(more, TASKS)


# Networks with stems.

SHAPES = {"small": (6, 7, 1), "colour": (11, 11, 3)}
NETS = DomainNets(SHAPES, jax.random.key(0), filters=2, size=5)


def test_domains_share_what_follows_their_stems(monkeypatch):
    monkeypatch.setattr(layers, "convolve", tiny.middle)
    key = jax.random.key(3)

    @eqx.filter_jit
    def both(key):
        net = DomainNets({"images": (28, 28, 1)}, key, filters=2).of("images")
        convolutions = (net.stem.convolution, *(stage.convolution for stage in net.shared))
        published = OmniglotNet((28, 28, 1), key, filters=2)
        published = eqx.tree_at(lambda net: net.convolutions, published, convolutions)
        images = jax.random.uniform(key, (2, 28, 28, 1))
        return net(images), published(images)

    np.testing.assert_array_equal(*both(key))
    for name, shape in SHAPES.items():
        assert eqx.filter_eval_shape(NETS.of(name), jnp.zeros((2, *shape))).shape == (2, 2)
    alone = DomainNets({"colour": SHAPES["colour"]}, jax.random.key(0), filters=2, size=5).of("colour")
    assert_trees_close(alone, NETS.of("colour"), rtol=0)  # wherever it starts, whoever the others are
    with pytest.raises(ValueError, match="no stem for 'sound', only for small, colour"):
        own_stem({"network": NETS}, "sound")
    for wrong, message in (({}, "one domain at least"), ({"dot": (3, 3, 1)}, "Stem needs images of at least 4 x 4")):
        with pytest.raises(ValueError, match=message):
            DomainNets(wrong, jax.random.key(0))
    with pytest.raises(ValueError, match="size must be a whole number, at least 5"):
        DomainNets(SHAPES, jax.random.key(0), size=4)


def test_filters_split_the_network_into_lam_and_w():
    """The stem in w and the shared layers in lam, or the other way round; the two are the whole network."""
    network, parts = NETS.of("small"), {}
    for adapted in (FirstStages(1), LastStages(3)):
        masks = masks_of(adapted, network)
        own = parts[type(adapted)] = adapted_part(masks, network)
        assert_trees_close(
            merged(masks, jax.tree.map(jnp.negative, own), network),
            eqx.apply_updates(network, jax.tree.map(lambda x: -2 * x, own)),
            rtol=0,
        )
    assert jax.tree.leaves(parts[FirstStages].shared) == jax.tree.leaves(parts[LastStages].stem) == []
    assert_trees_close(parts[FirstStages].stem, network.stem, rtol=0)
    assert_trees_close(parts[LastStages].shared, network.shared, rtol=0)
    with pytest.raises(ValueError, match="DomainNet has 4 stages, and the first 5"):
        FirstStages(5)(network)


def test_one_network_for_images_of_any_size():
    class Sizes(eqx.Module):
        def __call__(self, images, moments):
            return jnp.mean(images, (1, 2))[:, :1] * images.shape[1]

    small = jnp.full((2, 3, 9, 1), 0.5)
    np.testing.assert_allclose(Resized(Sizes(), 6)(small), np.full((2, 1), 3.0))
    wide = eqx.filter_eval_shape(Stem((21, 50, 1), jax.random.key(0), 2, size=7), jnp.zeros((1, 21, 50, 1)))
    assert wide.shape == (1, 7, 7, 2)


# Tasks with 3, 5 and 10 classes in one mini-batch.

SIDE = tiny.SIDE
noise = np.random.default_rng(1).integers(0, 256, (12, 4, SIDE, SIDE))
CLASSES = jax.tree.map(jnp.asarray, ImageClasses.from_lists({str(i): images for i, images in enumerate(noise)}))
MIXED = MixedEpisodes(ways=(3, 5, 10), shots=(2, 1, 1), queries=2)
DOUBLE = jax.tree.map(
    lambda x: x.astype(jnp.float64) if eqx.is_array(x) else x, tiny.Network((SIDE, SIDE, 1), jax.random.key(2))
)


@eqx.filter_jit
def draw(key):
    return MIXED.sample(key, CLASSES)


def unpadded(tasks, j):
    task = jax.tree.map(lambda x: x[j], tasks)
    support, query = np.flatnonzero(task.support_mask), np.flatnonzero(task.query_mask)
    return Episode(task.support[support], task.support_labels[support], task.query[query], task.query_labels[query])


def test_a_mini_batch_of_3_5_and_10_ways_is_the_mean_of_its_tasks():
    tasks = draw(jax.random.key(5))
    lam = {"network": DOUBLE}
    of_ways = lambda ways: HyperRepresentation(ways, step_size=0.3).hypergradient(hx.Reverse(2))
    alone = [unpadded(tasks, j) for j in range(3)]
    for task, ways, shots in zip(alone, MIXED.ways, (2, 1, 1), strict=True):
        assert task.support_labels.tolist() == np.repeat(np.arange(ways), shots).tolist()
        assert task.query_labels.tolist() == np.repeat(np.arange(ways), 2).tolist()

    @eqx.filter_jit
    def both(lam, tasks, alone):
        values = [of_ways(ways).value(lam, task, ())[0] for task, ways in zip(alone, MIXED.ways, strict=True)]
        return mean_over_tasks(of_ways(10)).value(lam, tasks, ())[0], values

    mean, values = both(lam, tasks, alone)
    assert mean.dtype == jnp.float64
    np.testing.assert_allclose(mean, np.mean(values), rtol=1e-12)


def test_mixed_ways_train_in_one_compiled_step():
    traces, steps = [], []

    class Counted(tiny.Network):
        def __call__(self, images, moments):
            traces.append(images.shape)
            return super().__call__(images, moments)

    f = mean_over_tasks(HyperRepresentation(10, step_size=0.3).hypergradient(hx.Reverse(2)))
    lam, values = {"network": Counted((SIDE, SIDE, 1), jax.random.key(2))}, []

    @eqx.filter_jit
    def step(lam, tasks):
        steps.append(1)
        h = f(lam, tasks)
        moved = jax.tree.map(lambda x, g: x - 0.1 * g, eqx.filter(lam, eqx.is_inexact_array), h.grad)
        return eqx.combine(moved, lam), h.value

    eqx.filter_eval_shape(f.evaluate, lam, jax.tree.map(lambda x: x[:1], draw(jax.random.key(0))), ())
    of_one_task = len(traces)
    traces.clear()
    eqx.filter_eval_shape(f.evaluate, lam, draw(jax.random.key(0)), ())
    assert len(traces) == of_one_task > 0  # the tasks are mapped, whatever their numbers of classes
    for k in range(4):
        lam, value = step(lam, draw(jax.random.key(k)))
        values.append(float(value))
        if k == 0:
            traces.clear()
    any_ways = eqx.filter_jit(Episodes(10, 2, 2, fewest_ways=3).sample_many)(jax.random.key(4), CLASSES, 3)
    step(lam, any_ways)  # other numbers of classes, drawn anew
    assert (len(steps), traces) == (1, [])
    assert len(set(values)) == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ways": (3, 1)}, "ways must be a whole number, at least 2"),
        ({"ways": 3}, "a tuple with the number of classes"),
        ({"shots": (1, 1)}, "shots are for 2 tasks and ways for 3"),
        ({"shots": 0}, "shots must be"),
        ({"queries": 0}, "queries must be"),
    ],
)
def test_mixed_episodes_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        MixedEpisodes(**{"ways": (3, 5, 10), **settings})


def test_episodes_of_a_domain_do_not_depend_on_the_others():
    both = DomainEpisodes({"a": Episodes(3, 1, 1), "b": Episodes(5, 1, 2)}, tasks=2)
    drawn = eqx.filter_jit(both)(jax.random.key(0), {"a": CLASSES, "b": CLASSES})
    alone = eqx.filter_jit(DomainEpisodes({"b": Episodes(5, 1, 2)}, tasks=2))(jax.random.key(0), {"b": CLASSES})
    np.testing.assert_array_equal(drawn["b"].query, alone["b"].query)
    assert drawn["a"].query.shape == (2, 3, SIDE, SIDE, 1)
    with pytest.raises(ValueError, match="classes are of a and episodes of a, b"):
        both(jax.random.key(0), {"a": CLASSES})
    with pytest.raises(ValueError, match="10-way episodes need 10"):
        MIXED.check(CLASSES.subset(range(5)))
