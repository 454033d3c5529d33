"""Implicit differentiation: the hypergradient of the exact problem, at an approximate inner solution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx

from hyperax.checks import leaf_name, unused_leaves
from hyperax.dynamics.dynamics import Dynamics, State
from hyperax.linear_solvers import (
    ConjugateGradient,
    LinearSolver,
    as_linear_solver,
    check_positive,
    norm,
    residual,
)
from hyperax.methods.method import Method, Outcome, detach, unrolled_value, with_gradient
from hyperax.problem import Data, Lam, Problem, Scalar, W
from hyperax.rollout import advance, check_steps, exact_gradient, initial_state

Tolerance = Callable[[jax.Array], Any]
"""k -> epsilon_k, in units of the inner gradient; k = 0, 1, ... counts hyperiterations."""


class ExponentialTolerance(eqx.Module):
    """epsilon_k = first ratio^k, k = 0, 1, ...: for `Implicit(tolerance=...)`.

    Arguments:
        first: epsilon_0 > 0, in units of the inner gradient.
        ratio: in (0, 1).

    Raises: `ValueError` outside these ranges.
    Cost: none to speak of.
    Reference: Pedregosa 2016 (0.1 * 0.9^k, the exponential decrease of its experiments).
    Do not use it for thousands of hyperiterations: it soon asks for more digits than there are.

    >>> print(ExponentialTolerance()(2))
    0.081
    """

    first: float = 0.1
    ratio: float = 0.9

    def __check_init__(self):
        check_positive("first", self.first)
        if not 0 < self.ratio < 1:
            raise ValueError(f"ratio is {self.ratio!r}; it must be in (0, 1), for the tolerances to decrease")

    def __call__(self, k: Any) -> Any:
        """epsilon_k."""
        return self.first * self.ratio**k


class PolynomialTolerance(eqx.Module):
    """epsilon_k = first / (k + 1)^power, k = 0, 1, ...: for `Implicit(tolerance=...)`.

    Arguments:
        first: epsilon_0 > 0, in units of the inner gradient.
        power: > 1, so that the tolerances have a finite sum, as convergence asks; 2 and 3 are the paper's.

    Raises: `ValueError` outside these ranges.
    Cost: none to speak of.
    Reference: Pedregosa 2016 (0.1 / k^2 and 0.1 / k^3, k from 1; convergence for tolerances of finite sum).
    Do not use it where the first hypergradients must be exact: `tolerance=None` runs all steps.

    >>> print(PolynomialTolerance(power=3)(1))
    0.0125
    """

    first: float = 0.1
    power: float = 2.0

    def __check_init__(self):
        check_positive("first", self.first)
        if not self.power > 1:
            raise ValueError(f"power is {self.power!r}; it must be over 1, for the sum of the tolerances to be finite")

    def __call__(self, k: Any) -> Any:
        """epsilon_k."""
        return self.first / (k + 1.0) ** self.power


class Memory(NamedTuple):
    """What `Implicit` carries to the next hyperiteration: w_T and q with warm starts, k with a tolerance."""

    w: Any = None
    q: Any = None
    k: Any = None


class Implicit(Method):
    """The hypergradient of the exact problem (2) by the implicit function theorem, at w = w_T.

        grad f = grad_lam E - (d/dlam grad_w L)^T q,   (grad^2_ww L) q = grad_w E,   at w = w_T

    T steps of the dynamics from Phi_0 give w_T, and are not differentiated. The value is E(w_T, lam).

    Arguments:
        steps: T >= 0; with `tolerance` the most steps.
        solver: of the linear system: `ConjugateGradient` (the default: for strongly convex L it needs no step size, the
            fewest products, and stops at a residual; unlike `lineax.CG` it does not fail in float32), `Neumann`,
            `FixedPoint`, `Nystrom`, or any solver of Lineax: `lineax.GMRES`, `BiCGStab` (any invertible Hessian),
            `Normal(CG)` (likewise, slowly), and, for small w since they build the matrix, `Cholesky` (strongly
            convex), `LU`, `AutoLinearSolver` (invertible), `SVD` (any Hessian: the smallest q).
        warm_start: begin at the last w_T and q. The carry then belongs to the data of the last call.
        tolerance: k -> epsilon_k, k = 0, 1, ... counted in the carry (HOAG): stop the inner run where
            |grad_w L(w_t, lam)| <= epsilon_k, and solve to |H q - grad_w E| <= epsilon_k. Ready-made:
            `ExponentialTolerance`, `PolynomialTolerance`.

    `info`: `inner_gradient` |grad_w L(w_T, lam)|, `residual` |H q - grad_w E| / |grad_w E| (both should be small, or
    the gradient is not that of f), `inner_steps` done, and `linear_steps` as the solver counts them, if it does.

    Raises: `ValueError` for T < 0, a solver that is none or that a tolerance cannot stop; when called, for a problem
    with `batch` (no single minimiser), and for leaves of lam that w_T depends on but the minimiser does not (step
    sizes, Phi_0). In an array that holds both, the entry of a step size is zero: give it a leaf of its own.
    Cost: the inner run without derivatives, the solver, and one mixed second derivative; memory independent of T.
    Error: proportional to |grad_w L(w_T, lam)| and to the residual, where L is strongly convex and smooth.
    Reference: Pedregosa 2016, Algorithm 1 (HOAG); Franceschi et al. 2018, Sec. 2.3 (implicit
    differentiation); Grazzi et al. 2020.
    Do not use it for few inner steps, or many minimisers: there f_T is the function, and `Reverse` has its gradient.

    >>> from hyperax.linear_solvers import Neumann
    >>> method = Implicit(steps=500, warm_start=True, tolerance=ExponentialTolerance())
    >>> other = Implicit(steps=500, solver=Neumann(terms=50, step_size=0.1))
    """

    differentiates: ClassVar = "f"

    steps: int
    solver: LinearSolver | lx.AbstractLinearSolver = ConjugateGradient()
    warm_start: bool = False
    tolerance: Tolerance | None = None

    def __check_init__(self):
        check_steps(self.steps)
        solver = as_linear_solver(self.solver)
        if self.tolerance is None:
            return
        if not callable(self.tolerance):
            raise ValueError(
                f"tolerance is {self.tolerance!r}; use a function k -> epsilon_k, such as ExponentialTolerance(), "
                f"or lambda k: {self.tolerance!r} for a constant"
            )
        if not solver.takes_tolerance:
            raise ValueError(
                f"{type(self.solver).__name__} cannot be stopped at the residual that `tolerance` asks for; use "
                "ConjugateGradient(), Neumann(...), FixedPoint(...) or lineax.GMRES, or leave `tolerance` out"
            )

    @property
    def remembers_tasks(self) -> bool:
        """Whether w_T and q of the last call are used again."""
        return self.warm_start

    def init(self, problem: Problem, dynamics: Dynamics, lam: Lam, data: Data) -> Any:
        """The first carry: w = Phi_0 and q = 0 with warm starts, k = 0 with a tolerance."""
        if not self.warm_start and self.tolerance is None:
            return ()
        memory = Memory(k=None if self.tolerance is None else jnp.int32(0))
        if not self.warm_start:
            return memory
        state = initial_state(problem, dynamics, lam, problem.prepare(lam, data))
        unknown = state if as_linear_solver(self.solver).of_step else state.w
        return memory._replace(w=state.w, q=jax.tree.map(jnp.zeros_like, unknown))

    def value(self, problem: Problem, dynamics: Dynamics, lam: Lam, data: Data, carry: Any) -> tuple[Scalar, Outcome]:
        """E(w_T, lam), whose derivative is the hypergradient."""
        prepared = problem.prepare(lam, data)
        constants = detach(lam), detach(prepared)
        memory = detach(carry) if isinstance(carry, Memory) else Memory()
        state, steps = self._inner_run(problem, dynamics, *constants, memory)
        q, reported = self._solve(problem, dynamics, state, *constants, memory, steps)
        value, metrics = self._surrogate(problem, dynamics, state, q, lam, prepared, steps)
        if isinstance(carry, Memory):
            kept = {"w": state.w, "q": q} if self.warm_start else {}
            carry = Memory(k=None if memory.k is None else memory.k + 1, **kept)
        return value, Outcome(state, {"metrics": metrics, **reported, "inner_steps": steps}, carry)

    def _inner_run(
        self, problem: Problem, dynamics: Dynamics, lam: Lam, prepared: Data, memory: Memory
    ) -> tuple[State, jax.Array]:
        """(s_T, the steps done)."""
        # The last w in the place of Phi_0; auxiliary variables start afresh. Only here: what else a module holds (its
        # activations) is in Phi_0 alone.
        start = problem if memory.w is None else replace(problem, init=lambda lam, prepared: memory.w)
        state = initial_state(start, dynamics, lam, prepared)
        run = lambda state, t, steps: advance(problem, dynamics, state, lam, prepared, first=t, steps=steps)[0]
        epsilon = self._epsilon(memory, state.w)
        if epsilon is None:
            return run(state, 1, self.steps), jnp.int32(self.steps)
        gradient = exact_gradient(problem.objective(prepared, 1))

        def step(loop: tuple) -> tuple:
            # The norm at w_t beside the step from w_t: the compiler computes their common gradient once.
            state, done, _ = loop
            solved = norm(gradient(state.w, lam)) <= epsilon
            after = run(state, done + 1, 1)
            return jax.tree.map(lambda a, b: jnp.where(solved, a, b), state, after), done + ~solved, solved

        unsolved = lambda loop: ~loop[2] & (loop[1] < self.steps)
        return jax.lax.while_loop(unsolved, step, (state, jnp.int32(0), jnp.asarray(False)))[:2]

    def _epsilon(self, memory: Memory, w: W) -> Scalar | None:
        if self.tolerance is None:
            return None
        return jnp.asarray(self.tolerance(memory.k), jnp.result_type(*jax.tree.leaves(w)))

    def _solve(
        self,
        problem: Problem,
        dynamics: Dynamics,
        state: State,
        lam: Lam,
        prepared: Data,
        memory: Memory,
        steps: jax.Array,
    ) -> tuple[Any, dict[str, jax.Array]]:
        """(q, what is reported of it), from constants only."""
        solver = as_linear_solver(self.solver)
        g = jax.grad(lambda w: problem.evaluate(w, lam, prepared)[0])(state.w)
        gradient = exact_gradient(problem.objective(prepared, 1))
        if solver.of_step:
            g = State(g, jax.tree.map(jnp.zeros_like, state.auxiliary))
            _, transposed = jax.vjp(lambda s: _step(problem, dynamics, s, lam, prepared, steps), state)
            operator = lambda q: jax.tree.map(jnp.subtract, q, transposed(q)[0])
            slope = gradient(state.w, lam)
        else:
            slope, operator = jax.linearize(lambda w: gradient(w, lam), state.w)  # H v, forward over reverse
        q, taken = solver.solve(operator, g, memory.q, self._epsilon(memory, state.w))
        q = jax.tree.map(lambda a, b: jax.lax.stop_gradient(a).astype(b.dtype), q, g)
        reported = {"inner_gradient": norm(slope), "residual": residual(operator, q, g)}
        return q, reported if taken is None else {**reported, "linear_steps": taken}

    def _surrogate(
        self, problem: Problem, dynamics: Dynamics, state: State, q: Any, lam: Lam, prepared: Data, steps: Any
    ) -> tuple[Scalar, dict[str, jax.Array]]:
        """(E, its metrics) at the constant w_T, with the derivative of <q, Phi> or of -<q, grad_w L> in lam added."""
        value, metrics = problem.evaluate(state.w, lam, prepared)
        if as_linear_solver(self.solver).of_step:
            implied = with_gradient(jnp.zeros_like(value), _step(problem, dynamics, state, lam, prepared, steps), q)
        else:
            slope = exact_gradient(problem.objective(prepared, 1))(state.w, lam)
            implied = with_gradient(jnp.zeros_like(value), slope, jax.tree.map(jnp.negative, q))
        return value + implied, metrics

    def reached(self, problem: Problem, dynamics: Dynamics, lam: Lam, data: Data) -> Scalar:
        """The value at w_0, without a run or a solve: the same paths."""
        prepared = problem.prepare(lam, data)
        state = detach(initial_state(problem, dynamics, detach(lam), detach(prepared)))
        q = state if as_linear_solver(self.solver).of_step else state.w
        return self._surrogate(problem, dynamics, state, q, lam, prepared, jnp.int32(1))[0]

    def check(self, problem: Problem, dynamics: Dynamics, lam: Lam, data: Data) -> None:
        """Refuse mini-batches, states with integers under `FixedPoint`, and leaves of lam that only the run sees."""
        if problem.batch is not None:
            raise ValueError(
                "with Problem.batch there is no single inner objective, so w_lam is not defined: use Reverse or "
                "Truncated, or leave batch out"
            )
        if as_linear_solver(self.solver).of_step:
            start = lambda lam, data: initial_state(problem, dynamics, lam, problem.prepare(lam, data))
            _check_floats(eqx.filter_eval_shape(start, lam, data), dynamics)
        missed = unused_leaves(lambda x: self.reached(problem, dynamics, x, data), lam)
        if not missed:
            return
        unused = unused_leaves(lambda x: unrolled_value(problem, dynamics, self.steps, x, data, ())[0], lam)
        lost = [name for name in missed if name not in unused]
        if lost:
            reaches, it = ("reaches", "it") if len(lost) == 1 else ("reach", "them")
            raise ValueError(
                f"{', '.join(lost)} {reaches} w_T only through the dynamics or Phi_0 (a step size, an initial point), "
                f"and the inner solution w_lam does not depend on {it}: use Reverse, Forward or Truncated, or move "
                f"{it} out of lam"
            )


def _step(problem: Problem, dynamics: Dynamics, state: State, lam: Lam, prepared: Data, steps: Any) -> State:
    """Phi_T at a state: the step that the run ended with (the first one, if it took none)."""
    gradient = exact_gradient(problem.objective(prepared, 1))
    return dynamics.step(gradient, state, lam, jnp.maximum(steps, 1))


def _check_floats(state: Any, dynamics: Dynamics) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(
                f"{leaf_name('state', path)} of {type(dynamics).__name__} is {leaf.dtype}, and FixedPoint "
                "differentiates the whole state: use ConjugateGradient() (any dynamics), or GradientDescent, "
                "HeavyBall or Adam"
            )
