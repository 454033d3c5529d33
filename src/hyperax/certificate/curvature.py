"""The Hessian of the inner objective: its extreme eigenvalues, and Newton's method."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

DENSE = 400
"""The largest d for which the Hessian is formed: 400 x 400 numbers, and d products with it."""

_LANCZOS = 32
_CONJUGATE_GRADIENTS = 50

Vector = Float[Array, " d"]
SlopeOf = Callable[[Vector], Vector]
"""w -> grad_w L, both flat."""


class Curvature(NamedTuple):
    """The extreme eigenvalues of H = grad^2_ww L at one point.

    Fields:
        mu: the smallest, the modulus of strong convexity there; if not `exact`, an upper bound of it.
        nu: the largest in magnitude, the Lipschitz constant of the gradient there.
        exact: whether all eigenvalues were computed (d <= 400), or estimated by 32 steps of Lanczos.
        step_size, limit: eta, and the value below which the dynamics contracts on a quadratic: 2 / nu for gradient
            descent, 2 (1 + momentum) / nu for heavy ball; `None` where eta is not one number, or for other dynamics.
    """

    mu: float
    nu: float
    exact: bool
    step_size: float | None = None
    limit: float | None = None

    @property
    def condition(self) -> float:
        """Nu / mu; infinite for mu <= 0."""
        return self.nu / self.mu if self.mu > 0 else float("inf")

    @property
    def indefinite(self) -> bool:
        """Whether there is a direction of descent: then w is not near a minimiser."""
        return self.mu < -1e-7 * self.nu

    @property
    def singular(self) -> bool:
        """Whether L is flat along a direction, up to rounding."""
        return not self.indefinite and self.mu <= 1e-10 * self.nu


def extremes(slope: SlopeOf, w: Vector) -> tuple[Array, Array]:
    """(smallest eigenvalue of the Hessian, largest eigenvalue in magnitude)."""
    ritz = jnp.linalg.eigvalsh(hessian(slope, w)) if w.size <= DENSE else _lanczos(slope, w)
    return ritz[0], jnp.maximum(jnp.abs(ritz[0]), jnp.abs(ritz[-1]))


def hessian(slope: SlopeOf, w: Vector) -> Float[Array, "d d"]:
    """The Hessian, its two triangles averaged."""
    matrix = jax.jacfwd(slope)(w)
    return (matrix + matrix.T) / 2


def newton(slope: SlopeOf, w: Vector, iterations: int, always: bool = False) -> tuple[Vector, Array]:
    """(w after Newton's method, length of its last step: more than the distance that is left).

        w <- w - (H + delta I)^-1 grad_w L,   delta far below nu, so that flat directions do no harm

    A step is taken if it makes the gradient smaller, or `always`, with delta = 0 (where w is known to be next to the
    solution, and the result is to be differentiated). Where H is not positive definite no step is taken, and the
    length is infinite. A last step of rounding size says that w is a minimiser, and how well it is known.
    """
    share = 0.0 if always else float(jnp.finfo(w.dtype).eps) ** 0.6  # 4e-10 in float64

    def dense(w: Vector, g: Vector) -> Vector:
        matrix = hessian(slope, w)
        delta = share * jnp.trace(matrix) / w.size
        factor = jnp.linalg.cholesky(matrix + delta * jnp.eye(w.size, dtype=w.dtype))
        return jax.scipy.linalg.cho_solve((factor, True), g)

    def iterative(w: Vector, g: Vector) -> Vector:
        product = lambda v: jax.jvp(slope, (w,), (v,))[1]
        p = jax.scipy.sparse.linalg.cg(product, g, tol=1e-12, maxiter=_CONJUGATE_GRADIENTS)[0]
        return jnp.where(jnp.vdot(p, product(p)) >= 0, p, jnp.nan)

    direction = dense if w.size <= DENSE else iterative

    def step(w: Vector, _: None) -> tuple[Vector, Array]:
        g = slope(w)
        p = direction(w, g)
        new = w - p
        if not always:
            better = jnp.sum(slope(new) ** 2) < jnp.sum(g**2)  # False for NaN
            new = jnp.where(better, new, w)
        return new, jax.lax.stop_gradient(jnp.sum(p**2))

    w, squares = jax.lax.scan(step, w, None, length=iterations)
    length = jnp.sqrt(squares[-1])
    return w, jnp.where(jnp.isfinite(length), length, jnp.inf)


def _lanczos(slope: SlopeOf, w: Vector) -> Float[Array, " k"]:
    """Ritz values in ascending order, with every new vector made orthogonal to all before."""
    count = _LANCZOS
    first = jax.random.normal(jax.random.key(0), w.shape, w.dtype)
    basis = jnp.zeros((count, w.size), w.dtype).at[0].set(first / jnp.linalg.norm(first))

    def step(basis: Array, j: Array) -> tuple[Array, tuple[Array, Array]]:
        v = jax.jvp(slope, (w,), (basis[j],))[1]
        alpha = jnp.vdot(basis[j], v)
        size = jnp.linalg.norm(v)
        for _ in range(2):
            v = v - basis.T @ (basis @ v)
        beta = jnp.linalg.norm(v)
        beta = jnp.where(beta > 1e-10 * size, beta, 0.0)  # the basis is complete: what is left is rounding
        v = jnp.where(beta > 0, v / jnp.where(beta > 0, beta, 1), 0.0)
        return basis.at[jnp.minimum(j + 1, count - 1)].set(jnp.where(j + 1 < count, v, basis[-1])), (alpha, beta)

    basis, (alpha, beta) = jax.lax.scan(step, basis, jnp.arange(count))
    # After an early end the vectors are zero; their entries repeat one that is inside the spectrum.
    alpha = jnp.where(jnp.sum(basis**2, axis=1) > 0, alpha, alpha[0])
    return jnp.linalg.eigvalsh(jnp.diag(alpha) + jnp.diag(beta[:-1], 1) + jnp.diag(beta[:-1], -1))
