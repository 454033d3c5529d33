"""Few-shot tasks of different structure: networks with a stem for each data set, mini-batches that mix ways."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from hyperax.fewshot.episodes import Episode, Episodes
from hyperax.fewshot.image_classes import ImageClasses
from hyperax.fewshot.layers import Activations, BatchNorm, Convolution, Moments, own_moments
from hyperax.fewshot.networks import Features, Network, Stage, require_size, stages_of, through
from hyperax.problem import Lam
from hyperax.rollout import check_steps

ImageShape = tuple[int, int, int]


class Resize(eqx.Module):
    """Activations of any height and width brought to size x size: linear interpolation, averages where they shrink."""

    size: int = eqx.field(static=True)

    def __call__(self, images: Activations, moments: Moments = own_moments) -> Activations:
        """[images, height, width, channels] -> [images, size, size, channels]; nothing to do if they have that size."""
        count, channels = images.shape[0], images.shape[3]
        return jax.image.resize(images, (count, self.size, self.size, channels), "linear")


class Stem(eqx.Module):
    """The first layer of a domain: from its images to the activations that all domains have in common.

        stem(x) = resize(ReLU(batch normalisation(3x3 convolution(x))))     [height, width, channels] -> [s, s, filters]

    Arguments:
        image_shape: (height, width, channels) of the domain.
        key: for the Glorot-uniform initialisation.
        filters: those that the shared layers expect.
        size: s. The convolution has stride 2 where that leaves s pixels at least; what is left or missing is
            interpolated.

    Raises: `ValueError` for images below 4 x 4.
    Cost: of 28 x 28 x 1 to s = 14, as the first layer of `OmniglotNet`; nothing is interpolated then.
    Reference: Bridge paper 2017, end of Sec. 4 (structurally different instance spaces).
    Do not use it on photographs much larger than 2 s: all but the averages of neighbouring activations is lost.

    >>> stem = lambda *shape: Stem(shape, jax.random.key(0), filters=4, size=7)
    >>> shape_of = lambda *shape: stem(*shape)(jnp.zeros((5, *shape))).shape
    >>> shape_of(14, 14, 1), shape_of(4, 4, 1), shape_of(16, 24, 3)
    ((5, 7, 7, 4), (5, 7, 7, 4), (5, 7, 7, 4))
    """

    convolution: Convolution
    normalisation: BatchNorm
    resize: Resize

    def __init__(self, image_shape: ImageShape, key: Key[Array, ""], filters: int = 64, size: int = 14):
        require_size("Stem", image_shape, 4)
        stride = 2 if -(-min(image_shape[:2]) // 2) >= size else 1
        self.convolution = Convolution(image_shape[2], filters, key, stride=stride)
        self.normalisation = BatchNorm(jnp.zeros(filters))
        self.resize = Resize(size)

    def __call__(self, images: Activations, moments: Moments = own_moments) -> Activations:
        """[images, height, width, channels] -> [images, size, size, filters]."""
        return self.resize(jax.nn.relu(self.normalisation(self.convolution(images), moments)))


class DomainNet(eqx.Module):
    """The network of one domain: its own stem, then layers that it shares with other domains.

    Arguments:
        stem: images -> activations of the common shape.
        shared: what follows, each (activations, moments) -> activations.

    Its first stage is the stem, so filters split it into lam and w: `FirstStages(1)` adapts the stem to each task and
    leaves the shared layers in lam, `LastStages(3)` adapts what is shared from a common start.

    Cost: the stages'.
    Reference: Bridge paper 2017, end of Sec. 4.
    Do not use it as lam of several domains: `DomainNets` holds the shared layers once.

    >>> net = DomainNet(Stem((8, 8, 1), jax.random.key(0), filters=4, size=6), ())
    >>> net(jnp.zeros((5, 8, 8, 1))).shape
    (5, 144)
    """

    stem: Stem
    shared: tuple[Stage, ...]

    def __call__(self, images: Activations, moments: Moments = own_moments) -> Features:
        """[images, height, width, channels] in [0, 1] -> [images, features], as many for every domain."""
        return through(self.stages, images, moments).reshape(images.shape[0], -1)

    @property
    def stages(self) -> tuple[Any, ...]:
        """The stem and the shared layers."""
        return (self.stem, *self.shared)


class DomainNets(eqx.Module):
    """One pytree for several domains: a stem for each, and the layers that all share.

        h_d(x) = shared(stem_d(x)),   shared: three strided 3x3 convolutions, batch normalisation, ReLU: 14-7-4-2

    Of 28 x 28 images h_d is `OmniglotNet`. The stem of a domain starts at the same numbers whichever the others are.

    Arguments:
        image_shapes: for each domain (height, width, channels).
        key: for the Glorot-uniform initialisation.
        filters: of every layer.
        size: side of the activations that all stems end in, at least 5, so that the strides do not meet a single pixel
            early.

    As lam of a learner it is `{"network": DomainNets}`, and `own_stem` is the view for `mean_over_domains`.

    Raises: `ValueError` for no domain, images that are too small, and, of `of`, an unknown domain.
    Cost: memory for the shared layers once; an image of a domain costs what its stem and the shared layers cost.
    Reference: Bridge paper 2017, end of Sec. 4.
    Do not use it where domains have images of one kind: one stem learns from all of them (`Resized`).

    >>> nets = DomainNets({"digits": (8, 8, 1), "photographs": (32, 32, 3)}, jax.random.key(0), filters=4)
    >>> nets.of("digits")(jnp.zeros((5, 8, 8, 1))).shape, nets.of("photographs")(jnp.zeros((5, 32, 32, 3))).shape
    ((5, 16), (5, 16))
    >>> nets.of("digits").shared is nets.of("photographs").shared
    True
    """

    stems: dict[str, Stem]
    shared: tuple[Stage, ...]

    def __init__(self, image_shapes: Mapping[str, ImageShape], key: Key[Array, ""], filters: int = 64, size: int = 14):
        check_steps(filters, "filters", 1)
        check_steps(size, "size", 5)
        if not image_shapes:
            raise ValueError("DomainNets needs the image shape of one domain at least")
        for_shared, for_stems = jax.random.split(key)
        self.shared = tuple(
            Stage(Convolution(filters, filters, k, stride=2), BatchNorm(jnp.zeros(filters)), pooled=False)
            for k in jax.random.split(for_shared, 3)
        )
        self.stems = {
            name: Stem(shape, own_key(for_stems, name), filters, size) for name, shape in image_shapes.items()
        }

    def of(self, domain: str) -> DomainNet:
        """The network of a domain."""
        if domain not in self.stems:
            raise ValueError(
                f"there is no stem for {domain!r}, only for {', '.join(self.stems)}: for a new domain make a Stem and "
                "DomainNet(stem, nets.shared)"
            )
        return DomainNet(self.stems[domain], self.shared)


def own_key(key: Key[Array, ""], name: str) -> Key[Array, ""]:
    """The random key of a name: the same whichever other names there are."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def own_stem(lam: Lam, domain: str) -> Lam:
    """What a domain sees of a learner's lam: its own stem and the shared layers; other entries are shared by all.

        v_d({"network": (stem_1, stem_2, ..., shared), ...}) = {"network": shared o stem_d, ...}

    Arguments:
        lam: `{"network": DomainNets, ...}`.
        domain: one of its stems.

    Returns: `{"network": DomainNet, ...}`, the lam of a few-shot learner on that domain.
    Raises: `ValueError` for a domain without a stem.
    Cost: none.
    Do not use it with a learned head: that has a number of ways, which differs between domains; a head at zero serves
    any.

    >>> lam = {"network": DomainNets({"digits": (8, 8, 1)}, jax.random.key(0), filters=4)}
    >>> type(own_stem(lam, "digits")["network"]).__name__
    'DomainNet'
    """
    return {**lam, "network": lam["network"].of(domain)}


class Resized(eqx.Module):
    """A network on images of any size, resized to the one it was made for: what domains share without own stems.

        h(x) = network(resize(x))

    Arguments:
        network: made for images of size x size and the channels of all domains.
        size: in pixels.

    Cost: the network's, whatever the size of the images: small ones become as dear as large ones.
    Reference: none; it is what stems are compared with.
    Do not use it for domains with other channels: only a stem of its own takes those.

    >>> from hyperax.fewshot import OmniglotNet
    >>> net = Resized(OmniglotNet((28, 28, 1), jax.random.key(0), filters=4), 28)
    >>> net(jnp.zeros((5, 8, 8, 1))).shape
    (5, 16)
    """

    network: Network
    size: int = eqx.field(static=True)

    def __call__(self, images: Activations, moments: Moments = own_moments) -> Features:
        """[images, height, width, channels] in [0, 1] -> [images, features]."""
        return self.network(Resize(self.size)(images), moments)

    @property
    def stages(self) -> tuple[Any, ...]:
        """Resizing, which has no parameters, and the stages of the network."""
        return (Resize(self.size), *stages_of(self.network))


class FirstStages(eqx.Module):
    """A filter in depth, from below: the first stages are initialised and adapted, the others hyperparameters.

        h = shared o stem,   w = (stem, head),   stem_0 = lam_stem,   shared = lam_shared throughout

    Arguments:
        count: how many stages are adapted; 1 is the stem of a `DomainNet`.

    Raises: `ValueError` for count < 1, and for a network with fewer stages.
    Cost: of an inner step, a forward and a backward pass of the whole network, as all of it follows what is adapted.
    Reference: Bridge paper 2017, end of Sec. 4 (in depth, the other way round).
    Do not use it to save time: `LastStages` computes the stages below once an episode.

    >>> net = DomainNets({"digits": (8, 8, 1)}, jax.random.key(0), filters=4).of("digits")
    >>> mask = FirstStages(1)(net)
    >>> mask.stem.convolution.weight, [stage.convolution.weight for stage in mask.shared]
    (True, [False, False, False])
    """

    count: int = 1

    def __check_init__(self):
        check_steps(self.count, "count", 1)

    def __call__(self, network: Network) -> Any:
        """The tree of truth values."""
        stages = stages_of(network)
        if len(stages) < self.count:
            raise ValueError(
                f"{type(network).__name__} has {len(stages)} stages, and the first {self.count} are to be adapted: use "
                "a smaller count, or True for the whole network"
            )
        nothing = jax.tree.map(lambda _: False, network)
        lower = lambda tree: jax.tree.leaves(stages_of(tree)[: self.count])
        return eqx.tree_at(lower, nothing, replace_fn=lambda _: True)


class MixedEpisodes(eqx.Module):
    """Mini-batches of tasks with exactly these numbers of classes and shots, in one shape: masks, not ragged arrays.

        task j has N_j classes and K_j support images a class, padded to max N and max K

    Arguments:
        ways: N_j, one for each task of the mini-batch.
        shots: K_j, one number for all tasks or one for each.
        queries: Q, query images a class.

    Raises: `ValueError` for counts below 1 (ways below 2), or shots for another number of tasks; `check` for classes
    that cannot give such episodes.
    Cost: every task that of one with max N classes and max K shots.
    Reference: Bridge paper 2017, end of Sec. 4.
    Do not use it for tasks of very different sizes, where most of the work is padding: make them domains.

    >>> classes = ImageClasses.from_lists({name: [[[0]]] * 4 for name in "abcde"})
    >>> tasks = MixedEpisodes(ways=(2, 5), shots=1, queries=3).sample(jax.random.key(0), classes)
    >>> tasks.support.shape, tasks.support_mask.sum(1).tolist(), tasks.query_mask.sum(1).tolist()
    ((2, 5, 1, 1, 1), [2, 5], [6, 15])
    """

    ways: tuple[int, ...]
    shots: int | tuple[int, ...] = 1
    queries: int = 15

    def __check_init__(self):
        if not isinstance(self.ways, tuple) or not self.ways:
            raise ValueError(f"ways is {self.ways!r}; it must be a tuple with the number of classes of each task")
        if isinstance(self.shots, tuple) and len(self.shots) != len(self.ways):
            raise ValueError(f"shots are for {len(self.shots)} tasks and ways for {len(self.ways)}: give one a task")
        for count in self.ways:
            check_steps(count, "ways", 2)
        for count in self._shots:
            check_steps(count, "shots", 1)
        check_steps(self.queries, "queries", 1)

    @property
    def _shots(self) -> tuple[int, ...]:
        """K_j of every task."""
        return self.shots if isinstance(self.shots, tuple) else (self.shots,) * len(self.ways)

    @property
    def _largest(self) -> Episodes:
        """What every task is padded to."""
        return Episodes(max(self.ways), max(self._shots), self.queries)

    def check(self, classes: ImageClasses, where: str = "this set") -> None:
        """Raise `ValueError` if these classes cannot give the largest of the tasks."""
        self._largest.check(classes, where)

    def sample(self, key: Key[Array, ""], classes: ImageClasses) -> Episode:
        """One mini-batch, the tasks on a leading axis in the order of `ways`; traceable."""
        largest = self._largest
        tasks = largest.sample_many(key, classes, len(self.ways))
        in_task = np.arange(largest.ways) < np.asarray(self.ways)[:, None]
        shown = np.arange(largest.shots) < np.asarray(self._shots)[:, None]
        support = (in_task[:, :, None] & shown[:, None, :]).reshape(len(self.ways), -1)
        query = np.repeat(in_task, self.queries, axis=1)
        return tasks._replace(support_mask=jnp.asarray(support), query_mask=jnp.asarray(query))


class DomainEpisodes(eqx.Module):
    """Episodes of several domains for one hyperiteration: `minimize(..., sample=DomainEpisodes(episodes, tasks))`.

        sample(key, {domain: classes}) = {domain: `tasks` episodes}

    Arguments:
        episodes: for each domain what is drawn there.
        tasks: episodes of each domain.

    Raises: `ValueError` for tasks below 1, and for classes of other domains.
    Cost: that of the draws.
    Reference: Bridge paper 2017, end of Sec. 4.
    Do not use it for tasks of one data set that differ in their numbers of classes alone: `MixedEpisodes`.

    The episodes of a domain depend on the key and its name alone: a learner of several domains sees those that a
    learner of one sees.

    >>> classes = ImageClasses.from_lists({name: [[[0]]] * 4 for name in "abc"})
    >>> sample = DomainEpisodes({"two": Episodes(2, 1, 3), "three": Episodes(3, 1, 1)}, tasks=4)
    >>> drawn = sample(jax.random.key(0), {"two": classes, "three": classes})
    >>> drawn["two"].support.shape, drawn["three"].support.shape
    ((4, 2, 1, 1, 1), (4, 3, 1, 1, 1))
    """

    episodes: dict[str, Episodes]
    tasks: int

    def __check_init__(self):
        check_steps(self.tasks, "tasks", 1)

    def __call__(self, key: Key[Array, ""], classes: Mapping[str, ImageClasses]) -> dict[str, Episode]:
        """The episodes of one hyperiteration."""
        if set(classes) != set(self.episodes):
            raise ValueError(f"classes are of {', '.join(classes)} and episodes of {', '.join(self.episodes)}")
        return {
            name: episodes.sample_many(own_key(key, name), classes[name], self.tasks)
            for name, episodes in self.episodes.items()
        }
