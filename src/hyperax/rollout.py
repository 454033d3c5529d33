"""The one loop over t: w_0 = Phi_0(lam), w_t = Phi_t(w_{t-1}, lam)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hyperax.dynamics.dynamics import Dynamics, Gradient, InnerGradient, State
from hyperax.problem import Data, Lam, Problem, W

Objective = Callable[[W, Lam], Any]


def exact_gradient(objective: Objective) -> InnerGradient:
    """The gradient of the inner objective, differentiable itself: what every exact method differentiates through."""
    return InnerGradient(jax.value_and_grad(objective))


def initial_state(problem: Problem, dynamics: Dynamics, lam: Lam, prepared: Data) -> State:
    """s_0: the dynamics' first state at w_0 = Phi_0(lam, D)."""
    state = dynamics.init(problem.start(lam, prepared), lam)
    # Weakly typed constants (jnp.zeros() * 2.0 and the like) would change their type after one step.
    return jax.tree.map(lambda leaf: jax.lax.convert_element_type(leaf, leaf.dtype), state)


def advance(
    problem: Problem,
    dynamics: Dynamics,
    state: State,
    lam: Lam,
    prepared: Data,
    *,
    first: int | jax.Array,
    steps: int,
    segments: Sequence[int] = (),
    gradient_of: Callable[[Objective], Gradient] = exact_gradient,
    observe: Callable[[W], Any] | None = None,
) -> tuple[State, Any]:
    """Run steps t = first, ..., first + steps - 1 and return the last state and the stacked observations of w_t.

    With `segments` = (k,), only the states at the ends of segments of k steps are kept for a reverse pass, and the
    steps inside a segment are run again: memory O(steps / k + k) states in place of O(steps), time one more forward
    pass. Further lengths cut each segment again, at one more forward pass each. `first` may be traced.
    """

    def step(state: State, t: jax.Array) -> tuple[State, Any]:
        gradient = gradient_of(problem.objective(prepared, t))
        state = dynamics.step(gradient, state, lam, t)
        return state, None if observe is None else observe(state.w)

    _check_step(step, state)
    return _scan(step, state, first + jnp.arange(steps), tuple(segments))


def _scan(step: Callable, state: State, times: jax.Array, segments: tuple[int, ...]) -> tuple[State, Any]:
    """A scan over `times`, cut into segments of the first length, each of them cut again by the other lengths."""
    if not segments:
        return jax.lax.scan(step, state, times)
    size, *inner = segments
    if size >= len(times):
        return _scan(step, state, times, tuple(inner))

    # prevent_cse is for code outside a loop; inside lax.scan it only costs time.
    @partial(jax.checkpoint, prevent_cse=False)
    def run(state: State, times: jax.Array) -> tuple[State, Any]:
        return _scan(step, state, times, tuple(inner))

    whole = len(times) // size * size
    state, observed = jax.lax.scan(run, state, times[:whole].reshape(-1, size))
    observed = jax.tree.map(lambda x: x.reshape(whole, *x.shape[2:]), observed)
    if whole == len(times):
        return state, observed
    state, remainder = run(state, times[whole:])
    return state, jax.tree.map(lambda a, b: jnp.concatenate([a, b]), observed, remainder)


def rollout(
    problem: Problem,
    dynamics: Dynamics,
    steps: int,
    lam: Lam,
    data: Data = None,
    *,
    observe: Callable[[W], Any] | None = None,
) -> tuple[State, Any]:
    """Solve the inner problem approximately: the state after T = `steps` steps of the dynamics, from Phi_0(lam).

        w_0 = Phi_0(lam, D),   w_t = Phi_t(w_{t-1}, lam),   t = 1, ..., T,   D = prepare(lam, data)

    Arguments:
        problem, dynamics: what is solved, and how.
        steps: T >= 0.
        lam, data: the outer variables and the data of one task.
        observe: a function of w_t whose results are returned for t = 1, ..., T, stacked on a leading axis (losses
            along the way, accuracies to validate T by).

    Returns: (state, observed): `state.w` is w_T; `observed` is `None` without `observe`.
    Raises: `ValueError` for T < 0 or a state whose shapes or types change from step to step.
    Cost: T gradients of the inner objective, memory of one state (and of the observations).
    Reference: Franceschi et al. 2018, eq. 6.
    Do not use it to differentiate: `hypergradient` does, with a bounded memory.

    >>> import jax.numpy as jnp
    >>> from hyperax import GradientDescent, Problem
    >>> square = Problem(inner=lambda w, lam, d: (w - lam) ** 2, outer=lambda w, lam, d: w, init=lambda lam, d: 0.0)
    >>> state, seen = rollout(square, GradientDescent(0.25), 3, jnp.asarray(8.0), observe=lambda w: w)
    >>> print(state.w, seen)
    7.0 [4. 6. 7.]
    """
    check_steps(steps)
    prepared = problem.prepare(lam, data)
    state = initial_state(problem, dynamics, lam, prepared)
    seen = None if observe is None else lambda w: observe(problem.whole(w, lam, prepared))
    return advance(problem, dynamics, state, lam, prepared, first=1, steps=steps, observe=seen)


def check_steps(steps: int, name: str = "steps", lowest: int = 0) -> None:
    """Raise a `ValueError` unless this is a whole number, at least `lowest`."""
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or steps < lowest:
        raise ValueError(f"{name} must be a whole number, at least {lowest}; it is {steps!r}")


def _check_step(step: Callable, state: State) -> None:
    before = jax.tree_util.tree_leaves_with_path(state)
    after_state = jax.eval_shape(lambda s: step(s, jnp.asarray(1))[0], state)
    if jax.tree.structure(after_state) != jax.tree.structure(state):
        raise ValueError(
            f"a step changes the structure of the state: {jax.tree.structure(state)} before, "
            f"{jax.tree.structure(after_state)} after; a dynamics must return a state like the one it received"
        )
    for (path, old), new in zip(before, jax.tree.leaves(after_state), strict=True):
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            name = "state" + jax.tree_util.keystr(path)
            raise ValueError(
                f"{name} is {old.dtype}{list(old.shape)} before a step and {new.dtype}{list(new.shape)} after it; "
                "w and lam must keep their shapes and types: let Phi_0 return w with the shape and type of a later "
                "step (a float32 w with a float64 lam or data is the usual cause)"
            )
