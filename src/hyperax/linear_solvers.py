"""Solvers for the linear system of `Implicit`: conjugate gradients, series, low rank, and any solver of Lineax."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jax.flatten_util import ravel_pytree

from hyperax.problem import Scalar, W
from hyperax.rollout import check_steps

Operator = Callable[[W], W]
"""v -> A v: a linear function from a pytree to one like it."""

Solved = tuple[W, jax.Array | None]
"""(q, the steps it took; `None` for a solver that takes none)."""


class LinearSolver(eqx.Module):
    """How A q = g is solved, with A given by its products with vectors.

    `solve(operator, vector, start, tolerance)` returns (q, steps). `start` is a guess, or `None` for zero. `tolerance`
    is the ||A q - g|| to stop at, or `None` for the solver's own. A solver never raises for a system it cannot solve:
    `Implicit` measures what is left and reports it.
    """

    of_step: ClassVar[bool] = False
    """Whether A is I - (dPhi/ds)^T, of the dynamics' step, in place of the Hessian of the inner objective."""

    @property
    def takes_tolerance(self) -> bool:
        """Whether the solver can be told the residual to stop at."""
        return True

    @abstractmethod
    def solve(self, operator: Operator, vector: W, start: W | None, tolerance: Scalar | None) -> Solved:
        """A q with A q = vector, nearly, and the steps it took."""


class ConjugateGradient(LinearSolver):
    """Conjugate gradients for a symmetric positive definite H, without a matrix.

        alpha = |r|^2 / p^T H p,   q <- q + alpha p,   r <- r - alpha H p,   p <- r + (|r_new|^2 / |r|^2) p

    Stops when |r| <= tolerance |g|, after `max_steps`, or where p^T H p <= 0: there H is not positive definite, and q
    stays as it was. Beside `lineax.CG` because that one gives NaN in float32 as soon as a curvature p^T H p / |p|^2 is
    below 100 d eps (0.1 for d = 10 000), and measures the residual entry by entry.

    Arguments:
        tolerance: of |r| / |g|, > 0; `None` takes eps^(3/4) of w's type: 2e-12 in float64, 6e-6 in float32.
        max_steps: Hessian-vector products at the most; about sqrt(nu / mu) log(2 / tolerance) / 2 are needed.

    Raises: `ValueError` for tolerance <= 0 or max_steps < 1.
    Cost: one Hessian-vector product a step; memory four w.
    Reference: Hestenes and Stiefel 1952; for hypergradients Pedregosa 2016, Algorithm 1.
    Do not use it where the inner objective is not strongly convex around w_T: `lineax.GMRES` takes any invertible H.

    >>> solver = ConjugateGradient(tolerance=1e-8)
    """

    tolerance: float | None = None
    max_steps: int = 1000

    def __check_init__(self):
        check_positive("tolerance", self.tolerance)
        check_steps(self.max_steps, "max_steps", 1)

    def solve(self, operator: Operator, vector: W, start: W | None, tolerance: Scalar | None) -> Solved:
        """Conjugate gradients from `start`."""
        relative = float(jnp.finfo(jnp.result_type(*jax.tree.leaves(vector))).eps) ** 0.75
        stop = _stop(relative if self.tolerance is None else self.tolerance, vector, tolerance)

        def unsolved(carry: Any) -> jax.Array:
            _, _, _, square, k, convex = carry
            return convex & (k < self.max_steps) & (jnp.sqrt(square) > stop)

        def step(carry: Any) -> Any:
            q, r, p, square, k, _ = carry
            product = operator(p)
            curvature = dot(p, product)
            convex = curvature > 0
            alpha = jnp.where(convex, square / curvature, 0)
            q, r = _add(q, alpha, p), _add(r, -alpha, product)
            new = dot(r, r)
            return q, r, _add(r, new / square, p), new, k + 1, convex

        q, r = _first(operator, vector, start)
        carry = jax.lax.while_loop(unsolved, step, (q, r, r, dot(r, r), jnp.int32(0), jnp.asarray(True)))
        return carry[0], carry[4]


class Neumann(LinearSolver):
    """The first K terms of the Neumann series of H^-1: gradient descent on the linear system.

        q = eta sum over k < K of (I - eta H)^k g,   as q <- q + eta (g - H q), K times

    Arguments:
        terms: K >= 1.
        step_size: eta > 0, in units of 1 / H; the series converges for eta < 2 / nu, nu the largest eigenvalue of H.

    Raises: `ValueError` for terms < 1 or step_size <= 0.
    Cost: K + 1 Hessian-vector products; memory three w. The error is at most (1 - eta mu)^K for eta <= 1 / nu.
    With a warm start the iteration begins at the last q, so K terms refine it.
    Reference: Lorraine, Vicol and Duvenaud 2020, Algorithm 3.
    Do not use it on badly conditioned problems: `ConjugateGradient` takes the square root of the steps and no eta.

    >>> solver = Neumann(terms=100, step_size=0.1)
    """

    terms: int
    step_size: float

    def __check_init__(self):
        check_steps(self.terms, "terms", 1)
        check_positive("step_size", self.step_size)

    def solve(self, operator: Operator, vector: W, start: W | None, tolerance: Scalar | None) -> Solved:
        """K terms, or fewer if `tolerance` is met."""
        return _richardson(operator, vector, start, self.step_size, self.terms, _stop(0.0, vector, tolerance))


class FixedPoint(LinearSolver):
    """The adjoint of the dynamics' own step at the last state, iterated to its fixed point.

        q <- (dPhi_T / ds)^T q + grad_s E,   grad f = grad_lam E + (dPhi_T / dlam)^T q,   at s = s_T = (w_T, auxiliary)

    This differentiates the fixed point of the dynamics, which may depend on lam through the dynamics as well (a decay
    decoupled from the gradient). The gradient of a step size or a momentum tends to zero as s_T converges.

    Arguments:
        iterations: K >= 1, from q = 0 (with a warm start from the last q).
        tolerance: stop before where |(I - dPhi^T) q - grad_s E| <= tolerance |grad_s E|; `None` takes all iterations.

    Raises: `ValueError` for iterations < 1 or tolerance <= 0; when called, for a state with integer leaves (Optax).
    Cost: K + 1 products with the transpose of the step's derivative; memory three states. Converges where the inner run
    does, at its rate.
    Reference: Grazzi et al. 2020 (the fixed-point method of AID); the state as in the Bridge paper 2017, eq. 1.4.
    Do not use it where one step is no contraction around s_T (Adam with a small eps): the residual then grows.

    >>> solver = FixedPoint(iterations=200)
    """

    of_step: ClassVar[bool] = True

    iterations: int
    tolerance: float | None = None

    def __check_init__(self):
        check_steps(self.iterations, "iterations", 1)
        check_positive("tolerance", self.tolerance)

    def solve(self, operator: Operator, vector: W, start: W | None, tolerance: Scalar | None) -> Solved:
        """K iterations, or fewer if a tolerance is met."""
        return _richardson(
            operator, vector, start, 1.0, self.iterations, _stop(self.tolerance or 0.0, vector, tolerance)
        )


class Nystrom(LinearSolver):
    """A damped inverse of a low-rank H: exact on the span that k random directions O show, 1 / rho off it.

        H_k = (H O) (O^T H O)^+ (H O)^T,   q = (H_k + rho I)^-1 g

    The inverse is taken by eigenvalues: with H O = Q R and V diag(s) V^T = R (O^T H O)^+ R^T, U = Q V,
    q = U diag(1 / (s + rho)) U^T g + (g - U U^T g) / rho. Woodbury's formula is the same, but loses digits as rho -> 0.

    Arguments:
        rank: k >= 1; more than d counts as d, and then H_k = H.
        damping: rho > 0, in units of H. It biases q even at full rank.
        seed: of the Gaussian directions; the same in every call.

    Raises: `ValueError` for rank < 1 or damping <= 0.
    Cost: k Hessian-vector products, one after the other, and 4 d k^2 operations; memory 3 k w. No iterations, so the
    time is known beforehand.
    Reference: Hataya and Yamada 2023 (columns of H there, Gaussian directions here).
    Do not use it where H has more than k eigenvalues that are large beside rho: look at `info["residual"]`.

    >>> solver = Nystrom(rank=10, damping=0.01)
    """

    rank: int
    damping: float
    seed: int = 0

    def __check_init__(self):
        check_steps(self.rank, "rank", 1)
        check_positive("damping", self.damping)

    @property
    def takes_tolerance(self) -> bool:
        """The rank decides, not a tolerance."""
        return False

    def solve(self, operator: Operator, vector: W, start: W | None, tolerance: Scalar | None) -> Solved:
        """The damped inverse; neither `start` nor `tolerance` is of use."""
        g, unravel = ravel_pytree(vector)
        flat = lambda v: ravel_pytree(operator(unravel(v)))[0]
        shape = (g.size, min(self.rank, g.size))
        with jax.default_matmul_precision("highest"):  # GPUs would multiply with 10 bits
            O, _ = jnp.linalg.qr(jax.random.normal(jax.random.key(self.seed), shape, g.dtype))
            HO = jax.lax.map(flat, O.T).T
            Q, R = jnp.linalg.qr(HO)
            s, V = jnp.linalg.eigh(R @ jnp.linalg.pinv(O.T @ HO, hermitian=True) @ R.T)
            U = Q @ V
            along = U.T @ g
            rest = g - U @ along
            rest = rest - U @ (U.T @ rest)  # what rounding left of the span would be divided by rho
            q = U @ (along / (s + self.damping)) + rest / self.damping
        return unravel(q), None


class FromLineax(LinearSolver):
    """A solver of Lineax, behind the same call.

    >>> solver = FromLineax(lx.GMRES(rtol=1e-8, atol=1e-8))
    """

    solver: lx.AbstractLinearSolver

    @property
    def takes_tolerance(self) -> bool:
        """Iterative solvers have an `rtol` and an `atol`; wrapped in `lineax.Normal` they stop at another residual."""
        return hasattr(self.solver, "rtol") and hasattr(self.solver, "atol")

    def solve(self, operator: Operator, vector: W, start: W | None, tolerance: Scalar | None) -> Solved:
        """`lineax.linear_solve`, without raising."""
        solver = self.solver
        if tolerance is not None:
            # rtol = 0 and the Euclidean norm: what is compared with the tolerance is then |A q - g|.
            solver = eqx.tree_at(lambda s: (s.rtol, s.atol), solver, (0.0, tolerance))
            if hasattr(solver, "norm"):
                solver = eqx.tree_at(lambda s: s.norm, solver, norm)
        # Only what asks for it is told that A is positive definite: other solvers must not rely on it.
        definite = isinstance(self.solver, lx.CG | lx.Cholesky)
        tags = [lx.symmetric_tag, *([lx.positive_semidefinite_tag] if definite else [])]
        system = lx.FunctionLinearOperator(operator, jax.eval_shape(lambda: vector), tags)
        solution = lx.linear_solve(system, vector, solver, options={} if start is None else {"y0": start}, throw=False)
        steps = solution.stats.get("num_steps")
        return solution.value, None if steps is None else jnp.asarray(steps, jnp.int32)


def as_linear_solver(solver: Any) -> LinearSolver:
    """The solver itself, or a solver of Lineax made into one of ours.

    >>> as_linear_solver(lx.LU()).takes_tolerance
    False
    """
    if isinstance(solver, LinearSolver):
        return solver
    if isinstance(solver, lx.AbstractLinearSolver):
        return FromLineax(solver)
    raise ValueError(
        f"solver is {solver!r}; use ConjugateGradient(), Neumann(...), FixedPoint(...), Nystrom(...), or a solver of "
        "Lineax: lineax.GMRES(rtol=1e-8, atol=1e-8), lineax.Cholesky()"
    )


def check_positive(name: str, number: float | None) -> None:
    """Raise a `ValueError` for a number that is not positive; `None` is none."""
    if number is not None and not number > 0:
        raise ValueError(f"{name} is {number!r}; it must be a number > 0")


def dot(a: W, b: W) -> Scalar:
    """a^T b; a sum of products, because GPUs multiply matrices of float32 with fewer digits."""
    products = jax.tree.map(lambda x, y: jnp.sum(x * y), a, b)
    return sum(jax.tree.leaves(products), jnp.zeros((), jnp.result_type(*jax.tree.leaves(a))))


def norm(a: W) -> Scalar:
    """|a|, the Euclidean norm of a pytree."""
    return jnp.sqrt(dot(a, a))


def residual(operator: Operator, q: W, vector: W) -> Scalar:
    """|A q - g| / |g|, by one product; |A q| where g = 0."""
    size = norm(vector)
    return norm(_add(operator(q), -1.0, vector)) / jnp.where(size > 0, size, 1)


def _add(a: W, factor: Any, b: W) -> W:
    return jax.tree.map(lambda x, y: x + jnp.asarray(factor, x.dtype) * y, a, b)


def _first(operator: Operator, vector: W, start: W | None) -> tuple[W, W]:
    """(q, g - A q) at the start; no product for a start at zero."""
    if start is None:
        return jax.tree.map(jnp.zeros_like, vector), vector
    return start, _add(vector, -1.0, operator(start))


def _stop(relative: float, vector: W, tolerance: Scalar | None) -> Scalar:
    return relative * norm(vector) if tolerance is None else tolerance


def _richardson(
    operator: Operator, vector: W, start: W | None, eta: float, most: int, stop: Scalar
) -> tuple[W, jax.Array]:
    """Repeat q <- q + eta (g - A q), `most` times or until |g - A q| <= stop."""

    def unsolved(carry: Any) -> jax.Array:
        _, r, k = carry
        return (k < most) & (norm(r) > stop)

    def step(carry: Any) -> Any:
        q, r, k = carry
        q = _add(q, eta, r)
        return q, _add(vector, -1.0, operator(q)), k + 1

    q, _, k = jax.lax.while_loop(unsolved, step, (*_first(operator, vector, start), jnp.int32(0)))
    return q, k
