"""Exact gradients in O(log T) where the inner objective is quadratic in w."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array

from hyperax.dynamics.dynamics import Dynamics, Setting, State, depends_on_step, evaluate_setting, scale
from hyperax.dynamics.gradient_descent import GradientDescent
from hyperax.dynamics.heavy_ball import HeavyBall
from hyperax.matrix_powers import Matrix, Rows, cheapest, geometric_sum, recurrence, square_of_symmetric
from hyperax.methods.method import Method, Outcome
from hyperax.problem import Data, Lam, Problem, Scalar, W
from hyperax.quadratic import column_axis, why_not_quadratic
from hyperax.rollout import check_steps, exact_gradient, initial_state

LARGEST_SIDE = 8192
"""Of the matrix of the inner problem: half a GiB in float64, and several of them are kept for the backward pass."""


class Layout(NamedTuple):
    """How w is written as a matrix of p rows and c columns, all of which the Hessian treats alike.

    Fields:
        axis: of every leaf, the one that runs over columns; `None`: a single column of all d entries.
        size: p, the side of the Hessian H_0.
        columns: c.
    """

    axis: int | None
    size: int
    columns: int

    def rows(self, w: W) -> Rows:
        """The leaves of w below each other."""
        return jnp.concatenate([self._rows(leaf) for leaf in jax.tree.leaves(w)])

    def _rows(self, leaf: Array) -> Rows:
        return leaf.reshape(-1, 1) if self.axis is None else jnp.moveaxis(leaf, self.axis, -1).reshape(-1, self.columns)

    def unrows(self, rows: Rows, like: W) -> W:
        """The inverse of `rows`: a pytree with the shapes and types of `like`."""
        leaves, structure = jax.tree.flatten(like)
        parts, start = [], 0
        for leaf in leaves:
            part = rows[start : start + leaf.size // self.columns]
            start += len(part)
            if self.axis is not None:
                shape = list(leaf.shape)
                shape.append(shape.pop(self.axis))
                part = jnp.moveaxis(part.reshape(shape), -1, self.axis)
            parts.append(part.reshape(leaf.shape).astype(leaf.dtype))
        return jax.tree.unflatten(structure, parts)


class Doubling(Method):
    """The exact gradient of f_T in O(log T) where L is quadratic in w, so that all steps are one affine map.

        w_T = w_0 - eta (I + M + ... + M^(T-1)) grad L(w_0),   M = I - eta H,   H = the Hessian of L,
        I + ... + M^(2N-1) = (I + M^N)(I + ... + M^(N-1)),   M^(2N) = M^N M^N

    With momentum mu, m_{t+1} = V m_t - mu m_{t-1} with V = (1 + mu) I - eta H, so m_{t+2N} = V_N m_{t+N} - mu^N m_t
    and V_{2N} = V_N V_N - 2 mu^N I.

    Arguments:
        steps: T >= 0.

    Where w is a matrix (p, c), or a pytree of arrays that share their last (or first) axis of length c, and the trace
    shows that the Hessian acts on all c columns alike, H = H_0 (x) I_c, only H_0 (p x p) is formed, from
    ceil(p / c) Hessian-vector products: least squares with c outputs, one rate for all of them. Otherwise the whole
    d x d matrix is. `info["doubling"]` has `size` (the side of the matrix that is squared), `columns` (c; 1 for the
    whole matrix) and `squarings`.

    Raises: `ValueError` if the trace does not show that L is quadratic in w, if the dynamics is not `GradientDescent`
    or `HeavyBall`, if their settings depend on t, if the problem has a `batch`, or if the side p (d without such
    columns) is over 8192.
    Cost: about 3 (log2 T) products of p x p matrices, one third of them to get the value, and ceil(p / c)
    Hessian-vector products; memory log2 T such matrices. Momentum with one number per parameter doubles p.
    Reference: Franceschi et al. 2018, eq. 5-6 and Example 3.4; the Lucas sequences for the momentum.
    Do not use it where T is below ceil(p / c), such as for a vector w with a dense Hessian and few steps: `Reverse`
    is cheaper there; nor where f_T has converged to f and w_lam is a formula: `ClosedForm`.

    >>> import jax.numpy as jnp
    >>> from hyperax import GradientDescent, Problem, hypergradient
    >>> problem = Problem(
    ...     inner=lambda w, lam, d: jnp.sum((d["x"] @ w - d["y"]) ** 2) + lam * jnp.sum(w**2),
    ...     outer=lambda w, lam, d: jnp.sum(w**2),
    ...     init=lambda lam, d: jnp.zeros((2, 3)),
    ... )
    >>> data = {"x": jnp.array([[1.0, 0.0], [0.0, 3.0]]), "y": jnp.ones((2, 3))}
    >>> h = hypergradient(problem, GradientDescent(0.05), Doubling(steps=1000))(jnp.asarray(1.0), data)
    >>> print(f"{h.value:.3f} {h.grad:.3f}", h.info["doubling"]["size"], h.info["doubling"]["columns"])
    1.020 -0.804 2 3
    """

    differentiates: ClassVar = "f_T"

    steps: int

    def __check_init__(self):
        check_steps(self.steps)

    def value(self, problem: Problem, dynamics: Dynamics, lam: Lam, data: Data, carry: Any) -> tuple[Scalar, Outcome]:
        """f_T(lam), with every dependence on lam left in place."""
        prepared = problem.prepare(lam, data)
        state = initial_state(problem, dynamics, lam, prepared)
        gradient = _gradient(problem, lam, prepared)
        layout = layout_of(gradient, dynamics, state.w, lam)
        state, size, squarings = run(gradient, dynamics, layout, state, lam, self.steps)
        value, metrics = problem.evaluate(state.w, lam, prepared)
        sizes = {"size": size, "columns": layout.columns, "squarings": squarings}
        info = {"metrics": metrics, "doubling": {name: jnp.asarray(n, jnp.int32) for name, n in sizes.items()}}
        return value, Outcome(state, info, carry)

    def check(self, problem: Problem, dynamics: Dynamics, lam: Lam, data: Data) -> None:
        """Raise `ValueError` unless all steps are the same affine map, of a size that fits."""
        instead = f"use Reverse(steps={self.steps}, memory=...)"
        if problem.batch is not None:
            raise ValueError(
                f"Doubling needs the same map at every step, and the mini-batches (batch) change it: {instead}"
            )
        if type(dynamics) not in (GradientDescent, HeavyBall):  # a subclass may step otherwise
            raise ValueError(
                f"Doubling needs the dynamics to be GradientDescent or HeavyBall, whose steps are affine in w; "
                f"{type(dynamics).__name__} is not one of them: {instead}"
            )
        for name, setting in _settings(dynamics).items():
            if depends_on_step(setting):
                raise ValueError(
                    f"Doubling needs the same map at every step, and {name} is a function of (lam, t): let it be a "
                    f"function of lam alone, or {instead}"
                )

        def read(lam: Lam, data: Data) -> None:
            prepared = problem.prepare(lam, data)
            state = initial_state(problem, dynamics, lam, prepared)
            objective = problem.objective(prepared, 1)
            reason = why_not_quadratic(lambda w: objective(w, lam), state.w)
            if reason is not None:
                raise ValueError(
                    "Doubling needs an inner objective that is quadratic in w, as the trace shows it; this one applies "
                    f"`{reason}` to what depends on w, which cross-entropy does, for one, and least squares does not "
                    f"(write a square as x**2, with a whole number): {instead}"
                )
            layout = layout_of(_gradient(problem, lam, prepared), dynamics, state.w, lam)
            if layout.size > LARGEST_SIDE:
                raise ValueError(
                    f"Doubling would square matrices of side {layout.size}, over its limit of {LARGEST_SIDE} (columns "
                    f"of w that the trace shows to be treated alike: {layout.columns}): {instead}"
                )

        eqx.filter_eval_shape(read, lam, data)


def _gradient(problem: Problem, lam: Lam, prepared: Data) -> Callable[[W], W]:
    gradient = exact_gradient(problem.objective(prepared, 1))
    return lambda w: gradient(w, lam)


def _settings(dynamics: Dynamics) -> dict[str, Setting]:
    names = ("step_size", "momentum") if isinstance(dynamics, HeavyBall) else ("step_size",)
    return {name: getattr(dynamics, name) for name in names}


def layout_of(gradient: Callable[[W], W], dynamics: Dynamics, w: W, lam: Lam) -> Layout:
    """The columns that the Hessian and the settings of the dynamics treat alike, read from a trace."""

    def linear(v: W) -> list[W]:
        scaled = [scale(name, evaluate_setting(s, lam, jnp.asarray(1)), v) for name, s in _settings(dynamics).items()]
        return [jax.jvp(gradient, (w,), (v,))[1], *scaled]

    entries = sum(leaf.size for leaf in jax.tree.leaves(w))
    axis = column_axis(linear, w)
    columns = 1 if axis is None else jax.tree.leaves(w)[0].shape[axis]
    return Layout(axis, entries // columns, columns)


def _rate(name: str, setting: Setting, lam: Lam, layout: Layout, w: W) -> Array:
    """A setting as one number, or as one for each row (p, 1)."""
    rate = evaluate_setting(setting, lam, jnp.asarray(1))
    rows = layout.rows(scale(name, rate, jax.tree.map(jnp.ones_like, w)))[:, :1]
    alone = jax.tree.structure(rate) == jax.tree.structure(0.0) and jnp.ndim(rate) == 0
    return jnp.asarray(rate, rows.dtype) if alone else rows


def hessian(product: Callable[[W], W], layout: Layout, like: W) -> Matrix:
    """H_0 from ceil(p / c) Hessian-vector products: the columns of v are unit vectors, c of them at a time."""
    p, c = layout.size, layout.columns
    count = ceil(p / c)
    dtype = jnp.result_type(*jax.tree.leaves(like))
    units = jnp.moveaxis(jnp.eye(p, count * c, dtype=dtype).reshape(p, count, c), 1, 0)
    of_units = lambda v: layout.rows(product(layout.unrows(v, like)))
    blocks = of_units(units[0])[None] if count == 1 else jax.vmap(of_units)(units)
    return jnp.moveaxis(blocks, 0, 1).reshape(p, count * c)[:, :p]


def run(
    gradient: Callable[[W], W], dynamics: Dynamics, layout: Layout, state: State, lam: Lam, steps: int
) -> tuple[State, int, int]:
    """(the state after T steps, the side of the matrix that was squared, how often it was)."""
    w0 = state.w
    if steps == 0:
        return state, layout.size, 0
    slope, product = jax.linearize(gradient, w0)
    g, H = layout.rows(slope), hessian(product, layout, w0)

    rates = [_rate(name, setting, lam, layout, w0) for name, setting in _settings(dynamics).items()]
    eta, mu = (*rates, jnp.zeros((), g.dtype))[:2]
    # m_t follows I - H diag(eta), in which one eta for all leaves a symmetric matrix.
    square = square_of_symmetric if eta.ndim == 0 else lambda M: M @ M
    one = jnp.eye(layout.size, dtype=g.dtype)
    if mu.ndim:
        squarings = cheapest(steps, 2 * layout.size, layout.columns)
        K = jnp.block([[one - eta * H, -eta * mu * one], [H, mu * one]])  # (w, m) at t to (w, m) at t + 1
        moved = geometric_sum(K, jnp.concatenate([-eta * g, g]), steps, squarings, lambda M: M @ M)
        descent, m = -moved[: layout.size], moved[layout.size :]
        size = 2 * layout.size
    elif isinstance(dynamics, HeavyBall):
        squarings, size = cheapest(steps, layout.size, 2 * layout.columns), layout.size
        total, m = recurrence((1 + mu) * one - H * eta.T, mu, g, steps, squarings, square)
        descent = eta * total
    else:
        squarings, size = cheapest(steps, layout.size, layout.columns), layout.size
        m, descent = None, eta * geometric_sum(one - H * eta.T, g, steps, squarings, square)
    w = jax.tree.map(lambda a, b: a - b, w0, layout.unrows(descent, w0))
    return State(w, state.auxiliary if m is None else layout.unrows(m, w0)), size, squarings
