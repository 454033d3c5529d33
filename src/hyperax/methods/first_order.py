"""First-order approximation: no second derivatives of the inner objective."""

from __future__ import annotations

from typing import Any

import jax

from hyperax.dynamics.dynamics import Dynamics, InnerGradient
from hyperax.methods.method import Method, Outcome, unrolled_value
from hyperax.problem import Data, Lam, Problem, Scalar
from hyperax.rollout import Objective, check_steps, exact_gradient


class FirstOrder(Method):
    """An approximate gradient of f_T that treats the inner gradients g_t = grad L(w_{t-1}, lam) as constants.

        w_t = Phi_t(w_{t-1}, g_t, lam) with d g_t / d lam = 0 and d g_t / d w = 0

    What is left of d w_T / d lam is what reaches w_T without a second derivative of L: Phi_0, step sizes, momenta,
    decoupled weight decay. So it is the papers' *Approx* (grad_lam w_T = 0) for a hyper-representation, where lam
    enters only L and E, and first-order MAML where Phi_0(lam) = lam.

    Arguments:
        steps: T >= 0.

    Raises: `ValueError` for T < 0.
    Cost: the inner run and one gradient of E; no memory for the past with gradient descent.
    Reference: Franceschi et al. 2018, Sec. 5.3 (Approx); Finn et al. 2017, Sec. 5.2 (first-order MAML).
    Do not use it for hyperparameters that enter the inner objective alone (regularisers, example weights): their
    gradient is zero, and a warning says so.

    >>> method = FirstOrder(steps=5)
    """

    steps: int

    def __check_init__(self):
        check_steps(self.steps)

    def value(self, problem: Problem, dynamics: Dynamics, lam: Lam, data: Data, carry: Any) -> tuple[Scalar, Outcome]:
        """f_T(lam), with the inner gradients detached."""
        return unrolled_value(problem, dynamics, self.steps, lam, data, carry, gradient_of=constant_gradient)


def constant_gradient(objective: Objective) -> InnerGradient:
    """A `gradient_of` for `advance`: gradient and value of the inner objective as constants of the derivative."""
    gradient = exact_gradient(objective)
    return InnerGradient(lambda w, lam: jax.lax.stop_gradient(gradient.value_and_gradient(w, lam)))
