"""Hypergradients during the inner run: lam moves while w does."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Int, PyTree

from hyperax.dynamics.dynamics import Dynamics, State
from hyperax.methods.method import Method, Outcome, detach
from hyperax.methods.truncated import Truncated
from hyperax.problem import Data, Lam, Problem, Scalar
from hyperax.rollout import advance, check_steps, initial_state


class InnerProgress(NamedTuple):
    """The carry: the inner run so far.

    Fields:
        t: the inner steps done since the run began.
        state: s_t.
        tangents: Z_t = d s_t / d lam, like the floating-point arrays of the state, with a leading axis of m; `()` with
            a window.
    """

    t: Int[Array, ""]
    state: State
    tangents: PyTree = ()


class RealTime(Method):
    """Partial hypergradients at intermediate steps t of one inner run, so that lam is updated while w is solved for.

        Z_t = (d Phi_t / d s) Z_{t-1} + d Phi_t / d lam,   h_t = grad_lam E(w_t, lam) + Z_t^T grad_w E(w_t, lam)

    One hyperiteration goes `every` steps on from where the last one stopped, at the lam of now. The Z_t carried was
    pushed at earlier lam: that is the approximation. For lam that does not move, h_t is the gradient of f_t.

    Arguments:
        steps: T >= 1, the length of the inner run; then the next one begins. `None`: one run without end.
        every: inner steps per hyperiteration, a divisor of T.
        window: `None` carries Z_t forward. A number K in 1, ..., `every` differentiates the last K steps in reverse in
            its place, and what came before counts as constant.
        warm_restart: whether the next run begins at the last w, with Z = 0, in place of Phi_0(lam), with Z = d Phi_0.

    `value` is f_t(lam) = E(w_t, lam), `info["step"]` is t, and the carry an `InnerProgress`.
    Raises: `ValueError` if `every` does not divide T, or for a window outside 1, ..., `every`.
    Cost: forward: time about (m + 1) `every` steps, memory m + 1 states, whatever T is. With a window: that of
    `Truncated(every, window)`. One evaluation and one backward pass of `prepare` a hyperiteration, and forward m
    tangents of it.
    Reference: Franceschi et al. 2017 (ICML), Sec. 3.3 and Algorithm 2 (RTHO); Bridge paper 2017, Sec. 2.
    Do not use it with tasks drawn anew at each hyperiteration: it carries their w; nor forward for lam with many
    coordinates (a window costs the same whatever m is, but cuts the past off).

    >>> method = RealTime(steps=10_000, every=20)
    """

    steps: int | None
    every: int = 1
    window: int | None = None
    warm_restart: bool = False
    differentiates: ClassVar = "online"

    def __check_init__(self):
        check_steps(self.every, "every", 1)
        if self.steps is not None:
            check_steps(self.steps, lowest=1)
            if self.steps % self.every:
                raise ValueError(
                    f"{self.steps} steps are not a multiple of every={self.every}: the run would end between two "
                    "hyperiterations; change one of them"
                )
        if self.window is not None:
            check_steps(self.window, "window", 1)
            if self.window > self.every:
                raise ValueError(
                    f"window {self.window} is longer than the every={self.every} steps of a hyperiteration: what came "
                    f"before is constant; use at most {self.every}, a larger every, or window=None to carry tangents"
                )

    @property
    def remembers_tasks(self) -> bool:
        """The carry holds the inner variables of the data."""
        return True

    def init(self, problem: Problem, dynamics: Dynamics, lam: Lam, data: Data) -> InnerProgress:
        """The carry with t = 0 and s_0; the first call begins the run, so the tangents may be zero here."""
        state = initial_state(problem, dynamics, lam, problem.prepare(lam, data))
        t = jnp.asarray(0, jnp.int32)
        if self.window is not None:
            return InnerProgress(t, state)
        m = ravel_pytree(eqx.filter(lam, eqx.is_inexact_array))[0].size
        zeros = lambda leaf: jnp.zeros((m, *leaf.shape), leaf.dtype)
        return InnerProgress(t, state, jax.tree.map(zeros, eqx.filter(state, eqx.is_inexact_array)))

    def value(
        self, problem: Problem, dynamics: Dynamics, lam: Lam, data: Data, carry: InnerProgress
    ) -> tuple[Scalar, Outcome]:
        """f_t(lam) at the t of this call, with h_t as its derivative."""
        prepared = problem.prepare(lam, data)
        if self.window is None:
            live, after = self._pushed(problem, dynamics, lam, data, carry)
        else:
            live, after = self._windowed(problem, dynamics, lam, prepared, carry)
        value, metrics = problem.evaluate(live, lam, prepared)
        return value, Outcome(after.state, {"metrics": metrics, "step": after.t}, after)

    def reached(self, problem: Problem, dynamics: Dynamics, lam: Lam, data: Data) -> Scalar:
        """The value at the end of the first call, by plain steps."""
        window = self.every if self.window is None else self.window
        return Truncated(self.every, window).value(problem, dynamics, lam, data, ())[0]

    def _pushed(
        self, problem: Problem, dynamics: Dynamics, lam: Lam, data: Data, carry: InnerProgress
    ) -> tuple[Any, InnerProgress]:
        """(w_t + Z_t (lam - constant(lam)), the carry): a point with the derivative Z_t, and nothing behind it."""
        variables, constants = eqx.partition(lam, eqx.is_inexact_array)
        moving, _ = ravel_pytree(variables)
        centre, unravel = ravel_pytree(detach(variables))
        floats, rest = eqx.partition(carry.state, eqx.is_inexact_array)

        def run(floats: PyTree, flat: Array) -> tuple[PyTree, tuple[PyTree, Array]]:
            # `prepare` is inside: part of d Phi_t / d lam comes through it.
            lam = eqx.combine(unravel(flat), constants)
            prepared = problem.prepare(lam, data)
            state = eqx.combine(floats, rest)
            t, state = self._begin(problem, dynamics, lam, prepared, carry.t, state)
            state, _ = advance(problem, dynamics, state, lam, prepared, first=t + 1, steps=self.every)
            floats, others = eqx.partition(state, eqx.is_inexact_array)
            return floats, (others, t + self.every)

        def along(z: PyTree, direction: Array) -> tuple[Any, Any, Any]:
            floats_of_t, tangent, others = jax.jvp(run, (floats, centre), (z, direction), has_aux=True)
            return floats_of_t, tangent, others

        # The states do not depend on the direction: one run serves all m tangents, which travel with it.
        along_all = jax.vmap(along, out_axes=(None, 0, None))
        floats, tangents, (others, t) = along_all(carry.tangents, jnp.eye(centre.size, dtype=centre.dtype))
        state = eqx.combine(floats, others)
        change = moving - jax.lax.stop_gradient(moving)
        live = jax.tree.map(lambda w, z: w + jnp.tensordot(change, z, 1).astype(w.dtype), state.w, tangents.w)
        return live, InnerProgress(t, state, tangents)

    def _windowed(
        self, problem: Problem, dynamics: Dynamics, lam: Lam, prepared: Data, carry: InnerProgress
    ) -> tuple[Any, InnerProgress]:
        """(w_t, the carry), the last K steps differentiable."""
        assert self.window is not None
        cut = self.every - self.window
        before = (detach(lam), detach(prepared)) if cut else (lam, prepared)
        t, state = self._begin(problem, dynamics, *before, carry.t, carry.state)
        if cut:
            state, _ = advance(problem, dynamics, state, *before, first=t + 1, steps=cut)
            state = detach(state)
        state, _ = advance(problem, dynamics, state, lam, prepared, first=t + cut + 1, steps=self.window)
        return state.w, InnerProgress(t + self.every, detach(state))

    def _begin(
        self, problem: Problem, dynamics: Dynamics, lam: Lam, prepared: Data, t: Array, state: State
    ) -> tuple[Array, State]:
        """(t, s) that this call goes on from: the carried ones, or at t = 0 and t = T those of a new run."""

        def warm(state: State) -> State:
            new = dynamics.init(detach(state.w), lam)
            return jax.tree.map(lambda leaf, old: jax.lax.convert_element_type(leaf, old.dtype), new, state)

        same = lambda state: state
        ended = jnp.asarray(False) if self.steps is None else t == self.steps
        if self.warm_restart:
            state = jax.lax.cond(ended, warm, same, state)
        cold = (t == 0) if self.warm_restart else (t == 0) | ended
        state = jax.lax.cond(cold, lambda state: initial_state(problem, dynamics, lam, prepared), same, state)
        return jnp.where(ended, 0, t), state
