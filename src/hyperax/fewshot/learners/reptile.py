"""Reptile: the start moves towards where the inner runs end."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from hyperax.dynamics import Adam
from hyperax.dynamics.dynamics import Dynamics
from hyperax.fewshot.learners.initialisation import Initialisation
from hyperax.methods.method import Method, Outcome, detach, with_gradient
from hyperax.problem import Data, Lam, Problem, Scalar
from hyperax.rollout import advance, check_steps, initial_state


class Reptile(Method):
    """The direction from where an inner run ends to where it began, in the place of a hypergradient.

        grad = (d Phi_0 / d lam)^T (w_0 - w_T),   with Phi_0(lam) = lam:   lam <- lam + epsilon (w_T - lam)

    It is no gradient of f_T, nor of any other function in general: E is evaluated and reported, and has no influence.
    Its size is that of w, not of f_T / lam: a step epsilon of plain gradient descent is Reptile's, 0 < epsilon <= 1.

    Arguments:
        steps: T >= 1. With T = 1 it is the gradient of L, as in joint training; it takes at least two steps, and
            better ones on different images, to learn to learn.

    Raises: `ValueError` for T < 1. `UnusedLeafWarning` names leaves of lam that w_0 does not hold: they do not move.
    Cost: the inner run, without derivatives, and one evaluation of E; no memory for the past.
    Reference: Nichol, Achiam and Schulman 2018, Algorithm 2.
    Do not use it for hyperparameters other than an initial point, or where D_val has other information than D_tr.

    >>> from hyperax import GradientDescent, hypergradient
    >>> problem = Problem(inner=lambda w, lam, d: (w - d) ** 2, outer=lambda w, lam, d: w, init=lambda lam, d: lam)
    >>> direction = hypergradient(problem, GradientDescent(0.25), Reptile(steps=1))
    >>> print(direction(jnp.asarray(2.0), jnp.asarray(1.0)).grad)
    0.5
    """

    steps: int

    def __check_init__(self):
        check_steps(self.steps, "steps", 1)

    def value(self, problem: Problem, dynamics: Dynamics, lam: Lam, data: Data, carry: Any) -> tuple[Scalar, Outcome]:
        """E(w_T), whose derivative is the direction."""
        prepared = problem.prepare(lam, data)
        constants = detach(lam), detach(prepared)
        first = initial_state(problem, dynamics, lam, prepared)
        state, _ = advance(problem, dynamics, detach(first), *constants, first=1, steps=self.steps)
        value, metrics = problem.evaluate(state.w, *constants)
        direction = jax.tree.map(jnp.subtract, first.w, state.w)
        return with_gradient(value, first.w, direction), Outcome(state, {"metrics": metrics}, carry)


def reptile(ways: int, step_size: float = 1e-3, batch_size: int = 10, **settings: Any) -> Initialisation:
    """Reptile: all parameters start at lam and are trained by Adam on mini-batches of the support set.

        w_0 = lam,   w_t = Adam without momentum on L(w; B_t),   lam <- lam + epsilon mean over tasks of (w_T - lam)

    Arguments:
        ways: classes an episode.
        step_size: of the inner Adam; 1e-3 in the paper's runs.
        batch_size: images of B_t; 10 in the paper's 5-way Omniglot and miniImageNet runs.
        settings: other arguments of `Initialisation`.

    Train it on episodes with more shots than it is tested on (10 in the paper for 1 shot), with T = 5 to 10 steps, by
    plain gradient descent of the outer problem with epsilon from 1 down to 0, and test it with T = 50. The query
    images take no part in training.

    Returns: the learner, an `Initialisation`.
    Cost: an inner run and nothing else.
    Reference: Nichol et al. 2018, Sec. 6.1 and App. A.
    Do not use it with `adapted` other than `True`: what no task adapts is never learned.

    >>> reptile(5).method(8), reptile(5).dynamics.b1
    (Reptile(steps=8), 0.0)
    """
    settings = {"optimizer": eqx.Partial(Adam, b1=0.0), "differentiated_by": Reptile} | settings
    return Initialisation(ways, step_size=step_size, batch_size=batch_size, **settings)
