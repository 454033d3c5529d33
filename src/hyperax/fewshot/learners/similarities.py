"""Comparisons of features that the metric learners share, with masks, and safe where a vector is zero."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from hyperax.fewshot.layers import own_moments
from hyperax.fewshot.networks import Features, Network
from hyperax.fewshot.targets import Targets


def present(targets: Targets) -> Bool[Array, " images"]:
    """Which images are there; the others are padding."""
    if targets.weights is None:
        return jnp.ones(targets.one_hot.shape[0], bool)
    return targets.weights > 0


def class_means(features: Features, targets: Targets) -> Float[Array, "ways features"]:
    """The mean of each class over the images that are there; zero for a class that is not in the task."""
    members = targets.one_hot.T * present(targets)
    return members @ features / jnp.maximum(jnp.sum(members, 1, keepdims=True), 1)


def mean_square(rows: Float[Array, "images features"], targets: Targets) -> Array:
    """The mean of |row|^2 over the images that are there."""
    squares, there = jnp.sum(rows**2, 1), present(targets)
    return jnp.sum(squares * there) / jnp.sum(there)


def squared_distances(a: Float[Array, "n features"], b: Float[Array, "m features"]) -> Float[Array, "n m"]:
    """|a_i - b_j|^2, as |a_i|^2 - 2 a_i . b_j + |b_j|^2."""
    return jnp.sum(a**2, 1)[:, None] - 2 * products(a, b) + jnp.sum(b**2, 1)[None]


def products(a: Float[Array, "n features"], b: Float[Array, "m features"]) -> Float[Array, "n m"]:
    """a_i . b_j, for differences of large numbers and systems of equations."""
    # By default accelerators round the factors to 10 bits: too coarse for both.
    return jnp.matmul(a, b.T, precision=jax.lax.Precision.HIGHEST)


def normalised(rows: Float[Array, "n features"]) -> Float[Array, "n features"]:
    """a_i / |a_i|; a row that is zero, or no longer than rounding, becomes zero and has no gradient."""
    squares = jnp.sum(rows**2, 1, keepdims=True)
    long = squares > jnp.finfo(rows.dtype).eps ** 2
    # The inner `where` too: a derivative that is infinite where it is not chosen would still make the product nan.
    return rows * jnp.where(long, jax.lax.rsqrt(jnp.where(long, squares, 1)), 0)


def cosines(a: Float[Array, "n features"], b: Float[Array, "m features"]) -> Float[Array, "n m"]:
    """a_i . b_j / (|a_i| |b_j|), zero where one of them is."""
    return normalised(a) @ normalised(b).T


def by_class(similarities: Float[Array, "NQ NK"], support: Targets) -> Float[Array, "NQ ways NK"]:
    """The similarities to the support images of each class; of all other images, one that exp turns into 0."""
    members = (support.one_hot.T > 0) & present(support)
    return jnp.where(members, similarities[:, None], jnp.asarray(-1e9, similarities.dtype))


def features_like(
    network: Network, image_shape: tuple[int, int, int] | None, learner: str, needs: str
) -> jax.ShapeDtypeStruct:
    """The shape and type of the features of one image, [1, features]; `ValueError` without the shape of the images."""
    if image_shape is None:
        raise ValueError(
            f"{learner} needs the number of features for {needs}: pass image_shape=(height, width, channels) to lam"
        )
    return eqx.filter_eval_shape(network, jax.ShapeDtypeStruct((1, *image_shape), jnp.float32), own_moments)


def features_and_key(
    network: Network,
    image_shape: tuple[int, int, int] | None,
    key: Key[Array, ""] | None,
    learner: str,
    draws: str,
) -> tuple[jax.ShapeDtypeStruct, Key[Array, ""]]:
    """`features_like`, and the key for what a learner draws; `ValueError` without one of them."""
    like = features_like(network, image_shape, learner, draws)
    if key is None:
        raise ValueError(f"{learner} draws {draws}: pass key=jax.random.key(seed) to lam")
    return like, key
