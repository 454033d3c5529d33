"""How far the inner run has converged: its last steps, their contraction, the distance that is left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from hyperax.methods import HypergradientFunction, Method
from hyperax.problem import Data, Lam
from hyperax.rollout import advance, initial_state
from hyperax.tasks import TASKS, MeanOverTasks, count_tasks


class InnerRun(NamedTuple):
    """The end of the inner run of one task.

    Fields:
        gradient_norm: the norm of grad_w L at w_T.
        w_norm: the norm of w_T.
        last_step: the norm of w_T - w_{T-1}; `None` for T < 2 or a method without steps.
        rate: r = (|w_T - w_{T-1}| / |w_{T-k} - w_{T-k-1}|)^(1/k), k = min(8, T / 2): by which the last steps shrink,
            one to the next; `None` where there is no last step, or it is rounding (then the run has converged).
        distance: r / (1 - r) |w_T - w_{T-1}|, the extrapolated distance from w_T to the inner solution; infinite for
            r >= 1, `None` where r is.
    """

    gradient_norm: float
    w_norm: float
    last_step: float | None = None
    rate: float | None = None
    distance: float | None = None

    @staticmethod
    def extrapolated(
        gradient_norm: float, w_norm: float, last: float, early: float, span: int, machine: float
    ) -> InnerRun:
        """From the lengths of the last step and of the one `span` steps before; `machine` is the machine precision."""
        # Steps of a hundred units in the last place of w are rounding, not contraction.
        if last <= 100 * machine * w_norm or early == 0:
            return InnerRun(gradient_norm, w_norm, last)
        rate = float((last / early) ** (1 / span))
        distance = rate / (1 - rate) * last if rate < 1 else float("inf")
        return InnerRun(gradient_norm, w_norm, last, rate, distance)

    @property
    def badness(self) -> tuple[float, float]:
        """Larger for a run that is solved worse."""
        worst_if_nan = lambda x: float("inf") if np.isnan(x) else x
        return worst_if_nan(self.distance or 0.0), worst_if_nan(self.gradient_norm)


def inner_runs(
    hypergradient: HypergradientFunction | MeanOverTasks, lam: Lam, data: Data, machine: float
) -> list[InnerRun]:
    """The end of the inner run of every task (of the only one)."""
    single = hypergradient.hypergradient if isinstance(hypergradient, MeanOverTasks) else hypergradient
    floats, rest = eqx.partition(lam, eqx.is_inexact_array)
    norms = over_tasks(hypergradient, data, rest, lambda lam, data: _norms(single, lam, data))(floats)
    span = _span(single.method)
    if span == 0:
        return [InnerRun(float(gradient), float(w)) for gradient, w in zip(*norms, strict=True)]
    return [
        InnerRun.extrapolated(float(gradient), float(w), float(last), float(early), span, machine)
        for gradient, w, last, early in zip(*norms, strict=True)
    ]


def over_tasks(
    hypergradient: HypergradientFunction | MeanOverTasks, data: Data, rest: Lam, function: Callable[[Lam, Data], Any]
) -> Callable[[Lam], Any]:
    """The given function for each task, stacked, as a function of the floats of lam.

    As many tasks are taken at a time as the hypergradient takes; `rest` is what of lam is not differentiated.
    """
    arrays, others = eqx.partition(data, eqx.is_array)
    of_task = lambda floats, arrays: function(eqx.combine(floats, rest), eqx.combine(arrays, others))
    if not isinstance(hypergradient, MeanOverTasks):
        alone = jax.jit(of_task)
        return lambda floats: jax.tree.map(lambda x: np.asarray(x, np.float64)[None], alone(floats, arrays))

    count = count_tasks(data)
    on_device = count if hypergradient.mesh is None else count // hypergradient.mesh.size
    together = min(hypergradient.parallel or on_device, on_device)
    group = jax.jit(jax.vmap(of_task, in_axes=(None, 0), axis_name=TASKS))

    def mapped(floats: Lam) -> Any:
        starts = range(0, count, together)
        groups = [group(floats, jax.tree.map(lambda x, i=i: x[i : i + together], arrays)) for i in starts]
        return jax.tree.map(lambda *parts: np.concatenate([np.asarray(part, np.float64) for part in parts]), *groups)

    return mapped


def _span(method: Method) -> int:
    """k: over how many steps the contraction rate is taken; 0 where there is none."""
    return min(8, getattr(method, "steps", 0) // 2)


def _norms(single: HypergradientFunction, lam: Lam, data: Data) -> tuple[Array, ...]:
    """(|grad_w L(w_T)|, |w_T|) of one task, and the lengths of its last step and of the one k steps before."""
    problem, dynamics, span = single.problem, single.dynamics, _span(single.method)
    steps = getattr(single.method, "steps", 0)
    prepared = problem.prepare(lam, data)
    if span == 0:
        w, lengths = single.value(lam, data, single.init(lam, data))[1].state.w, ()
    else:
        state = initial_state(problem, dynamics, lam, prepared)
        state, _ = advance(problem, dynamics, state, lam, prepared, first=1, steps=steps - span - 1)
        before, early = state.w, steps - span
        state, seen = advance(problem, dynamics, state, lam, prepared, first=early, steps=span + 1, observe=lambda w: w)
        w, at = state.w, lambda i: jax.tree.map(lambda x: x[i], seen)
        lengths = _distance(w, at(-2)), _distance(at(0), before)
    gradient = jax.grad(problem.objective(prepared, max(steps, 1)))(w, lam)
    return optax.tree.norm(gradient), optax.tree.norm(w), *lengths


def _distance(one: Any, other: Any) -> Array:
    return optax.tree.norm(jax.tree.map(jnp.subtract, one, other))
