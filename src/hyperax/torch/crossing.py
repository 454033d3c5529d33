"""Arrays between JAX and PyTorch: by DLPack, without a copy where both can read the memory."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.core import Tracer

from hyperax.checks import leaf_name


def is_torch(tree: Any) -> bool:
    """Whether a pytree has a tensor in it."""
    return any(isinstance(x, torch.Tensor) for x in jax.tree.leaves(tree))


def is_traced(tree: Any) -> bool:
    """Whether a pytree has an array in it whose values are not known yet."""
    return any(isinstance(x, Tracer) for x in jax.tree.leaves(tree))


def to_torch(tree: Any, device: torch.device | str | None = None) -> Any:
    """Arrays of JAX and NumPy in a pytree as tensors: lam of `hyperax.minimize` for PyTorch.

    Arguments:
        tree: any pytree; what is no array stays as it is.
        device: where the tensors go; `None` leaves them where they are, without a copy where that is possible.

    Raises: `ValueError` for keys of JAX.
    Cost: a copy where memory cannot be shared.
    Do not write into the tensors: the arrays of JAX may share their memory. `x.clone()` is yours.

    >>> to_torch({"decay": jnp.ones(2)})["decay"].sum()
    tensor(2...)
    """

    def convert(x: Any) -> Any:
        if isinstance(x, np.ndarray | np.generic):
            x = torch.tensor(x)
        elif isinstance(x, jax.Array):
            if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
                raise ValueError(
                    "data has a key of JAX in it, which PyTorch cannot draw from: give it a whole number "
                    "(jax.random.randint(key, (), 0, 2**31 - 1)) to seed with"
                )
            x = torch.from_dlpack(x)
        else:
            return x
        return x if device is None else x.to(device)

    return jax.tree.map(convert, tree)


def to_jax(tree: Any) -> Any:
    """Tensors in a pytree as JAX arrays: a lam or data for `hyperax.minimize`.

    Arguments:
        tree: any pytree; what is no tensor stays as it is.

    64 bits become 32 (numbers, and labels) unless `jax.config.update("jax_enable_x64", True)` was called.
    Raises: `KeyError` for complex and quantised tensors.
    Cost: none where types are kept, for the memory is shared; else a copy.
    Do not change the tensors in place afterwards: JAX takes its arrays for constant.

    >>> to_jax({"decay": torch.ones(2)})["decay"].shape
    (2,)
    """

    def convert(x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        x = x.detach().to(torch_dtype(jax.dtypes.canonicalize_dtype(_NUMPY[x.dtype]))).contiguous()
        return jnp.from_dlpack(x)

    return jax.tree.map(convert, tree)


def to_numpy(tree: Any, like: Any) -> Any:
    """Tensors as NumPy arrays with the shapes and types of `like`, for what compiled code waits for."""

    def convert(path: Any, x: Any, like: jax.ShapeDtypeStruct) -> np.ndarray:
        if isinstance(x, torch.Tensor):
            # NumPy has no bfloat16 of its own; float32 holds all of it.
            x = x.detach().cpu().to(torch.float32 if x.dtype == torch.bfloat16 else x.dtype).numpy()
        x = np.asarray(x)
        if x.shape != like.shape:
            raise ValueError(
                f"{leaf_name('', path)} has shape {list(x.shape)} now and had {list(like.shape)} when it was compiled"
            )
        return x.astype(like.dtype, copy=False)

    return jax.tree_util.tree_map_with_path(convert, tree, like)


def shapes_of(tree: Any) -> Any:
    """The shapes and types that these tensors have in JAX."""

    def shape(x: Any) -> jax.ShapeDtypeStruct:
        dtype = _NUMPY[x.dtype] if isinstance(x, torch.Tensor) else jnp.result_type(x)
        return jax.ShapeDtypeStruct(tuple(np.shape(x)), jax.dtypes.canonicalize_dtype(dtype))

    return jax.tree.map(shape, tree)


def torch_dtype(dtype: Any) -> torch.dtype:
    """PyTorch's name of a JAX type."""
    return _TORCH[np.dtype(dtype)]


_NUMPY: dict[torch.dtype, np.dtype] = {
    getattr(torch, name): jnp.dtype(name)
    for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
}
_TORCH = {numpy: torch for torch, numpy in _NUMPY.items()}
