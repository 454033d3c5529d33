"""What models with latent variables are made of: Gaussians, their divergence, perceptrons, noise from images."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, UInt8, UInt32

# Of logarithms of variances: a ratio of variances up to e^16 and its square stay finite in float32.
_LARGEST_LOG_VARIANCE = 8.0


class Gaussian(NamedTuple):
    """Normal distributions with independent entries, on the last axis."""

    mean: Float[Array, "... size"]
    log_variance: Float[Array, "... size"]

    def at(self, noise: Float[Array, "... size"]) -> Float[Array, "... size"]:
        """The draw mean + standard deviation * noise, of standard normal noise."""
        return self.mean + jnp.exp(self.log_variance / 2) * noise


def gaussian(parameters: Float[Array, "... both"]) -> Gaussian:
    """The first half of these numbers as the mean, the second, kept within +-8, as the logarithm of the variance."""
    mean, raw = jnp.split(parameters, 2, axis=-1)
    return Gaussian(mean, _LARGEST_LOG_VARIANCE * jnp.tanh(raw / _LARGEST_LOG_VARIANCE))


def divergence(p: Gaussian, q: Gaussian) -> Float[Array, ...]:
    """KL(p || q) = (1/2) sum of [log v_q - log v_p + (v_p + (m_p - m_q)^2) / v_q - 1], in nats; p and q broadcast."""
    ratio = (jnp.exp(p.log_variance) + jnp.square(p.mean - q.mean)) * jnp.exp(-q.log_variance)
    return jnp.sum(q.log_variance - p.log_variance + ratio - 1, axis=-1) / 2


def standard(size: int, dtype: Any) -> Gaussian:
    """N(0, I)."""
    return Gaussian(jnp.zeros(size, dtype), jnp.zeros(size, dtype))


class Perceptron(eqx.Module):
    """Dense layers with ReLU between them: x -> W_n relu(... relu(W_1 x + b_1) ...) + b_n."""

    weights: tuple[Float[Array, "inputs outputs"], ...]
    biases: tuple[Float[Array, " outputs"], ...]

    def __init__(self, sizes: tuple[int, ...], key: Key[Array, ""], dtype: Any):
        initialise, keys = jax.nn.initializers.glorot_uniform(), jax.random.split(key, len(sizes) - 1)
        self.weights = tuple(initialise(k, pair, dtype) for k, pair in zip(keys, pairwise(sizes), strict=True))
        self.biases = tuple(jnp.zeros(size, dtype) for size in sizes[1:])

    def __call__(self, x: Float[Array, "... inputs"]) -> Float[Array, "... outputs"]:
        """The numbers of the last layer."""
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = (jax.nn.relu(x) if index else x) @ weight + bias
        return x


def hashes(images: UInt8[Array, "images height width channels"]) -> UInt32[Array, " images"]:
    """A number for each image, in all likelihood another one for another image."""
    # Computed by NumPy: XLA would fold the same random constants anew in every compilation.
    multipliers = np.random.default_rng(0).integers(2**32, size=images.shape[1:], dtype=np.uint32)
    return jnp.sum(images * multipliers, axis=(1, 2, 3), dtype=jnp.uint32)  # modulo 2^32


def noise_from(
    numbers: UInt32[Array, " many"], key: Key[Array, ""], size: int, dtype: Any
) -> Float[Array, "many size"]:
    """Standard normal numbers, a function of key and number."""
    return jax.vmap(lambda number: jax.random.normal(jax.random.fold_in(key, number), (size,), dtype))(numbers)
