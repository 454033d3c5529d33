"""The abstract dynamics: how the inner problem is solved, one step at a time."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from hyperax.problem import Lam, Scalar, W

Gradient: TypeAlias = Callable[[W, Lam], W]
"""(w, lam) -> the gradient of the inner objective of this step with respect to w; of the methods an `InnerGradient`."""


@dataclass(frozen=True)
class InnerGradient:
    """The gradient of the inner objective of one step, and its value for the dynamics that use it.

        gradient(w, lam) = grad_w L(w, lam),   gradient.value_and_gradient(w, lam) = (L(w, lam), grad_w L(w, lam))

    Arguments:
        value_and_gradient: one evaluation of both. What of it is differentiated is the method's choice.

    Cost: the call is a gradient alone: compiled code leaves out a value that nothing reads.
    """

    value_and_gradient: Callable[[W, Lam], tuple[Scalar, W]]

    def __call__(self, w: W, lam: Lam) -> W:
        """The gradient at (w, lam)."""
        return self.value_and_gradient(w, lam)[1]


Step: TypeAlias = Int[Array, ""]

Setting: TypeAlias = float | PyTree | Callable[[Lam], Any] | Callable[[Lam, Step], Any]
"""A number, a pytree like w (one rate per parameter), or a function of lam, or of (lam, t), that returns either."""


class State(NamedTuple):
    """What the next step needs: the inner variables and the auxiliary ones: s = (w, v) in the Bridge paper, eq. 1.4."""

    w: W
    auxiliary: Any = ()


class Dynamics(eqx.Module):
    """How the inner problem is solved: s_0 = init(w_0, lam) and s_t = step(gradient, s_{t-1}, lam, t), t = 1, ..., T.

    The state s = (w, auxiliary variables) is a `State`. Both functions are pure, and lam is an argument: whatever of
    lam enters them (step size, momentum, betas) is differentiated. A dynamics never calls the objectives: it receives
    `gradient(w, lam)`, so a method decides what is differentiated through.

    Reference: Franceschi et al. 2018, eq. 6 and footnote 2; Bridge paper 2017, eq. 1.3-1.4.
    """

    @abstractmethod
    def init(self, w: W, lam: Lam) -> State:
        """The first state, from w_0 = Phi_0(lam)."""

    @abstractmethod
    def step(self, gradient: Gradient, state: State, lam: Lam, t: Step) -> State:
        """Phi_t: the state after step t, with t = 1 for the first step."""


def check_setting(name: str, setting: Setting, lowest: float = 0.0, below: float = float("inf")) -> None:
    """Raise a `ValueError` for a setting that no lam could make right; called when a dynamics is built."""
    if callable(setting):
        if arity(setting) not in (1, 2):
            raise ValueError(
                f"{name} is a function of {arity(setting)} arguments; it must be a number, a function of lam, "
                "or a function of (lam, t)"
            )
    elif isinstance(setting, int | float) and not lowest <= setting < below:
        limit = "" if below == float("inf") else f" and below {below:g}"
        raise ValueError(f"{name} is {setting:g}; it must be at least {lowest:g}{limit}")


def evaluate_setting(setting: Setting, lam: Lam, t: Step) -> PyTree:
    """The value of a setting at (lam, t)."""
    if not callable(setting):
        return setting
    function: Callable[..., Any] = setting
    return function(lam) if arity(function) == 1 else function(lam, t)


def depends_on_step(setting: Setting) -> bool:
    """Whether a setting is a function of (lam, t)."""
    return callable(setting) and arity(setting) == 2


def arity(function: Callable) -> int:
    """How many arguments must be given; optional ones are the function's own business."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # a built-in that does not say
        return 1
    return sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)


def scale(name: str, rate: PyTree, tree: W) -> W:
    """The tree times a rate: one number for all, or a pytree like w with one rate (or array of rates) a leaf."""
    shapes = lambda tree: [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]
    alike = jax.tree.structure(rate) == jax.tree.structure(tree)
    if alike and all(_fits(r, leaf) for r, leaf in zip(shapes(rate), shapes(tree), strict=True)):
        return jax.tree.map(lambda r, leaf: jnp.asarray(r * leaf, leaf.dtype), rate, tree)
    if jax.tree.structure(rate) != jax.tree.structure(0.0) or jnp.ndim(rate) != 0:
        raise ValueError(
            f"{name} must be a number or a pytree like w; it is {jax.tree.structure(rate)} of shapes "
            f"{shapes(rate)}, and w is {jax.tree.structure(tree)} of shapes {shapes(tree)}"
        )
    # A float64 rate must not promote a float32 w: w keeps its type from step to step.
    return jax.tree.map(lambda leaf: jnp.asarray(rate, leaf.dtype) * leaf, tree)


def _fits(shape: tuple[int, ...], into: tuple[int, ...]) -> bool:
    """Whether an array of this shape can be multiplied into an array of the other without changing its shape."""
    return len(shape) <= len(into) and all(a in (1, b) for a, b in zip(shape[::-1], into[::-1], strict=False))
