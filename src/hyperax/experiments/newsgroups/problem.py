"""Softmax regression on words with one L2 coefficient for all, or one for each, as a bilevel problem."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from hyperax.dynamics import Newton
from hyperax.estimators.sparse import SparseMatrix
from hyperax.experiments.newsgroups.corpus import Documents
from hyperax.linear_solvers import ConjugateGradient
from hyperax.methods import ExponentialTolerance, Implicit, hypergradient
from hyperax.problem import Problem


class Split(NamedTuple):
    """Training and validation documents, and the scale S [d + 1, 1] of the inner variables v: (w, b) = S v.

    S^2 is near 1 / diag of the Hessian, for conjugate gradients.
    """

    x: SparseMatrix
    y: Array
    x_validation: SparseMatrix
    y_validation: Array
    scale: Array


def split_of(documents: Documents, train: np.ndarray, validation: np.ndarray, log_alpha: float) -> Split:
    """Both sides in float32."""
    classes = int(documents.y.max()) + 1
    y = np.eye(classes, dtype=np.float32)[documents.y]
    x = documents.x[train]
    squares = np.append(np.asarray(x.multiply(x).mean(0)).ravel(), 1.0) * (1 - 1 / classes) / classes
    scale = 1 / np.sqrt(squares + np.append(np.full(x.shape[1], np.exp(log_alpha) / len(train)), 0.0))
    sparse = lambda rows: SparseMatrix.from_scipy(rows, np.float32)
    return Split(
        sparse(x),
        jnp.asarray(y[train]),
        sparse(documents.x[validation]),
        jnp.asarray(y[validation]),
        jnp.asarray(scale[:, None], jnp.float32),
    )


def _cross_entropy(v: Array, x: SparseMatrix, y: Array, d: Split) -> Array:
    w = d.scale * v
    z = x @ w[:-1] + w[-1]
    return jnp.mean(jax.nn.logsumexp(z, 1) - jnp.sum(y * z, 1))


def _inner(v: Array, lam: Array, d: Split) -> Array:
    w = d.scale * v
    penalty = jnp.sum(jnp.exp(lam) * jnp.sum(w[:-1] ** 2, 1)) / len(d.y)
    return _cross_entropy(v, d.x, d.y, d) + (penalty + jnp.sum(w[-1]) ** 2) / 2  # b + const is b: its sum is held at 0


SOFTMAX = Problem(
    inner=_inner,
    outer=lambda v, lam, d: _cross_entropy(v, d.x_validation, d.y_validation, d),
    init=lambda lam, d: jnp.zeros((d.scale.shape[0], d.y.shape[1]), jnp.float32),
)
NEWTON = Newton(tolerance=5e-4, forcing=0.5, max_steps=25)
IMPLICIT = Implicit(30, ConjugateGradient(max_steps=25), warm_start=True, tolerance=ExponentialTolerance(5e-3, 0.8))
"""The first hypergradients may be rough: each begins where the last ended, and asks for more digits (HOAG)."""
HYPERGRADIENT = hypergradient(SOFTMAX, NEWTON, IMPLICIT)


def trained(documents: Documents, alpha: np.ndarray) -> Callable[[Any], np.ndarray]:
    """The model of these coefficients on all documents, by scikit-learn; a function x -> log p [n, C].

    With x_j / sqrt(alpha_j) in place of x_j every coefficient is 1.
    """
    import scipy.sparse
    from sklearn.linear_model import LogisticRegression

    scaled = lambda x: x @ scipy.sparse.diags_array(np.broadcast_to(1 / np.sqrt(alpha), x.shape[1]))
    model = LogisticRegression(C=1.0, max_iter=200)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as for the grid
        model.fit(scaled(documents.x), documents.y)
    return lambda x: model.predict_log_proba(scaled(x))
