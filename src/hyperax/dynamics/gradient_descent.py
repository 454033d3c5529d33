"""Gradient descent."""

from __future__ import annotations

import jax

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


class GradientDescent(Dynamics):
    """Gradient descent: w_t = w_{t-1} - eta_t grad L(w_{t-1}, lam).

    Arguments:
        step_size: eta, in units of w / gradient: a number >= 0, a pytree like w (one rate per parameter), a function
            of lam, or of (lam, t), t = 1, ..., T, for a schedule (an Optax one: `lambda lam, t: schedule(t)`).

    Raises: `ValueError` for a negative number, or a function of other than one or two arguments.
    Cost: one gradient a step; the state is w alone.
    Converges linearly on strongly convex objectives for eta < 2 / nu, nu the Lipschitz constant of the gradient.
    Reference: Franceschi et al. 2018, text after eq. 6 and eq. 10.
    Do not use it on badly conditioned inner problems with few steps: `HeavyBall` converges faster.

    >>> import jax.numpy as jnp
    >>> dynamics = GradientDescent(step_size=lambda lam: jnp.exp(lam["log_step"]))
    """

    step_size: Setting

    def __check_init__(self):
        check_setting("step_size", self.step_size)

    def init(self, w: W, lam: Lam) -> State:
        """The state is w alone."""
        return State(w)

    def step(self, gradient: Gradient, state: State, lam: Lam, t: Step) -> State:
        """One step of gradient descent."""
        eta = evaluate_setting(self.step_size, lam, t)
        descent = scale("step_size", eta, gradient(state.w, lam))
        return State(jax.tree.map(lambda w, d: w - d, state.w, descent))
