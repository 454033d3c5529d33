"""The abstract update rule: what a learned optimizer computes from a gradient and its memory."""

from __future__ import annotations

from abc import abstractmethod
from itertools import accumulate
from typing import Any, ClassVar, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from hyperax.dynamics.dynamics import Step
from hyperax.problem import Scalar, W

Tree = TypeVar("Tree")


class Inputs(NamedTuple):
    """What an update rule sees of the inner problem at step t.

    Fields:
        w: w_{t-1}.
        gradient: g_t = grad_w L(w_{t-1}, lam), a pytree like w. Whether it has a derivative is the method's choice.
        value: L(w_{t-1}, lam) for rules with `uses_value`, `None` for the others.
    """

    w: W
    gradient: W
    value: Scalar | None = None


class UpdateRule(eqx.Module):
    """An optimizer with parameters: (u_t, memory_t) = update(inputs_t, memory_{t-1}, t), memory_0 = init(w_0).

    `LearnedOptimizer` adds u_t to w_{t-1}. The arrays of the module are the parameters, part of lam; what is not an
    array is a setting. A rule that shares its parameters between the coordinates fits inner variables of any shapes.

    Reference: Andrychowicz et al. 2016, eq. 1-2; Bridge paper 2017, Sec. 3.
    """

    uses_value: ClassVar[bool] = False
    """Whether `Inputs.value` is read."""

    @abstractmethod
    def init(self, w: W) -> Any:
        """The first memory, a pytree of arrays; `()` for a rule without memory."""

    @abstractmethod
    def update(self, inputs: Inputs, memory: Any, t: Step) -> tuple[W, Any]:
        """(u_t, a pytree like w with its shapes and types; the next memory, of the shapes and types of this one)."""


def ravelled(tree: W) -> Float[Array, " d"]:
    """All coordinates of a tree, leaf after leaf, in one vector of the type that holds them all."""
    return ravel_pytree(tree)[0]


def like(w: W, flat: Float[Array, " d"]) -> W:
    """The tree like w with these coordinates."""
    return ravel_pytree(w)[1](flat)


def in_type(parameters: Tree, dtype: Any) -> Tree:
    """The parameters of a rule in the type of w: a float64 lam must not promote a float32 w."""
    return jax.tree.map(lambda x: x.astype(dtype) if eqx.is_inexact_array(x) else x, parameters)


def random_matrix(key: Array, outputs: int, inputs: int, size: float = 1.0) -> Float[Array, "outputs inputs"]:
    """Normal entries of variance size^2 / inputs, in JAX's default type."""
    return jax.random.normal(key, (outputs, inputs)) * (size / jnp.sqrt(inputs))


def leaf_sizes(w: W) -> list[int]:
    """How many coordinates each leaf has."""
    return [leaf.size for leaf in jax.tree.leaves(w)]


def mean_of_leaves(w: W, x: Float[Array, "d features"]) -> Float[Array, "leaves features"]:
    """The mean over the coordinates of each leaf of w, of numbers that each coordinate has; 0 for an empty leaf."""
    parts = jnp.split(x, list(accumulate(leaf_sizes(w)))[:-1])
    return jnp.stack([jnp.sum(part, 0) / max(len(part), 1) for part in parts])


def to_coordinates(w: W, x: Float[Array, "leaves features"]) -> Float[Array, "d features"]:
    """Numbers that each leaf of w has, for each of its coordinates."""
    # Not jnp.repeat: its derivative is a scatter, this one's a sum over each leaf.
    sizes = leaf_sizes(w)
    return jnp.concatenate([jnp.broadcast_to(row, (n, *row.shape)) for row, n in zip(x, sizes, strict=True)])
