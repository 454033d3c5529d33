"""Newton's method with conjugate gradients, for convex inner problems."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from hyperax.dynamics.dynamics import Dynamics, Gradient, State, Step
from hyperax.linear_solvers import ConjugateGradient, check_positive, dot, norm
from hyperax.problem import Lam, Scalar, W
from hyperax.rollout import check_steps

SHORTENINGS = 20
FLAT = 0.1  # of the first slope: what a step may climb with at its end


class Newton(Dynamics):
    """Newton's method, its system solved by conjugate gradients as far as `forcing` says, with a safe step length.

        |H p + g| <= max(forcing |g|, tolerance / 10),   g = grad L(w_{t-1}, lam),   H its derivative in w
        w_t = w_{t-1} + eta p,   eta = 1, or shortened until <grad L(w_t, lam), p> <= |<g, p>| / 10

    The slope along p grows with eta where L is convex, so that the secant through eta = 0 and the last eta finds the
    length; the objective itself is not needed.

    Arguments:
        tolerance: where |g| <= tolerance no step is taken (and no product with H); 0 or more, in units of the gradient.
        forcing: in (0, 1), of the residual.
        max_steps: products with H in one step at the most.

    For `hyperax.Implicit`, which does not differentiate the run: give it the same tolerance, as `lambda k: tolerance`.
    Raises: `ValueError` for numbers outside these ranges.
    Cost: one product with H for each step of conjugate gradients, two gradients and more where a step is shortened;
    memory six w. The error shrinks by `forcing` a step near the solution.
    Reference: Dembo, Eisenstat and Steihaug 1982 (inexact Newton methods).
    Do not use it under `Reverse` (a loop of unknown length cannot be run backwards) nor where L is not convex: it stays
    where H is not positive definite. A badly scaled w makes it slow: change variables, w = S v, S^2 near 1 / diag H.

    >>> from hyperax import Implicit, Problem, hypergradient
    >>> problem = Problem(
    ...     inner=lambda w, lam, d: jnp.sum(jnp.logaddexp(0.0, -d * w)) + 0.5 * lam * w**2,
    ...     outer=lambda w, lam, d: w**2,
    ...     init=lambda lam, d: 0.0,
    ... )
    >>> h = hypergradient(problem, Newton(), Implicit(steps=8))(jnp.asarray(1.0), jnp.asarray([1.0, 2.0, -1.0]))
    >>> print(f"{h.state.w:.3f} {h.info['inner_gradient'] < 1e-6} {h.grad:.3f}")
    0.410 True -0.144
    """

    tolerance: float = 0.0
    forcing: float = 0.1
    max_steps: int = 500

    def __check_init__(self):
        if not self.tolerance >= 0:
            raise ValueError(f"tolerance is {self.tolerance!r}; it must be a number >= 0")
        check_positive("forcing", self.forcing)
        if not self.forcing < 1:
            raise ValueError(f"forcing is {self.forcing!r}; it must be below 1, for the residual to shrink")
        check_steps(self.max_steps, "max_steps", 1)

    def init(self, w: W, lam: Lam) -> State:
        """The state is w alone."""
        return State(w)

    def step(self, gradient: Gradient, state: State, lam: Lam, t: Step) -> State:
        """One step of Newton's method."""
        w = state.w
        g, hessian = jax.linearize(lambda w: gradient(w, lam), w)
        size = norm(g)
        enough = jnp.where(size <= self.tolerance, size, jnp.maximum(self.forcing * size, self.tolerance / 10))
        p, _ = ConjugateGradient(max_steps=self.max_steps).solve(hessian, _scaled(-1.0, g), None, enough)
        slope = lambda eta: dot(gradient(_moved(w, eta, p), lam), p)
        return State(_moved(w, _length(slope, dot(g, p)), p))


def _length(slope, first: Scalar) -> Scalar:
    """Eta <= 1 with slope(eta) <= FLAT |first|, by secants from eta = 0, where the slope is `first` <= 0."""

    def climbs(loop: tuple) -> jax.Array:
        _, last, k = loop
        # Not `last > ...`: a slope that is NaN, outside of where L is defined, is too large as well.
        return ~(last <= -FLAT * first) & (k < SHORTENINGS)

    def shorten(loop: tuple) -> tuple:
        # The first turn, where last = inf, only looks at eta = 1: so `slope` is compiled once.
        eta, last, k = loop
        secant = jnp.where(jnp.isfinite(last), first / (first - last), 0.0)
        eta = jnp.where(k == 0, eta, eta * jnp.maximum(secant, 0.1))
        return eta, slope(eta), k + 1

    one = jnp.ones_like(first)
    return jax.lax.while_loop(climbs, shorten, (one, jnp.full_like(one, jnp.inf), jnp.int32(0)))[0]


def _scaled(factor: float, tree: W) -> W:
    return jax.tree.map(lambda leaf: factor * leaf, tree)


def _moved(w: W, eta: Scalar, p: W) -> W:
    return jax.tree.map(lambda a, b: a + jnp.asarray(eta, a.dtype) * b, w, p)
