"""Products with a sparse table, their derivatives and mapped versions, against dense ones."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

sparse = pytest.importorskip("scipy.sparse")
pytest.importorskip("sklearn")

from hyperax.estimators.sparse import SparseMatrix  # noqa: E402

DENSE = np.where(np.random.default_rng(0).random((7, 5)) < 0.4, np.random.default_rng(1).normal(size=(7, 5)), 0.0)
X = SparseMatrix.from_scipy(sparse.csc_matrix(DENSE), np.float64)
W = jnp.asarray(np.random.default_rng(2).normal(size=(3, 5, 2)))


def loss(x, w):
    return jnp.sum(jnp.tanh(x @ w) ** 3)


def newton(x, w):
    """A gradient and a Hessian-vector product."""
    return jax.jvp(jax.grad(lambda w: loss(x, w)), (w,), (jnp.cos(w),))


@pytest.mark.parametrize("function", [loss, newton])
def test_sparse_equals_dense_alone_and_mapped(function):
    mapped = lambda x: (function(x, W[0]), jax.vmap(lambda w: function(x, w))(W))
    got, expected = (jax.tree.leaves(eqx.filter_jit(mapped)(x)) for x in (X, jnp.asarray(DENSE)))
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)


def test_shapes_and_vectors():
    assert X.shape == (7, 5)
    np.testing.assert_allclose(X @ W[0, :, 0], DENSE @ W[0, :, 0], rtol=1e-12)
    doubled = sparse.coo_matrix(([1.0, 2.0, 0.0], ([0, 0, 1], [1, 1, 0])), (2, 2))
    assert SparseMatrix.from_scipy(doubled, np.float32).rows[0].tolist() == [3.0]
    with pytest.raises(ValueError, match=r"X @ W needs W of shape \[d\]"):
        X @ jnp.ones((4, 2))


def test_a_matrix_is_shared_not_mapped():
    scaled = lambda scale: eqx.tree_at(lambda x: x.rows[0], X, X.rows[0] * scale)
    with pytest.raises(ValueError, match="let all tasks share it"):
        jax.vmap(lambda scale: scaled(scale) @ W[0])(jnp.ones(2))
