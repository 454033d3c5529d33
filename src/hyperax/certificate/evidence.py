"""What `certify` measured of one hypergradient, and the first conclusions from it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from hyperax.certificate.differences import Comparison
from hyperax.certificate.inner_runs import TaskReport

CONVERGED = 0.01
"""The distance |w_T - w*|, relative to |w_T| or |w_T - w_0|, up to which w_T counts as the inner solution."""


class Evidence(NamedTuple):
    """What `judge` reads.

    Fields:
        method, target: the name of the method, and what it claims: "f_T", "f", "approximately" or "online".
        formula: whether w is given by a formula, without dynamics.
        steps: T, or 0.
        value, gradient_norm: of the hypergradient.
        comparisons, leaves: along random directions in lam, and in each leaf of it.
        against: whether `comparisons` are of "f_T" or "f", or of the method's "own" value.
        tolerance: the relative error that a right gradient stays below.
        report: of the inner problem (of the task that is worst solved).
        residual: of the linear system, relative, as the method reports it; `None` if it does not.
        rounding: the relative distance of the hypergradients in the precision of lam and in float64.
        dtype, batches: the precision of lam; whether the inner steps see mini-batches.
    """

    method: str
    target: str
    formula: bool
    steps: int
    value: float
    gradient_norm: float
    comparisons: Sequence[Comparison]
    leaves: Sequence[Comparison]
    against: str
    tolerance: float
    report: TaskReport
    residual: float | None
    rounding: float | None
    dtype: str
    batches: bool

    @property
    def exact(self) -> bool:
        """Whether the method claims an exact gradient of what it was compared with."""
        return self.target == self.against

    @property
    def typical(self) -> float:
        """The size of the derivatives along a random direction."""
        return _rms(c.hypergradient for c in self.comparisons)

    @property
    def finite(self) -> bool:
        """Whether value and gradient are."""
        return math.isfinite(self.value) and math.isfinite(self.gradient_norm)

    @property
    def kinked(self) -> bool:
        """Whether the one-sided difference quotients disagree somewhere."""
        return any(c.kinked(self.typical) for c in self.comparisons)

    @property
    def off(self) -> bool:
        """Whether finite differences contradict the hypergradient."""
        return any(c.off(self.tolerance, self.typical) for c in self.comparisons) or bool(self.wrong_leaves)

    @property
    def wrong_leaves(self) -> list[Comparison]:
        """The leaves of lam along which they do, small beside the others or not."""
        return [c for c in self.leaves if c.off(self.tolerance, 1e-3 * self.typical)]

    @property
    def error(self) -> float:
        """The relative distance of the hypergradient from the derivatives it was compared with."""
        truth = _rms(c.finite_difference for c in self.comparisons)
        distance = _rms(c.hypergradient - c.finite_difference for c in self.comparisons)
        return distance / max(truth, self.typical, 1e-300)

    @property
    def too_large(self) -> bool:
        """Whether the step size is beyond the limit of its dynamics."""
        eta, limit = self.report.curvature.step_size, self.report.curvature.limit
        return not self.batches and eta is not None and limit is not None and eta > limit * (1 + 1e-6)

    @property
    def distance(self) -> float | None:
        """The relative distance of w_T from w*, `None` if it is not known or means nothing."""
        return None if self.batches or self.target == "online" else self.report.run.relative_distance

    @property
    def solved(self) -> bool:
        """Whether w is where a method of the exact problem needs it: at the solution, as far as its gradient tells."""
        distance = self.report.run.relative_distance
        if self.formula:
            run, curvature = self.report.run, self.report.curvature
            near = run.gradient_norm <= 1e-5 * curvature.nu * run.scale
            return near or (distance is not None and distance <= 1e-5)
        if self.report.run.rate is None and distance is None:
            return not self.report.curvature.indefinite
        if distance is None or not distance <= CONVERGED:
            return False
        return not (self.exact and self.off and distance > 1e-7)


def _rms(numbers: Iterable[float]) -> float:
    squares = [x * x for x in numbers]
    return math.sqrt(sum(squares) / len(squares)) if squares else 0.0
