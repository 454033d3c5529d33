"""The outer objective E and its gradients, whether it is written in PyTorch or in JAX."""

from __future__ import annotations

from typing import Any

import jax
import torch

from hyperax.torch.crossing import to_jax, to_torch
from hyperax.torch.problem import Inner, JaxObjective, Problem, floats_of, split_metrics
from hyperax.torch.runs import Gradients, backward, constant, variable


def objective(inner: Inner, state: Any, lam: Any) -> tuple[torch.Tensor, Any]:
    """(E, metrics)."""
    if isinstance(inner.problem.outer, JaxObjective):
        return differentiated(inner, state, lam)[:2]
    with torch.no_grad():
        return inner.outer(constant(state), constant(lam))


def differentiated(inner: Inner, state: Any, lam: Any) -> tuple[torch.Tensor, Any, Gradients, Gradients]:
    """(E, metrics, dE/ds_T, dE/dlam)."""
    if isinstance(inner.problem.outer, JaxObjective):
        value, metrics, of_state, of_lam = in_jax(inner.problem, *to_jax((state, lam, inner.data)))
        device = floats_of(state)[0].device
        value, metrics, of_state, of_lam = to_torch((value, metrics, of_state, of_lam), device)
        like = [*floats_of(state), *floats_of(lam)]
        cast = [g.to(x) for g, x in zip([*of_state, *of_lam], like, strict=True)]
        cut = len(of_state)  # JAX has zeros where nothing arrives
        return value, metrics, cast[:cut], [g if g.any() else None for g in cast[cut:]]
    at_state, at_lam = variable(state), variable(lam)
    value, metrics = inner.outer(at_state, at_lam)
    inputs = [*floats_of(at_state), *floats_of(at_lam)]
    found = backward([value], inputs, [torch.ones_like(value)])
    cut = len(floats_of(at_state))
    return value.detach(), constant(metrics), found[:cut], found[cut:]


def in_jax(problem: Problem, state: Any, lam: Any, data: Any) -> tuple[Any, Any, list[Any], list[Any]]:
    """(E, metrics, dE/ds_T, dE/dlam) of an objective in JAX; not compiled by itself."""
    assert isinstance(problem.outer, JaxObjective)
    function = problem.outer.function
    is_float = lambda x: jax.numpy.issubdtype(x.dtype, jax.numpy.floating)
    leaves, tree = jax.tree.flatten(state)

    def value(floats: list[Any], lam: Any) -> tuple[Any, Any]:
        new = iter(floats)
        whole = jax.tree.unflatten(tree, [next(new) if is_float(x) else x for x in leaves])
        return split_metrics(problem, function(whole, lam, data))

    both = jax.value_and_grad(value, argnums=(0, 1), has_aux=True)
    (found, metrics), (of_state, of_lam) = both([x for x in leaves if is_float(x)], lam)
    return found, metrics, of_state, jax.tree.leaves(of_lam)
