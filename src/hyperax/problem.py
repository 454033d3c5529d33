"""What is solved: the bilevel problem and the answer to "what is its gradient here?".

Dimension legend, used in every docstring: `d` size of w, `m` size of lam, `T` inner steps, `K` truncation window,
`N` tasks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

Lam: TypeAlias = PyTree
"""Outer variables: hyperparameters, or the parameters of a meta-learner. Any pytree with floating-point leaves."""

W: TypeAlias = PyTree
"""Inner variables: the parameters of a (ground) model. Any pytree of arrays."""

Data: TypeAlias = PyTree
"""Whatever the objectives need besides w and lam: arrays, an episode, `None`."""

Scalar: TypeAlias = Float[Array, ""]


def _is_module(node: Any) -> bool:
    return isinstance(node, eqx.Module)


def _unprepared(lam: Lam, data: Data) -> Data:
    return data


class Problem(eqx.Module):
    """A bilevel problem: min over lam of E(w_lam, lam), with w_lam a minimiser of L(., lam).

    The paper's equations (1)-(2), with the solution of the inner problem replaced by T steps of a dynamics (5)-(6):

        f_T(lam) = E(w_T, lam, D),   w_0 = Phi_0(lam, D),   w_t = Phi_t(w_{t-1}, lam),   D = prepare(lam, data)

    Arguments:
        inner: L(w, lam, D) -> scalar, the inner objective (training error).
        outer: E(w, lam, D) -> scalar, the outer objective (validation error); with `has_metrics`, a pair
            (scalar, dict of arrays), and the dict is found in `Hypergradient.info["metrics"]`.
        init: Phi_0(lam, D) -> w, the initial point of the inner variables: any pytree. In an Equinox module its arrays
            are the inner variables; what else it holds is put back before the objectives see it.
        prepare: prepare(lam, data) -> D, whatever depends on lam and data but not on w (features of a fixed batch, a
            kernel matrix, a data augmentation). It is computed once for all T steps and differentiated once; the
            three functions above receive its result in place of `data`.
        batch: batch(D, t) -> D_t, the mini-batch that the inner objective sees at step t = 1, ..., T. A pure function
            of t (and of a key inside D), so that every replay of the inner run sees the same batches.
        has_metrics: whether `outer` also returns metrics.

    Cost: with `prepare`, one evaluation and one backward pass of it, whatever T is.
    Reference: Franceschi et al. 2018 (ICML), eq. 1-6; `batch` is B_t of the Bridge paper (2017), eq. 2.1.
    Do not use `prepare` for what depends on w, nor for what is constant (put that into `data`).

    >>> import jax.numpy as jnp
    >>> ridge = Problem(
    ...     inner=lambda w, lam, d: jnp.sum((d["x"] @ w - d["y"]) ** 2) + jnp.exp(lam) * jnp.sum(w**2),
    ...     outer=lambda w, lam, d: jnp.sum((d["x_val"] @ w - d["y_val"]) ** 2),
    ...     init=lambda lam, d: jnp.zeros(d["x"].shape[1]),
    ... )
    """

    inner: Callable[[W, Lam, Data], Scalar]
    outer: Callable[[W, Lam, Data], Scalar | tuple[Scalar, dict[str, Array]]]
    init: Callable[[Lam, Data], W]
    prepare: Callable[[Lam, Data], Data] = _unprepared
    batch: Callable[[Data, Int[Array, ""]], Data] | None = None
    has_metrics: bool = False

    def objective(self, prepared: Data, t: Int[Array, ""] | int) -> Callable[[W, Lam], Scalar]:
        """The inner objective of step t as a function of (w, lam), with the data of that step bound."""
        data = prepared if self.batch is None else self.batch(prepared, jnp.asarray(t))
        return lambda w, lam: self.inner(self.whole(w, lam, prepared), lam, data)

    def start(self, lam: Lam, prepared: Data) -> W:
        """The arrays of w_0 = Phi_0(lam, D): the inner variables. Functions and numbers in a module are not."""
        w = self.init(lam, prepared)
        plain = not any(_is_module(node) for node in jax.tree.leaves(w, is_leaf=_is_module))
        return jax.tree.map(jnp.asarray, eqx.filter(w, eqx.is_array_like if plain else eqx.is_array))

    def whole(self, w: W, lam: Lam, prepared: Data) -> W:
        """Inner variables with what else Phi_0 returns, such as the functions in a module, put back."""
        shapes = eqx.filter_eval_shape(self.init, lam, prepared)
        fixed = jax.tree.map(lambda leaf: None if isinstance(leaf, jax.ShapeDtypeStruct) else leaf, shapes)
        return eqx.combine(w, fixed)

    def evaluate(self, w: W, lam: Lam, prepared: Data) -> tuple[Scalar, dict[str, Array]]:
        """E(w, lam, D) and its metrics (an empty dict if the problem has none)."""
        w = self.whole(w, lam, prepared)
        if self.has_metrics:
            value, metrics = self.outer(w, lam, prepared)  # pyright: ignore[reportGeneralTypeIssues]
            return value, metrics
        return self.outer(w, lam, prepared), {}  # pyright: ignore[reportReturnType]


class Shared(eqx.Module):
    """Data that all tasks see whole, under `mean_over_tasks`: a table whose folds are the tasks, a set of images.

        data = {"x": Shared(x), "fold": folds}   is for task j   {"x": x, "fold": folds[j]}

    Arguments:
        value: any pytree. Its arrays need no task axis and are not copied for each task.

    Cost: one copy, whatever N is.
    Do not use it for what differs between tasks, nor for what is computed from lam (that is `Problem.prepare`).

    >>> import jax.numpy as jnp
    >>> from hyperax import GradientDescent, Problem, Reverse, hypergradient, mean_over_tasks
    >>> problem = Problem(
    ...     inner=lambda w, lam, d: (w - d["x"]) ** 2,
    ...     outer=lambda w, lam, d: (w * d["scale"]) ** 2,
    ...     init=lambda lam, d: lam,
    ... )
    >>> mean = mean_over_tasks(hypergradient(problem, GradientDescent(0.25), Reverse(1)))
    >>> print(mean(jnp.asarray(2.0), {"x": jnp.asarray([0.0, 2.0]), "scale": Shared(jnp.asarray(10.0))}).value)
    250.0
    """

    value: Any


def is_shared(node: Any) -> bool:
    """Whether this is `Shared`, for `jax.tree.map(..., is_leaf=is_shared)`."""
    return isinstance(node, Shared)


class Hypergradient(NamedTuple):
    """The answer of a method at one lam.

    Fields:
        value: f_T(lam), a scalar.
        grad: the (approximate) gradient of f_T, a pytree like lam; `None` at leaves of lam that are not arrays.
        state: the last state of the dynamics; `state.w` is w_T (with a leading task axis under `mean_over_tasks`).
        info: what a person may want to know: `metrics` of the outer objective, and what the method adds.
        carry: what the method remembers for the next hyperiteration; `()` for methods that remember nothing.
    """

    value: Scalar
    grad: Lam
    state: Any
    info: dict[str, Any]
    carry: Any
