"""Ridge regression on several related tasks as a bilevel problem whose folds are summed up by Gram matrices."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hyperax.methods import ClosedForm
from hyperax.methods.hypergradient import hypergradient
from hyperax.problem import Problem
from hyperax.tasks import mean_over_tasks

TOLERANCE, MOST_ITERATIONS = 1e-11, 1000
"""Of the conjugate gradients: the residual relative to the right-hand side."""


class Relation(eqx.Module):
    """lam: how strongly the coefficients of the tasks hang together, and how small they are.

        C_ij = exp(s_ij) / N,   alpha = exp(log_alpha)[group],   beta = exp(log_beta)

    Arguments:
        log_alpha: [G], of the pull between tasks, one a group of features.
        log_beta: [], of the size of all coefficients.
        log_similarity: s [N (N - 1) / 2], the pairs i > j row by row; 0 everywhere is a common mean.
    """

    log_alpha: Float[Array, " G"]
    log_beta: Float[Array, ""]
    log_similarity: Float[Array, " pairs"]


class Sums(eqx.Module):
    """sum_i a_i (w_{t_i} . x_i - y_i)^2 = sum_t w_t' gram_t w_t - 2 moment_t . w_t + energy, for weights a."""

    gram: Any
    """[N, p, p]"""
    moment: Any
    """[N, p]"""
    energy: Any
    """[]"""

    def __call__(self, w: Float[Array, "N p"]) -> Float[Array, ""]:
        """The sum of squares at w."""
        return jnp.einsum("tj,tjk,tk", w, self.gram, w) - 2 * jnp.sum(self.moment * w) + self.energy


class Table(eqx.Module):
    """What the objectives of one fold see; under `mean_over_tasks` train and validation have the folds in front."""

    train: Sums
    validation: Sums
    present: Any
    """[N], 1 for tasks, 0 for padding."""
    group: Any
    """[p], of each feature: its entry of alpha."""


def sums(x: np.ndarray, y: np.ndarray, task: np.ndarray, weight: np.ndarray, count: int) -> Sums:
    """The sums of examples x [n, p], y [n] of tasks 0, ..., count - 1 with these weights [n]."""
    gram, moment = np.zeros((count, x.shape[1], x.shape[1])), np.zeros((count, x.shape[1]))
    for t in range(count):
        mine = (task == t) & (weight > 0)
        weighted = x[mine] * weight[mine, None]
        gram[t], moment[t] = weighted.T @ x[mine], weighted.T @ y[mine]
    return Sums(gram, moment, np.asarray(weight @ y**2))


def similarities(lam: Relation, present: Float[Array, " N"]) -> Float[Array, "N N"]:
    """C, symmetric with a diagonal of 0."""
    rows, columns = np.tril_indices(present.size, -1)
    lower = jnp.zeros((present.size, present.size)).at[rows, columns].set(jnp.exp(lam.log_similarity))
    return (lower + lower.T) * present[:, None] * present / jnp.sum(present)


def penalty(w: Float[Array, "N p"], lam: Relation, table: Table) -> Float[Array, ""]:
    """sum_{i<j} C_ij sum_k alpha_k (w_ik - w_jk)^2 + beta sum_t |w_t|^2."""
    laplacian, alpha = _laplacian(lam, table)
    return jnp.sum(alpha * w * (laplacian @ w)) + jnp.exp(lam.log_beta) * jnp.sum(w**2)


def solve(lam: Relation, table: Table) -> Float[Array, "N p"]:
    """w_lam, by conjugate gradients: (blockdiag(gram_t) + laplacian(C) (x) diag(alpha) + beta I) w = moment.

    The preconditioner has C_ij replaced by c_i c_j / sum(c), with c the sums of the rows of C with a diagonal at their
    mean. It differs from its diagonal blocks by a matrix of rank p, so its inverse takes O(N p^3); its Laplacian is
    never indefinite; and where all C_ij are equal it is the whole matrix, and one iteration is enough.
    """
    gram, moment = table.train.gram, table.train.moment
    laplacian, alpha = _laplacian(lam, table)
    product = lambda w: jnp.einsum("tjk,tk->tj", gram, w) + alpha * (laplacian @ w) + jnp.exp(lam.log_beta) * w
    inverse = jax.lax.stop_gradient(_preconditioner(lam, table))
    w, _ = jax.scipy.sparse.linalg.cg(product, moment, tol=TOLERANCE, maxiter=MOST_ITERATIONS, M=inverse)
    return w


def _preconditioner(lam: Relation, table: Table) -> Any:
    """H_0^-1 v = B^-1 v + B^-1 U R (I - R U' B^-1 U R)^-1 R U' B^-1 v,   H_0 = B - U R^2 U'."""
    laplacian, alpha = _laplacian(lam, table)
    p = table.train.moment.shape[1]
    number = jnp.sum(table.present)
    c = jnp.diagonal(laplacian) * number / jnp.maximum(number - 1, 1)
    total = jnp.sum(c)
    r = jnp.sqrt(alpha / jnp.where(total > 0, total, 1.0))
    B = table.train.gram + (c[:, None] * alpha + jnp.exp(lam.log_beta))[:, :, None] * jnp.eye(p)
    inverses = _inverse(B)
    inner = _inverse(jnp.eye(p) - r[:, None] * jnp.einsum("t,tjk->jk", c**2, inverses) * r)
    return Preconditioner(inverses, c, r, inner)


def _inverse(matrix: Float[Array, "... p p"]) -> Float[Array, "... p p"]:
    """Of positive definite matrices; by eigenvectors, which compiles in a fraction of a triangular solve's time."""
    values, vectors = jnp.linalg.eigh(matrix)
    floor = jnp.finfo(values.dtype).eps * values[..., -1:]
    return (vectors / jnp.maximum(values, floor)[..., None, :]) @ jnp.swapaxes(vectors, -1, -2)


class Preconditioner(eqx.Module):
    """The inverse of a block diagonal matrix minus one of rank p, as a linear map of w [N, p]."""

    inverses: Float[Array, "N p p"]
    c: Float[Array, " N"]
    r: Float[Array, " p"]
    inner: Float[Array, "p p"]

    def __call__(self, v: Float[Array, "N p"]) -> Float[Array, "N p"]:
        """H_0^-1 v."""
        w = jnp.einsum("tjk,tk->tj", self.inverses, v)
        common = self.r * (self.inner @ (self.r * (self.c @ w)))
        return w + jnp.einsum("tjk,tk->tj", self.inverses, self.c[:, None] * common)


def _laplacian(lam: Relation, table: Table) -> tuple[Float[Array, "N N"], Float[Array, " p"]]:
    C = similarities(lam, table.present)
    return jnp.diag(C.sum(1)) - C, jnp.exp(lam.log_alpha)[table.group]


def _start(lam: Relation, table: Table) -> Any:
    return jnp.zeros_like(table.train.moment)


cross_validation = mean_over_tasks(
    hypergradient(
        Problem(
            inner=lambda w, lam, table: table.train(w) + penalty(w, lam, table),
            outer=lambda w, lam, table: table.validation(w),
            init=_start,
        ),
        None,
        ClosedForm(solve),
    )
)
"""(lam, data) -> the mean over folds of the validation error and its hypergradient. One object: one compiled program
for every fit of the same shapes."""


@eqx.filter_jit
def solution(lam: Relation, table: Table) -> tuple[Float[Array, "N p"], Float[Array, "N N"]]:
    """(w_lam, C)."""
    return solve(lam, table), similarities(lam, table.present)
