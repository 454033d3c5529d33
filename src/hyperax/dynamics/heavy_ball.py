"""Gradient descent with momentum (heavy ball)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from hyperax.dynamics.dynamics import (
    Dynamics,
    Gradient,
    Setting,
    State,
    Step,
    check_setting,
    evaluate_setting,
    scale,
)
from hyperax.problem import Lam, W


class HeavyBall(Dynamics):
    """Gradient descent with momentum: m_t = mu_t m_{t-1} + grad L(w_{t-1}, lam), w_t = w_{t-1} - eta_t m_t, m_0 = 0.

    Arguments:
        step_size: eta, a number >= 0, a pytree like w, a function of lam, or of (lam, t).
        momentum: mu in [0, 1), likewise.

    Raises: `ValueError` for numbers outside these ranges.
    Cost: one gradient a step; the state is (w, m), twice the size of w.
    Reference: Bridge paper 2017, eq. 1.3 (state s = (w, v)); convention of Franceschi et al. 2017.
    Do not use it with the convention w <- w + v, v <- mu v - eta g in mind when eta varies with t: there the old
    velocity keeps the old step size, here it is scaled by the new one.

    >>> dynamics = HeavyBall(step_size=0.1, momentum=lambda lam: lam["momentum"])
    """

    step_size: Setting
    momentum: Setting = 0.9

    def __check_init__(self):
        check_setting("step_size", self.step_size)
        check_setting("momentum", self.momentum, below=1.0)

    def init(self, w: W, lam: Lam) -> State:
        """The first velocity is zero."""
        return State(w, jax.tree.map(jnp.zeros_like, w))

    def step(self, gradient: Gradient, state: State, lam: Lam, t: Step) -> State:
        """One step: the velocity first, then w with the new velocity."""
        eta = evaluate_setting(self.step_size, lam, t)
        mu = evaluate_setting(self.momentum, lam, t)
        carried = scale("momentum", mu, state.auxiliary)
        m = jax.tree.map(lambda c, g: c + g, carried, gradient(state.w, lam))
        return State(jax.tree.map(lambda w, d: w - d, state.w, scale("step_size", eta, m)), m)
