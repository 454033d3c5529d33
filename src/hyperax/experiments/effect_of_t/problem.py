"""Example 3.4: a linear map H of features as hyperparameter, with its exact solution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from hyperax.methods.closed_form import ClosedForm
from hyperax.problem import Problem


class Sets(NamedTuple):
    """Features (multiplied by H after `prepare`) and targets of the three sets."""

    x_train: Float[Array, "n d"]
    y_train: Float[Array, "n outputs"]
    x_validation: Float[Array, "n_validation d"]
    y_validation: Float[Array, "n_validation outputs"]
    x_test: Float[Array, "n_test d"] | None = None
    y_test: Float[Array, "n_test outputs"] | None = None


def mean_square(x: Array, y: Array, w: Array) -> Array:
    """(1 / n) |Y - X w|^2: the sum over outputs, the mean over examples."""
    return jnp.sum((y - x @ w) ** 2) / x.shape[0]


def linear_representation(rho: float, H_of: Callable[[Any], Array] = lambda lam: lam) -> tuple[Problem, ClosedForm]:
    """The bilevel problem of Example 3.4, squared errors as means over examples, and its exact solution.

        L_H(w) = (1 / n) |Y - X H w|^2 + rho |w|^2,   E(w, H) = (1 / n_val) |Y_val - X_val H w|^2,   w_0 = 0,
        w_H = ((XH)^T XH / n + rho I)^-1 (XH)^T Y / n

    Arguments:
        rho: > 0. With the paper's sums in place of means, rho and eta would be n rho and eta / n, and w_t the same.
        H_of: lam -> H, [d, d].

    Reference: Franceschi et al. 2018, eq. 8 and Sec. 5.1.
    """

    def prepare(lam: Any, s: Sets) -> Sets:
        H = H_of(lam)
        x_test = None if s.x_test is None else s.x_test @ H
        return s._replace(x_train=s.x_train @ H, x_validation=s.x_validation @ H, x_test=x_test)

    def solve(lam: Any, s: Sets) -> Array:
        n, d = s.x_train.shape
        hessian = s.x_train.T @ s.x_train / n + rho * jnp.eye(d, dtype=s.x_train.dtype)
        return jnp.linalg.solve(hessian, s.x_train.T @ s.y_train / n)

    problem = Problem(
        inner=lambda w, lam, s: mean_square(s.x_train, s.y_train, w) + rho * jnp.sum(w**2),
        outer=lambda w, lam, s: mean_square(s.x_validation, s.y_validation, w),
        init=lambda lam, s: jnp.zeros((s.x_train.shape[1], s.y_train.shape[1]), s.x_train.dtype),
        prepare=prepare,
    )
    return problem, ClosedForm(solve)


def identity(sets: Sets) -> Array:
    """H_0 = I, the same for all runs: the features as they are."""
    return jnp.eye(sets.x_train.shape[1], dtype=sets.x_train.dtype)
