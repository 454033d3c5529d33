"""Learned step sizes with momentum: the simplest learned optimizer."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from hyperax.dynamics.dynamics import Step, scale
from hyperax.learned_optimizers.update_rule import Inputs, UpdateRule
from hyperax.problem import W


class StepSizeRule(UpdateRule):
    """Gradient descent with momentum, with a step size and a momentum learned for each parameter, or for each leaf:

        m_t = sigmoid(b) m_{t-1} + g_t,   u_t = -exp(a) m_t,   m_0 = 0      (products by coordinate)

    Arguments:
        w: a template: the inner variables that the rule is for, or arrays of their shapes.
        step_size: exp(a) at first, in units of w per unit of gradient.
        momentum: sigmoid(b) at first, in (0, 1); `None` for none, and no memory.
        per_leaf: one step size and one momentum for all coordinates of a leaf, in place of one each.

    The arrays are `log_step` (a) and `momentum_logit` (b), pytrees like w.
    Raises: `ValueError` for a step size that is not positive, a momentum outside (0, 1), a template without arrays; in
    a run, for inner variables unlike the template.
    Cost: nothing beside the gradient; memory one w, and two w of parameters (two numbers a leaf).
    Reference: Li et al. 2017 (Meta-SGD) for step sizes learned by coordinate; there they may change sign.
    Do not use it for inner variables of other shapes than the template's: its parameters belong to coordinates.

    >>> rule = StepSizeRule({"weight": jnp.ones((3, 2)), "bias": jnp.ones(2)}, step_size=0.1, per_leaf=True)
    >>> print(jnp.exp(rule.log_step["weight"]), jax.nn.sigmoid(rule.momentum_logit["bias"]))
    0.1 0.9
    """

    log_step: PyTree
    momentum_logit: PyTree | None

    def __init__(self, w: W, step_size: float = 0.01, momentum: float | None = 0.9, per_leaf: bool = False):
        if not step_size > 0:
            raise ValueError(f"step_size is {step_size!r}; it is learned as a logarithm, so start from a positive one")
        if momentum is not None and not 0 < momentum < 1:
            raise ValueError(
                f"momentum is {momentum!r}; it is learned as a logit, so start inside (0, 1), or leave it out with None"
            )
        template = eqx.filter(w, eqx.is_inexact_array)
        if not jax.tree.leaves(template):
            raise ValueError("the template w has no floating-point array; give the inner variables themselves")
        fill = lambda x: jax.tree.map(lambda leaf: jnp.full(() if per_leaf else leaf.shape, x, leaf.dtype), template)
        self.log_step = fill(jnp.log(step_size))
        self.momentum_logit = None if momentum is None else fill(jax.scipy.special.logit(momentum))

    def init(self, w: W) -> W | tuple[()]:
        """The first velocity is zero."""
        return () if self.momentum_logit is None else jax.tree.map(jnp.zeros_like, w)

    def update(self, inputs: Inputs, memory: W | tuple[()], t: Step) -> tuple[W, W | tuple[()]]:
        """The velocity first, then a step along it."""
        m = inputs.gradient
        if self.momentum_logit is not None:
            carried = scale("momentum_logit", jax.tree.map(jax.nn.sigmoid, self.momentum_logit), memory)
            m = jax.tree.map(jnp.add, carried, m)
        update = scale("log_step", jax.tree.map(lambda a: -jnp.exp(a), self.log_step), m)
        return update, () if self.momentum_logit is None else m
