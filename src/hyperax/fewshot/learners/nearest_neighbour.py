"""Nearest neighbour: an image has the class of the support image nearest to it in a representation."""

from __future__ import annotations

from typing import Any, final

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from hyperax.fewshot.layers import Statistics
from hyperax.fewshot.learners.formula import FormulaLearner
from hyperax.fewshot.learners.learner import OnFeatures
from hyperax.fewshot.learners.similarities import by_class, mean_square, squared_distances
from hyperax.fewshot.networks import Features, Network


@final
class NearestNeighbour(FormulaLearner):
    """Classification by the nearest support image, in Euclidean distance of representations.

        L^j(w, lam) = mean over i in D_tr^j of |h_lam(x_i) - w_i|^2,   w_i = argmin of L^j = h_lam(x_i),
        logits_c(x) = - min over i with y_i = c of |h_lam(x) - w_i|^2

    Arguments:
        ways: classes an episode; of episodes with a varying number, the most.
        statistics: where batch normalisation takes its statistics.

    lam is `{"network": module}`: pretrained, a `Readout`, or any other; `PerImage(jnp.ravel)` is pixels. There are no
    inner steps: w is the support set itself.

    Cost: a product of the query by the support features, and `ways` minima over the support set for each query image.
    Reference: Bridge paper 2017, Table 1 (Nearest-neighbour) and App. A (it stops the training of NN); Franceschi et
    al. 2018, Sec. 5.3.
    Do not use its probabilities (`predict`): squared distances have no scale; the order of the classes is what counts.

    >>> from hyperax.fewshot import Episode, PerImage
    >>> images = jnp.asarray([[[[0]]], [[[200]]]], jnp.uint8)
    >>> learner = NearestNeighbour(ways=2)
    >>> episode = Episode(images, jnp.arange(2), images, jnp.arange(2))
    >>> print(learner.accuracies(learner.lam(PerImage(jnp.ravel)), episode, steps=1))
    [1.]
    """

    ways: int
    statistics: Statistics = "set"

    def lam(
        self,
        network: Network,
        image_shape: tuple[int, int, int] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> dict[str, Any]:
        """The outer variables: the network."""
        return {"network": network}

    def init(self, lam: Any, prepared: OnFeatures) -> Features:
        """w: the features of the support set, remembered."""
        return prepared.support

    def inner(self, w: Features, lam: Any, prepared: OnFeatures) -> Array:
        """L: how far what is remembered is from the features."""
        return mean_square(prepared.support - w, prepared.support_targets)

    def logits(self, w: Features, lam: Any, prepared: OnFeatures) -> Float[Array, "NQ ways"]:
        """The negative squared distance of each query image to the nearest support image of each class."""
        return jnp.max(by_class(-squared_distances(prepared.query, w), prepared.support_targets), axis=-1)
