"""Reverse mode through the whole inner run."""

from __future__ import annotations

from typing import Any

from hyperax.dynamics.dynamics import Dynamics
from hyperax.methods.method import Method, Outcome, unrolled_value
from hyperax.problem import Data, Lam, Problem, Scalar
from hyperax.rollout import check_steps


class Reverse(Method):
    """The exact gradient of f_T by reverse-mode differentiation through all T steps.

        alpha_T = grad_w E,  alpha_{t-1} = (d Phi_t / d w)^T alpha_t,
        grad f_T = grad_lam E + sum over t of (d Phi_t / d lam)^T alpha_t

    Arguments:
        steps: T >= 0; with T = 0, w_T = Phi_0(lam).
        segment: keep only every `segment`-th state and run the steps between again in the backward pass; `None`
            keeps all T states. About sqrt(T) is the least memory. T need not be a multiple of it.

    Raises: `ValueError` for T < 0 or segment < 1.
    Cost: time a small multiple (2 to 3) of the inner run, with `segment` one inner run more; memory T states, with
    `segment` about T / segment + segment states. Neither depends on the size of lam.
    Reference: Franceschi et al. 2018, Algorithm 1 (Reverse-HG); Maclaurin et al. 2015; checkpoints: Griewank 1992.
    Do not use it for few hyperparameters and very many steps: `Forward` needs no memory for the past; nor to get the
    gradient of the exact problem (2) from an unconverged inner run: it differentiates f_T, not f.

    >>> method = Reverse(steps=250, segment=16)
    """

    steps: int
    segment: int | None = None

    def __check_init__(self):
        check_steps(self.steps)
        if self.segment is not None:
            check_steps(self.segment, "segment", 1)

    def value(self, problem: Problem, dynamics: Dynamics, lam: Lam, data: Data, carry: Any) -> tuple[Scalar, Outcome]:
        """f_T(lam), with every dependence on lam left in place."""
        return unrolled_value(problem, dynamics, self.steps, lam, data, carry, segment=self.segment)
