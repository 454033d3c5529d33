"""Matching networks: a query image is classified by its attention to the support images."""

from __future__ import annotations

from typing import Any, final

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from hyperax.fewshot.layers import Statistics
from hyperax.fewshot.learners.formula import FormulaLearner
from hyperax.fewshot.learners.learner import OnFeatures
from hyperax.fewshot.learners.similarities import by_class, cosines, features_and_key, mean_square, present
from hyperax.fewshot.networks import Features, Network
from hyperax.rollout import check_steps

Memory = Float[Array, "NK features"]


@final
class Matching(FormulaLearner):
    """Few-shot learning by attention over the support images, in a representation that may see the whole support set.

        P(y = c | x) = sum over i with y_i = c of a(x, x_i),   logits = log P + a number that all classes share,
        a(x, x_i) = softmax over i of scale * f(x) . g(x_i) / (|f(x)| |g(x_i)|),
        L^j(w, lam) = mean over D_tr^j of |w_i - g(x_i)|^2,   w = argmin of L^j: the memory g(x_i)

    Without full context f = g = h_lam. With it (`full_context`), the support set S = x_1, ..., x_n is read in both
    directions, and a query image K times by attention to it,

        g(x_i) = h_lam(x_i) + forward_i + backward_i,
        forward_i = LSTM(h_lam(x_i), forward_{i-1}),   backward_i = LSTM(h_lam(x_i), backward_{i+1}),
        f(x) = u_K,   u_k = h_lam(x) + LSTM(h_lam(x), [u_{k-1}, r_{k-1}]),   u_0 = 0,
        r_k = sum over i of b_i g(x_i),   b = softmax over i of u_k . g(x_i)

    Arguments:
        ways: classes an episode; of episodes with a varying number, the most.
        statistics: where batch normalisation takes its statistics.
        full_context: whether f and g see the support set (FCE).
        processing_steps: K >= 1, with `full_context` only; the paper does not print its number.
        scale: > 0, the inverse temperature of a. The paper prints none, that is 1; but then, with cosines of
            nonnegative features, f cannot fall below log(1 + (ways - 1) / e) in a 1-shot episode, 2.08 for 20 ways,
            however good the representation is, and training is slow; 10 lets it fall next to 0.

    lam is `{"network": module}`, with `full_context` also `"forward"`, `"backward"`, `"attention"`: LSTM cells with as
    many units as there are features, for which `lam` needs `image_shape` and `key`.
    Raises: `ValueError` for a scale that is not positive, K < 1, and in `lam` if shape or key are missing.
    Cost: one pass of the network over the episode and a product of the query by the support images. With
    `full_context` N K steps in turn for g, K for f, and 28 F^2 weights for F features (1.8 million for 256).
    Reference: Vinyals et al. 2016, eq. 1, Sec. 2.1.1-2.1.2, App. A.1-A.2.
    Do not use `full_context` where the order of the support set means nothing and may change: g depends on it, and
    `Episodes` puts it class by class.

    >>> from hyperax.fewshot import PerImage
    >>> learner, images = Matching(ways=2, scale=1.0), jnp.asarray([[255, 0], [0, 255]], jnp.uint8).reshape(2, 1, 2, 1)
    >>> lam = learner.lam(PerImage(jnp.ravel))
    >>> learner.predict(lam, learner.adapt(lam, images, jnp.array([0, 1]), steps=0), images).round(2).tolist()
    [[0.73, 0.27], [0.27, 0.73]]
    >>> sorted(Matching(ways=2, full_context=True).lam(PerImage(jnp.ravel), (1, 2, 1), jax.random.key(0)))
    ['attention', 'backward', 'forward', 'network']
    """

    ways: int
    statistics: Statistics = "set"
    full_context: bool = False
    processing_steps: int = 5
    scale: float = 10.0

    def __check_init__(self):
        check_steps(self.processing_steps, "processing_steps", 1)
        if not self.scale > 0:
            raise ValueError(f"scale is {self.scale!r}; it must be positive: 1 is plain cosine similarity")

    def lam(
        self,
        network: Network,
        image_shape: tuple[int, int, int] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> dict[str, Any]:
        """The initial outer variables around a network."""
        if not self.full_context:
            return {"network": network}
        like, key = features_and_key(network, image_shape, key, "Matching with full_context", "its LSTMs")
        size, keys = like.shape[1], jax.random.split(key, 3)
        cell = lambda inputs, key: eqx.nn.LSTMCell(inputs, size, dtype=like.dtype, key=key)
        return {
            "network": network,
            "forward": cell(size, keys[0]),
            "backward": cell(size, keys[1]),
            # What it reads, r, comes as an input beside h_lam(x): the same as a state [u, r], with cells of one size.
            "attention": cell(2 * size, keys[2]),
        }

    def init(self, lam: Any, prepared: OnFeatures) -> Memory:
        """The memory g(x_i), which minimises L."""
        if not self.full_context:
            return prepared.support
        there = present(prepared.support_targets)
        forward = _read(lam["forward"], prepared.support, there)
        return prepared.support + forward + _read(lam["backward"], prepared.support, there, reverse=True)

    def inner(self, w: Memory, lam: Any, prepared: OnFeatures) -> Array:
        """L: the mean squared distance of the memory to g(x_i)."""
        return mean_square(w - self.init(lam, prepared), prepared.support_targets)

    def logits(self, w: Memory, lam: Any, prepared: OnFeatures) -> Float[Array, "NQ ways"]:
        """The logarithm of the attention to each class, up to a number that all classes share."""
        query = prepared.query
        if self.full_context:
            query = _attend(lam["attention"], query, w, present(prepared.support_targets), self.processing_steps)
        # Not log(sum of softmax): a class that gets next to no attention would have log(0).
        return jax.nn.logsumexp(by_class(self.scale * cosines(query, w), prepared.support_targets), axis=-1)


def _read(cell: eqx.nn.LSTMCell, sequence: Features, there: Bool[Array, " NK"], reverse: bool = False) -> Memory:
    """The outputs of an LSTM along a sequence; padding does not change its state."""

    def step(state: tuple[Array, Array], at: tuple[Array, Array]) -> tuple[tuple[Array, Array], Array]:
        features, is_there = at
        after = cell(features, state)
        state = jax.tree.map(lambda new, old: jnp.where(is_there, new, old), after, state)
        return state, state[0]

    zero = jnp.zeros_like(sequence[0])
    return jax.lax.scan(step, (zero, zero), (sequence, there), reverse=reverse)[1]


def _attend(cell: eqx.nn.LSTMCell, query: Features, memory: Memory, there: Bool[Array, " NK"], steps: int) -> Features:
    """u_K of the query images: K times read the memory by attention, then one step of the LSTM."""

    def step(state: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
        u, c = state
        b = jax.nn.softmax(u @ memory.T, axis=-1, where=there)
        inputs = jnp.concatenate([query, b @ memory], axis=1)
        h, c = jax.vmap(cell)(inputs, (u, c))
        return (h + query, c), None

    zero = jnp.zeros_like(query)
    return jax.lax.scan(step, (zero, zero), length=steps)[0][0]
