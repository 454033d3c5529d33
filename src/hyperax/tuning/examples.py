"""Examples on the leading axis: checked, and counted."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from hyperax.checks import leaf_name


def checked_examples(name: str, data: PyTree) -> PyTree:
    """The data with arrays for NumPy arrays, finite."""
    if not jax.tree.leaves(data):
        raise ValueError(f"{name} is {data!r}; give arrays with the examples on the leading axis")

    def check(path: Any, leaf: Any) -> Array:
        try:
            leaf = jnp.asarray(leaf)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{leaf_name(name, path)} is {type(leaf).__name__}, not an array: {error}") from None
        if jnp.issubdtype(leaf.dtype, jnp.inexact) and not bool(jnp.isfinite(leaf).all()):
            raise ValueError(f"{leaf_name(name, path)} contains NaN or infinity; clean it first")
        return leaf

    return jax.tree_util.tree_map_with_path(check, data)


def count_examples(name: str, data: PyTree) -> int:
    """How many examples there are: the length that all arrays share."""
    lengths = {leaf_name(name, path): jnp.shape(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(data)}
    counts = {shape[0] if shape else 0 for shape in lengths.values()}
    if len(counts) != 1 or 0 in counts:
        raise ValueError(f"the arrays of {name} must have one leading axis of examples; their shapes are {lengths}")
    return counts.pop()
