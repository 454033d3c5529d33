"""A sparse table of examples whose products with dense matrices are fast in both directions, and linear to JAX."""

from __future__ import annotations

from typing import Any, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.experimental.sparse import BCSR
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Float, Int


class SparseMatrix(eqx.Module):
    """A sparse matrix X with its transpose, for products X W and, where JAX needs them, X^T R.

        (X W)_ic = sum over the entries x_ij of row i of x_ij W_jc

    Arguments: of `from_scipy`, which makes it.
        matrix: a sparse matrix of SciPy, [n, d].
        dtype: of its values; a NumPy type.

    Each direction reads rows in their order (both X and X^T are kept by rows), where the derivative of one product
    alone would scatter: three to five times slower on a CPU. Derivatives of any order and `vmap` (which makes one
    product of all mapped ones) work with respect to W; X is a constant.

    Cost: 2 (values + indices) = 16 bytes an entry in float32; a product takes 2 operations for each entry and column.
    Do not use it for a table more than a fifth full: a dense product is faster there.

    >>> import numpy as np, scipy.sparse, jax
    >>> X = SparseMatrix.from_scipy(scipy.sparse.csr_array(np.array([[0.0, 2.0], [3.0, 0.0], [0.0, 4.0]])), np.float64)
    >>> (X @ np.ones((2, 1))).ravel().tolist()
    [2.0, 3.0, 4.0]
    >>> jax.grad(lambda w: (X @ w).sum())(np.ones((2, 1))).ravel().tolist()
    [3.0, 6.0]
    """

    # Plain arrays (values, columns, starts of the rows): `vmap` maps JAX's own sparse types along their rows.
    rows: tuple[Array, Array, Array]
    transposed: tuple[Array, Array, Array]

    @classmethod
    def from_scipy(cls, matrix: Any, dtype: Any) -> Self:
        """From any sparse matrix of SciPy; doubled entries are summed, stored zeros dropped."""
        rows = matrix.tocsr().astype(dtype)
        rows.sum_duplicates()
        rows.eliminate_zeros()
        return cls(_by_rows(rows), _by_rows(rows.T.tocsr()))

    @property
    def shape(self) -> tuple[int, int]:
        """(n, d)."""
        return len(self.rows[2]) - 1, len(self.transposed[2]) - 1

    @property
    def dtype(self) -> Any:
        """Of the values."""
        return self.rows[0].dtype

    def __matmul__(self, W: Float[Array, "d c"]) -> Float[Array, "n c"]:
        """X W; also for a vector."""
        W = jnp.asarray(W, self.dtype)
        if W.shape[0] != self.shape[1] or W.ndim not in (1, 2):
            raise ValueError(f"X is {list(self.shape)} and W is {list(W.shape)}; X @ W needs W of shape [d] or [d, c]")
        product = _product(self, W if W.ndim == 2 else W[:, None])
        return product if W.ndim == 2 else product[:, 0]


def _by_rows(matrix: Any) -> tuple[Array, Array, Array]:
    index = lambda x: np.asarray(x, np.int32)
    return jax.device_put((matrix.data, index(matrix.indices), index(matrix.indptr)))


# A primitive of its own, because a linear function with a transpose of its own (`linear_call`) cannot be mapped.
_sparse_product = Primitive("sparse_product")


def _product(X: SparseMatrix, W: Array) -> Array:
    return _sparse_product.bind(*X.rows, *X.transposed, W)


def _whole(
    data: Array, indices: Int[Array, " entries"], starts: Int[Array, " n+1"], *rest: Array
) -> Float[Array, "n c"]:
    *_, W = rest
    return BCSR((data, indices, starts), shape=(len(starts) - 1, W.shape[0])) @ W


def _shape(data: Any, indices: Any, starts: Any, *rest: Any) -> Any:
    return ShapedArray((starts.shape[0] - 1, rest[-1].shape[1]), rest[-1].dtype)


def _transpose(cotangent: Any, *parts: Any) -> list[Any]:
    nothing: list[Any] = [None] * 6
    rows, transposed = parts[:3], parts[3:6]
    if type(cotangent) is ad.Zero:
        return [*nothing, cotangent]
    return [*nothing, _sparse_product.bind(*transposed, *rows, cotangent)]


def _mapped(parts: Any, axes: Any) -> tuple[Any, int]:
    *matrix, W = parts
    if any(axis is not None for axis in axes[:-1]):
        raise ValueError("a SparseMatrix cannot be mapped: let all tasks share it (hx.Shared)")
    W = jnp.moveaxis(W, axes[-1], 1)  # [d, batch, c]
    product = _sparse_product.bind(*matrix, W.reshape(W.shape[0], -1))
    return product.reshape(product.shape[0], *W.shape[1:]), 1


_sparse_product.def_impl(jax.jit(_whole))
_sparse_product.def_abstract_eval(_shape)
ad.defjvp(_sparse_product, *[None] * 6, lambda slope, *parts: _sparse_product.bind(*parts[:-1], slope))
ad.primitive_transposes[_sparse_product] = _transpose
batching.primitive_batchers[_sparse_product] = _mapped
mlir.register_lowering(_sparse_product, mlir.lower_fun(_whole, multiple_results=False))
