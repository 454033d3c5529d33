"""Adam, in a form that has a derivative everywhere."""

from __future__ import annotations

from typing import Any

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


class Adam(Dynamics):
    """Adam with eps inside the square root, so that its derivative is finite where a gradient is zero.

        m_t = b1 m_{t-1} + (1 - b1) g_t,   v_t = b2 v_{t-1} + (1 - b2) g_t^2,   g_t = grad L(w_{t-1}, lam)
        w_t = w_{t-1} - eta ( m^ / sqrt(v^ + eps^2) + decay w_{t-1} ),   m^ = m_t / (1 - b1^t),   v^ = v_t / (1 - b2^t)

    The usual sqrt(v^) + eps has the same value at v^ = 0 and differs by less than eps elsewhere, but no derivative
    at v^ = 0: one dead unit, or an inner variable that starts where its gradient is zero, makes the hypergradient NaN.

    Arguments:
        step_size: eta, in units of w: a number >= 0, a pytree like w, a function of lam, or of (lam, t).
        b1, b2: in [0, 1), likewise; 1 - b is one over the length of the mean, in steps.
        eps: in units of the gradient, likewise; a number must be at least 1e-15. Where lam makes it smaller than about
            1e-15 in float32 (2e-2 in float16), it counts as that, so that squares do not underflow.
        weight_decay: decoupled from the gradient (AdamW), likewise.

    Raises: `ValueError` for numbers outside these ranges.
    Cost: one gradient a step; the state is (w, (m, v)), three times the size of w.
    Reference: Kingma and Ba 2015, Algorithm 1; Loshchilov and Hutter 2019, Algorithm 2 (decoupled decay).
    In float32, gradients over 1e19 overflow v. Do not use it where the inner run must converge to the minimiser: steps
    of size eta do not shrink by themselves. Nor for many steps at a point where gradients vanish: the derivative of a
    step there is the curvature times eta / eps, and its powers overflow; a larger eps is the remedy.

    >>> dynamics = Adam(step_size=0.01, b1=lambda lam: lam["b1"], weight_decay=lambda lam: lam["decay"])
    """

    step_size: Setting
    b1: Setting = 0.9
    b2: Setting = 0.999
    eps: Setting = 1e-8
    weight_decay: Setting = 0.0

    def __check_init__(self):
        check_setting("step_size", self.step_size)
        check_setting("b1", self.b1, below=1.0)
        check_setting("b2", self.b2, below=1.0)
        check_setting("eps", self.eps, lowest=1e-15)
        check_setting("weight_decay", self.weight_decay)

    def init(self, w: W, lam: Lam) -> State:
        """Both moments are zero."""
        return State(w, (jax.tree.map(jnp.zeros_like, w), jax.tree.map(jnp.zeros_like, w)))

    def step(self, gradient: Gradient, state: State, lam: Lam, t: Step) -> State:
        """One step: the moments first, then w with the new moments."""
        w, (m, v) = state
        per_leaf = lambda name: _per_leaf(name, evaluate_setting(getattr(self, name), lam, t), w)
        eta, b1, b2, eps, decay = map(per_leaf, ("step_size", "b1", "b2", "eps", "weight_decay"))
        g = gradient(w, lam)
        m = jax.tree.map(lambda b1, m, g: b1 * m + (1 - b1) * g, b1, m, g)
        v = jax.tree.map(lambda b2, v, g: b2 * v + (1 - b2) * g**2, b2, v, g)
        # An integer power: unlike exp(t log b), it has a derivative at b = 0.
        unbiased = lambda b, moment: moment * (1 / (1 - b**t))
        direction = lambda b1, b2, eps, m, v: _normalised(unbiased(b1, m), unbiased(b2, v), eps)
        u = jax.tree.map(direction, b1, b2, eps, m, v)
        w = jax.tree.map(lambda w, eta, u, decay: w - eta * (u + decay * w), w, eta, u, decay)
        return State(w, (m, v))


def _per_leaf(name: str, rate: Any, w: W) -> W:
    """The rate as a pytree like w, of the type of w, its leaves of shapes that broadcast."""
    jax.eval_shape(lambda rate, w: scale(name, rate, w), rate, w)  # raises for a rate that does not fit w
    if jax.tree.structure(rate) == jax.tree.structure(w):
        return jax.tree.map(lambda r, leaf: jnp.asarray(r, leaf.dtype), rate, w)
    return jax.tree.map(lambda leaf: jnp.asarray(rate, leaf.dtype), w)


@jax.custom_jvp
def _normalised(m: jax.Array, v: jax.Array, eps: jax.Array) -> jax.Array:
    """The direction m / sqrt(v + eps^2)."""
    return m / _root(v, eps)


def _root(v: jax.Array, eps: jax.Array) -> jax.Array:
    """sqrt(v + eps^2), kept well above the size of a gradient whose square underflows in v but not in m: m / root and
    its derivatives are then finite. For any eps in use, what is added is lost in rounding.
    """
    return jnp.sqrt(v + eps**2 + jnp.finfo(v.dtype).tiny ** 0.8)


@_normalised.defjvp
def _(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    # By the rule for quotients: (v + eps^2)^(-3/2), as JAX would compute it, overflows in float32 from eps = 1e-13
    # down, and infinity times m = 0 is NaN. Here every factor is about as large as the derivative itself.
    (m, v, eps), (dm, dv, deps) = primals, tangents
    root = _root(v, eps)
    u = m / root
    d_root = (dv / 2 + eps * deps) / root
    return u, (dm - u * d_root) / root
