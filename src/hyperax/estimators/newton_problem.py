"""Linear models with a convex loss on folds, as a bilevel problem solved by Newton's method and implicit derivatives.

Inner variables are scaled, w = S v with S^2 near 1 / diag of the Hessian: coefficients of features with alphas many
orders of magnitude apart are then alike, for Newton's conjugate gradients and for those of the hypergradient.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from hyperax.cross_validation import Fold
from hyperax.dynamics.newton import Newton
from hyperax.linear_solvers import ConjugateGradient
from hyperax.methods import Implicit, hypergradient
from hyperax.problem import Problem
from hyperax.tasks import MeanOverTasks, mean_over_tasks

NEVER = -1e30  # the logit of a class that cannot be: its probability is 0, its derivatives are 0 and not NaN
STEPS = 100


class FoldData(NamedTuple):
    """What the objectives see of one fold; what does not differ between folds is `Shared` when they are stacked.

    Fields:
        x: [n, d], an array or a `SparseMatrix`.
        y: [n, C], targets; for classes 1 at the class of an example. A row of 0 is the reference class.
        fold: weights of the examples. Training weights of all examples are of sum 1.
        scale: [d + 1, C], S; the last row belongs to the intercept.
        classes: [C], 1 for classes that the fold is trained on, 0 for others.
        intercept: 1 with an intercept, else 0.
        reference: the logit of the reference class: 0 for two classes, `NEVER` without one.
    """

    x: Any
    y: Array
    fold: Fold
    scale: Array
    classes: Array
    intercept: Array
    reference: Array


def cross_entropy(z: Array, d: FoldData) -> Array:
    """log(e^r + sum_c e^z_c) - y^T z, over the classes that the fold is trained on; [n]."""
    # By hand, because `jax.nn.logsumexp` also minds infinities, and takes longer to compile.
    z = z + (1 - d.classes) * NEVER
    most = jax.lax.stop_gradient(jnp.maximum(jnp.max(z, 1), d.reference))
    sum_of_powers = jnp.exp(d.reference - most) + jnp.sum(jnp.exp(z - most[:, None]), 1)
    return most + jnp.log(sum_of_powers) - jnp.sum(d.y * z, 1)


def half_square(z: Array, d: FoldData) -> Array:
    """|y - z|^2 / 2; [n]."""
    return jnp.sum((d.y - z) ** 2, 1) / 2


class Training(NamedTuple):
    """The inner objective of a loss.

    L = sum_i s_i l(y_i, x_i w + b) + sum_j alpha_j |w_j|^2 / 2 + |what b does not need|^2 / 2,   (w, b) = S v
    """

    loss: Any

    def __call__(self, v: Array, log_alpha: Array, d: FoldData) -> Array:
        """L at v [d + 1, C]."""
        w = d.scale * v
        value = jnp.sum(d.fold.train * self.loss(_logits(w, d), d))
        value += jnp.exp(log_alpha) @ jnp.sum(w[:-1] ** 2, 1) / 2
        # Without a reference class b + const is b: the sum of b is 0 at the minimiser, as in scikit-learn.
        used = d.intercept * d.classes
        several = jnp.where(d.reference < 0, 1.0, 0.0)
        return value + (several * jnp.sum(used * w[-1]) ** 2 + jnp.sum((1 - used) * w[-1] ** 2)) / 2


class Validation(NamedTuple):
    """The outer objective of a loss: sum_i v_i l(y_i, x_i w + b)."""

    loss: Any

    def __call__(self, v: Array, log_alpha: Array, d: FoldData) -> Array:
        """E at v."""
        return jnp.sum(d.fold.validation * self.loss(_logits(d.scale * v, d), d))


def _logits(w: Array, d: FoldData) -> Array:
    return d.x @ w[:-1] + d.intercept * w[-1]


def _zeros(log_alpha: Array, d: FoldData) -> Array:
    return jnp.zeros_like(d.scale)


class Constant(NamedTuple):
    """The same tolerance at every hyperiteration."""

    epsilon: float

    def __call__(self, k: Any) -> float:
        """Epsilon."""
        return self.epsilon


@lru_cache
def newton_hypergradient(loss: Any, parallel: int | None = None, tolerance: float = 1e-6) -> MeanOverTasks:
    """The hypergradient of a cross-validated linear model: a function (log_alpha, `FoldData`, carry).

    Arguments:
        loss: `cross_entropy` or `half_square`.
        parallel: folds at a time, `None` for all.
        tolerance: on |grad L| and on the residual of the linear system; in the scaled variables its square is about the
            error in L, whatever the scale of x and alpha.
    """
    problem = Problem(Training(loss), Validation(loss), _zeros)
    method = Implicit(STEPS, ConjugateGradient(max_steps=1000), warm_start=True, tolerance=Constant(tolerance))
    return mean_over_tasks(hypergradient(problem, Newton(tolerance=tolerance), method), parallel)
