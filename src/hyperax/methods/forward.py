"""Forward mode along the coordinates of lam."""

from __future__ import annotations

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from hyperax.dynamics.dynamics import Dynamics
from hyperax.methods.method import Method, Outcome, ValueFunction, unrolled_value
from hyperax.problem import Data, Lam, Problem, Scalar
from hyperax.rollout import check_steps


class Forward(Method):
    """The exact gradient of f_T by forward-mode differentiation, one tangent for each of the m coordinates of lam.

        Z_0 = d Phi_0 / d lam,  Z_t = (d Phi_t / d w) Z_{t-1} + d Phi_t / d lam,
        grad f_T = grad_lam E + Z_T^T grad_w E

    Arguments:
        steps: T >= 0.
        chunk: how many tangents travel together; the inner run is repeated m / chunk times. `None`: all at once.

    Raises: `ValueError` for T < 0 or chunk < 1.
    Cost: time about m + m / chunk inner runs, memory chunk + 1 states, whatever T is.
    Reference: Franceschi et al. 2017 (ICML), Algorithm 2 (Forward-HG); Franceschi et al. 2018, Sec. 2.3.
    Do not use it for lam with many coordinates: `Reverse` costs a few inner runs whatever m is.

    >>> method = Forward(steps=10_000, chunk=4)
    """

    steps: int
    chunk: int | None = None
    differentiates: ClassVar = "f_T"

    def __check_init__(self):
        check_steps(self.steps)
        if self.chunk is not None:
            check_steps(self.chunk, "chunk", 1)

    def value(self, problem: Problem, dynamics: Dynamics, lam: Lam, data: Data, carry: Any) -> tuple[Scalar, Outcome]:
        """f_T(lam), with every dependence on lam left in place."""
        return unrolled_value(problem, dynamics, self.steps, lam, data, carry)

    def differentiate(self, function: ValueFunction, lam: Lam) -> tuple[tuple[Scalar, Outcome], Lam]:
        """((f_T, outcome), hypergradient), by Jacobian-vector products along the coordinates of lam."""
        variables, constants = eqx.partition(lam, eqx.is_inexact_array)
        flat, unravel = ravel_pytree(variables)

        def of_flat(flat: jax.Array) -> tuple[Scalar, Outcome]:
            return function(eqx.combine(unravel(flat), constants))

        def along(direction: jax.Array) -> jax.Array:
            # The value and the outcome do not depend on the direction: computed here once more a chunk, not a tangent.
            return jax.jvp(lambda x: of_flat(x)[0], (flat,), (direction,))[1]

        value, outcome = of_flat(flat)
        derivatives = jax.lax.map(along, jnp.eye(flat.size, dtype=flat.dtype), batch_size=self.chunk or flat.size)
        return (value, outcome), unravel(derivatives)
