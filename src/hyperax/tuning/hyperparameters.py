"""What `tune` learns: values with the set they live in, and schedules made of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PyTree

from hyperax.constraints import Box, Constraint, Logarithmic
from hyperax.free_variables import resolve
from hyperax.problem import Lam


class Hyperparameter(eqx.Module):
    """A leaf of the `hyperparameters` of `tune`: where it starts, and the set that it stays in.

        h = forward(u),   h_0 = value   (the optimizer moves u: see `Constraint`)

    Arguments:
        value: a number or an array, in the units in which the loss and the optimizer use it.
        constraint: any set: `Logarithmic()`, `Box(low, high)`, `Positive()`, `Projected(...)`, ...

    Raises: `ValueError` for a value outside the set, or one that is not finite.
    Cost: none to speak of.
    Do not use it for what may be any number: a plain array or float is a free leaf.

    >>> from hyperax.constraints import Positive
    >>> Hyperparameter(0.5, Positive()).value
    0.5
    """

    value: ArrayLike
    constraint: Constraint

    def __check_init__(self) -> None:
        if not isinstance(self.constraint, Constraint):
            raise ValueError(f"constraint is {self.constraint!r}; use a set, such as Logarithmic() or Box(low, high)")
        try:
            value = jnp.asarray(np.asarray(self.value, float))
        except (TypeError, ValueError):
            raise ValueError(f"value is {self.value!r}; a hyperparameter is a number or an array of numbers") from None
        if not np.isfinite(np.asarray(value)).all():
            raise ValueError(f"value is {self.value!r}; a hyperparameter starts at a finite number")
        try:
            resolve(self.constraint, value)
        except ValueError as error:
            raise ValueError(str(error).replace("lam", "value", 1)) from None


def log_scale(value: ArrayLike) -> Hyperparameter:
    """A positive hyperparameter moved on a logarithmic scale (weight decays, loss weights, temperatures).

        h = exp(u),   so an outer step of 0.05 in u changes h by 5 %

    Arguments:
        value: > 0, a number or an array.

    Returns: a leaf for the `hyperparameters` of `tune`.
    Raises: `ValueError` for a value that is not positive.
    Cost: none to speak of.
    Do not use it for a step size without an eye on it: nothing keeps it below the edge of stability, where the
    hypergradient explodes. `logit_scale(0.1, high=1.0)` does.

    >>> log_scale(1e-4).constraint
    Logarithmic()
    """
    return Hyperparameter(value, Logarithmic())


def logit_scale(value: ArrayLike, *, low: float = 0.0, high: float = 1.0) -> Hyperparameter:
    """A hyperparameter between two bounds, moved on a logit scale (momentum, label smoothing, bounded step sizes).

        h = low + (high - low) sigmoid(u);   near low, h - low moves as exp(u) does, and so does high - h near high

    Arguments:
        value: strictly between the bounds, a number or an array.
        low, high: the bounds, in the units of h.

    Returns: a leaf for the `hyperparameters` of `tune`.
    Raises: `ValueError` for a value outside the bounds, or low >= high.
    Cost: none to speak of.
    Do not use it where the best value is a bound: it is approached ever more slowly. Use
    `Hyperparameter(value, Projected(Box(low, high)))` there.

    >>> logit_scale([0.1, 0.1], high=0.5).constraint
    Box(low=0.0, high=0.5)
    """
    return Hyperparameter(value, Box(low, high))


def piecewise_schedule(knots: Float[ArrayLike, " K"], steps: int) -> Callable[[Any], Float[Array, ""]]:
    """An Optax schedule through K values, evenly spaced over the training steps, linear between them.

        s(t) = sum over k of max(0, 1 - |p_t - k|) knots_k,   p_t = (K - 1) min(t / (T - 1), 1),   t = 0, ..., T - 1

    Arguments:
        knots: the value at the first step, ..., at the last; one knot is a constant. It may be traced: part of h.
        steps: T.

    Returns: count -> value. `optax.sgd` and others take it as learning rate; for a momentum wrap the optimizer,
    `optax.inject_hyperparams(optax.sgd)(learning_rate=..., momentum=piecewise_schedule(h["momentum"], T))`.
    Raises: `ValueError` unless knots has one axis and steps >= 1.
    Cost: K multiplications a step.
    Reference: Maclaurin et al. 2015, Sec. 3.1 (a learned step size for each training step; here K of them).
    Do not use one knot a step for long runs: neighbours then differ by noise, and little is learned about each.

    >>> schedule = piecewise_schedule([0.0, 1.0, 0.0], steps=5)
    >>> [float(schedule(t)) for t in range(6)]
    [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]
    """
    values = _floats(knots)
    if values.ndim != 1 or not values.size or steps < 1:
        raise ValueError(
            f"a schedule needs knots of shape [K] and at least one step; it got shape {list(values.shape)} and {steps}"
        )

    def schedule(count: Any) -> Float[Array, ""]:
        position = (values.size - 1) * jnp.minimum(count / max(steps - 1, 1), 1.0)
        weights = jnp.maximum(0.0, 1.0 - jnp.abs(position - jnp.arange(values.size)))
        return weights.astype(values.dtype) @ values

    return schedule


def _floats(value: ArrayLike) -> Array:
    """An array of floats: whole numbers are converted, and the types of arrays are kept."""
    value = jnp.asarray(value)
    return value if jnp.issubdtype(value.dtype, jnp.floating) else value.astype(float)


def _is_hyperparameter(node: Any) -> bool:
    return isinstance(node, Hyperparameter)


def values_of(hyperparameters: PyTree) -> Lam:
    """The values alone: what the losses and the optimizer see."""
    value = lambda node: _floats(node.value) if _is_hyperparameter(node) else node
    return jax.tree.map(value, hyperparameters, is_leaf=_is_hyperparameter)


def sets_of(hyperparameters: PyTree) -> PyTree:
    """The sets alone, `None` where a leaf is free: the `constraint` of `minimize`."""
    constraint = lambda node: node.constraint if _is_hyperparameter(node) else None
    return jax.tree.map(constraint, hyperparameters, is_leaf=_is_hyperparameter)
