"""Siamese networks: a learned similarity of two images, trained to tell same from different."""

from __future__ import annotations

from typing import Any, final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from hyperax.fewshot.layers import Statistics
from hyperax.fewshot.learners.formula import FormulaLearner
from hyperax.fewshot.learners.learner import OnFeatures
from hyperax.fewshot.learners.similarities import by_class, features_like, mean_square, present
from hyperax.fewshot.networks import Network
from hyperax.fewshot.targets import accuracy

Memory = Float[Array, "NK features"]


@final
class Siamese(FormulaLearner):
    """Few-shot learning by verification of whether two images are of the same class.

        p(x, x_i) = sigmoid(s(x, x_i)),   s(x, x_i) = sum over k of a_k |h_k(x) - h_k(x_i)| + b,   h = h_lam,
        E = mean over x in D_val^j of (1/2) (mean over i with y_i = y of -log p(x, x_i)
                                             + mean over i with y_i != y of -log(1 - p(x, x_i))),
        logits_c(x) = max over i with y_i = c of s(x, x_i),
        L^j(w, lam) = mean over D_tr^j of |w_i - h(x_i)|^2,   w = argmin of L^j: the features of the support images

    The pairs are those of an episode, every query image with every support image; same and different pairs weigh one
    half each, however many ways there are. An image is classified by the support image most similar to it.

    Arguments:
        ways: classes an episode; of episodes with a varying number, the most.
        statistics: where batch normalisation takes its statistics.

    lam is `{"network": module, "weights": a, "bias": b}`; a starts at -1 / features and b at 0, so that before any
    training the nearest support image (mean absolute difference) is the most similar one; `lam` needs `image_shape`.
    Raises: `ValueError` in `lam` without `image_shape`.
    Cost: one pass of the network over the episode; time and memory of N Q x N K x features numbers for the pairs.
    Reference: Koch et al. 2015, Sec. 3. Theirs has a dense sigmoid layer of 4096 units before the difference, larger
    convolutions without batch normalisation, random a, pairs drawn evenly from all classes, L2 penalties and distorted
    images; here h_lam is any network of the library, so that learners differ in the loss alone.
    Do not use its probabilities as those of verification: `predict` returns the softmax of s, over classes.

    >>> from hyperax.fewshot import PerImage
    >>> learner, images = Siamese(ways=2), jnp.asarray([[255, 0], [0, 255]], jnp.uint8).reshape(2, 1, 2, 1)
    >>> lam = learner.lam(PerImage(jnp.ravel), image_shape=(1, 2, 1))
    >>> learner.predict(lam, learner.adapt(lam, images, jnp.array([0, 1]), steps=0), images).round(2).tolist()
    [[0.73, 0.27], [0.27, 0.73]]
    """

    ways: int
    statistics: Statistics = "set"

    def lam(
        self,
        network: Network,
        image_shape: tuple[int, int, int] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> dict[str, Any]:
        """The initial outer variables around a network."""
        like = features_like(network, image_shape, "Siamese", "its weights")
        size = like.shape[1]
        return {"network": network, "weights": jnp.full(size, -1 / size, like.dtype), "bias": jnp.zeros((), like.dtype)}

    def init(self, lam: Any, prepared: OnFeatures) -> Memory:
        """The features of the support images, which minimise L."""
        return prepared.support

    def inner(self, w: Memory, lam: Any, prepared: OnFeatures) -> Array:
        """L: the mean squared distance of w to the features."""
        return mean_square(w - prepared.support, prepared.support_targets)

    def logits(self, w: Memory, lam: Any, prepared: OnFeatures) -> Float[Array, "NQ ways"]:
        """The largest similarity to a support image of each class."""
        return jnp.max(by_class(_similarities(w, lam, prepared), prepared.support_targets), axis=-1)

    def outer(self, w: Memory, lam: Any, prepared: OnFeatures) -> tuple[Array, dict[str, Array]]:
        """E: the verification loss over all pairs, and the accuracy of classification."""
        s = _similarities(w, lam, prepared)
        support, query = prepared.support_targets, prepared.query_targets
        same, there = query.one_hot @ support.one_hot.T, present(support)
        of_same = _mean_of_chosen(-jax.nn.log_sigmoid(s), same * there)
        of_different = _mean_of_chosen(-jax.nn.log_sigmoid(-s), (1 - same) * there)
        losses = (of_same + of_different) / 2
        loss = jnp.mean(losses) if query.weights is None else jnp.sum(query.weights * losses)
        return loss, {"accuracy": accuracy(self.logits(w, lam, prepared), query)}


def _similarities(w: Memory, lam: Any, prepared: OnFeatures) -> Float[Array, "NQ NK"]:
    """The similarity s of every query image with every support image."""
    return jnp.abs(prepared.query[:, None] - w) @ lam["weights"] + lam["bias"]


def _mean_of_chosen(losses: Float[Array, "NQ NK"], chosen: Float[Array, "NQ NK"]) -> Float[Array, " NQ"]:
    """The mean over the pairs of each query image that are chosen; 0 if none is."""
    return jnp.sum(losses * chosen, 1) / jnp.maximum(jnp.sum(chosen, 1), 1)
