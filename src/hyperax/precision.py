"""Double precision for a while, whatever JAX is set to."""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager
from typing import Any

import jax


def float64() -> AbstractContextManager[Any]:
    """Float64 inside, in this thread, whatever `jax_enable_x64` says outside.

    >>> import jax.numpy as jnp
    >>> with float64():
    ...     print(jnp.ones(2).dtype)
    float64
    """
    module = jax if hasattr(jax, "enable_x64") else importlib.import_module("jax.experimental")  # before jax 0.8
    return module.enable_x64(True)
