"""The way not taken: a JAX program that calls back to PyTorch for every step, there and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks.torch.problems import Setting


def callback_a_step(setting: Setting, steps: int) -> Callable[[], jax.Array]:
    """The gradient of f_T by `jax.grad` of a scan whose step is `jax.pure_callback`, its pull-back too.

    The way back runs each step again (`torch.func.vjp`), since a graph cannot be carried through JAX.
    """
    batches = setting.batches

    def step(t: int, state: Any, lam: torch.Tensor) -> Any:
        w, v = state
        g = torch.func.grad(lambda w: setting.inner(w, lam, batches(None, t)))(w)
        return setting.updated(w, v, g.values())

    w = setting.start()
    start = jax.tree.map(lambda x: jnp.asarray(x.numpy()), (w, {name: torch.zeros_like(x) for name, x in w.items()}))
    phi = _through_callbacks(step, start)
    objective = _through_callbacks(lambda t, state, lam: setting.outer(state[0], setting.validation), jnp.float32(0))

    def f(lam: jax.Array) -> jax.Array:
        state, _ = jax.lax.scan(lambda state, t: (phi(t, state, lam), None), start, jnp.arange(1, steps + 1))
        return objective(0, state, lam)

    gradient, lam = jax.jit(jax.grad(f)), jnp.asarray(setting.lam().numpy())
    return lambda: gradient(lam)


def _through_callbacks(function: Callable[[int, Any, torch.Tensor], Any], like: Any) -> Callable[..., Any]:
    """A function of PyTorch, (t, state, lam) -> arrays like these, as one of JAX with a derivative."""
    shapes = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), tree)
    tensors = lambda tree: jax.tree.map(lambda x: torch.tensor(np.asarray(x)), tree)
    arrays = lambda tree: jax.tree.map(lambda x: x.detach().numpy(), tree)

    @jax.custom_vjp
    def called(t: Any, state: Any, lam: jax.Array) -> Any:
        run = lambda t, state, lam: arrays(function(int(t), tensors(state), tensors(lam)))
        return jax.pure_callback(run, shapes(like), t, state, lam)

    def backward(kept: Any, cotangent: Any) -> Any:
        def pull(t: Any, state: Any, lam: Any, cotangent: Any) -> Any:
            there = lambda state, lam: function(int(t), state, lam)
            return arrays(torch.func.vjp(there, tensors(state), tensors(lam))[1](tensors(cotangent)))

        return None, *jax.pure_callback(pull, shapes(kept[1:]), *kept, cotangent)

    called.defvjp(lambda t, state, lam: (called(t, state, lam), (t, state, lam)), backward)
    return called
