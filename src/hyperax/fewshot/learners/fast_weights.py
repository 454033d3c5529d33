"""From gradients to fast weights, one coordinate at a time: what meta networks learn besides their slow weights."""

from __future__ import annotations

from itertools import pairwise

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from hyperax.learned_optimizers.coordinatewise import lstm_step
from hyperax.learned_optimizers.preprocessing import log_and_sign

P = 7.0
"""Of the preprocessing p(g) of gradients, as published: how many powers of e below one are told apart."""


class GradientMLP(eqx.Module):
    """A weight from its gradient, by the same small network for all weights: ReLU layers, the last one linear.

        w*_k = scale (v . relu(B relu(A p(g_k) + a) + b) + c),   p(g) = log_and_sign(g, 7)

    Arguments:
        hidden: units of its two hidden layers, an even number.
        key: for He-normal matrices; a, b, c start at 0. One half of the units mirrors the other at g = 0 and has the
            opposite v, and signs are such that the units of the first half answer to g = 0.1, a usual gradient, and the
            network starts as a descent: the weight of g = 0 is 0, those of g and -g are opposite, that of 0.1 negative.
        scale: of the outputs, fixed; without it v would be tiny where weights are, and the steps of Adam too large.
        dtype: of its weights.

    Raises: `ValueError` for an odd number of units.
    Cost: for each gradient hidden (hidden + 3) multiplications.
    Reference: Munkhdalai and Yu 2017, Sec. 3 (m); the mirrored start is ours.
    Do not use it for gradients whose size alone counts, such as sums over numbers of images that vary: log |g| / 7
    hardly moves.

    >>> make = GradientMLP(20, jax.random.key(0))
    >>> weights = make(jnp.array([[-0.1, 0.0, 0.1]]))
    >>> weights.shape, (weights + weights[:, ::-1]).round(5).tolist(), bool(weights[0, 2] < 0)
    ((1, 3), [[0.0, 0.0, 0.0]], True)
    """

    weights: tuple[Float[Array, "outputs inputs"], ...]
    biases: tuple[Float[Array, " outputs"], ...]
    scale: float = eqx.field(static=True)

    def __init__(self, hidden: int, key: Key[Array, ""], scale: float = 1.0, dtype: jnp.dtype | type = jnp.float32):
        if hidden % 2:
            raise ValueError(f"hidden is {hidden}; it must be even, because one half of the units mirrors the other")
        sizes, keys = (2, hidden // 2, hidden // 2, 1), jax.random.split(key, 3)
        draw = jax.nn.initializers.he_normal(in_axis=1, out_axis=0)
        first, second, last = (draw(k, (o, i), dtype) for k, (i, o) in zip(keys, pairwise(sizes), strict=True))
        answering = lambda weight, x: weight * jnp.where(weight @ x < 0, -1, 1).astype(dtype)[:, None]
        usual = log_and_sign(jnp.asarray(0.1, dtype), P)
        first = answering(first, usual)
        second = answering(second, first @ usual)
        last = -answering(last, second @ first @ usual)
        mirrored = jnp.concatenate([first, first * jnp.array([1, -1], dtype)])
        self.weights = (mirrored, jax.scipy.linalg.block_diag(second, second), jnp.concatenate([last, -last], axis=1))
        self.biases = tuple(jnp.zeros(size, dtype) for size in (hidden, hidden, 1))
        self.scale = scale

    def __call__(self, gradients: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """A weight for each gradient."""
        x = log_and_sign(gradients, P)
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            x = jax.nn.relu(x @ weight.T + bias)
        return self.scale * (x @ self.weights[-1][0] + self.biases[-1][0])


class GradientLSTM(eqx.Module):
    """A weight from a sequence of its gradients, by the same LSTM for all weights.

        h_i, c_i = LSTM(p(g_i), h_{i-1}, c_{i-1}),   w* = scale (v . h_T + b),   p(g) = log_and_sign(g, 7)

    Arguments:
        hidden: units of the LSTM.
        key: for its matrices, and for v, standard normal; b starts at 0.
        scale: of the outputs, fixed.
        dtype: of its weights.

    Cost: for each gradient 4 hidden (hidden + 2) multiplications, and in a reverse pass memory for all of them.
    Reference: Munkhdalai and Yu 2017, Sec. 3 (d).
    Do not use it for long sequences of many gradients in training: `GradientMLP` of their mean needs no such memory.

    >>> make = GradientLSTM(20, jax.random.key(0))
    >>> make(jnp.ones((3, 4, 5)), jnp.ones(3, bool)).shape
    (4, 5)
    """

    cell: eqx.nn.LSTMCell
    readout: Float[Array, " hidden"]
    bias: Float[Array, ""]
    scale: float = eqx.field(static=True)

    def __init__(self, hidden: int, key: Key[Array, ""], scale: float = 1.0, dtype: jnp.dtype | type = jnp.float32):
        for_cell, for_readout = jax.random.split(key)
        self.cell = eqx.nn.LSTMCell(2, hidden, dtype=dtype, key=for_cell)
        self.readout = jax.random.normal(for_readout, (hidden,), dtype)
        self.bias = jnp.zeros((), dtype)
        self.scale = scale

    def __call__(self, gradients: Float[Array, "images ..."], there: Bool[Array, " images"]) -> Float[Array, "*shape"]:
        """The weights after the gradients that are there, in their order."""

        def step(state: tuple[Array, Array], at: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
            of_image, is_there = at
            after = lstm_step(self.cell, log_and_sign(of_image, P).T, state)
            return jax.tree.map(lambda new, old: jnp.where(is_there, new, old), after, state), None

        flat = gradients.reshape(gradients.shape[0], -1)
        zero = jnp.zeros((self.readout.shape[0], flat.shape[1]), flat.dtype)
        (h, _), _ = jax.lax.scan(step, (zero, zero), (flat, there))
        return self.scale * (self.readout @ h + self.bias).reshape(gradients.shape[1:])
