"""Episodes, layers and networks, each against an independent computation."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hyperax as hx
from hyperax.fewshot import layers
from hyperax.fewshot.episodes import Episodes
from hyperax.fewshot.image_classes import ImageClasses
from hyperax.fewshot.layers import BatchNorm, Convolution, convolve, max_pool
from hyperax.fewshot.networks import C4L, OmniglotNet, PerImage, ResidualNet, encode
from problems import small_net

COUNTS = (4, 9, 5, 7, 4, 6)


def numbered(counts=COUNTS):
    """Images that carry their class and their number in the class in two pixels."""
    return ImageClasses.from_lists(
        {f"class {c}": np.array([[[c, i]] for i in range(count)]) for c, count in enumerate(counts)}
    )


def drawn(episodes, classes, count, seed=0):
    """(support, query) ids, [count, ways, shots or queries, (class, number)]."""
    many = jax.jit(lambda key: episodes.sample_many(key, classes, count))(jax.random.key(seed))
    ids = lambda images, each: np.asarray(images).reshape(count, episodes.ways, each, 2)
    return ids(many.support, episodes.shots), ids(many.query, episodes.queries)


def test_episodes_are_disjoint_and_stay_in_their_classes():
    support, query = drawn(Episodes(3, 1, 3), numbered(), 400)
    both = np.concatenate([support, query], 2)
    assert np.all(both[..., 0] == both[:, :, :1, 0])  # one class a row
    assert all(len(set(classes)) == 3 for classes in both[:, :, 0, 0].tolist())
    numbers = np.sort(both[..., 1], -1)
    assert np.all(numbers[..., 1:] != numbers[..., :-1])  # all images of a class different
    assert np.all(both[..., 1] < np.array(COUNTS)[both[..., 0]])  # and of that class
    assert {tuple(x) for x in both.reshape(-1, 2)} == {(c, i) for c, n in enumerate(COUNTS) for i in range(n)}


def chi_square(observed):
    expected = observed.sum() / observed.size
    return np.sum((observed - expected) ** 2) / expected


def test_classes_and_images_are_drawn_uniformly():
    support, query = drawn(Episodes(2, 1, 2), numbered((5, 5, 5, 5)), 3000)
    # The mean of chi-square with k degrees of freedom is k, its standard deviation sqrt(2 k).
    for ids in (support[:, :, 0], query[:, :, 0], query[:, :, 1]):
        for observed in (np.bincount(ids[..., 0].ravel(), minlength=4), np.bincount(ids[..., 1].ravel(), minlength=5)):
            assert chi_square(observed) < observed.size + 6 * np.sqrt(2 * observed.size)
    first = np.bincount(support[:, 0, 0, 0], minlength=4)  # a label says nothing of the class
    assert chi_square(first) < 4 + 6 * np.sqrt(8)


def test_overlapping_sets_are_drawn_independently():
    episodes = Episodes(2, 2, 3, overlap=True)
    support, query = drawn(episodes, numbered((5, 5, 5)), 3000)
    for ids in (support, query):
        numbers = np.sort(ids[..., 1], -1)
        assert np.all(numbers[..., 1:] != numbers[..., :-1])
    assert np.all(support[:, :, 0, 0] == query[:, :, 0, 0])
    shared = (query[..., None, 1] == support[..., None, :, 1]).any(-1)
    assert shared.mean() == pytest.approx(2 / 5, abs=0.02)  # K / n


def test_a_key_is_an_episode():
    episodes, classes = Episodes(3, 1, 2), numbered()
    sample = jax.jit(lambda key: episodes.sample(key, classes))
    one, again, other = (sample(jax.random.key(seed)) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, one, again)
    assert np.any(one.support != other.support)
    assert (one.support.shape, one.query.shape) == ((3, 1, 2, 1), (6, 1, 2, 1))
    assert one.support_labels.tolist() == [0, 1, 2]
    assert one.query_labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert {one.support.dtype, one.support_labels.dtype} == {jnp.dtype("uint8"), jnp.dtype("int32")}


@pytest.mark.parametrize(
    ("episodes", "message"),
    [
        (Episodes(7, 1, 1), "7-way episodes need 7 classes and the set has 6: use fewer ways or more classes"),
        (Episodes(2, 2, 3), r"class 'class 0' of the set has 4 images and an episode needs 5 \(2 shots, 3 queries\)"),
        (Episodes(2, 2, 5, overlap=True), "class 'class 0' of the set has 4 images and an episode needs 5"),
    ],
)
def test_classes_that_cannot_give_the_episodes(episodes, message):
    with pytest.raises(ValueError, match=message):
        episodes.check(numbered(), "the set")


def test_classes_that_just_can():
    Episodes(6, 1, 3).check(numbered())
    Episodes(6, 4, 4, overlap=True).check(numbered())


@pytest.mark.parametrize("counts", [(1, 1, 1), (5, 0, 1), (5, 1, -1), (5, 1.0, 1), (5, True, 1)])
def test_counts_that_cannot_be(counts):
    with pytest.raises(ValueError, match="must be a whole number, at least"):
        Episodes(*counts)


# Layers.


@pytest.mark.parametrize("shape", [(7, 8), (2, 1)], ids=str)
@pytest.mark.parametrize(("size", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2)])
def test_patches_are_a_convolution(size, stride, shape):
    draw = np.random.default_rng(0)
    x, weight = jnp.asarray(draw.normal(size=(2, *shape, 3))), jnp.asarray(draw.normal(size=(size, size, 3, 4)))

    def native(x, weight):
        return jax.lax.conv_general_dilated(
            x, weight, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    def patched(x, weight):
        return layers.patches(x, size, stride) @ weight.reshape(-1, 4)

    np.testing.assert_allclose(patched(x, weight), native(x, weight), atol=1e-12)
    np.testing.assert_allclose(convolve(x, weight, stride), native(x, weight), atol=1e-12)
    bent = lambda f: jax.jit(jax.grad(lambda x, weight: jnp.sum(jnp.sin(f(x, weight))), argnums=(0, 1)))(x, weight)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-11), bent(patched), bent(native))


@pytest.mark.parametrize("inputs", [3, 16])  # narrow and wide patches are multiplied differently
def test_derivatives_of_a_convolution(inputs):
    draw = np.random.default_rng(0)
    shapes = [(2, 5, 6, inputs), (3, 3, inputs, 4)]
    at, along = ([jnp.asarray(draw.normal(size=shape)) for shape in shapes] for _ in range(2))
    native = lambda x, weight: jax.lax.conv_general_dilated(
        x, weight, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )

    def derivatives(f):
        slope = jax.grad(lambda x, weight: jnp.sum(jnp.sin(f(x, weight))), argnums=(0, 1))
        both = lambda x, weight: jax.jvp(slope, (x, weight), tuple(along))
        two = [jnp.stack([leaf, 0.5 * leaf]) for leaf in at]
        return jax.jit(jax.vmap(both))(*two)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10),
        derivatives(lambda x, weight: convolve(x, weight, 2)),
        derivatives(native),
    )


@pytest.mark.parametrize("shape", [(4, 6), (5, 7)], ids=str)
@pytest.mark.parametrize("padding", ["VALID", "SAME"])
def test_max_pool(padding, shape):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, *shape, 3))) - 5.0  # negative: padding must not win
    native = lambda x: jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), padding)
    ours = lambda x: max_pool(x, same=padding == "SAME")
    np.testing.assert_array_equal(ours(x), native(x))
    bent = lambda f: jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(f(x)))))(x)
    np.testing.assert_allclose(bent(ours), bent(native), rtol=1e-12)


def test_batch_norm():
    x = np.random.default_rng(0).normal(2.0, 3.0, size=(4, 3, 5, 2))
    mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
    y = BatchNorm(jnp.array([0.5, -1.0]))(jnp.asarray(x), layers.own_moments)
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(variance + 1e-3) + np.array([0.5, -1.0]), rtol=1e-12)
    first = BatchNorm(jnp.zeros(2))(jnp.asarray(x), layers.moments_of_first(3))
    np.testing.assert_allclose(first, (x - x[:3].mean((0, 1, 2))) / np.sqrt(x[:3].var((0, 1, 2)) + 1e-3), rtol=1e-12)


def test_glorot_uniform():
    weight = Convolution(32, 64, jax.random.key(0)).weight
    bound = np.sqrt(6 / (9 * 32 + 9 * 64))
    assert weight.dtype == jnp.float32
    assert 0.99 * bound < jnp.max(jnp.abs(weight)) <= bound
    assert jnp.std(weight) == pytest.approx(bound / np.sqrt(3), rel=0.02)


# Networks.


@pytest.mark.parametrize(
    ("network", "shape", "features", "weights"),
    [
        (OmniglotNet, (28, 28, 1), 256, 9 * 64 + 3 * 9 * 64 * 64 + 4 * 64),
        (C4L, (84, 84, 3), 800, 9 * 3 * 32 + 3 * 9 * 32 * 32 + 4 * 32),
        (ResidualNet, (84, 84, 3), 512, None),
    ],
)
def test_networks_have_the_papers_sizes(network, shape, features, weights):
    built = jax.eval_shape(lambda key: network(shape, key), jax.random.key(0))
    images = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    assert eqx.filter_eval_shape(lambda net, x: net(x), built, images).shape == (2, features)
    if weights is not None:
        assert sum(leaf.size for leaf in jax.tree.leaves(built)) == weights


@pytest.mark.parametrize(("network", "least"), [(OmniglotNet, 9), (C4L, 16), (ResidualNet, 16)])
def test_images_that_are_too_small(network, least):
    jax.eval_shape(lambda key: network((least, least, 1), key), jax.random.key(0))
    with pytest.raises(
        ValueError, match=f"needs images of at least {least} x {least} pixels .* these are {least - 1} x 40 x 1"
    ):
        network((least - 1, 40, 1), jax.random.key(0))


NET = small_net()
IMAGES = jnp.asarray(np.random.default_rng(2).uniform(size=(8, 9, 9, 1)))
SUPPORT, QUERY = IMAGES[:3], IMAGES[3:]


@jax.jit
def features_of(images):
    return NET(images)


@jax.jit
def features(support, query):
    return {name: encode(NET, support, query, name) for name in ("set", "support", "episode")}


def test_whose_statistics():
    base = features(SUPPORT, QUERY)
    other_support = features(SUPPORT**2, QUERY)
    other_last_query = features(SUPPORT, QUERY.at[-1].multiply(0.5))
    changes = lambda a, b: bool(np.max(np.abs(a - b)) > 1e-6)
    #                    query by support            support by query             first query by last query
    seen = {
        name: (
            changes(base[name][1], other_support[name][1]),
            changes(base[name][0], other_last_query[name][0]),
            changes(base[name][1][0], other_last_query[name][1][0]),
        )
        for name in base
    }
    assert seen == {
        "set": (False, False, True),
        "support": (True, False, False),
        "episode": (True, True, True),
    }
    np.testing.assert_allclose(base["set"][1], features_of(QUERY), rtol=1e-12)
    np.testing.assert_allclose(base["support"][0], features_of(SUPPORT), rtol=1e-12)
    np.testing.assert_allclose(jnp.concatenate(base["episode"]), features_of(IMAGES), rtol=1e-12)


def test_batch_statistics_are_those_of_all_episodes():
    tasks = jnp.stack([IMAGES[:4], IMAGES[4:]])
    support, query = jax.jit(jax.vmap(lambda x: encode(NET, x[:1], x[1:], "batch"), axis_name=hx.TASKS))(tasks)
    # Tasks of one size: the mean variance about each task's mean is not the variance of all, so compare by the mean.
    together = jnp.concatenate([support, query], 1).reshape(8, -1)
    x = NET.convolution(IMAGES)
    mean, _ = jax.vmap(layers.moments_over_tasks, axis_name=hx.TASKS)(x.reshape(2, 4, *x.shape[1:]))
    np.testing.assert_allclose(mean, jnp.stack([jnp.mean(x, (0, 1, 2))] * 2), rtol=1e-12)
    np.testing.assert_allclose(together, features_of(IMAGES), rtol=1e-10)


def test_unknown_statistics():
    with pytest.raises(ValueError, match="unknown statistics 'sets': use 'set', 'support', 'episode' or 'batch'"):
        encode(NET, SUPPORT, QUERY, "sets")


@pytest.mark.parametrize("first", [True, False])
def test_any_module_is_a_representation(first):
    module = eqx.nn.Conv2d(1, 2, 3, key=jax.random.key(0)) if first else (lambda image: image[:2, :, 0] ** 2)
    got = jax.jit(PerImage(module, channels_first=first).__call__)(IMAGES)
    one = jax.jit(lambda x: module(jnp.transpose(x, (2, 0, 1)) if first else x).ravel())
    np.testing.assert_allclose(got, [one(x) for x in IMAGES], rtol=1e-6)
    np.testing.assert_array_equal(encode(lambda x, moments: x, SUPPORT, QUERY)[1], QUERY)


@pytest.mark.parametrize(
    ("network", "shape", "cost"),
    [
        (OmniglotNet, (28, 28, 1), "2.7 million"),
        (C4L, (84, 84, 3), "27 million"),
        (ResidualNet, (84, 84, 3), "1.3 billion"),
    ],
)
def test_the_cost_in_the_docstring_is_that_of_the_convolutions(network, shape, cost, monkeypatch):
    counted = []

    def count(x, weight, stride):
        rows, columns = (-(-side // stride) for side in x.shape[1:3])
        counted.append(rows * columns * weight.size)
        return jnp.zeros((x.shape[0], rows, columns, weight.shape[-1]), x.dtype)

    monkeypatch.setattr(layers, "convolve", count)
    eqx.filter_eval_shape(lambda: network(shape, jax.random.key(0))(jnp.zeros((1, *shape))))
    number, unit = cost.split()
    assert sum(counted) == pytest.approx(float(number) * {"million": 1e6, "billion": 1e9}[unit], rel=0.02)
    assert f"Cost: {cost} multiplications" in network.__doc__
