"""What learners that read the support set as a sequence share: its order, causal attention, dilated convolution."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from hyperax.fewshot.episodes import Episode
from hyperax.fewshot.learners.formula import FormulaLearner
from hyperax.fewshot.learners.learner import OnFeatures
from hyperax.fewshot.learners.similarities import present
from hyperax.fewshot.networks import Features
from hyperax.fewshot.targets import Targets

Positions = Float[Array, "positions channels"]
There = Bool[Array, " NK"]


class SequenceLearner(FormulaLearner):
    """A learner that reads the support images one after the other, and answers each query image by itself after them.

        P(y | x, S) = softmax(g_lam((h(x_s(1)), y_s(1)), ..., (h(x_s(n)), y_s(n)), h(x))),   h = h_lam

    Episodes come class by class, and an episode's order is nothing that a learner may rely on; so the sequence is put
    into an order s of its own (`sequence_order`): one that looks random and is a function of the set of images. In it a
    position says nothing about a label, as in the papers' shuffled sequences, and a task is learned alike in whatever
    order its images are given. Padding comes first, where a sequence has not yet begun.

    The features are centred and scaled by the support set, h = (h_lam - mean) / sqrt(mean square of what is left +
    0.001), one number for all features: what all images share would be most of every comparison before any training.

    A subclass has lam["output"], a linear layer with a row for each class: the number of ways is part of lam.

    Raises: `ValueError` where lam is for another number of ways than the learner.
    Cost: one pass of the network over the episode, and the subclass's.
    Do not use it where the number of ways in training is not that of the test; fewer classes, by masks, are possible.

    >>> from hyperax.fewshot.learners.snail import SNAIL
    >>> issubclass(SNAIL, SequenceLearner)
    True
    """

    def prepare(self, lam: Any, episode: Episode) -> OnFeatures:
        """h_lam(x) of the support images, in the order of the sequence, and of the query images."""
        rows = lam["output"].out_features
        if rows != self.ways:
            raise ValueError(
                f"lam's output is for {rows} classes and the learner for {self.ways}: a label is an input and a row of "
                "the output, so train it on episodes of as many ways as in the test"
            )
        support, of_support, query, of_query = super().prepare(lam, episode)
        support, query = _standardised(support, query, present(of_support))
        order = sequence_order(episode.support, episode.support_mask)
        weights = None if of_support.weights is None else of_support.weights[order]
        return OnFeatures(
            support[order], Targets(of_support.one_hot[order], weights, of_support.absent), query, of_query
        )


def sequence_order(
    images: UInt8[Array, "NK height width channels"], mask: Bool[Array, " NK"] | None = None
) -> Int[Array, " NK"]:
    """An order of images that looks random and does not depend on the order in which they are given.

        s = the order of (a sum over the pixels p of p x_p) modulo 2^32,   a = 2^32 / the golden ratio, made odd

    Arguments:
        images: uint8.
        mask: which of them are there; the others come first. `None`: all.

    Returns: the index of the image at each position; equal images keep the order in which they are given.
    Cost: one multiplication a pixel.
    Do not use it as a source of randomness: it is multiplicative hashing, made to be the same everywhere.

    >>> images = jnp.asarray([1, 2, 3, 4], jnp.uint8).reshape(4, 1, 1, 1)
    >>> sequence_order(images).tolist(), sequence_order(images[::-1]).tolist()
    ([1, 3, 0, 2], [2, 0, 3, 1])
    """
    pixels = images.reshape(len(images), -1).astype(jnp.uint32)
    places = jnp.arange(1, pixels.shape[1] + 1, dtype=jnp.uint32)
    hashes = jnp.sum(pixels * places, axis=1, dtype=jnp.uint32) * jnp.uint32(2654435769)
    there = jnp.ones(len(images), bool) if mask is None else mask
    return jnp.lexsort((hashes, there))


def _standardised(support: Features, query: Features, there: There) -> tuple[Features, Features]:
    """Features without the mean of the support set, of mean square 1 there."""
    share = there.astype(support.dtype)[:, None] / jnp.sum(there)
    mean = jnp.sum(share * support, axis=0)
    scale = jax.lax.rsqrt(jnp.sum(share * (support - mean) ** 2) / support.shape[1] + 1e-3)
    return (support - mean) * scale, (query - mean) * scale


class CausalAttention(eqx.Module):
    """What each position reads, by attention, of the positions before it and of itself.

        r_t = sum over s <= t of p_s V(x_s),   p = softmax over s <= t of Q(x_t) . K(x_s) / sqrt(size of K)

    Q, K and V are affine; Q and K start alike, so that before any training the most similar positions are read most.
    Positions that are not there are not read.

    Arguments:
        inputs: channels of x.
        keys: those of K(x) and Q(x).
        values: those of V(x) and of r.
        dtype: of the weights.
        key: draws them.

    Cost: of n positions n inputs (2 keys + values) + n^2 (keys + values) multiplications.
    Reference: Mishra et al. 2018, Sec. 3.1 (AttentionBlock), where nothing is said of the start; Vaswani et al. 2017.
    Do not use it for long sequences: all pairs of positions are compared at once.

    >>> read = lambda key: CausalAttention(3, 2, 4, jnp.float32, key).along(jnp.ones((5, 3)), jnp.ones(5, bool))
    >>> jax.eval_shape(read, jax.random.key(0)).shape
    (5, 4)
    """

    query: eqx.nn.Linear
    key: eqx.nn.Linear
    value: eqx.nn.Linear

    def __init__(self, inputs: int, keys: int, values: int, dtype: Any, key: Key[Array, ""]):
        for_both, for_value = jax.random.split(key)
        both = eqx.nn.Linear(inputs, keys, dtype=dtype, key=for_both)
        # Twice the usual weights: with these, scores are too small to tell one position from another.
        alike = lambda: eqx.tree_at(
            lambda layer: (layer.weight, layer.bias), both, (2 * both.weight, jnp.zeros(keys, dtype))
        )
        self.query, self.key = alike(), alike()
        self.value = eqx.nn.Linear(inputs, values, dtype=dtype, key=for_value)

    def along(self, sequence: Positions, there: There) -> Positions:
        """What is read at all positions of a sequence, [NK, values]."""
        return self._read(sequence, sequence, jnp.tri(len(sequence), k=-1, dtype=bool) & there)

    def after(self, sequence: Positions, there: There, x: Positions) -> Positions:
        """What is read by each row of x as the one position after a sequence, [rows, values]."""
        return self._read(x, sequence, jnp.broadcast_to(there, (len(x), len(there))))

    def _read(self, x: Positions, past: Positions, visible: Bool[Array, "positions NK"]) -> Positions:
        """What each row of x reads, of itself and those of the past that it sees."""
        query, own = jax.vmap(self.query)(x), jax.vmap(self.value)(x)
        of_self = jnp.sum(query * jax.vmap(self.key)(x), axis=1, keepdims=True)
        scores = jnp.concatenate([query @ jax.vmap(self.key)(past).T, of_self], axis=1)
        scores = scores * jnp.asarray(query.shape[1], x.dtype) ** -0.5
        p = jax.nn.softmax(scores, axis=1, where=jnp.pad(visible, ((0, 0), (0, 1)), constant_values=True))
        return p[:, :-1] @ jax.vmap(self.value)(past) + p[:, -1:] * own


class GatedConvolution(eqx.Module):
    """A causal convolution of two positions, `dilation` apart, with a gate.

        a_t = tanh(A x_t + B x_{t - dilation} + b) * sigmoid(C x_t + D x_{t - dilation} + c),   x_t = 0 for t < 1

    Arguments:
        inputs: channels of x.
        filters: those of a.
        dilation: >= 1.
        dtype: of the weights.
        key: draws them.

    Cost: 4 inputs filters multiplications a position.
    Reference: Mishra et al. 2018, Sec. 3.1 (DenseBlock); van den Oord et al. 2016 (the gate).
    Do not use one alone: it sees two positions; dilations of 1, 2, 4, ..., 2^(k-1) in turn see 2^k.

    >>> run = lambda key: GatedConvolution(3, 4, 2, jnp.float32, key).along(jnp.ones((5, 3)), jnp.ones(5, bool))
    >>> jax.eval_shape(run, jax.random.key(0)).shape
    (5, 4)
    """

    now: eqx.nn.Linear
    before: eqx.nn.Linear
    dilation: int = eqx.field(static=True)

    def __init__(self, inputs: int, filters: int, dilation: int, dtype: Any, key: Key[Array, ""]):
        for_now, for_before = jax.random.split(key)
        self.now = eqx.nn.Linear(inputs, 2 * filters, dtype=dtype, key=for_now)
        self.before = eqx.nn.Linear(inputs, 2 * filters, use_bias=False, dtype=dtype, key=for_before)
        self.dilation = dilation

    def along(self, sequence: Positions, there: There) -> Positions:
        """The output at all positions of a sequence whose absent positions, all at its beginning, are zero."""
        return self._gate(sequence, jnp.pad(sequence, ((self.dilation, 0), (0, 0)))[: len(sequence)])

    def after(self, sequence: Positions, there: There, x: Positions) -> Positions:
        """The output of each row of x as the one position after a sequence, [rows, filters]."""
        past = sequence[-self.dilation][None] if self.dilation <= len(sequence) else jnp.zeros_like(x[:1])
        return self._gate(x, past)

    def _gate(self, x: Positions, past: Positions) -> Positions:
        content, gate = jnp.split(jax.vmap(self.now)(x) + jax.vmap(self.before)(past), 2, axis=1)
        return jnp.tanh(content) * jax.nn.sigmoid(gate)
