"""An unbiased gradient of a smoothed f_T from values alone."""

from __future__ import annotations

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from hyperax.dynamics.dynamics import Dynamics
from hyperax.methods.method import Method, Outcome, detach, unrolled_value, with_gradient
from hyperax.problem import Data, Lam, Problem, Scalar
from hyperax.rollout import check_steps


class EvolutionStrategy(Method):
    """The gradient of f_T smoothed by a Gaussian, estimated from values at random pairs of points around lam.

        g = 1 / (2 n sigma) sum over i of ( f_T(lam + sigma e_i) - f_T(lam - sigma e_i) ) e_i,   e_i ~ N(0, I)

    Its expectation is the gradient of E f_T(lam + sigma e), which exists where f_T is a step function (accuracy,
    rounding, argmax) and is tame where f_T is chaotic (long unrolls beyond the edge of stability).

    Arguments:
        steps: T >= 0.
        pairs: n >= 1. For a linear f_T with gradient a the variance of g is (|a|^2 + a_j^2) / n at coordinate j.
        sigma: > 0, in units of lam. Large against the steps of f_T, small against the scale it changes on.
        seed: of the directions. Hyperiteration k draws its own, from fold_in(key(seed), k); k is the carry, so a
            resumed run goes on with the next. Tasks of a mean see the same directions.
        chunk: how many pairs run together; `None`: all at once.

    Raises: `ValueError` for T < 0, pairs < 1, sigma not a positive number, seed not a whole number, chunk < 1.
    Cost: time 2 n + 1 inner runs; memory of 2 chunk of them without their past. No second derivative is formed.
    No `UnusedLeafWarning` is given: an objective without derivative hides which leaves reach it.
    Reference: Salimans et al. 2017, Sec. 2; Metz et al. 2019, eq. 3-4.
    Do not use it where f_T has a derivative that `Reverse` computes: the noise grows with the size of lam; nor with a
    sigma that takes lam out of the domain of the objectives (a constraint holds for lam, not for lam + sigma e).

    >>> method = EvolutionStrategy(steps=20, pairs=64, sigma=0.1)
    """

    steps: int
    pairs: int
    sigma: float
    seed: int = 0
    chunk: int | None = None

    def __check_init__(self):
        check_steps(self.steps)
        check_steps(self.pairs, "pairs", 1)
        check_steps(self.seed, "seed")
        if self.chunk is not None:
            check_steps(self.chunk, "chunk", 1)
        if not isinstance(self.sigma, int | float) or not 0.0 < self.sigma < math.inf:
            raise ValueError(f"sigma is {self.sigma!r}; it must be a positive number, in units of lam")

    def init(self, problem: Problem, dynamics: Dynamics, lam: Lam, data: Data) -> Any:
        """The number of the hyperiteration, k = 0."""
        return jnp.asarray(0, jnp.int32)

    def value(self, problem: Problem, dynamics: Dynamics, lam: Lam, data: Data, carry: Any) -> tuple[Scalar, Outcome]:
        """f_T(lam), with g as its derivative."""
        variables, constants = eqx.partition(detach(lam), eqx.is_inexact_array)
        centre, unravel = ravel_pytree(variables)
        key = jax.random.fold_in(jax.random.key(self.seed), carry)
        direction = lambda i: jax.random.normal(jax.random.fold_in(key, i), centre.shape, centre.dtype)

        def at(flat: jax.Array) -> tuple[Scalar, Outcome]:
            point = eqx.combine(unravel(flat), constants)
            return unrolled_value(problem, dynamics, self.steps, point, data, ())

        def across(i: jax.Array) -> Scalar:
            e = direction(i)
            return at(centre + self.sigma * e)[0] - at(centre - self.sigma * e)[0]

        numbers = jnp.arange(self.pairs)
        rises = jax.lax.map(across, numbers, batch_size=self.chunk or self.pairs)
        # The directions are drawn again, not kept: n of them would be n copies of lam.
        add = lambda total, pair: (total + pair[0].astype(centre.dtype) * direction(pair[1]), None)
        total, _ = jax.lax.scan(add, jnp.zeros_like(centre), (rises, numbers))
        value, outcome = at(centre)
        value = with_gradient(value, lam, unravel(total / (2 * self.pairs * self.sigma)))
        return value, outcome._replace(carry=carry + 1)

    def reached(self, problem: Problem, dynamics: Dynamics, lam: Lam, data: Data) -> Scalar:
        """The sum of lam: a value without derivative does not tell which leaves it depends on, so none is named."""
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(eqx.filter(lam, eqx.is_inexact_array)))  # pyright: ignore[reportReturnType]
