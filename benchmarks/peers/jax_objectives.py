"""L and E in JAX, shared by hyperax and jaxopt. `z` is what the regression sees: x, or x H where lam = H."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.peers.problems import Numbers, somewhere


def features(name: str, lam: jax.Array, data: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The data with z = x H and z_val = x_val H in the linear representation: once for all T steps."""
    if name != "linear_representation":
        return {**data, "z": data["x"], "z_val": data["x_val"]}
    return {**data, "z": data["x"] @ lam, "z_val": data["x_val"] @ lam}


def cross_entropy(logits: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean(jax.nn.logsumexp(logits, axis=1) - jnp.sum(logits * y, axis=1))


def predict(name: str, w: Any, z: jax.Array) -> jax.Array:
    return jnp.tanh(z @ w[0] + w[1]) @ w[2] + w[3] if name == "network" else z @ w[0]


def inner(name: str, w: Any, lam: jax.Array, data: dict[str, jax.Array]) -> jax.Array:
    p, y = predict(name, w, data["z"]), data["y"]
    if name == "ridge":
        return 0.5 * jnp.mean((p - y) ** 2) + 0.5 * jnp.sum(jnp.exp(lam) * w[0] ** 2)
    if name == "linear_representation":
        return jnp.sum((y - p) ** 2) + data["rho"] * jnp.sum(w[0] ** 2)
    if name == "logistic":
        return cross_entropy(p, y) + 0.5 * jnp.sum(jnp.exp(lam)[:, None] * w[0] ** 2)
    return cross_entropy(p, y)


def outer(name: str, w: Any, lam: jax.Array, data: dict[str, jax.Array]) -> jax.Array:
    p, y = predict(name, w, data["z_val"]), data["y_val"]
    if name == "ridge":
        return 0.5 * jnp.mean((p - y) ** 2)
    return jnp.sum((y - p) ** 2) if name == "linear_representation" else cross_entropy(p, y)


def to_numpy(gradient: jax.Array) -> np.ndarray:
    return np.asarray(gradient)


def objectives(numbers: Numbers) -> list[float]:
    data = features(numbers.name, jnp.asarray(numbers.lam), jax.tree.map(jnp.asarray, numbers.data))
    return [float(objective(numbers.name, somewhere(numbers), numbers.lam, data)) for objective in (inner, outer)]
