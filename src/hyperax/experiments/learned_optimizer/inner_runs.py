"""Inner runs, many at once: the loss along the way, for one optimizer on many problems."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from hyperax.dynamics import Dynamics
from hyperax.problem import Data, Lam, Problem
from hyperax.rollout import advance, initial_state
from hyperax.tasks import one_task, split_tasks

LONGER = 10
"""The long horizon is so many times the training horizon."""

Blocks = tuple[tuple[int, int], ...]
"""((count, steps), ...): E is measured `count` times, each after `steps` more steps, then the next pair."""


def blocks(horizon: int, points: int, long: bool) -> Blocks:
    """`points` evenly spaced measurements up to the horizon; with `long` others, ten times as far apart, up to ten
    times it.

    >>> blocks(100, 50, long=True)
    ((50, 2), (45, 20))
    """
    every = horizon // points
    return ((points, every), (points - points // LONGER, LONGER * every)) if long else ((points, every),)


def times(measured: Blocks) -> np.ndarray:
    """The steps after which E is measured, and 0 before them.

    >>> times(((2, 1), (2, 10))).tolist()
    [0, 1, 2, 12, 22]
    """
    gaps = [steps for count, steps in measured for _ in range(count)]
    return np.cumsum([0, *gaps])


def losses(
    problem: Problem, dynamics: Dynamics, measured: Blocks, parallel: int | None = None
) -> Callable[[Lam, Data], Float[Array, "problems times"]]:
    """E(w_t) of one optimizer on many problems, at the times measured.

    Arguments:
        problem, dynamics: what is solved, and how.
        measured: see `Blocks`.
        parallel: problems at once; `None`: all.

    Returns: (lam, tasks) -> [problems, 1 + measurements], compiled; infinite where it is not a number.
    Cost: one run a problem, and one evaluation of E a measurement.

    >>> from hyperax.dynamics import GradientDescent
    >>> tasks = {"own": {"x": jnp.asarray([1.0, 2.0])}}
    >>> square = Problem(lambda w, lam, d: w**2, lambda w, lam, d: w**2, lambda lam, d: d["own"]["x"])
    >>> print(losses(square, GradientDescent(lambda lam: lam), ((2, 1),))(0.25, tasks))
    [[1.     0.25   0.0625]
     [4.     1.     0.25  ]]
    """

    def of_problem(lam: Lam, data: Data) -> Float[Array, " times"]:
        prepared = problem.prepare(lam, data)
        state = initial_state(problem, dynamics, lam, prepared)
        measure = lambda w: problem.evaluate(w, lam, prepared)[0]
        found, first = [measure(state.w)[None]], 1
        for count, steps in measured:

            def block(state: Any, t: Array, steps: int = steps) -> tuple[Any, Array]:
                state, _ = advance(problem, dynamics, state, lam, prepared, first=t, steps=steps)
                return state, measure(state.w)

            state, along = jax.lax.scan(block, state, first + steps * jnp.arange(count))
            found.append(along)
            first += steps * count
        return _finite(jnp.concatenate(found))

    return eqx.filter_jit(lambda lam, tasks: _over_problems(lambda data: of_problem(lam, data), tasks, parallel))


def final_losses(
    problem: Problem, dynamics: Dynamics, parallel: int | None = None
) -> Callable[[Lam, Data, Int[Array, ""]], Float[Array, " problems"]]:
    """E(w_T) of one optimizer on many problems.

    Arguments: as of `losses`.
    Returns: (lam, tasks, T) -> [problems], compiled once for all T; infinite where it is not a number.

    >>> from hyperax.dynamics import GradientDescent
    >>> tasks = {"own": {"x": jnp.asarray([1.0, 2.0])}}
    >>> square = Problem(lambda w, lam, d: w**2, lambda w, lam, d: w**2, lambda lam, d: d["own"]["x"])
    >>> print(final_losses(square, GradientDescent(lambda lam: lam))(0.25, tasks, jnp.asarray(2)))
    [0.0625 0.25  ]
    """

    def of_problem(lam: Lam, data: Data, steps: Int[Array, ""]) -> Float[Array, ""]:
        prepared = problem.prepare(lam, data)
        step = lambda t, state: advance(problem, dynamics, state, lam, prepared, first=t, steps=1)[0]
        state = jax.lax.fori_loop(1, steps + 1, step, initial_state(problem, dynamics, lam, prepared))
        return _finite(problem.evaluate(state.w, lam, prepared)[0])

    return eqx.filter_jit(
        lambda lam, tasks, steps: _over_problems(lambda data: of_problem(lam, data, steps), tasks, parallel)
    )


def _over_problems(of_problem: Callable[[Data], Array], tasks: Data, parallel: int | None) -> Array:
    arrays, rest = split_tasks(tasks)
    one = lambda task: of_problem(one_task(task, rest))
    if parallel is None:
        return jax.vmap(one)(arrays)
    # Without a batch size there is no mapped axis of length one, which makes small steps slower on a processor.
    return jax.lax.map(one, arrays, batch_size=None if parallel == 1 else parallel)


def _finite(x: Array) -> Array:
    """Infinite where it is not a number: worse than all numbers."""
    return jnp.where(jnp.isfinite(x), x, jnp.inf)
