"""The optimizers that people tune by hand, and the search for their best constant step size."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from hyperax.dynamics import Adam, Dynamics, GradientDescent, HeavyBall, Optax
from hyperax.experiments.learned_optimizer.inner_runs import final_losses
from hyperax.problem import Data, Problem

MeanLosses: TypeAlias = Callable[[Float[Array, " k"]], np.ndarray]

_MOST_BLOCKS = 12
"""Widenings of a grid: with a factor of 1.5 and blocks of 7 steps a range of 10^15."""


@dataclass(frozen=True)
class Baseline:
    """An optimizer with a constant step size, which is its lam.

    Fields:
        name: in tables and figures; several of one name differ in momentum, and the best of them counts.
        dynamics: its settings other than the step size are fixed.
        near: a step size that its grid is built around.
        momentum: of heavy ball.
    """

    name: str
    dynamics: Dynamics
    near: float
    momentum: float | None = None


def baselines(momenta: Sequence[float]) -> tuple[Baseline, ...]:
    """SGD, heavy ball at each of these momenta, RMSProp with decay 0.9, Adam with 0.9 and 0.999.

    >>> [b.name for b in baselines((0.9,))]
    ['SGD', 'momentum', 'RMSProp', 'Adam']
    """
    eta = lambda lam: lam
    return (
        Baseline("SGD", GradientDescent(eta), 0.1),
        *(Baseline("momentum", HeavyBall(eta, mu), 0.1 * (1 - mu), mu) for mu in momenta),
        Baseline("RMSProp", Optax(lambda lam: optax.rmsprop(lam, decay=0.9)), 0.01),
        Baseline("Adam", Adam(eta), 0.03),
    )


@dataclass(frozen=True)
class Best:
    """The best step size of a grid: `loss` at `step_size`, and the mean loss at every step size that was tried."""

    step_size: float
    loss: float
    tried: Mapping[float, float]


def best_step_size(mean_losses: MeanLosses, near: float, factor: float, each_side: int, what: str) -> Best:
    """The best of the step sizes near * factor^j, j = -K, ..., K; the grid grows on the side where the best one ends
    it, until none does.

    Arguments:
        mean_losses: step sizes [2 K + 1] -> mean losses [2 K + 1], infinite where a run diverged.
        near: where the grid begins.
        factor: between neighbours, above 1.
        each_side: K >= 1.
        what: the optimizer's name, for the message.

    Raises: `ValueError` if the best step size is at an end of the grid after all widenings.
    Cost: one call a block of 2 K + 1 step sizes, of one shape.
    Do not use it where the loss has several valleys as a function of the step size: it ends in the first it finds.

    >>> best = best_step_size(lambda steps: np.log(np.asarray(steps) / 3) ** 2, 0.1, 2.0, 2, "SGD")
    >>> round(best.step_size, 3), len(best.tried)
    (3.2, 10)
    """
    size = 2 * each_side + 1
    tried: dict[int, float] = {}
    low = high = -each_side  # exponents low, ..., high - 1 are tried
    while True:
        first = high if not tried or _arg_best(tried) == high - 1 else low - size
        exponents = range(first, first + size)
        steps = jnp.asarray([near * factor**j for j in exponents], jnp.float32)
        tried |= dict(zip(exponents, map(float, mean_losses(steps)), strict=True))
        low, high = min(low, first), max(high, first + size)
        at = _arg_best(tried)
        if low < at < high - 1:
            grid = {near * factor**j: tried[j] for j in sorted(tried)}
            return Best(near * factor**at, tried[at], grid)
        if len(tried) >= _MOST_BLOCKS * size:
            raise ValueError(
                f"the best step size of {what} is at an end of the grid, {near * factor**at:.3g}, after "
                f"{_MOST_BLOCKS} blocks: these problems have no best constant step size; change them or the horizon"
            )


def _arg_best(tried: Mapping[int, float]) -> int:
    """The exponent of the least loss; where all diverged the smallest, so that the grid grows downwards."""
    return min(sorted(tried), key=lambda j: tried[j] if math.isfinite(tried[j]) else math.inf)


def mean_final_losses(
    one: Baseline, problem: Problem, tasks: Data, parallel: int | None = None
) -> Callable[[int], MeanLosses]:
    """T -> step sizes [k] -> the mean final losses [k] of a baseline on these problems, all runs at once.

    Arguments:
        one: the baseline.
        problem: what is solved.
        tasks: the data of the problems.
        parallel: problems at once; `None`: all.

    Cost: one compilation, whatever T is.
    """
    run = final_losses(problem, one.dynamics, parallel)
    mean = eqx.filter_jit(jax.vmap(lambda eta, tasks, T: run(eta, tasks, T).mean(), in_axes=(0, None, None)))
    return lambda horizon: lambda step_sizes: np.asarray(mean(step_sizes, tasks, jnp.asarray(horizon)), float)
