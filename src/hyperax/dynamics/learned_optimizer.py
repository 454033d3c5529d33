"""A learned optimizer as a dynamics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from hyperax.dynamics.dynamics import Dynamics, Gradient, State, Step
from hyperax.learned_optimizers.update_rule import Inputs, UpdateRule
from hyperax.problem import Lam, W


def _whole(lam: Lam) -> Any:
    return lam


class LearnedOptimizer(Dynamics):
    """The inner problem solved by an update rule whose parameters are outer variables:

        w_t = w_{t-1} + u_t,   (u_t, m_t) = update(g_t, w_{t-1}, m_{t-1}, t; lam),   g_t = grad L(w_{t-1}, lam)

    Arguments:
        rule: a function of lam that returns the `UpdateRule`, by default lam itself: `lambda lam: lam["rule"]`.

    The memory m of the rule is the auxiliary part of the state, so every method that follows a dynamics differentiates
    through it: `Reverse` with segments, `Truncated`, `RealTime` with a window, `EvolutionStrategy`, and `FirstOrder`,
    which takes the g_t for constants (the approximation of Andrychowicz et al. 2016).
    Raises: `ValueError` if `rule` is not a function, if it returns something else, or if the rule needs values of L
    and the gradient at hand has none.
    Cost: one gradient of L and one update a step; the state is w and the memory of the rule.
    Reference: Andrychowicz et al. 2016, eq. 1-3; Bridge paper 2017, Sec. 3 (learning to optimize).
    Do not use it with `Forward` or with tangents of `RealTime` unless the rule has few parameters: they carry one
    tangent of the state for each; nor with `Implicit`: the minimiser does not depend on how it is found.

    >>> from hyperax import FirstOrder, Problem, hypergradient
    >>> from hyperax.learned_optimizers import LSTMRule
    >>> sphere = lambda w, lam, d: jnp.sum((w - d) ** 2)
    >>> problem = Problem(inner=sphere, outer=sphere, init=lambda lam, d: jnp.zeros_like(d))
    >>> f = hypergradient(problem, LearnedOptimizer(), FirstOrder(steps=5))
    >>> h = f(LSTMRule(jax.random.key(0), units=4), jnp.ones(3))
    >>> h.grad.weight.shape, h.state.w.shape
    ((1, 4), (3,))
    """

    rule: Callable[[Lam], UpdateRule] = _whole

    def __check_init__(self):
        if isinstance(self.rule, UpdateRule) or not callable(self.rule):
            raise ValueError(
                f"rule is {type(self.rule).__name__}; its parameters are outer variables, so give a function of lam "
                'that returns the rule: lambda lam: lam["rule"]'
            )

    def _built(self, lam: Lam) -> UpdateRule:
        rule = self.rule(lam)
        if not isinstance(rule, UpdateRule):
            raise ValueError(
                f"the function given to LearnedOptimizer returned {type(rule).__name__}, not an UpdateRule; where the "
                'rule is a part of lam, say which: LearnedOptimizer(lambda lam: lam["rule"])'
            )
        return rule

    def init(self, w: W, lam: Lam) -> State:
        """The first memory of the rule."""
        return State(w, self._built(lam).init(w))

    def step(self, gradient: Gradient, state: State, lam: Lam, t: Step) -> State:
        """One update of the rule, added to w."""
        rule = self._built(lam)
        update, memory = rule.update(_inputs(rule, gradient, state.w, lam), state.auxiliary, t)
        return State(jax.tree.map(jnp.add, state.w, update), memory)


def _inputs(rule: UpdateRule, gradient: Gradient, w: W, lam: Lam) -> Inputs:
    """What the rule sees, from one evaluation of the inner objective."""
    if not rule.uses_value:
        return Inputs(w, gradient(w, lam))
    both = getattr(gradient, "value_and_gradient", None)
    if both is None:
        raise ValueError(
            f"{type(rule).__name__} uses the value of the inner objective, and this gradient has no method "
            "value_and_gradient(w, lam): wrap it as hyperax.dynamics.dynamics.InnerGradient(value_and_gradient)"
        )
    value, slope = both(w, lam)
    return Inputs(w, slope, value)
