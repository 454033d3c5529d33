"""What coordinatewise networks see of a gradient: numbers of size one, whatever the size of the gradient."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from hyperax.dynamics.dynamics import Step


def log_and_sign(g: Float[Array, "*shape"], p: float = 10.0) -> Float[Array, "*shape 2"]:
    """The logarithm of |g| and the sign of g, each within [-1, 1] for |g| <= e^p.

        (log|g| / p, sign g)   where |g| >= e^{-p},      (-1, e^p g)   elsewhere

    Arguments:
        g: gradients of any shape.
        p: how many powers of e below one still count; > 0.

    Returns: an array with one more axis, of two. Both are continuous, and their derivatives at most e^p.
    Cost: one logarithm an entry.
    Reference: Andrychowicz et al. 2016, App. A, with p = 10.
    Do not use it where the size of a gradient relative to the others of its tensor is what matters: divide by
    `root_mean_square`.

    >>> import numpy as np
    >>> print(np.round(log_and_sign(jnp.asarray([0.0, 1.0, -jnp.e, 1e-6])), 3).tolist())
    [[-1.0, 0.0], [0.0, 1.0], [0.1, -1.0], [-1.0, 0.022]]
    """
    size = jnp.abs(g)
    large = size >= jnp.exp(-p)
    # The branch not taken needs a finite derivative too: its zero cotangent would meet an infinity at g = 0.
    logarithm = jnp.where(large, jnp.log(jnp.where(large, size, 1.0)) / p, -1.0)
    sign = jnp.where(large, jnp.sign(g), jnp.exp(p) * jnp.where(large, 0.0, g))
    return jnp.stack([logarithm, sign], -1)


def root(square: Float[Array, "*shape"], floor: float) -> Float[Array, "*shape"]:
    """sqrt(square + floor^2), whose derivative is finite at zero.

    Arguments:
        square: a mean of squares, >= 0.
        floor: > 0, in units of the root; below it sizes count as this one. At least 1e-12: in float32
            the square of less is nothing.

    Returns: an array like `square`.
    Cost: one root an entry.

    >>> print(root(jnp.asarray([0.0, 9.0]), 0.1))
    [0.1 3.002]
    """
    return jnp.sqrt(square + floor**2)


def time_features(t: Step, scales: Sequence[float], dtype: jnp.dtype) -> Float[Array, " scales"]:
    """How far the run is, at several time scales: tanh(log(t / scale)) = (t^2 - scale^2) / (t^2 + scale^2).

    Arguments:
        t: the step, from 1.
        scales: in steps; each feature goes from -1 to 1 around its own.
        dtype: of the result.

    Returns: one number a scale.
    Cost: nothing.
    Reference: in the manner of the time inputs of Metz et al. 2019 and 2020.
    Do not use a scale far beyond the longest training horizon: its feature takes new values in a longer run.

    >>> print([round(float(x), 2) for x in time_features(jnp.asarray(10), (1.0, 10.0, 100.0), jnp.dtype("float32"))])
    [0.98, 0.0, -0.98]
    """
    ratio = (t / jnp.asarray(scales, dtype)) ** 2
    return (1 - 2 / (ratio + 1)).astype(dtype)
