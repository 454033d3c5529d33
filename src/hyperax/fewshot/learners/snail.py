"""SNAIL: the support set is a sequence, read by temporal convolutions and causal attention in turn."""

from __future__ import annotations

from typing import Any, final

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from hyperax.fewshot.layers import Statistics
from hyperax.fewshot.learners.learner import OnFeatures
from hyperax.fewshot.learners.sequences import CausalAttention, GatedConvolution, Positions, SequenceLearner
from hyperax.fewshot.learners.similarities import features_and_key, mean_square, present
from hyperax.fewshot.networks import Network
from hyperax.rollout import check_steps

Block = CausalAttention | GatedConvolution


@final
class SNAIL(SequenceLearner):
    """Few-shot learning by a sequence model with interleaved temporal convolutions and attention.

        u_t^0 = [A h_lam(x_t) + a, one-hot y_t]    t = 1, ..., N K, the support images,
        u_{NK+1}^0 = [A h_lam(x) + a, 0]           a query image,
        u_t^k = [u_t^{k-1}, block_k(u_1^{k-1}, ..., u_t^{k-1})],   logits(x) = C u_{NK+1} + c

    The blocks are causal attention, then for each further attention convolutions of dilation 1, 2, 4, ... that together
    see N K + 1 positions, and that attention. A block only adds channels, so u_1, ..., u_NK, which no query image
    changes, is computed once an episode and is w: L^j(w, lam) = mean over D_tr^j of |w_t - u_t|^2, w = argmin of L^j.

    Arguments:
        ways: classes an episode.
        statistics: where batch normalisation takes its statistics.
        shots: K, the support images a class for which the convolutions see the whole sequence; with more of them only
            the attention does.
        embedding: channels of A h_lam(x).
        filters: of a convolution.
        attention: (channels of the keys, of the values) of each attention.

    lam is `{"network": module, "embedding": A, "blocks": tuple, "output": C}`; `lam` needs `image_shape` and `key`.
    Raises: `ValueError` for sizes below 1 and no attention at all, in `lam` if shape or key are missing, and where lam
    is for another number of ways.
    Cost: one pass of the network over the episode; with the paper's sizes, 5 ways and 1 shot, 3.2 million weights and
    2.4 million multiplications a query image, as much as `OmniglotNet`. To compile it takes long, half a minute.
    Reference: Mishra et al. 2018, Sec. 3 and App. A (Omniglot). There the dilations are printed as 2, 4, ..., here
    they begin with 1: so two positions in a row meet, and what is seen doubles with each. The network is any of the
    library's, in place of one with max-pooling, and its features are standardised (`SequenceLearner`); the start of
    the attention is our choice (`CausalAttention`). As there, the loss is that of the last position alone.
    Do not use it for support sets without end: the blocks are made for a length, and a metric learner needs less
    training.

    >>> from hyperax.fewshot import PerImage
    >>> learner = SNAIL(5)
    >>> make = lambda key: learner.lam(PerImage(jnp.ravel), (28, 28, 1), key)
    >>> lam = eqx.filter_eval_shape(make, jax.random.key(0))
    >>> "".join(type(block).__name__[0] for block in lam["blocks"])  # C: causal attention, G: gated convolution
    'CGGGCGGGC'
    >>> images, labels = jax.ShapeDtypeStruct((5, 28, 28, 1), jnp.uint8), jax.ShapeDtypeStruct((5,), jnp.int32)
    >>> ask = lambda lam, images, labels: learner.predict(lam, learner.adapt(lam, images, labels, 0), images)
    >>> eqx.filter_eval_shape(ask, lam, images, labels).shape
    (5, 5)
    """

    ways: int
    statistics: Statistics = "set"
    shots: int = 1
    embedding: int = 64
    filters: int = 128
    attention: tuple[tuple[int, int], ...] = ((64, 32), (256, 128), (512, 256))

    def __check_init__(self):
        for name in ("shots", "embedding", "filters"):
            check_steps(getattr(self, name), name, 1)
        if not self.attention:
            raise ValueError("attention is empty: without any the labels are hardly seen; give (keys, values) of each")
        for sizes in self.attention:
            for size in sizes:
                check_steps(size, "a size in attention", 1)

    def lam(
        self,
        network: Network,
        image_shape: tuple[int, int, int] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> dict[str, Any]:
        """The initial outer variables around a network."""
        like, key = features_and_key(network, image_shape, key, "SNAIL", "its layers")
        for_embedding, for_output, for_blocks = jax.random.split(key, 3)
        linear = lambda inputs, outputs, key: eqx.nn.Linear(inputs, outputs, dtype=like.dtype, key=key)
        channels = self.embedding + self.ways
        dilations = [2**k for k in range((self.ways * self.shots).bit_length())]
        blocks: list[Block] = []

        def next_key() -> Key[Array, ""]:
            return jax.random.fold_in(for_blocks, len(blocks))

        for number, (keys, values) in enumerate(self.attention):
            for dilation in dilations if number else []:
                blocks.append(GatedConvolution(channels, self.filters, dilation, like.dtype, next_key()))
                channels += self.filters
            blocks.append(CausalAttention(channels, keys, values, like.dtype, next_key()))
            channels += values
        return {
            "network": network,
            "embedding": linear(like.shape[1], self.embedding, for_embedding),
            "blocks": tuple(blocks),
            "output": linear(channels, self.ways, for_output),
        }

    def init(self, lam: Any, prepared: OnFeatures) -> Positions:
        """u_1, ..., u_NK before the last block, which no query image sees further than that; zero where padding is."""
        there = present(prepared.support_targets)
        u = jnp.concatenate([jax.vmap(lam["embedding"])(prepared.support), prepared.support_targets.one_hot], axis=1)
        u = u * there[:, None]
        for block in lam["blocks"][:-1]:
            u = jnp.concatenate([u, block.along(u, there) * there[:, None]], axis=1)
        return u

    def inner(self, w: Positions, lam: Any, prepared: OnFeatures) -> Array:
        """L: the mean squared distance of w to the sequence."""
        return mean_square(w - self.init(lam, prepared), prepared.support_targets)

    def logits(self, w: Positions, lam: Any, prepared: OnFeatures) -> Float[Array, "NQ ways"]:
        """The output at the position after the sequence, of each query image by itself."""
        there = present(prepared.support_targets)
        u = jax.vmap(lam["embedding"])(prepared.query)
        u = jnp.concatenate([u, jnp.zeros((len(u), self.ways), u.dtype)], axis=1)
        for block in lam["blocks"]:
            # Blocks only add channels: the first ones of w are the sequence as this block sees it.
            u = jnp.concatenate([u, block.after(w[:, : u.shape[1]], there, u)], axis=1)
        return jax.vmap(lam["output"])(u)
