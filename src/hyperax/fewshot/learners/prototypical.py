"""Prototypical networks: a class is the mean of its support images."""

from __future__ import annotations

from typing import Any, Literal, final, get_args

from jaxtyping import Array, Float

from hyperax.fewshot.layers import Statistics
from hyperax.fewshot.learners.formula import FormulaLearner
from hyperax.fewshot.learners.learner import OnFeatures
from hyperax.fewshot.learners.similarities import class_means, cosines, mean_square, squared_distances

Distance = Literal["euclidean", "cosine"]


@final
class Prototypical(FormulaLearner):
    """Few-shot learning by the distance to the mean of each class in a learned representation.

        L^j(w, lam) = mean over D_tr^j of |h_lam(x) - w_y|^2,
        w_c = argmin of L^j = mean of h_lam(x) over the images of class c in D_tr^j,
        logits_c(x) = -d(h_lam(x), w_c),   d(a, b) = |a - b|^2  or  1 - a . b / (|a| |b|)

    Arguments:
        ways: classes an episode; of episodes with a varying number, the most.
        statistics: where batch normalisation takes its statistics.
        distance: d, "euclidean" (squared, a Bregman divergence: the mean is its best prototype) or "cosine".

    lam is `{"network": module}`. Training with more ways than at test is the paper's: lam does not depend on `ways`.
    Raises: `ValueError` for another distance.
    Cost: one pass of the network over the episode, and a product of the query images by the classes.
    Reference: Snell et al. 2017, eq. 1-2 and Sec. 2.6.
    Do not use "cosine" for its accuracy: its logits lie within 2 of each other, and in the paper too (Fig. 2) it is
    behind; `CosineClassifier` and `Matching` have a scale.

    >>> import jax.numpy as jnp
    >>> from hyperax.fewshot import Episode, PerImage
    >>> learner, images = Prototypical(ways=2), jnp.asarray([0, 51, 204, 255], jnp.uint8).reshape(4, 1, 1, 1)
    >>> lam = learner.lam(PerImage(jnp.ravel))
    >>> adapted = learner.adapt(lam, images, jnp.array([0, 0, 1, 1]), steps=0)
    >>> adapted.w[:, 0].round(2).tolist()
    [0.1, 0.9]
    >>> learner.predict(lam, adapted, images).round(2).tolist()
    [[0.69, 0.31], [0.62, 0.38], [0.38, 0.62], [0.31, 0.69]]
    """

    ways: int
    statistics: Statistics = "set"
    distance: Distance = "euclidean"

    def __check_init__(self):
        if self.distance not in get_args(Distance):
            raise ValueError(f"unknown distance {self.distance!r}: use 'euclidean' or 'cosine'")

    def init(self, lam: Any, prepared: OnFeatures) -> Float[Array, "ways features"]:
        """The prototypes w_c: the class means, which minimise L; zero for a class that is not in the task."""
        return class_means(prepared.support, prepared.support_targets)

    def inner(self, w: Float[Array, "ways features"], lam: Any, prepared: OnFeatures) -> Array:
        """L: the mean squared distance of the support images to their prototypes."""
        return mean_square(prepared.support - prepared.support_targets.one_hot @ w, prepared.support_targets)

    def logits(self, w: Float[Array, "ways features"], lam: Any, prepared: OnFeatures) -> Float[Array, "NQ ways"]:
        """The negative distances of the query images to the prototypes."""
        if self.distance == "cosine":
            return cosines(prepared.query, w) - 1
        return -squared_distances(prepared.query, w)
