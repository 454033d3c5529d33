"""What `tune` and `fixed` hold: numbers, knots of schedules and arrays, with or without a set; refused by name."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn

from hyperax.constraints import Constraint
from hyperax.tuning.hyperparameters import Hyperparameter

_BELOW_ONE = ("momentum", "beta1", "beta2", "alpha")


def precision_of(module: nn.Module) -> torch.dtype:
    """Float64 for a module that has it, else float32: fewer bits are no use to a hyperparameter."""
    double = any(p.dtype == torch.float64 for p in module.parameters())
    return torch.float64 if double else torch.float32


def type_in_jax(precision: torch.dtype) -> np.dtype:
    """The type of lam; a warning where JAX cannot hold the module's."""
    held = jax.dtypes.canonicalize_dtype(np.float64 if precision == torch.float64 else np.float32)
    if precision == torch.float64 and held != np.float64:
        warnings.warn(
            "the module is in float64 and JAX in float32: lam and the hypergradient are rounded to float32. "
            'jax.config.update("jax_enable_x64", True) at the start of the program keeps them',
            UserWarning,
            stacklevel=3,
        )
    return held


def values(name: str, node: Any, dtype: Any) -> Any:
    """The node with arrays of this type in place of numbers, lists and tensors; sets stay around theirs."""
    if isinstance(node, Mapping):
        if not node:
            raise ValueError(f"{name} is empty: leave it out, or give values")
        return {key: values(f'{name}["{key}"]', one, dtype) for key, one in node.items()}
    if isinstance(node, Hyperparameter):
        return Hyperparameter(np.array(_array(name, node.value), dtype), node.constraint)
    return np.array(_array(name, node), dtype)  # a copy: what it came from may be changed by its owner


def setting(kind: str, name: str, node: Any, dtype: Any) -> Any:
    """The same for a setting of an optimizer, which has a range: one value, or {layer or pattern: value}."""
    found, called = values(f'{kind}["{name}"]', node, dtype), f'{kind}["{name}"]'
    high = 1.0 if name in _BELOW_ONE else np.inf
    for key, one in found.items() if isinstance(found, dict) else [("", found)]:
        at = f'{called}["{key}"]' if key else called
        if isinstance(one, dict):
            raise ValueError(f"{at} is a dict; a layer has one value: a number, or [K] knots of a schedule")
        x = np.asarray(one.value if isinstance(one, Hyperparameter) else one)
        if not ((x >= 0) & (x < high)).all():
            told = "at least 0" if high == np.inf else "at least 0 and below 1"
            raise ValueError(f"{at} has {x.min() if x.min() < 0 else x.max():.6g} in it; a {name} is {told}")
    return found


def constant(node: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """A setting that is not tuned, for the steps: numbers as numbers, knots as tensors."""
    if isinstance(node, dict):
        return {key: constant(one, dtype, device) for key, one in node.items()}
    x = np.asarray(node.value if isinstance(node, Hyperparameter) else node)
    return torch.tensor(x, dtype=dtype, device=device) if x.ndim else float(x)


def check_patterns(name: str, given: Any) -> None:
    """`ValueError` for what are no patterns of names."""
    if not isinstance(given, str | list | tuple | set | frozenset) or not given:
        raise ValueError(
            f'tune["{name}"] is {shown(given)}; give patterns of names of parameters: "*" for all, "features.*", or a '
            "list of them"
        )


def shown(x: Any) -> str:
    """A value in a message: of arrays type and shape, of modules the class, of all else its beginning."""
    if isinstance(x, nn.Module):
        return f"a module ({type(x).__name__})"
    if isinstance(x, torch.Tensor) and x.numel() > 1:
        return f"a tensor, {x.dtype}{list(x.shape)}"
    if hasattr(x, "dtype") and np.size(x) > 1:
        return f"an array, {x.dtype}{list(x.shape)}"
    if isinstance(x, np.generic):
        x = x.item()
    text = repr(x) if not isinstance(x, torch.Tensor) else str(x.item()) if x.numel() else "an empty tensor"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _array(name: str, node: Any) -> np.ndarray:
    """One value as a NumPy array; `ValueError` for what is none."""
    advice = _advice(node)
    if advice is None:
        try:
            x = np.asarray(_numbers(node))
        except (TypeError, ValueError, RuntimeError):
            x = np.asarray(None)
        if x.dtype.kind in "fiu" and x.size and np.isfinite(x).all():
            return x
        if x.dtype.kind in "fiu":
            advice = "use finite numbers" if x.size else "give at least one number"
    advice = advice or "use a number, a list of them, an array, or one with a set, such as hyperax.log_scale(0.1)"
    raise ValueError(f"{name} is no value: it is {shown(node)}; {advice}")


def _numbers(node: Any) -> Any:
    """Tensors, also in lists, as arrays; types that NumPy lacks as float32."""
    if isinstance(node, list | tuple):
        return [_numbers(one) for one in node]
    if isinstance(node, torch.Tensor):
        node = node.detach().cpu()
        return (node.float() if node.dtype in (torch.bfloat16, torch.float16) else node).numpy()
    if hasattr(node, "dtype") and jnp.issubdtype(node.dtype, jnp.bfloat16):
        return np.asarray(node, np.float32)
    return node


def _advice(node: Any) -> str | None:
    """What to write in the place of something that people try."""
    if isinstance(node, nn.Module):
        return "of a second module tune the parameters, dict(module.named_parameters()), for torch.func.functional_call"
    if isinstance(node, Constraint):
        return "a set needs a value to start from: hyperax.Hyperparameter(value, set)"
    if isinstance(node, list | tuple) and any(isinstance(one, Constraint) for one in node):
        return "a value with its set is hyperax.Hyperparameter(value, set)"
    if isinstance(node, list | tuple) and any(isinstance(one, Hyperparameter) for one in node):
        return "the set belongs around the list, hyperax.log_scale([0.1, 0.1])"
    if callable(node) or isinstance(node, torch.optim.lr_scheduler.LRScheduler):
        return "a schedule is a list of its knots, evenly spaced over the steps and linear between them: [0.1, 0.05, 0]"
    return None
