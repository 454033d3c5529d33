"""The abstract method: how f_T is differentiated."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

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
    approximation made by detaching, or one that the method computes itself: `with_gradient`); `differentiate` says in
    which mode. Neither knows of tasks: the mean over tasks is taken between the two, so that one backward pass serves
    all of them. What a method computes itself is a constant of the derivative: only where `value` is differentiated as
    it stands (`Reverse`, `Forward`, `ClosedForm`, `Doubling`) are second derivatives right.

    Reference: Franceschi et al. 2018, Sec. 2.3 and Algorithm 1.
    """

    needs_dynamics: ClassVar[bool] = True
    """Whether the method follows a dynamics; if not, `hypergradient` accepts `None` for it."""

    differentiates: ClassVar[Literal["f_T", "f", "approximately", "online"]] = "approximately"
    """What the method claims, for `certify`: the gradient of f_T, of f, one near that of f_T, or one on the way."""

    @property
    def remembers_tasks(self) -> bool:
        """Whether the carry belongs to the data of the last call (its inner variables, say): no use with other data."""
        return False

    @abstractmethod
    def value(self, problem: Problem, dynamics: Dynamics, lam: Lam, data: Data, carry: Any) -> tuple[Scalar, Outcome]:
        """f_T(lam) on the data of one task, and what comes with it."""

    def init(self, problem: Problem, dynamics: Dynamics, lam: Lam, data: Data) -> Any:
        """The first carry; `()` for methods that remember nothing between hyperiterations."""
        return ()

    def check(self, problem: Problem, dynamics: Dynamics, lam: Lam, data: Data) -> None:
        """Raise `ValueError`, with the alternative, for what this method cannot differentiate; reads traces only."""

    def reached(self, problem: Problem, dynamics: Dynamics, lam: Lam, data: Data) -> Scalar:
        """A value that depends on lam along the paths that the method sees; leaves that do not reach it are named."""
        return self.value(problem, dynamics, lam, data, self.init(problem, dynamics, lam, data))[0]

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
    segments: Sequence[int] = (),
    gradient_of: Callable[[Objective], Gradient] = exact_gradient,
) -> tuple[Scalar, Outcome]:
    """f_T(lam) by running all T steps, every dependence on lam left in place: what the exact methods differentiate."""
    prepared = problem.prepare(lam, data)
    state = initial_state(problem, dynamics, lam, prepared)
    state, _ = advance(
        problem, dynamics, state, lam, prepared, first=1, steps=steps, segments=segments, gradient_of=gradient_of
    )
    value, metrics = problem.evaluate(state.w, lam, prepared)
    return value, Outcome(state, {"metrics": metrics}, carry)


def truncated_value(
    problem: Problem,
    dynamics: Dynamics,
    steps: int,
    window: int,
    lam: Lam,
    data: Data,
    carry: Any,
    *,
    gradient_of: Callable[[Objective], Gradient] = exact_gradient,
) -> tuple[Scalar, Outcome]:
    """f_T(lam) with the first T - K steps detached from lam; of the last K, `gradient_of` is differentiated."""
    prepared = problem.prepare(lam, data)
    detached = steps - window
    before = (detach(lam), detach(prepared)) if detached else (lam, prepared)
    state = initial_state(problem, dynamics, *before)
    if detached:
        state, _ = advance(problem, dynamics, state, *before, first=1, steps=detached)
        state = detach(state)
    state, _ = advance(
        problem, dynamics, state, lam, prepared, first=detached + 1, steps=window, gradient_of=gradient_of
    )
    value, metrics = problem.evaluate(state.w, lam, prepared)
    return value, Outcome(state, {"metrics": metrics}, carry)


def detach(tree: Any) -> Any:
    """The tree as constants of the derivative."""
    return jax.tree.map(lambda leaf: jax.lax.stop_gradient(leaf) if eqx.is_inexact_array(leaf) else leaf, tree)


def with_gradient(value: Scalar, at: Any, gradient: Any) -> Scalar:
    """The value, to which `gradient` is added as a derivative with respect to the tree `at`.

        value + <gradient, at - constant(at)>,   so its derivative is that of `value` plus gradient^T d at

    Arguments:
        value: detached where `gradient` already counts its derivative.
        at: any pytree; only its floating-point arrays count.
        gradient: a pytree like the floating-point arrays of `at` (`None` elsewhere).

    In mean_over_tasks the derivative passes on through `at` (the features that `prepare` computes), in one backward
    pass for all tasks.
    """
    points = jax.tree.leaves(eqx.filter(at, eqx.is_inexact_array))
    for point, slope in zip(points, jax.tree.leaves(gradient), strict=True):
        change = jnp.sum(jax.lax.stop_gradient(slope) * (point - jax.lax.stop_gradient(point)))
        value = value + change.astype(jnp.result_type(value))  # lam and w may have more digits than E
    return value
