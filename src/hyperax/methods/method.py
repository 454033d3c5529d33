"""The abstract method: how f_T is differentiated."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx

from hyperax.dynamics.dynamics import Dynamics, Gradient, State
from hyperax.problem import Data, Lam, Problem, Scalar
from hyperax.rollout import Objective, advance, exact_gradient, initial_state


class Outcome(NamedTuple):
    """What comes with a value of f_T: the last state, what a person may want to know, and the next carry."""

    state: State
    info: dict[str, Any]
    carry: Any


ValueFunction = Callable[[Lam], tuple[Scalar, Outcome]]


class Method(eqx.Module):
    """How f_T is differentiated: a value whose derivative is the hypergradient, and the mode to take it in.

    `value` computes f_T(lam) such that differentiating it gives the method's hypergradient (the exact one, or an
    approximation made by detaching); `differentiate` says in which mode. Neither knows of tasks: the mean over tasks
    is taken between the two, so that one backward pass serves all of them.

    Reference: Franceschi et al. 2018, Sec. 2.3 and Algorithm 1.
    """

    @abstractmethod
    def value(self, problem: Problem, dynamics: Dynamics, lam: Lam, data: Data, carry: Any) -> tuple[Scalar, Outcome]:
        """f_T(lam) on the data of one task, and what comes with it."""

    def init(self, problem: Problem, dynamics: Dynamics, lam: Lam, data: Data) -> Any:
        """The first carry; `()` for methods that remember nothing between hyperiterations."""
        return ()

    def differentiate(self, function: ValueFunction, lam: Lam) -> tuple[tuple[Scalar, Outcome], Lam]:
        """((f_T, outcome), hypergradient), by reverse mode: its cost does not depend on the size of lam."""
        return eqx.filter_value_and_grad(function, has_aux=True)(lam)


def unrolled_value(
    problem: Problem,
    dynamics: Dynamics,
    steps: int,
    lam: Lam,
    data: Data,
    carry: Any,
    *,
    segment: int | None = None,
    gradient_of: Callable[[Objective], Gradient] = exact_gradient,
) -> tuple[Scalar, Outcome]:
    """f_T(lam) by running all T steps, every dependence on lam left in place: what the exact methods differentiate."""
    prepared = problem.prepare(lam, data)
    state = initial_state(problem, dynamics, lam, prepared)
    state, _ = advance(
        problem, dynamics, state, lam, prepared, first=1, last=steps, segment=segment, gradient_of=gradient_of
    )
    value, metrics = problem.evaluate(state.w, lam, prepared)
    return value, Outcome(state, {"metrics": metrics}, carry)
