"""Layers of the papers' networks: convolution without bias, batch normalisation with explicit statistics, pooling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from hyperax.tasks import TASKS

Activations: TypeAlias = Float[Array, "images height width channels"]
Moments: TypeAlias = Callable[[Activations], tuple[Array, Array]]
"""Activations -> (mean, variance), each broadcastable against them: where batch normalisation takes its statistics."""

Statistics: TypeAlias = Literal["set", "support", "episode", "batch"]
"""Whose statistics batch normalisation uses: each set on its own (support by support, query by query, as in the papers;
transductive over the queries), the support set's for both, those of support and query together, or those of all
episodes that are mapped together."""


def own_moments(x: Activations) -> tuple[Array, Array]:
    """The mean and the variance of these activations, a channel at a time."""
    mean = jnp.mean(x, (0, 1, 2))
    return mean, jnp.mean(jnp.square(x - mean), (0, 1, 2))


def moments_of_first(count: int) -> Moments:
    """The moments of the first `count` images, for all of them."""
    return lambda x: own_moments(x[:count])


def moments_over_tasks(x: Activations) -> tuple[Array, Array]:
    """The moments over all tasks that are mapped together (needs the mapped axis `hyperax.TASKS`)."""
    mean = jax.lax.pmean(jnp.mean(x, (0, 1, 2)), TASKS)
    return mean, jax.lax.pmean(jnp.mean(jnp.square(x - mean), (0, 1, 2)), TASKS)


class Convolution(eqx.Module):
    """A square convolution without bias, SAME padding, Glorot-uniform initialisation."""

    weight: Float[Array, "size size inputs outputs"]
    stride: int = eqx.field(static=True)

    def __init__(self, inputs: int, outputs: int, key: Key[Array, ""], size: int = 3, stride: int = 1):
        initialise = jax.nn.initializers.glorot_uniform()
        self.weight = initialise(key, (size, size, inputs, outputs), jnp.float32)
        self.stride = stride

    def __call__(self, x: Activations) -> Activations:
        """[images, height, width, inputs] -> [images, ceil(height / stride), ceil(width / stride), outputs]."""
        return convolve(x, self.weight, self.stride)


class BatchNorm(eqx.Module):
    """Batch normalisation with a learned shift and no scale: (x - mean) / sqrt(variance + 1e-3) + beta.

    Its statistics are always those of the images at hand, and whose they are is the caller's choice (`Moments`).
    """

    beta: Float[Array, " channels"]
    epsilon: float = eqx.field(static=True, default=1e-3)

    def __call__(self, x: Activations, moments: Moments) -> Activations:
        """Normalise with the moments that the given function takes from the activations."""
        mean, variance = moments(x)
        return (x - mean) * jax.lax.rsqrt(variance + self.epsilon) + self.beta


def convolve(x: Activations, weight: Float[Array, "size size inputs outputs"], stride: int) -> Activations:
    """Convolution with SAME padding, by whichever algorithm is fast on the backend."""
    if jax.default_backend() != "cpu":
        return jax.lax.conv_general_dilated(
            x, weight, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
    # On a CPU, XLA's own convolution is slow in loops and under vmap; patches times a matrix is a plain product. Of two
    # matrices: the gradient of a product with more axes is computed from a transposed copy of the cotangent.
    size, inputs, outputs = weight.shape[0], weight.shape[2], weight.shape[3]
    seen, matrix = patches(x, size, stride), weight.reshape(size * size * inputs, outputs)
    if inputs >= 16:
        # cotangent^T patches is faster than patches^T cotangent by a quarter to a half, unless the patches are narrow;
        # without the barrier, XLA would turn the one into the other.
        matrix = jax.lax.optimization_barrier(matrix.T).T
    product = seen.reshape(-1, seen.shape[-1]) @ matrix
    return product.reshape(*seen.shape[:-1], outputs)


def patches(x: Activations, size: int, stride: int) -> Activations:
    """All size x size neighbourhoods, each flattened as the weights are: [images, height', width', size^2 inputs]."""
    if size == 1:
        return x[:, ::stride, ::stride]
    rows, top, bottom = _same(x.shape[1], size, stride)
    columns, left, right = _same(x.shape[2], size, stride)
    x = jnp.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
    shifted = [
        x[:, i : i + (rows - 1) * stride + 1 : stride, j : j + (columns - 1) * stride + 1 : stride]
        for i in range(size)
        for j in range(size)
    ]
    return jnp.concatenate(shifted, axis=-1)


def _same(length: int, size: int, stride: int) -> tuple[int, int, int]:
    """(output length, padding before, padding after) of SAME padding."""
    output = -(-length // stride)
    total = max((output - 1) * stride + size - length, 0)
    return output, total // 2, total - total // 2


def max_pool(x: Activations, same: bool = False) -> Activations:
    """2 x 2 maxima; an odd last row and column is dropped (VALID) or pooled alone (`same`)."""
    height, width = x.shape[1:3]
    if same:
        x = jnp.pad(x, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), constant_values=-jnp.inf)
    height, width = x.shape[1] // 2, x.shape[2] // 2
    x = x[:, : 2 * height, : 2 * width]
    # A reshape and a maximum: the gradient of XLA's windowed maximum is slow on every backend.
    return jnp.max(x.reshape(x.shape[0], height, 2, width, 2, x.shape[3]), axis=(2, 4))
