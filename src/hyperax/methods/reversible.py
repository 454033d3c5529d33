"""Reverse mode through an inner run that is run backwards, so that its states are not kept."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from hyperax.checks import reaching
from hyperax.dynamics.dynamics import Dynamics, State, evaluate_setting
from hyperax.dynamics.heavy_ball import HeavyBall
from hyperax.fixed_point import (
    as_factor,
    fits,
    in_range,
    lowest_numerator,
    multiply_add,
    products_per_word,
    subtract_divide,
    to_fixed,
    to_float,
    undo_rounds,
)
from hyperax.methods.method import Method, Outcome, detach, unrolled_value, with_gradient
from hyperax.problem import Data, Lam, Problem, Scalar, W
from hyperax.rollout import check_steps, initial_state

LOWEST = 1 / 64
"""The least momentum: it forgets six bits a number and step, and a word is full after ten steps."""


class Reversible(Method):
    """The exact gradient of f_T for `HeavyBall`, by running its T steps backwards, bit for bit, in fixed point.

        forward:   M <- mu_t M + round(2^S g_t),    W <- W - round(2^S eta_t m_t),    w = 2^-S W,  m = 2^-S M
        backward:  W <- W + round(2^S eta_t m_t),   M <- (M - round(2^S g_t)) / mu_t,
                   grad f_T += (d Phi_t / d lam)^T alpha_t,   alpha_{t-1} = (d Phi_t / d s)^T alpha_t   at s = (w, m)

    with g_t = grad L(w_{t-1}, lam). What a step forgets is the bits that the product by mu < 1 shifts out; they go
    into 64-bit words, a new one for each number every J steps. Rounding counts as the identity of the derivative, so
    the gradient is that of `Reverse` but for rounding: a step moves m by up to 256 units of 2^-S, 4e-12 at S = 46.

    Arguments:
        steps: T >= 0.
        fraction_bits: S, from 8 to 52. |w|, |m|, |g| and |eta m| must stay below 2^(61 - S), 32768 at S = 46.
        lowest_momentum: a lower bound of mu_t, in [1/64, 1), from which J follows. A momentum that is a number is its
            own bound; one that is a function, or holds arrays, needs this one: the nearer, the fewer words.

    `info` has `returned` (whether the way back ended at the integers of w_0 and m_0 = 0, with the words used up),
    `overflowed` (a number was too large, or not finite), `momentum_out_of_range` (some mu_t was below lowest_momentum,
    or not below 1) and `buffer_words` (how many for each number of w). Value and gradient are NaN unless it returned,
    without overflow and with every momentum in range: nothing is silently wrong.

    Raises: `ValueError` without 64-bit integers (`jax_enable_x64`), for other dynamics than `HeavyBall`, for a momentum
    below 1/64, or arguments outside their ranges.
    Cost: time 1.5 to 2 times that of `Reverse`: two more gradients a step. Memory a few states, the derivative of one
    step, and ceil(T / J) words for each number of w: J = 340 at momentum 0.9, which is 0.19 bits a step (1.1 at 0.5,
    0.022 at 0.99) where a float64 w and m take 128. It is proportional to T: a step forgets log2(1 / mu) bits (0.15,
    1 and 0.0145), and whoever undoes it, step by step, must have kept them.
    On a GPU whose sums come in random order (scatters) the gradient may change on the way back: `returned` says so.
    Reference: Maclaurin, Duvenaud and Adams 2015, Sec. 2-3, Algorithms 2 and 3.
    Do not use it for few steps (`Reverse` is faster), nor where the past is forgotten at once (gradient descent,
    momentum near 0): `Reverse(memory=...)` bounds the memory of every dynamics.

    >>> method = Reversible(steps=10_000)
    >>> scheduled = Reversible(steps=10_000, lowest_momentum=0.8)
    """

    differentiates: ClassVar = "f_T"

    steps: int
    fraction_bits: int = 46
    lowest_momentum: float = 0.5

    def __check_init__(self):
        check_steps(self.steps)
        check_steps(self.fraction_bits, "fraction_bits", 8)
        if self.fraction_bits > 52:
            raise ValueError(f"fraction_bits is {self.fraction_bits}; use at most 52: the rest is the range")
        if not LOWEST <= self.lowest_momentum < 1:
            raise ValueError(
                f"lowest_momentum is {self.lowest_momentum!r}; it must be at least 1/64 and below 1: a smaller "
                'momentum forgets too many bits to keep them; for that use Reverse(steps, segment="sqrt")'
            )

    def check(self, problem: Problem, dynamics: Dynamics, lam: Lam, data: Data) -> None:
        """Refuse other dynamics, momenta near 0, and 32-bit integers."""
        if type(dynamics) is not HeavyBall:  # a subclass may step otherwise
            raise ValueError(
                f"Reversible with {type(dynamics).__name__}: only HeavyBall can be run backwards, because its velocity "
                f"keeps what a step forgets; {_ALTERNATIVE}"
            )
        if self._lowest(dynamics) < LOWEST:
            raise ValueError(
                f"Reversible with momentum {self._lowest(dynamics):g}: below 1/64 a step forgets too many bits to keep "
                f"them; {_ALTERNATIVE}"
            )
        if jnp.result_type(int) != jnp.int64:
            raise ValueError(
                'Reversible needs 64-bit integers (w may stay float32): call jax.config.update("jax_enable_x64", True) '
                f"before any array is made; or {_ALTERNATIVE}"
            )

    def reached(self, problem: Problem, dynamics: Dynamics, lam: Lam, data: Data) -> Scalar:
        """The unrolled value: the paths are those of `Reverse`."""
        return unrolled_value(problem, dynamics, self.steps, lam, data, ())[0]

    def value(self, problem: Problem, dynamics: Dynamics, lam: Lam, data: Data, carry: Any) -> tuple[Scalar, Outcome]:
        """f_T(lam), with the gradient that the way back found."""
        self.check(problem, dynamics, lam, data)
        assert isinstance(dynamics, HeavyBall)
        prepared = problem.prepare(lam, data)
        start = initial_state(problem, dynamics, lam, prepared)
        if self.steps == 0:
            value, metrics = problem.evaluate(start.w, lam, prepared)
            return value, Outcome(start, {"metrics": metrics, **_nothing_done()}, carry)
        depending = eqx.filter(prepared, _depends_on_lam(problem, lam, data))
        lowest = lowest_numerator(self._lowest(dynamics))
        at = detach(lam), detach(prepared), detach(depending)
        found = _Run(problem, dynamics, at, self.steps, self.fraction_bits, lowest).there_and_back(detach(start))

        value, metrics = problem.evaluate(found.last.w, lam, prepared)
        known = found.valid & found.info["returned"]
        slopes = jax.tree.map(lambda x: jnp.where(known, x, jnp.nan), (found.of_start, *found.of_rest))
        value = with_gradient(jnp.where(known, value, jnp.nan), (start.w, lam, depending), slopes)
        return value, Outcome(found.last, {"metrics": metrics, **found.info}, carry)

    def _lowest(self, dynamics: HeavyBall) -> float:
        """A lower bound of mu_t that does not depend on lam."""
        numbers = [self.lowest_momentum] if callable(dynamics.momentum) else jax.tree.leaves(dynamics.momentum)
        return float(min(numbers)) if all(isinstance(mu, int | float) for mu in numbers) else self.lowest_momentum


_ALTERNATIVE = 'use Reverse(steps, segment="sqrt") or Reverse(steps, memory="2GiB")'


def _nothing_done() -> dict[str, jax.Array]:
    no = jnp.asarray(False)
    return {"returned": ~no, "overflowed": no, "momentum_out_of_range": no, "buffer_words": jnp.asarray(0, jnp.int32)}


class _Found(NamedTuple):
    """What a run there and back gives: s_T, the gradients by w_0 and by (lam, D), and whether to believe them."""

    last: State
    of_start: W
    of_rest: Any
    valid: jax.Array
    info: dict[str, jax.Array]


class _Adjoint(NamedTuple):
    """alpha_t, the gradient of f_T by s_t; the sums of the gradients by (lam, D); s_T."""

    alpha: State
    gradient: Any
    last: State


class _Loop(NamedTuple):
    """What goes through the loop: the integers W, M, G = round(2^S g) and the words; eta_t and mu_t; the adjoint."""

    W: W
    M: W
    G: W
    words: W
    eta: W
    factor: W
    adjoint: _Adjoint
    overflowed: jax.Array
    out_of_range: jax.Array


class _Run(eqx.Module):
    """T steps there and T steps back in one loop of 2 T + 1 turns.

    The way back must find the very bits of g_t that the way there rounded. Two loops would be two programs, which a
    compiler is free to round differently (fused multiply-adds, another order of a sum). So g_t is computed in one
    place, whichever way the loop goes, and reaches its uses through the loop's carry, and so do the settings. Between
    the carry and the rounding there are single products only, which leave a compiler no choice.

    Turn 0 finds g_1. Turn k = 1, ..., T makes step k and finds g_{k+1}; turn T starts the adjoint at w_T, and leaves W
    at w_{T-1}. Turn k = T + 1, ..., 2 T undoes step t = 2 T + 1 - k and finds g_{t-1}.
    """

    problem: Problem
    dynamics: HeavyBall
    at: tuple[Lam, Data, Data]
    """lam, D, and what of D depends on lam."""
    steps: int
    bits: int
    lowest: int
    """The least numerator n of a momentum."""

    def there_and_back(self, start: State) -> _Found:
        """s_T from s_0, and the gradients from the way back."""
        count = -(-self.steps // products_per_word(self.lowest))
        W = jax.tree.map(lambda w: to_fixed(w, self.bits), start.w)
        zero = jax.tree.map(jnp.zeros_like, W)
        words = jax.tree.map(lambda w: jnp.zeros((count, *w.shape), jnp.int64), W)
        lam, _, depending = self.at
        floats = eqx.filter((lam, depending), eqx.is_inexact_array)
        adjoint = jax.tree.map(jnp.zeros_like, _Adjoint(start, floats, start))
        eta, factor, out_of_range = self._settings(jnp.asarray(1), start.w)
        loop = _Loop(W, zero, zero, words, eta, factor, adjoint, jnp.asarray(False), out_of_range)
        end = jax.lax.fori_loop(0, 2 * self.steps + 1, lambda k, loop: self._turn(k, loop), loop)
        info = {
            "returned": _all(lambda a, b: a == b, (end.W, end.M, end.words), (W, zero, words)),
            "overflowed": end.overflowed,
            "momentum_out_of_range": end.out_of_range,
            "buffer_words": jnp.asarray(count, jnp.int32),
        }
        valid = ~(end.overflowed | end.out_of_range)
        return _Found(end.adjoint.last, end.adjoint.alpha.w, end.adjoint.gradient, valid, info)

    def _turn(self, k: jax.Array, loop: _Loop) -> _Loop:
        t, T = self._step_of(k), self.steps
        word = (t - 1) // products_per_word(self.lowest)
        buffer = jax.tree.map(lambda words: words[word], loop.words)
        undo = partial(subtract_divide, rounds=undo_rounds(self.lowest))
        M, buffer = jax.lax.cond(k <= T, multiply_add, undo, loop.M, buffer, loop.G, loop.factor)
        words = jax.tree.map(lambda words, i: words.at[word].set(i), loop.words, buffer)

        like = loop.adjoint.last.w
        m = self._floats(M, like)
        A = jax.tree.map(lambda eta, m: to_fixed(jnp.asarray(eta * m, m.dtype), self.bits), loop.eta, m)
        w = self._floats(loop.W, like)
        last = State(self._floats(jax.tree.map(jnp.subtract, loop.W, A), like), m)
        ways = (
            lambda adjoint, *_: adjoint,
            lambda adjoint, before, last, t: self._begin(adjoint, last),
            lambda adjoint, before, last, t: self._backward(adjoint, before, t),
        )
        way = jnp.sign(k - T) + 1
        adjoint = jax.lax.switch(way, ways, loop.adjoint, State(w, m), last, t)

        # w_t = w_{t-1} - eta m_t on the way there, w_{t-2} = w_{t-1} + eta m_{t-1} back; at the turn W stays.
        W = jax.tree.map(lambda W, A: W + (way - 1) * A, loop.W, A)
        following, (lam, prepared, _) = self._step_of(k + 1), self.at
        g = jax.grad(self.problem.objective(prepared, following))(self._floats(W, like), lam)
        G = jax.tree.map(lambda g: to_fixed(g, self.bits), g)
        # On the way back W moves by the step before the one whose momentum is undone.
        eta = self._settings(jnp.maximum(following - (k >= T), 1), like)[0]
        _, factor, out_of_range = self._settings(following, like)
        overflowed = loop.overflowed | ~_all(fits, (W, M, G, A))
        return _Loop(W, M, G, words, eta, factor, adjoint, overflowed, loop.out_of_range | out_of_range)

    def _step_of(self, k: jax.Array) -> jax.Array:
        """The step t that turn k makes or undoes; within 1, ..., T, for the settings and batches of the ends."""
        t = jnp.where(k <= self.steps, k, 2 * self.steps + 1 - k)
        return jnp.clip(t, 1, self.steps).astype(jnp.result_type(int))

    def _begin(self, adjoint: _Adjoint, last: State) -> _Adjoint:
        """alpha_T = grad_w E; what E has of lam and D directly is left in place."""
        lam, prepared, _ = self.at
        of_w = jax.grad(lambda w: self.problem.evaluate(w, lam, prepared)[0])(last.w)
        return adjoint._replace(alpha=adjoint.alpha._replace(w=of_w), last=last)

    def _backward(self, adjoint: _Adjoint, state: State, t: jax.Array) -> _Adjoint:
        """alpha_{t-1} = (d Phi_t / d s)^T alpha_t, and (d Phi_t / d (lam, D))^T alpha_t to the sums."""
        lam, prepared, depending = self.at
        floats, rest = eqx.partition((lam, depending), eqx.is_inexact_array)

        def step(state: State, floats: Any) -> State:
            lam, depending = eqx.combine(floats, rest)
            objective = self.problem.objective(eqx.combine(depending, prepared), t)
            return self.dynamics.step(jax.grad(objective), state, lam, t)

        alpha, gradient = jax.vjp(step, state, floats)[1](adjoint.alpha)
        return adjoint._replace(alpha=alpha, gradient=jax.tree.map(jnp.add, adjoint.gradient, gradient))

    def _settings(self, t: jax.Array, like: W) -> tuple[W, W, jax.Array]:
        """eta_t, and mu_t as factors, each a tree like w; and whether some mu_t is out of range."""
        eta = _spread(evaluate_setting(self.dynamics.step_size, self.at[0], t), like)
        mu = _spread(evaluate_setting(self.dynamics.momentum, self.at[0], t), like)
        return eta, jax.tree.map(as_factor, mu), ~_all(lambda mu: in_range(mu, self.lowest), mu)

    def _floats(self, integers: W, like: W) -> W:
        return jax.tree.map(lambda X, x: to_float(X, self.bits, x.dtype), integers, like)


def _all(holds: Callable, *trees: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(x) for x in jax.tree.leaves(jax.tree.map(holds, *trees))]))


def _spread(rate: Any, like: W) -> W:
    """A rate for each leaf of w, with the type that `scale` multiplies in."""
    if jax.tree.structure(rate) != jax.tree.structure(like):
        return jax.tree.map(lambda leaf: jnp.asarray(rate, leaf.dtype), like)
    return jax.tree.map(lambda r, leaf: jnp.asarray(r, jnp.result_type(r, leaf)), rate, like)


def _depends_on_lam(problem: Problem, lam: Lam, data: Data) -> Any:
    """For each leaf of D = prepare(lam, data) whether it is a float that lam reaches: only those need a gradient.

    Read from the trace of the backward pass, because a function with a derivative of its own (rounding, with the
    derivative of the identity) may depend on lam where its value's trace shows no differentiable path.
    """
    variables, constants = eqx.partition(lam, eqx.is_inexact_array)
    prepared = problem.prepare(lam, data)

    def backward(cotangents: list[jax.Array]) -> Any:
        floats = lambda x: jax.tree.leaves(
            eqx.filter(problem.prepare(eqx.combine(x, constants), data), eqx.is_inexact_array)
        )
        return jax.vjp(floats, variables)[1](cotangents)

    jaxpr = jax.make_jaxpr(backward)(jax.tree.leaves(eqx.filter(prepared, eqx.is_inexact_array))).jaxpr
    reached = set().union(*reaching(jaxpr, [{i} for i in range(len(jaxpr.invars))]))
    numbers = iter(range(len(jaxpr.invars)))
    return jax.tree.map(lambda leaf: eqx.is_inexact_array(leaf) and next(numbers) in reached, prepared)
