"""Reverse mode through the last steps, with central differences for the second derivatives (DARTS)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from hyperax.dynamics.dynamics import Dynamics, InnerGradient
from hyperax.methods.method import Method, Outcome, truncated_value
from hyperax.problem import Data, Lam, Problem, Scalar, W
from hyperax.rollout import Objective, check_steps


class FiniteDifference(Method):
    """`Truncated`, with the second derivatives of the inner objective replaced by differences of first ones.

        (d g_t / d lam)^T u  ~  ||u|| / (2 epsilon) ( grad_lam L(w+, lam) - grad_lam L(w-, lam) ),
        g_t = grad_w L(w_{t-1}, lam),   w+- = w_{t-1} +- epsilon u / ||u||

    and likewise (d g_t / d w)^T u, with grad_w L. So window = 1 with `GradientDescent` is DARTS:
    grad_lam E - eta ( grad_lam L(w+) - grad_lam L(w-) ) / (2 eps'), u = grad_w E(w_T), eps' = epsilon / ||u||.

    Arguments:
        steps: T >= 0.
        window: K, 0 <= K <= T. With K = T Phi_0 counts too, and `Reverse` is approximated.
        epsilon: the length of the move, in units of w (the norm of all of w). The error is O(epsilon^2) times third
            derivatives of L, plus rounding of about (6e-8 in float32, 1e-16 in float64) |grad L| / epsilon: for w
            and gradients of size one 0.01 is right in float32, 1e-5 in float64.

    Raises: `ValueError` for a window outside 0, ..., T, or epsilon not a positive number.
    Cost: time T - K plain steps, and for each of the last K steps three gradients of L (one forward, two backward) of
    all it depends on; memory K states. No second derivative of L is formed, so it may have none.
    Reference: Liu et al. 2019 (DARTS), eq. 7-8.
    Do not use it where L has second derivatives at a bearable cost: `Truncated` has no epsilon to choose and is exact.
    Nor where L has kinks within epsilon of w: the difference sees their mean.

    >>> method = FiniteDifference(steps=1)
    """

    steps: int
    window: int = 1
    epsilon: float = 0.01

    def __check_init__(self):
        check_steps(self.steps)
        check_steps(self.window, "window")
        if self.window > self.steps:
            raise ValueError(
                f"window {self.window} is longer than the run of {self.steps} steps; use at most {self.steps}"
            )
        if not isinstance(self.epsilon, int | float) or not 0.0 < self.epsilon < math.inf:
            raise ValueError(f"epsilon is {self.epsilon!r}; it must be a positive number, such as 0.01")

    def value(self, problem: Problem, dynamics: Dynamics, lam: Lam, data: Data, carry: Any) -> tuple[Scalar, Outcome]:
        """f_T(lam), with the first T - K steps detached from lam and differences in place of second derivatives."""
        gradient_of = differenced_gradient(self.epsilon)
        return truncated_value(problem, dynamics, self.steps, self.window, lam, data, carry, gradient_of=gradient_of)


def differenced_gradient(epsilon: float) -> Callable[[Objective], InnerGradient]:
    """A `gradient_of` for `advance`: the exact gradient, whose own derivative is taken by central differences.

    The value beside it is differentiated as it stands: that takes no second derivative.
    """

    def gradient_of(objective: Objective) -> InnerGradient:
        def value_and_gradient(w: W, lam: Lam) -> tuple[Scalar, W]:
            # The objective holds what `prepare` computed from lam, and the step's number: they become arguments, for
            # the backward pass runs where they are out of scope, and the former have a derivative too.
            closed = eqx.filter_closure_convert(objective, w, lam)
            return objective(w, lam), _gradient((w, lam, closed), epsilon)

        return InnerGradient(value_and_gradient)

    return gradient_of


@eqx.filter_custom_vjp
def _gradient(arguments: Any, epsilon: float) -> W:
    """grad_w L at (w, lam, L): all that the objective depends on in one argument."""
    w, lam, objective = arguments
    return jax.grad(objective)(w, lam)


def _forward(perturbed: Any, arguments: Any, epsilon: float) -> tuple[W, None]:
    return _gradient(arguments, epsilon), None


def _backward(residuals: None, u: W, perturbed: Any, arguments: Any, epsilon: float) -> Any:
    """(d grad_w L / d arguments)^T u, for the arguments that depend on lam."""
    norm = _norm(u)
    # Along no direction there is no derivative, and the norm must not divide.
    move = jax.tree.map(lambda leaf: leaf * (epsilon / jnp.where(norm > 0, norm, 1.0)).astype(leaf.dtype), u)
    moving, fixed = eqx.partition(arguments, perturbed)

    def slope(sign: int) -> Any:
        def objective(moving: Any) -> Scalar:
            w, lam, closed = eqx.combine(moving, fixed)
            return closed(jax.tree.map(lambda w, d: w + sign * d, w, move), lam)

        return jax.grad(objective)(moving)

    difference = jax.tree.map(jnp.subtract, slope(1), slope(-1))
    return jax.tree.map(lambda leaf: leaf * (norm / (2 * epsilon)).astype(leaf.dtype), difference)


_gradient.def_fwd(_forward)
_gradient.def_bwd(_backward)


def _norm(u: W) -> jax.Array:
    """The norm of all entries, scaled first: squares of small cotangents would underflow in float32."""
    leaves = jax.tree.leaves(u)
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(leaf), initial=0.0) for leaf in leaves]))
    unit = jnp.where(largest > 0, largest, 1.0)
    return unit * jnp.sqrt(sum(jnp.sum((leaf / unit) ** 2) for leaf in leaves)) * (largest > 0)
