"""A solution of the inner problem given as a formula."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp

from hyperax.checks import leaf_name
from hyperax.dynamics.dynamics import Dynamics, State
from hyperax.methods.method import Method, Outcome, detach
from hyperax.problem import Data, Lam, Problem, Scalar, W
from hyperax.rollout import exact_gradient


class ClosedForm(Method):
    """The exact gradient of f, where the solution of the inner problem is a formula: JAX differentiates the formula.

        f(lam) = E(w_lam, lam, D),   w_lam = argmin L(., lam, D) = solve(lam, D),   D = prepare(lam, data)

    Arguments:
        solve: (lam, D) -> w_lam, a pytree like Phi_0 (structure, shapes, types).

    No dynamics is followed: `hypergradient(problem, None, ClosedForm(solve))`. Phi_0 says what w looks like, and its
    values are not used. `info["inner_gradient"]` is the norm of grad_w L(w_lam, lam): next to zero if the formula is
    right.

    Raises: `ValueError` if `solve` returns something unlike Phi_0, or if the problem has a `batch`.
    Cost: that of `solve` and its backward pass, and one gradient of L.
    Reference: Franceschi et al. 2018, eq. 1-2; Example 3.4 and Sec. 5.1 (the exact problem).
    Do not use it where the inner run stops early on purpose: it differentiates f, not f_T; nor where the matrix to
    be solved with is too large to factor: `Implicit` needs only products with it.

    >>> import jax.numpy as jnp
    >>> from hyperax import Problem, hypergradient
    >>> ridge = Problem(
    ...     inner=lambda w, lam, d: jnp.sum((d["x"] @ w - d["y"]) ** 2) + lam * jnp.sum(w**2),
    ...     outer=lambda w, lam, d: jnp.sum(w**2),
    ...     init=lambda lam, d: jnp.zeros(2),
    ... )
    >>> solve = lambda lam, d: jnp.linalg.solve(d["x"].T @ d["x"] + lam * jnp.eye(2), d["x"].T @ d["y"])
    >>> data = {"x": jnp.array([[1.0, 0.0], [0.0, 3.0]]), "y": jnp.array([4.0, 5.0])}
    >>> h = hypergradient(ridge, None, ClosedForm(solve))(jnp.asarray(1.0), data)
    >>> print(f"{h.value:.3f} {h.grad:.3f}", h.state.w)
    6.250 -4.450 [2.  1.5]
    """

    solve: Callable[[Lam, Data], W]
    differentiates: ClassVar = "f"
    needs_dynamics: ClassVar[bool] = False

    def __check_init__(self):
        if not callable(self.solve):
            raise ValueError(f"solve must be a function (lam, D) -> w, not {type(self.solve).__name__}")

    def value(self, problem: Problem, dynamics: Dynamics, lam: Lam, data: Data, carry: Any) -> tuple[Scalar, Outcome]:
        """E at the solution, with every dependence on lam left in place."""
        prepared = problem.prepare(lam, data)
        w = self._solution(problem, lam, prepared)
        value, metrics = problem.evaluate(w, lam, prepared)
        fixed_lam, fixed_data = detach(lam), detach(prepared)
        slope = exact_gradient(problem.objective(fixed_data, 1))(detach(w), fixed_lam)
        norm = jnp.sqrt(jnp.sum(jnp.stack([jnp.sum(leaf**2) for leaf in jax.tree.leaves(detach(slope))])))
        return value, Outcome(State(w), {"metrics": metrics, "inner_gradient": norm}, carry)

    def check(self, problem: Problem, dynamics: Dynamics, lam: Lam, data: Data) -> None:
        """Raise `ValueError` unless `solve` returns a pytree like Phi_0."""
        if problem.batch is not None:
            raise ValueError(
                "ClosedForm solves one inner problem, and this one has mini-batches (batch), another problem every "
                "step: leave batch out, or use Reverse"
            )

        def both(lam: Lam, data: Data) -> tuple[W, W]:
            prepared = problem.prepare(lam, data)
            return problem.start(lam, prepared), self._solution(problem, lam, prepared)

        start, solution = eqx.filter_eval_shape(both, lam, data)
        if jax.tree.structure(start) != jax.tree.structure(solution):
            raise ValueError(
                f"solve returns {jax.tree.structure(solution)} and Phi_0 {jax.tree.structure(start)}: let solve return "
                "a pytree like Phi_0"
            )
        leaves = jax.tree_util.tree_leaves_with_path(solution)
        for (path, leaf), like in zip(leaves, jax.tree.leaves(start), strict=True):
            if (leaf.shape, leaf.dtype) != (like.shape, like.dtype):
                raise ValueError(
                    f"{leaf_name('w', path)} is {leaf.dtype}{list(leaf.shape)} from solve and "
                    f"{like.dtype}{list(like.shape)} from Phi_0: let solve return a pytree like Phi_0"
                )

    def _solution(self, problem: Problem, lam: Lam, prepared: Data) -> W:
        # What counts as a variable in a module is the same as for Phi_0.
        return replace(problem, init=self.solve).start(lam, prepared)
