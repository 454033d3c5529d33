"""Reverse mode through the last steps only."""

from __future__ import annotations

from typing import Any

from hyperax.dynamics.dynamics import Dynamics
from hyperax.methods.method import Method, Outcome, truncated_value
from hyperax.problem import Data, Lam, Problem, Scalar
from hyperax.rollout import check_steps


class Truncated(Method):
    """An approximate gradient of f_T by reverse mode through the last K of the T steps; s_{T-K} counts as constant.

        h_{T-K} = grad_lam E + sum over t = T-K+1, ..., T of (d Phi_t / d lam)^T alpha_t

    Arguments:
        steps: T >= 0.
        window: K, 0 <= K <= T. With K = T it is `Reverse`, Phi_0 included.

    Raises: `ValueError` for a window outside 0, ..., T.
    Cost: as `Reverse(K)`, plus T - K plain steps; memory K states.
    Error: where the inner objective is strongly convex near w_T it decays like (1 - eta mu)^K (Shaban et al. 2019).
    Reference: Franceschi et al. 2017 (ICML), Sec. 3.3; Shaban et al. 2019.
    Do not use it where lam acts through Phi_0 or early steps (initialisations, schedules): that part is cut off.

    >>> method = Truncated(steps=1000, window=20)
    """

    steps: int
    window: int

    def __check_init__(self):
        check_steps(self.steps)
        check_steps(self.window, "window")
        if self.window > self.steps:
            raise ValueError(
                f"window {self.window} is longer than the run of {self.steps} steps; use at most {self.steps}"
            )

    def value(self, problem: Problem, dynamics: Dynamics, lam: Lam, data: Data, carry: Any) -> tuple[Scalar, Outcome]:
        """f_T(lam), with the first T - K steps detached from lam."""
        return truncated_value(problem, dynamics, self.steps, self.window, lam, data, carry)
