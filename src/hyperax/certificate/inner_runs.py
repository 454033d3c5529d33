"""How far the inner run has converged, measured: its next steps, the solution itself, and other starting points."""

from __future__ import annotations

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from hyperax.certificate.curvature import DENSE, Curvature, extremes, newton
from hyperax.certificate.measuring import Subject
from hyperax.dynamics import Dynamics, GradientDescent, HeavyBall, State
from hyperax.dynamics.dynamics import evaluate_setting
from hyperax.problem import Data, Lam, Problem
from hyperax.rollout import advance

_NEWTON_STEPS = 8
_RADII = (0.5, 1.0, 2.0)


class InnerRun(NamedTuple):
    """The end of the inner run of one task.

    Fields:
        gradient_norm: the norm of grad_w L at w_T.
        w_norm: the norm of w_T.
        scale: the larger of |w_T| and |w_T - w_0|: what counts as a large distance.
        next_step: the norm of w_{T+1} - w_T; `None` for T < 2 or a method without steps.
        rate: r = (|w_{T+k+1} - w_{T+k}| / |w_{T+1} - w_T|)^(1/k), k = min(8, T / 2): by which the next steps shrink;
            `None` where there is no next step, or it is rounding (then the run has converged).
        extrapolated: |w_{T+1} - w_T| / (1 - r), the distance from w_T to the inner solution by that rate; infinite for
            r >= 1, `None` where r is.
        distance: |w_T - w*|, measured: w* is where the same dynamics with 2 T more steps (50 at least) and then
            Newton's method end, from w_T. `None` if they end nowhere (or with mini-batches, which have no one end).
        solution: w*, flat; NaN where there is none.
    """

    gradient_norm: float
    w_norm: float
    scale: float
    next_step: float | None
    rate: float | None
    extrapolated: float | None
    distance: float | None
    solution: Float[np.ndarray, " d"]

    @property
    def relative_distance(self) -> float | None:
        """The distance to the solution (measured; if it could not be, extrapolated) in units of `scale`."""
        known = self.extrapolated if self.distance is None else self.distance
        return None if known is None else known / max(self.scale, float(np.finfo(float).tiny))

    @property
    def badness(self) -> tuple[float, float]:
        """Larger for a run that is solved worse."""
        worst_if_nan = lambda x: float("inf") if np.isnan(x) else x
        return worst_if_nan(self.relative_distance or 0.0), worst_if_nan(self.gradient_norm)


class Minimiser(NamedTuple):
    """A minimiser of L other than w*, found from another starting point.

    Fields:
        distance: its distance from w*.
        inner, outer: L and E there.
        inner_here, outer_here: L and E at w*.
    """

    distance: float
    inner: float
    outer: float
    inner_here: float
    outer_here: float

    @property
    def relation(self) -> str:
        """Whether its L is "lower", "equal" or "higher" than L(w*)."""
        if abs(self.inner - self.inner_here) <= 1e-7 * max(abs(self.inner), abs(self.inner_here), 1e-12):
            return "equal"
        return "lower" if self.inner < self.inner_here else "higher"


class TaskReport(NamedTuple):
    """What is known of the inner problem of one task."""

    run: InnerRun
    curvature: Curvature
    others: tuple[Minimiser, ...]


def inner_reports(subject: Subject, state: Any, starts: int, draw: np.random.Generator) -> list[TaskReport]:
    """The inner problem of every task (of the only one), from the last states of the hypergradient.

    Cost: (starts + 1) runs of 2 T steps, Newton's method from the end of each (8 Hessians, or 400 products with one),
    and the eigenvalues of a Hessian.
    """
    of_one = jax.tree.leaves(state.w if subject.tasks is None else jax.tree.map(lambda x: x[0], state.w))
    offsets = draw.normal(size=(starts if subject.steps else 0, sum(leaf.size for leaf in of_one)))
    found = subject.each(_Inner(subject.steps), subject.floats, jnp.asarray(offsets, of_one[0].dtype), state)
    return [_report(subject, jax.tree.map(lambda x, j=j: x[j], found)) for j in range(subject.tasks or 1)]


class _Inner(eqx.Module):
    """The measure: all that needs inner steps or Hessians, in one program."""

    steps: int

    def __call__(
        self, problem: Problem, dynamics: Dynamics, lam: Lam, data: Data, offsets: Array, state: State
    ) -> dict[str, Any]:
        """Arrays of one task, from its last state."""
        prepared = problem.prepare(lam, data)
        w, unravel = ravel_pytree(state.w)
        loss = lambda x: problem.objective(prepared, max(self.steps, 1))(unravel(x), lam)
        slope = jax.grad(loss)
        first = ravel_pytree(problem.start(lam, prepared))[0].astype(w.dtype)
        where = jnp.where(jnp.all(jnp.isfinite(w)), w, first)  # after an overflow, look where the run began
        mu, nu = extremes(slope, where)
        found = {
            "w": w,
            "first": first,
            "gradient": slope(w),
            "mu": mu,
            "nu": nu,
            "settings": _settings(dynamics, lam, max(self.steps, 1)),
            "lengths": self._next_lengths(problem, dynamics, lam, prepared, state),
        }
        if problem.batch is not None:
            return found

        def settled(start: Array) -> tuple[Array, ...]:
            end = start
            if self.steps:
                begin = dynamics.init(unravel(start), lam)
                count = max(2 * self.steps, 50)
                ran, _ = advance(problem, dynamics, begin, lam, prepared, first=1, steps=count)
                end = ravel_pytree(ran.w)[0]
            end, left = newton(slope, end, _NEWTON_STEPS)
            return end, left, loss(end), problem.evaluate(unravel(end), lam, prepared)[0]

        return {**found, "ends": jax.lax.map(settled, jnp.concatenate([where[None], _far(where, first, offsets)]))}

    def _next_lengths(
        self, problem: Problem, dynamics: Dynamics, lam: Lam, prepared: Data, state: State
    ) -> tuple[Array, Array] | None:
        span = _span(self.steps)
        if span == 0:
            return None
        flat = lambda w: ravel_pytree(w)[0]
        first = self.steps + 1
        _, seen = advance(problem, dynamics, state, lam, prepared, first=first, steps=span + 1, observe=flat)
        length = lambda a, b: jnp.sqrt(jnp.sum((a - b) ** 2))
        return length(seen[0], flat(state.w)), length(seen[-1], seen[-2])


def _span(steps: int) -> int:
    """k: over how many steps the contraction rate is taken; 0 where there is none."""
    return min(8, steps // 2)


def _far(w: Array, first: Array, offsets: Float[Array, "count d"]) -> Float[Array, "count d"]:
    """Starting points around w_T: the mirrored w_T, then random ones in pairs of opposite offsets, ever farther."""
    scale = jnp.sqrt(jnp.mean(w**2)) + jnp.sqrt(jnp.mean((w - first) ** 2))
    scale = jnp.where(scale > 0, scale, 1.0)
    index = np.arange(len(offsets))
    radii = np.where(index % 2 == 1, 1.0, -1.0) * np.asarray(_RADII)[(index - 1) // 2 % len(_RADII)]
    around = w + scale * jnp.asarray(radii, w.dtype)[:, None] * offsets[(index - 1) // 2]
    return jnp.where((index == 0)[:, None], -w, around)


def _settings(dynamics: Any, lam: Lam, t: int) -> Any:
    """(step size, momentum) of gradient descent and heavy ball, each a number if it is one."""
    if not isinstance(dynamics, GradientDescent | HeavyBall):
        return None
    names = ("step_size", "momentum")
    values = [evaluate_setting(getattr(dynamics, name, 0.0), lam, jnp.asarray(t)) for name in names]
    single = all(jax.tree.structure(x) == jax.tree.structure(0.0) and jnp.ndim(x) == 0 for x in values)
    return tuple(jnp.asarray(x, float) for x in values) if single else None


def _report(subject: Subject, found: dict[str, Any]) -> TaskReport:
    w = found["w"]
    norm = float(np.linalg.norm(w))
    machine = float(np.finfo(w.dtype).eps)
    step = rate = extrapolated = None
    if found["lengths"] is not None:
        step, last = (float(x) for x in found["lengths"])
        # Steps of a hundred units in the last place of w are rounding, not contraction.
        if not (step <= 100 * machine * norm or last <= 100 * machine * norm):
            rate = float((last / step) ** (1 / _span(subject.steps)))
            extrapolated = step / (1 - rate) if rate < 1 else float("inf")
    distance, solution, others = None, np.full(w.shape, np.nan), ()
    if "ends" in found:
        ends, left, inner, outer = found["ends"]
        small = np.sqrt(machine) * np.maximum(np.linalg.norm(ends, axis=1), 1e-3)
        solved = np.isfinite(outer) & (left <= small)
        if solved[0] and np.isfinite(norm):
            solution, distance = ends[0], float(np.linalg.norm(w - ends[0]))
            others = _others(ends, solved, inner, outer)
    limit = eta = None
    if found["settings"] is not None and subject.single.method.needs_dynamics:
        eta, momentum = (float(x) for x in found["settings"])
        limit = 2 * (1 + momentum) / float(found["nu"]) if found["nu"] > 0 else None
    curvature = Curvature(float(found["mu"]), float(found["nu"]), w.size <= DENSE, eta, limit)
    slope, scale = float(np.linalg.norm(found["gradient"])), max(norm, float(np.linalg.norm(w - found["first"])))
    run = InnerRun(slope, norm, scale, step, rate, extrapolated, distance, solution)
    return TaskReport(run, curvature, others)


def _others(ends: Any, solved: Any, inner: Any, outer: Any) -> tuple[Minimiser, ...]:
    """Those ends that are solved and not where the first is, each place once."""
    found, places = [], [ends[0]]
    for j in np.flatnonzero(solved[1:]) + 1:
        far = lambda place, j=j: (
            np.linalg.norm(ends[j] - place) > 1e-3 * (np.linalg.norm(ends[j]) + np.linalg.norm(place))
        )
        if all(far(place) for place in places):
            places.append(ends[j])
            distance = float(np.linalg.norm(ends[j] - ends[0]))
            found.append(Minimiser(distance, *(float(x) for x in (inner[j], outer[j], inner[0], outer[0]))))
    return tuple(found)
