"""Reverse mode through the whole inner run."""

from __future__ import annotations

from math import isqrt
from typing import Any, ClassVar, Literal

import jax.numpy as jnp

from hyperax.dynamics.dynamics import Dynamics
from hyperax.methods.method import Method, Outcome, unrolled_value
from hyperax.methods.schedule import Schedule, cheapest, measure_step, parse_bytes
from hyperax.problem import Data, Lam, Problem, Scalar
from hyperax.rollout import check_steps, initial_state


class Reverse(Method):
    """The exact gradient of f_T by reverse-mode differentiation through all T steps.

        alpha_T = grad_w E,  alpha_{t-1} = (d Phi_t / d w)^T alpha_t,
        grad f_T = grad_lam E + sum over t of (d Phi_t / d lam)^T alpha_t

    Arguments:
        steps: T >= 0; with T = 0, w_T = Phi_0(lam).
        segment: keep only every `segment`-th state and run the steps between again in the backward pass; "sqrt" takes
            about sqrt(T) of them. T need not be a multiple of it. `None` keeps what every step needs.
        memory: in place of `segment`, bytes for what is kept on the way (a number, or "2GiB", "500MB"): the cheapest
            schedule that fits is chosen, from the sizes of a state and of a step's derivatives. Data, lam and the
            outer objective come on top; of tasks mapped together each has as much.

    `info["schedule"]` has the lengths of the segments (`segments`, longest first, each cut again by the next one), how
    many inner runs the backward pass repeats (`extra_runs`) and, with `memory`, the `bytes` to be kept.

    Raises: `ValueError` for T < 0, segment < 1, both `segment` and `memory`, or a budget that no schedule meets.
    Cost: time a small multiple (2 to 3) of the inner run; memory T steps. With `segment` one inner run more and about
    T / segment states + segment steps; with `memory` as many inner runs more as it takes. None of it depends on the
    size of lam.
    Reference: Franceschi et al. 2018, Algorithm 1 (Reverse-HG); Maclaurin et al. 2015; checkpoints: Griewank 1992.
    Do not use it for few hyperparameters and very many steps: `Forward` needs no memory for the past; nor to get the
    gradient of the exact problem (2) from an unconverged inner run: it differentiates f_T, not f.

    >>> method = Reverse(steps=250, segment=16)
    >>> long_run = Reverse(steps=100_000, memory="2GiB")
    """

    steps: int
    segment: int | Literal["sqrt"] | None = None
    memory: int | str | None = None
    differentiates: ClassVar = "f_T"

    def __check_init__(self):
        check_steps(self.steps)
        if self.segment is not None and self.memory is not None:
            raise ValueError("give segment or memory, not both: with memory the segments are chosen")
        if isinstance(self.segment, str):
            if self.segment != "sqrt":
                raise ValueError(f'segment is {self.segment!r}; use a whole number, or "sqrt"')
        elif self.segment is not None:
            check_steps(self.segment, "segment", 1)
        if self.memory is not None:
            parse_bytes(self.memory)

    def value(self, problem: Problem, dynamics: Dynamics, lam: Lam, data: Data, carry: Any) -> tuple[Scalar, Outcome]:
        """f_T(lam), with every dependence on lam left in place."""
        schedule = self._schedule(problem, dynamics, lam, data)
        value, outcome = unrolled_value(
            problem, dynamics, self.steps, lam, data, carry, segments=() if schedule is None else schedule.segments
        )
        if schedule is None:
            return value, outcome
        chosen = {
            "segments": jnp.asarray(schedule.segments, jnp.int32),
            "extra_runs": jnp.asarray(len(schedule.segments)),
        }
        if schedule.bytes:
            chosen["bytes"] = jnp.asarray(schedule.bytes, jnp.result_type(float))
        return value, outcome._replace(info=outcome.info | {"schedule": chosen})

    def _schedule(self, problem: Problem, dynamics: Dynamics, lam: Lam, data: Data) -> Schedule | None:
        if self.memory is not None:
            prepared = problem.prepare(lam, data)  # traced for its shapes; what nothing uses is not computed
            state = initial_state(problem, dynamics, lam, prepared)
            sizes = measure_step(problem, dynamics, state, lam, prepared)
            return cheapest(self.steps, sizes, parse_bytes(self.memory))
        if self.segment is None:
            return None
        size = max(1, isqrt(self.steps)) if isinstance(self.segment, str) else self.segment
        return Schedule((size,) if size < self.steps else (), 0)
