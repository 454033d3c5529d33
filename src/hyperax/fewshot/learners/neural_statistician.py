"""The neural statistician: a class is a set of images, summarised by the posterior of a latent context."""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple, final

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtr
from jaxtyping import Array, Bool, Float, Key, UInt32

from hyperax.fewshot.episodes import Episode
from hyperax.fewshot.layers import Statistics
from hyperax.fewshot.learners.formula import FormulaLearner
from hyperax.fewshot.learners.latent_variables import (
    Gaussian,
    Perceptron,
    divergence,
    gaussian,
    hashes,
    noise_from,
    standard,
)
from hyperax.fewshot.learners.learner import unit
from hyperax.fewshot.learners.similarities import features_and_key, present
from hyperax.fewshot.networks import Features, Network
from hyperax.fewshot.targets import Targets, accuracy, cross_entropy
from hyperax.rollout import check_steps


class Sets(NamedTuple):
    """An episode through the encoder, with what the generative model has to explain, the images themselves."""

    support: Features
    support_targets: Targets
    query: Features
    query_targets: Targets
    pixels: Float[Array, "images pixels"]
    hashes: UInt32[Array, " images"]


@final
class NeuralStatistician(FormulaLearner):
    """Few-shot learning with a generative model of sets of images that share a latent context c.

        p(D) = integral p(c) product over x in D of [ integral p(x | z, c) p(z | c) dz ] dc,   p(c) = N(0, I),
        bound(D) = sum over x in D of [ log p(x | z, c) - KL(q(z | x, c) || p(z | c)) ] - KL(q(c | D) || p(c)),
            with one draw c of q(c | D) and z of q(z | x, c) for each x,
        E = -(sum over classes k of bound(D_k)) / (images) + weight * (cross-entropy of the query images),
        logits_k(x) = -KL(q(c | D_k) || q(c | {x})),
        L^j(w, lam) = mean over classes of |w_k - q(c | D_k)|^2,   w_k = argmin of L^j = q(c | D_k), its two vectors

    In E a set D_k is all that an episode shows of class k, support and query images, without a label: what is learned
    is that they belong together. In the logits D_k is the support set of class k, and {x} a query image by itself. All
    q and p are diagonal Gaussians, but p(x | z, c): independent Bernoulli pixels, whose logarithm is taken at the gray
    x in [0, 1]. The statistic network q(c | D) averages over the images that D has, so their order means nothing, and
    sees log |D| beside the mean. So that it learns small sets too, in E it is shown a part of D: each image with
    probability `kept`, and one always.

    An episode has no key: noise (c, z, what is shown) is a pure function of its images, of all of them together, so
    that an image meets other noise in another episode. Neither order nor padding changes it.

    Arguments:
        ways: classes an episode; of episodes with a varying number, the most.
        statistics: where batch normalisation of the encoder takes its statistics.
        context: entries of c; 512 in the paper's Omniglot runs.
        latent: entries of z; 16 there.
        hidden: units of a layer of the statistic network, q(z | x, c), p(z | c) and the decoder.
        kept: in (0, 1], the probability of an image to be shown to q(c | D) in E; 1: all are.
        classification_weight: >= 0, the weight of the cross-entropy in E. 0 is the paper's objective, the bound alone:
            labels say which images form a set, and no more. Any other is a deviation, the default too, made because
            the bound alone is slow: on Omniglot, 5-way 1-shot, after 140 hyperiterations of 4 episodes of 20 classes,
            46 % of validation queries are right with 0, no more than at the start, 88 % with 100, at bounds alike.

    lam is `{"network": encoder, "embed", "context", "latent", "prior", "decoder": perceptrons}`; `lam` needs
    `image_shape` and `key`.
    Raises: `ValueError` for sizes below 1, `kept` or a weight outside their ranges, and in `lam` if shape or key are
    missing.
    Cost: one pass of the network over the episode, and of perceptrons, the largest with
    (latent + context + hidden + pixels) hidden weights, over its images; N Q x N x context numbers for the logits.
    Reference: Edwards and Storkey 2017, Sec. 3 and the experiments on Omniglot: sets of 5, sample dropout. There the
    encoder has nine convolutional layers of 64 to 256 filters and the decoder as many; here it is any network of the
    library, so that learners differ in the rest alone, and the decoder is dense. All layers there are batch-normalised;
    here those of the encoder are. Left out: the larger weight of log p(x | z, c) in early epochs, more than one layer
    z, and images made binary anew in every epoch. Added: bounds on log variances, +-8, and `classification_weight`.
    Do not use it where classes are only to be told apart: `Prototypical` needs neither decoder nor noise.

    >>> from hyperax.fewshot import PerImage
    >>> learner = NeuralStatistician(2, context=8, hidden=4)
    >>> images = jnp.asarray([[255, 0], [0, 255]], jnp.uint8).reshape(2, 1, 2, 1)
    >>> lam = learner.lam(PerImage(jnp.ravel), (1, 2, 1), jax.random.key(0))
    >>> adapted = jax.jit(lambda images: learner.adapt(lam, images, jnp.array([0, 1]), steps=0))(images)
    >>> adapted.w.mean.shape
    (2, 8)
    >>> jax.jit(lambda images: learner.predict(lam, adapted, images))(images).argmax(-1).tolist()
    [0, 1]
    """

    ways: int
    statistics: Statistics = "set"
    context: int = 512
    latent: int = 16
    hidden: int = 256
    kept: float = 0.5
    classification_weight: float = 100.0

    def __check_init__(self):
        for name in ("context", "latent", "hidden"):
            check_steps(getattr(self, name), name, 1)
        if not 0 < self.kept <= 1:
            raise ValueError(f"kept is {self.kept!r}, a probability of images to be shown: use 1 to show all of them")
        if not self.classification_weight >= 0:
            raise ValueError(
                f"classification_weight is {self.classification_weight!r}; it must not be negative: 0 is the paper's "
                "objective"
            )

    def lam(
        self,
        network: Network,
        image_shape: tuple[int, int, int] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> dict[str, Any]:
        """The initial outer variables around a network."""
        like, key = features_and_key(network, image_shape, key, "NeuralStatistician", "its perceptrons")
        assert image_shape is not None
        features, hidden, context, latent = like.shape[1], self.hidden, self.context, self.latent
        sizes = {
            "embed": (features, hidden),
            "context": (hidden + 1, hidden, 2 * context),
            "latent": (features + context, hidden, 2 * latent),
            "prior": (context, hidden, 2 * latent),
            "decoder": (latent + context, hidden, hidden, prod(image_shape)),
        }
        keys = jax.random.split(key, len(sizes))
        perceptrons = {name: Perceptron(of, k, like.dtype) for (name, of), k in zip(sizes.items(), keys, strict=True)}
        return {"network": network} | perceptrons

    def prepare(self, lam: Any, episode: Episode) -> Sets:
        """The features of the images, and the images."""
        images = jnp.concatenate([episode.support, episode.query])
        seen = super().prepare(lam, episode)
        pixels = unit(images).reshape(images.shape[0], -1).astype(seen.support.dtype)
        return Sets(*seen, pixels, hashes(images))

    def init(self, lam: Any, prepared: Sets) -> Gaussian:
        """The posteriors q(c | D_k) of the support sets, which minimise L."""
        return _posterior(lam, prepared.support, _members(prepared.support_targets))

    def inner(self, w: Gaussian, lam: Any, prepared: Sets) -> Array:
        """L: the mean squared distance of w to the posteriors."""
        there = jnp.any(_members(prepared.support_targets), axis=1)
        squares = jax.tree.map(lambda a, b: jnp.sum(jnp.square(a - b), -1), w, self.init(lam, prepared))
        return jnp.sum((squares.mean + squares.log_variance) * there) / jnp.sum(there)

    def logits(self, w: Gaussian, lam: Any, prepared: Sets) -> Float[Array, "NQ ways"]:
        """The negative divergences of each query image's posterior, as a set of its own, from those of the classes."""
        of_query = _posterior(lam, prepared.query, jnp.eye(prepared.query.shape[0], dtype=bool))
        return -divergence(w, jax.tree.map(lambda leaf: leaf[:, None], of_query))

    def outer(self, w: Gaussian, lam: Any, prepared: Sets) -> tuple[Array, dict[str, Array]]:
        """E, minus the bound per image with the weighted cross-entropy, and accuracy and bound."""
        logits, bound = self.logits(w, lam, prepared), self._bound(lam, prepared)
        value = -bound
        if self.classification_weight:
            value = value + self.classification_weight * cross_entropy(logits, prepared.query_targets)
        return value, {"accuracy": accuracy(logits, prepared.query_targets), "bound": bound}

    def _bound(self, lam: Any, prepared: Sets) -> Array:
        """The bound, summed over the sets, per image."""
        features = jnp.concatenate([prepared.support, prepared.query])
        members = jnp.concatenate([_members(prepared.support_targets), _members(prepared.query_targets)], axis=1)
        there, dtype = jnp.any(members, axis=0), features.dtype
        of_sets, of_images = self._noise(prepared.hashes, members, dtype)

        q_c = _posterior(lam, features, self._shown(ndtr(of_images[:, -1]), members))
        c = q_c.at(of_sets)
        of_image = lambda rows: members.T.astype(dtype) @ rows  # of its set; zero for padding
        q_z = gaussian(lam["latent"](jnp.concatenate([features, of_image(c)], axis=1)))
        p_z = jax.tree.map(of_image, gaussian(lam["prior"](c)))
        z = q_z.at(of_images[:, :-1])
        scores = lam["decoder"](jnp.concatenate([z, of_image(c)], axis=1))

        # log of p^x (1 - p)^(1 - x) with p = sigmoid(score)
        likelihoods = jnp.sum(prepared.pixels * scores - jax.nn.softplus(scores), axis=1)
        explained = jnp.sum(there * (likelihoods - divergence(q_z, p_z)))
        paid = jnp.sum(jnp.any(members, axis=1) * divergence(q_c, standard(self.context, dtype)))
        return (explained - paid) / jnp.sum(there)

    def _noise(
        self, numbers: UInt32[Array, " images"], members: Bool[Array, "ways images"], dtype: Any
    ) -> tuple[Float[Array, "ways context"], Float[Array, "images latent_and_one"]]:
        """For c of each set, and for z of each image, with one more that says whether it is shown."""
        sets = jnp.sum(jnp.where(members, numbers, 0), axis=1, dtype=jnp.uint32)
        of_episode = jax.random.fold_in(jax.random.key(0), jnp.sum(sets, dtype=jnp.uint32))
        for_sets, for_images = jax.random.split(of_episode)
        of_sets = noise_from(sets, for_sets, self.context, dtype)
        return of_sets, noise_from(numbers, for_images, self.latent + 1, dtype)

    def _shown(self, uniform: Float[Array, " images"], members: Bool[Array, "ways images"]) -> Bool[Array, ...]:
        """Which images of each set the statistic network sees: those below `kept`, and the lowest."""
        of_set = jnp.where(members, uniform, 2.0)
        return members & ((of_set < self.kept) | (of_set == jnp.min(of_set, axis=1, keepdims=True)))


def _members(targets: Targets) -> Bool[Array, "ways images"]:
    """Which images are there in which set."""
    return (targets.one_hot.T > 0) & present(targets)


def _posterior(lam: Any, features: Features, members: Bool[Array, "sets images"]) -> Gaussian:
    """The statistic network: q(c | D) of each set."""
    count = jnp.maximum(jnp.sum(members, axis=1, keepdims=True), 1).astype(features.dtype)
    pooled = members.astype(features.dtype) @ jax.nn.relu(lam["embed"](features)) / count
    return gaussian(lam["context"](jax.nn.relu(jnp.concatenate([pooled, jnp.log(count)], axis=1))))
