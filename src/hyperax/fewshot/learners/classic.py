"""Classic multitask learning: the representation and the classifiers of its tasks descend together."""

from __future__ import annotations

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from hyperax.dynamics.dynamics import Dynamics, State
from hyperax.methods.method import Method, Outcome, detach
from hyperax.problem import Data, Lam, Problem, Scalar
from hyperax.rollout import advance, check_steps, initial_state


class JointProgress(NamedTuple):
    """The carry: the tasks at hand and how far they are.

    Fields:
        t: joint steps done on these data, 0, ..., period - 1; at 0 the next call takes the data that it is given.
        data: the arrays of the data.
        state: s_t, with w_t.
    """

    t: Int[Array, ""]
    data: Data
    state: State


class Joint(Method):
    """One joint descent step of lam and w a hyperiteration (Classic): multitask learning without a bilevel structure.

        minimise over lam, w^1, ..., w^N:   sum over j of L^j(w^j, lam, D_tr^j)
        lam_{k+1} = lam_k - update(grad_lam L(w_k, lam_k)),   w_{k+1} = Phi(w_k, lam_k),   both from (w_k, lam_k)

    The value is L(w_k, lam_k) and the derivative its partial gradient in lam, with w_k constant; then w makes one step
    of the dynamics. Every `period` hyperiterations the data of the call are taken in, and w starts at Phi_0(lam); the
    data of the calls between are not looked at. What `prepare` computes is computed at the lam of now.

    Arguments:
        period: joint steps on the same data, at least 2: with 1, w would never leave Phi_0.

    `info["step"]` is t of the step that was made, 1, ..., period. The outer objective E is never evaluated, so there
    are no metrics. With w_0 = 0 (`HyperRepresentation`) the first gradient of a period is zero: logits that are zero
    do not depend on the features.

    With `HyperRepresentation` on `Episodes(ways=5, shots=16, queries=16, held_out=False)`, four of them in
    `mean_over_tasks` and `sample=` in `minimize`, it is the papers' Classic-train: sampling goes on every
    hyperiteration, and one draw in `period` is used. The carry keeps its data, so it remembers no tasks of the caller.

    Raises: `ValueError` for a period below 2.
    Cost: one gradient of L in lam and in w, with one pass through `prepare`; a copy of the data in the carry, and of
    what is `Shared` one a task.
    Reference: Baxter 1995; Franceschi et al. 2018, Sec. 5.3 (Classic: 4 episodes, drawn every 5 steps); Bridge paper
    2017, App. A (every 4).
    Do not use it for hyperparameters of the inner run (step sizes, regularisers, Phi_0): it is no hypergradient, and
    of those either has none or one that makes L small.

    >>> problem = Problem(lambda w, lam, d: (w - lam) ** 2, lambda w, lam, d: w**2, lambda lam, d: 0.0)
    >>> from hyperax import GradientDescent, hypergradient
    >>> f = hypergradient(problem, GradientDescent(0.25), Joint(period=5))
    >>> first = f(jnp.asarray(1.0))
    >>> second = f(jnp.asarray(1.0), None, first.carry)
    >>> print(first.grad, first.state.w, second.grad)
    2.0 0.5 1.0
    """

    period: int = 5

    def __check_init__(self):
        check_steps(self.period, "period", 2)

    def init(self, problem: Problem, dynamics: Dynamics, lam: Lam, data: Data) -> JointProgress:
        """The carry with t = 0 and s_0."""
        state = initial_state(problem, dynamics, lam, problem.prepare(lam, data))
        return JointProgress(jnp.asarray(0, jnp.int32), eqx.filter(data, eqx.is_array), state)

    def value(
        self, problem: Problem, dynamics: Dynamics, lam: Lam, data: Data, carry: JointProgress
    ) -> tuple[Scalar, Outcome]:
        """L(w_k, lam), whose derivative is the partial gradient in lam, and the step of w."""
        given, rest = eqx.partition(data, eqx.is_array)
        begins = carry.t == 0
        choose = lambda new, old: jax.tree.map(lambda a, b: jnp.where(begins, a, b), new, old)
        kept = choose(given, carry.data)
        prepared = problem.prepare(lam, eqx.combine(kept, rest))
        constants = detach(lam), detach(prepared)
        state = choose(initial_state(problem, dynamics, *constants), detach(carry.state))
        step = carry.t + 1

        value = problem.objective(prepared, step)(state.w, lam)
        after, _ = advance(problem, dynamics, state, *constants, first=step, steps=1)
        carry = JointProgress(step % self.period, kept, after)
        return value, Outcome(after, {"metrics": {}, "step": step}, carry)
