"""Representations h_lam: images -> features, the papers' three networks and an adapter for any other module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from hyperax.fewshot.layers import (
    Activations,
    BatchNorm,
    Convolution,
    Moments,
    Statistics,
    max_pool,
    moments_of_first,
    moments_over_tasks,
    own_moments,
)
from hyperax.tasks import TASKS

Features = Float[Array, "images features"]
Network = Callable[[Activations, Moments], Features]
"""A representation: (images in [0, 1], where batch normalisation takes its statistics) -> features."""


def stages_of(network: Any) -> tuple[Any, ...]:
    """The parts of a network that follow each other, each (activations, moments) -> activations.

    A network says them by a property `stages`, modules made of its own leaves; one without it is a single stage. Of a
    tree like the network, such as a mask for each leaf, they are the same parts of that tree.
    """
    return getattr(network, "stages", (network,))


def through(stages: tuple[Any, ...], images: Activations, moments: Moments = own_moments) -> Activations:
    """The activations after some stages."""
    for stage in stages:
        images = stage(images, moments)
    return images


class Stage(eqx.Module):
    """Convolution, batch normalisation, ReLU, and with `pooled` 2 x 2 max-pooling."""

    convolution: Convolution
    normalisation: BatchNorm
    pooled: bool = eqx.field(static=True)

    def __call__(self, images: Activations, moments: Moments) -> Activations:
        """[images, height, width, inputs] -> [images, smaller height, smaller width, filters]."""
        activations = jax.nn.relu(self.normalisation(self.convolution(images), moments))
        return max_pool(activations) if self.pooled else activations


class OmniglotNet(eqx.Module):
    """Four strided 3x3 convolutions of 64 filters, each with batch normalisation and ReLU: 28-14-7-4-2, 256 features.

    Arguments:
        image_shape: (height, width, channels); at least 9 x 9, so that the strides do not meet a single pixel early.
        key: for the Glorot-uniform initialisation.
        filters: 64 in the papers.

    Raises: `ValueError` for images that are too small.
    Cost: 2.7 million multiplications an image of 28 x 28.
    Reference: Franceschi et al. 2018, Sec. 5.2 and App. D; Vinyals et al. 2016.
    Do not use it on photographs: `C4L` pools instead of striding.

    >>> features = lambda key, images: OmniglotNet((28, 28, 1), key)(images)
    >>> jax.eval_shape(features, jax.random.key(0), jnp.zeros((5, 28, 28, 1))).shape
    (5, 256)
    """

    convolutions: tuple[Convolution, ...]
    normalisations: tuple[BatchNorm, ...]

    def __init__(self, image_shape: tuple[int, int, int], key: Key[Array, ""], filters: int = 64):
        require_size("OmniglotNet", image_shape, 9)
        self.convolutions, self.normalisations = _stack(image_shape[2], filters, key, stride=2)

    def __call__(self, images: Activations, moments: Moments = own_moments) -> Features:
        """[images, height, width, channels] in [0, 1] -> [images, 4 filters at 28 x 28]."""
        return through(self.stages, images, moments).reshape(images.shape[0], -1)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The four layers."""
        return tuple(Stage(*layer, pooled=False) for layer in zip(self.convolutions, self.normalisations, strict=True))


class C4L(eqx.Module):
    """Four 3x3 convolutions of 32 filters, each with batch normalisation, ReLU and 2x2 max-pooling: 84-42-21-10-5.

    Arguments:
        image_shape: (height, width, channels); at least 16 x 16; 84 x 84 x 3 gives 800 features.
        key: for the Glorot-uniform initialisation.
        filters: 32 in the papers.

    Raises: `ValueError` for images that are too small.
    Cost: 27 million multiplications an image of 84 x 84.
    Reference: Franceschi et al. 2018, Sec. 5.2 and App. D; Ravi and Larochelle 2017.
    Do not use it on images below 16 x 16, of which four poolings leave nothing: `OmniglotNet` takes 9 x 9.

    >>> features = lambda key, images: C4L((84, 84, 3), key)(images)
    >>> jax.eval_shape(features, jax.random.key(0), jnp.zeros((5, 84, 84, 3))).shape
    (5, 800)
    """

    convolutions: tuple[Convolution, ...]
    normalisations: tuple[BatchNorm, ...]

    def __init__(self, image_shape: tuple[int, int, int], key: Key[Array, ""], filters: int = 32):
        require_size("C4L", image_shape, 16)
        self.convolutions, self.normalisations = _stack(image_shape[2], filters, key, stride=1)

    def __call__(self, images: Activations, moments: Moments = own_moments) -> Features:
        """[images, height, width, channels] in [0, 1] -> [images, 25 filters at 84 x 84]."""
        return through(self.stages, images, moments).reshape(images.shape[0], -1)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The four layers."""
        return tuple(Stage(*layer, pooled=True) for layer in zip(self.convolutions, self.normalisations, strict=True))


class ResidualBlock(eqx.Module):
    """Three {3x3 convolution, batch normalisation, leaky ReLU 0.1} plus a 1x1 skip convolution, then 2x2 pooling."""

    convolutions: tuple[Convolution, ...]
    normalisations: tuple[BatchNorm, ...]
    skip: Convolution

    def __init__(self, inputs: int, outputs: int, key: Key[Array, ""]):
        *keys, for_skip = jax.random.split(key, 4)
        sizes = (inputs, outputs, outputs)
        self.convolutions = tuple(Convolution(size, outputs, k) for size, k in zip(sizes, keys, strict=True))
        self.normalisations = tuple(BatchNorm(jnp.zeros(outputs)) for _ in sizes)
        self.skip = Convolution(inputs, outputs, for_skip, size=1)

    def __call__(self, x: Activations, moments: Moments) -> Activations:
        """[images, height, width, inputs] -> [images, ceil(height / 2), ceil(width / 2), outputs]."""
        y = x
        for convolution, normalisation in zip(self.convolutions, self.normalisations, strict=True):
            y = jax.nn.leaky_relu(normalisation(convolution(y), moments), 0.1)
        return max_pool(y + self.skip(x), same=True)


class WidenAndNarrow(eqx.Module):
    """The end of `ResidualNet`: 1x1 convolution, ReLU, the mean over the image, 1x1 convolution, ReLU."""

    widen: Convolution
    narrow: Convolution

    def __call__(self, images: Activations, moments: Moments) -> Activations:
        """[images, height, width, inputs] -> [images, 1, 1, features]; nothing is normalised here."""
        pooled = jnp.mean(jax.nn.relu(self.widen(images)), axis=(1, 2), keepdims=True)
        return jax.nn.relu(self.narrow(pooled))


class ResidualNet(eqx.Module):
    """The papers' RN: residual blocks of 64, 96, 128, 256 filters, then 1x1 convolution (2048), mean, 512 features.

    Arguments:
        image_shape: (height, width, channels); at least 16 x 16; the papers use 84 x 84 x 3 (84-42-21-11-6).
        key: for the Glorot-uniform initialisation.

    Raises: `ValueError` for images that are too small.
    Cost: 1.3 billion multiplications an image of 84 x 84.
    Reference: Franceschi et al. 2018, App. D, with the 3x3 convolutions of the published code (the appendix prints
    1x1); every weight is learned here, skip convolutions and shifts included.
    Do not use it where time is short: an image costs thirty times one of `C4L`.

    >>> features = lambda key, images: ResidualNet((84, 84, 3), key)(images)
    >>> jax.eval_shape(features, jax.random.key(0), jnp.zeros((5, 84, 84, 3))).shape
    (5, 512)
    """

    blocks: tuple[ResidualBlock, ...]
    widen: Convolution
    narrow: Convolution

    def __init__(self, image_shape: tuple[int, int, int], key: Key[Array, ""]):
        require_size("ResidualNet", image_shape, 16)
        *keys, for_widen, for_narrow = jax.random.split(key, 6)
        sizes = (image_shape[2], 64, 96, 128, 256)
        self.blocks = tuple(ResidualBlock(i, o, k) for i, o, k in zip(sizes, sizes[1:], keys, strict=False))
        self.widen = Convolution(256, 2048, for_widen, size=1)
        self.narrow = Convolution(2048, 512, for_narrow, size=1)

    def __call__(self, images: Activations, moments: Moments = own_moments) -> Features:
        """[images, height, width, channels] in [0, 1] -> [images, 512]."""
        return through(self.stages, images, moments).reshape(images.shape[0], -1)

    @property
    def stages(self) -> tuple[Any, ...]:
        """The four blocks, and the 1x1 convolutions after them."""
        return (*self.blocks, WidenAndNarrow(self.widen, self.narrow))


class PerImage(eqx.Module):
    """Any module that maps one image to a vector, as a representation of a batch.

    Arguments:
        module: called with one float image in [0, 1], [height, width, channels] or, with `channels_first` (Equinox's
            layers), [channels, height, width]; its result is flattened.
        channels_first: see above.

    Raises: whatever the module raises for images that it does not fit.
    Cost: the module's, mapped over the images.
    Do not use it for a module with batch statistics: write a callable `(images, moments)` that asks `moments` for them.

    >>> PerImage(eqx.nn.MaxPool2d(3, stride=3))(jnp.zeros((5, 9, 9, 2))).shape
    (5, 18)
    """

    module: Any
    channels_first: bool = eqx.field(static=True, default=True)

    def __call__(self, images: Activations, moments: Moments = own_moments) -> Features:
        """[images, height, width, channels] -> [images, features]."""
        if self.channels_first:
            images = jnp.transpose(images, (0, 3, 1, 2))
        return jax.vmap(lambda image: jnp.ravel(self.module(image)))(images)


def encode(
    network: Network,
    support: Activations,
    query: Activations,
    statistics: Statistics = "set",
    support_mask: Bool[Array, " NK"] | None = None,
    query_mask: Bool[Array, " NQ"] | None = None,
) -> tuple[Features, Features]:
    """Features h_lam(x) of the support and of the query images of one episode, with the chosen batch statistics.

    Arguments:
        network: (images in [0, 1], moments) -> features.
        support: [N K, height, width, channels], in [0, 1].
        query: [N Q, height, width, channels], in [0, 1].
        statistics: "set": each set's own. "support": the support set's for both. "episode": those of both together.
            "batch": those of all episodes mapped together, inside `mean_over_tasks` only.
        support_mask, query_mask: which images are there; the others, padding, take no part in the statistics. `None`:
            all.

    Returns: features of the support [N K, features] and of the query images [N Q, features].
    Raises: `ValueError` for other statistics.
    Cost: one pass of the network over N (K + Q) images.
    Reference: Franceschi et al. 2018, Sec. 4; "set" is what the papers' code does.
    Do not use "set", "episode" or "batch" where query images have to be classified one by one: those predictions depend
    on the other query images.

    >>> support, query = encode(PerImage(jnp.ravel), jnp.zeros((5, 4, 4, 1)), jnp.zeros((10, 4, 4, 1)))
    >>> support.shape, query.shape
    ((5, 16), (10, 16))
    """
    if statistics == "set":
        return network(support, moments_of_set(support_mask)), network(query, moments_of_set(query_mask))
    count = support.shape[0]
    if statistics not in ("support", "episode", "batch"):
        raise ValueError(f"unknown statistics {statistics!r}: use 'set', 'support', 'episode' or 'batch'")
    features = network(
        jnp.concatenate([support, query]),
        _moments(statistics, _filled(support_mask, count), _filled(query_mask, len(query)))
        if support_mask is not None or query_mask is not None
        else {"support": moments_of_first(count), "episode": own_moments, "batch": moments_over_tasks}[statistics],
    )
    return features[:count], features[count:]


def _filled(mask: Array | None, count: int) -> Array:
    return jnp.ones(count, bool) if mask is None else mask


def moments_of_set(mask: Bool[Array, " images"] | None) -> Moments:
    """The moments of one set of images, of those that are there."""
    return own_moments if mask is None else moments_of_mask(mask)


def _moments(statistics: str, support: Array, query: Array) -> Moments:
    """The moments of the chosen images among support and query, one after the other, without padding."""
    if statistics == "support":
        return moments_of_mask(jnp.concatenate([support, jnp.zeros_like(query)]))
    return moments_of_mask(jnp.concatenate([support, query]), over_tasks=statistics == "batch")


def moments_of_mask(mask: Bool[Array, " images"], over_tasks: bool = False) -> Moments:
    """The moments of the images that are there, a channel at a time; `over_tasks`, of all tasks mapped together."""
    total = (lambda x: jax.lax.psum(x, TASKS)) if over_tasks else (lambda x: x)

    def moments(x: Activations) -> tuple[Array, Array]:
        weights = mask.astype(x.dtype)[:, None, None, None]
        count = total(jnp.sum(weights)) * (x.shape[1] * x.shape[2])
        mean = total(jnp.sum(weights * x, (0, 1, 2))) / count
        return mean, total(jnp.sum(weights * jnp.square(x - mean), (0, 1, 2))) / count

    return moments


def require_size(name: str, image_shape: tuple[int, int, int], least: int) -> None:
    """Raise `ValueError` unless the images are at least this large."""
    if len(image_shape) != 3 or min(image_shape[:2]) < least or image_shape[2] < 1:
        raise ValueError(
            f"{name} needs images of at least {least} x {least} pixels and one channel; these are "
            f"{' x '.join(map(str, image_shape))}: use larger images or another network"
        )


def _stack(
    channels: int, filters: int, key: Key[Array, ""], stride: int
) -> tuple[tuple[Convolution, ...], tuple[BatchNorm, ...]]:
    sizes = (channels, filters, filters, filters)
    convolutions = tuple(
        Convolution(size, filters, k, stride=stride) for size, k in zip(sizes, jax.random.split(key, 4), strict=True)
    )
    return convolutions, tuple(BatchNorm(jnp.zeros(filters)) for _ in sizes)
