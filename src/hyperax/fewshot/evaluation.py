"""Accuracy on many episodes, with its interval, and the baselines every number stands beside."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from hyperax.fewshot.episodes import Episodes
from hyperax.fewshot.image_classes import ImageClasses
from hyperax.fewshot.layers import own_moments
from hyperax.fewshot.learners.learner import Learner
from hyperax.fewshot.learners.nearest_neighbour import NearestNeighbour
from hyperax.fewshot.networks import PerImage


def accuracies_by_steps(
    learner: Learner,
    lam: Any,
    episodes: Episodes,
    classes: ImageClasses,
    key: Key[Array, ""],
    count: int,
    steps: int,
) -> np.ndarray:
    """Query accuracy of `count` episodes after each number of inner steps: float [count, steps].

    The episodes depend on the key alone, so learners evaluated with the same key see the same episodes.

    Arguments:
        learner: any; what is asked of it is `accuracies(lam, episode, steps)`.
        lam: its outer variables.
        episodes: what is drawn; a class too small for it is `Episodes.check`'s to refuse, before.
        classes: what it is drawn from.
        key: draws the episodes.
        count: how many.
        steps: the largest number T of inner steps.

    Returns: fractions, [count, steps]; column t - 1 is of t steps.
    Cost: `count` forward passes and inner runs, one after the other: on a CPU that keeps their activations in the
    cache, and memory does not grow with `count`.
    Reference: Franceschi et al. 2018, Fig. 6.
    Do not use it on test classes to choose T: that is for validation classes.

    >>> from hyperax.fewshot import HyperRepresentation, PerImage
    >>> learner = HyperRepresentation(ways=2)
    >>> classes = ImageClasses.from_lists({name: np.full((3, 4, 4), 90 * i) for i, name in enumerate("abc")})
    >>> lam = learner.lam(PerImage(jnp.ravel))
    >>> accuracies_by_steps(learner, lam, Episodes(2, 1, 2), classes, jax.random.key(0), count=4, steps=3).shape
    (4, 3)
    """
    keys = jax.random.split(key, count)
    return np.asarray(_accuracies(learner, lam, episodes, classes, keys, steps))


@eqx.filter_jit
def _accuracies(
    learner: Learner, lam: Any, episodes: Episodes, classes: ImageClasses, keys: Array, steps: int
) -> Array:
    return jax.lax.map(lambda key: learner.accuracies(lam, episodes.sample(key, classes), steps), keys)


def nearest_neighbour_accuracies(
    episodes: Episodes, classes: ImageClasses, key: Key[Array, ""], count: int
) -> np.ndarray:
    """Accuracy of one nearest neighbour on pixels (Euclidean distance) on the same episodes: float [count].

    Arguments:
        episodes: what is drawn.
        classes: what it is drawn from.
        key: draws the same episodes as in `accuracies_by_steps`.
        count: how many.

    Returns: fractions, [count].
    Cost: a product of the query by the support images, an episode.

    >>> classes = ImageClasses.from_lists({name: np.full((3, 4, 4), 90 * i) for i, name in enumerate("abc")})
    >>> nearest_neighbour_accuracies(Episodes(2, 1, 2), classes, jax.random.key(0), 4).tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    learner, lam = NearestNeighbour(episodes.ways), {"network": PerImage(jnp.ravel)}
    return accuracies_by_steps(learner, lam, episodes, classes, key, count, steps=1)[:, 0]


def interval(accuracies: np.ndarray) -> dict[str, Any]:
    """Mean accuracy over episodes and the half-width of its 95 % interval, 1.96 s / sqrt(n), as fractions.

    Arguments:
        accuracies: [n], one for each episode, which are drawn independently.

    Returns: `{"accuracy", "ci95", "episodes"}`; of a single episode the half-width is not a number.
    Do not use it for accuracies that share episodes or are of one run each: it is the spread over episodes, not seeds.

    >>> interval(np.array([0.5, 1.0]))
    {'accuracy': 0.75, 'ci95': 0.49, 'episodes': 2}
    """
    count = len(accuracies)
    spread = float(np.std(accuracies, ddof=1)) if count > 1 else float("nan")
    return {"accuracy": float(np.mean(accuracies)), "ci95": 1.96 * spread / count**0.5, "episodes": count}


def paired_difference(accuracies: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """The mean of accuracies minus the reference's on the same episodes, and the half-width of its 95 % interval.

    Arguments:
        accuracies: [n], one for each episode.
        reference: [n], another learner's on the same episodes, in the same order.

    Returns: `{"difference", "ci95"}`, as fractions.
    Raises: `ValueError` for other numbers of episodes.
    Cost: none to speak of.
    Do not use it for learners that were tested on other episodes (another key): their difference has a wider interval.

    >>> paired_difference(np.array([0.75, 1.0]), np.array([0.5, 0.5]))
    {'difference': 0.375, 'ci95': 0.245}
    """
    if accuracies.shape != reference.shape or accuracies.ndim != 1:
        raise ValueError(
            f"paired accuracies are of the same episodes, not of shapes {accuracies.shape} and {reference.shape}"
        )
    scores = interval(accuracies - reference)
    return {"difference": scores["accuracy"], "ci95": scores["ci95"]}


def nearest_and_farthest(
    network: Any, classes: ImageClasses, key: Key[Array, ""], most: int = 60, components: int = 40
) -> dict[str, np.ndarray]:
    """The pair of images of two classes nearest to each other in the representation, and the farthest (ICML, Fig. 5).

    Arguments:
        network: the representation; batch normalisation takes the statistics of each class's images on their own.
        classes: two of them are drawn.
        key: draws the two classes and the components.
        most: at most so many images of a class are compared.
        components: how many components of the representation are drawn, for a figure.

    Returns: arrays `near_images` [2, H, W, C], `near_features` [2, F], `near_distance`, `far_...`, `names` [2],
    `component_index`.
    Cost: two passes of the network over `most` images.

    >>> from hyperax.fewshot import PerImage
    >>> classes = ImageClasses.from_lists({name: np.full((3, 4, 4), 51 * i) for i, name in enumerate("ab")})
    >>> float(nearest_and_farthest(PerImage(jnp.ravel), classes, jax.random.key(0))["near_distance"])
    0.8
    """
    for_pair, for_components = jax.random.split(key)
    pair = np.asarray(jax.random.choice(for_pair, classes.num_classes, (2,), replace=False))
    encode = eqx.filter_jit(lambda network, images: network(images.astype(jnp.float32) / 255, own_moments))
    sets = [np.asarray(classes.images[int(classes.start[c]) :][: min(int(classes.count[c]), most)]) for c in pair]
    features = [np.asarray(encode(network, jnp.asarray(images))) for images in sets]
    distances = np.linalg.norm(features[0][:, None] - features[1][None], axis=-1)
    result: dict[str, np.ndarray] = {"names": np.asarray([classes.names[c] for c in pair])}
    for name, at in (("near", distances.argmin()), ("far", distances.argmax())):
        chosen = np.unravel_index(at, distances.shape)
        result[f"{name}_images"] = np.stack([images[i] for images, i in zip(sets, chosen, strict=True)])
        result[f"{name}_features"] = np.stack([f[i] for f, i in zip(features, chosen, strict=True)])
        result[f"{name}_distance"] = distances[chosen]
    size = features[0].shape[1]
    index = jax.random.choice(for_components, size, (min(components, size),), replace=False)
    result["component_index"] = np.sort(np.asarray(index))
    return result
