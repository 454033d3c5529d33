"""Losses of a task: cross-entropy and accuracy, with masks where tasks of different size share one shape."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hyperax.fewshot.episodes import Episode

# Added to the logits of classes that a task does not have: exp of it is 0 in float32, and differences stay finite.
_ABSENT = -1e9


class Targets(NamedTuple):
    """What the images of one set are to be classified as.

    Fields:
        one_hot: [images, ways].
        weights: the share of each image in a mean over those that are there, [images], their sum is 1; `None`: equal.
        absent: what is added to the logits, 0 for a class of the task, a large negative number else, [ways]; `None`:
            all classes are there.

    >>> round(float(cross_entropy(jnp.zeros((3, 2)), Targets(jnp.eye(2)[jnp.array([0, 1, 1])]))), 4)
    0.6931
    """

    one_hot: Float[Array, "images ways"]
    weights: Float[Array, " images"] | None = None
    absent: Float[Array, " ways"] | None = None


def targets_of(episode: Episode, ways: int, dtype: Any) -> tuple[Targets, Targets]:
    """The targets of the support and of the query set; the classes of a task are those of its support set."""
    one_hot = jax.nn.one_hot(episode.support_labels, ways, dtype=dtype)
    absent = None
    if episode.support_mask is not None:
        there = jnp.max(jnp.where(episode.support_mask[:, None], one_hot, 0), axis=0)
        absent = jnp.where(there > 0, 0, _ABSENT).astype(dtype)
    support = Targets(one_hot, _shares(episode.support_mask, dtype), absent)
    query = jax.nn.one_hot(episode.query_labels, ways, dtype=dtype)
    return support, Targets(query, _shares(episode.query_mask, dtype), absent)


def _shares(mask: Array | None, dtype: Any) -> Array | None:
    return None if mask is None else mask.astype(dtype) / jnp.sum(mask).astype(dtype)


def cross_entropy(logits: Float[Array, "images ways"], targets: Targets) -> Array:
    """The mean of -log softmax(logits) at the targets, over the images and classes that are there."""
    if targets.absent is not None:
        logits = logits + targets.absent
    # Written out because this is the inner loop: the general log-sum-exp, which guards against infinite logits, and
    # the indexing by labels take most of the time of an inner step on a CPU.
    largest = jax.lax.stop_gradient(jnp.max(logits, -1, keepdims=True))
    normaliser = largest + jnp.log(jnp.sum(jnp.exp(logits - largest), -1, keepdims=True))
    if targets.weights is None:
        return jnp.mean(normaliser) - jnp.sum(targets.one_hot * logits) / logits.shape[0]
    at_target = jnp.sum(targets.one_hot * logits, -1)
    return jnp.sum(targets.weights * (normaliser[:, 0] - at_target))


def accuracy(logits: Float[Array, "images ways"], targets: Targets) -> Array:
    """The share of the images whose largest logit is at their class."""
    if targets.absent is not None:
        logits = logits + targets.absent
    right = jnp.argmax(logits, -1) == jnp.argmax(targets.one_hot, -1)
    return jnp.mean(right) if targets.weights is None else jnp.sum(targets.weights * right)
