"""T equal linear steps in O(log T) matrix products: powers of a matrix, applied to few columns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Matrix = Float[Array, "p p"]
Rows = Float[Array, "p c"]


def cheapest(steps: int, size: int, columns: int) -> int:
    """How many squarings to do before the last matrix M^(2^n) is applied T / 2^n times, by their flops over 2 p^2."""
    # A product with few columns waits for the matrix to arrive from memory, as long as one with about 16 of them.
    width = max(columns, 16)

    def cost(n: int) -> int:
        low = steps % 2**n
        return n * size + width * (n + low.bit_count() + (steps >> n))

    return min(range(max(1, steps.bit_length())), key=cost)


def geometric_sum(M: Matrix, u: Rows, steps: int, squarings: int, square: Callable[[Matrix], Matrix]) -> Rows:
    """(I + M + ... + M^(T-1)) u."""
    total = None  # the sum over k < t, with t the binary digits of T read so far
    for level in range(squarings):
        # Here M stands for M^N and u for (I + ... + M^(N-1)) u, N = 2^level.
        if steps >> level & 1:
            total = u if total is None else u + M @ total
        u = u + M @ u
        M = square(M)
    left = steps >> squarings
    return _repeat(lambda x: u + M @ x, u, left - 1) if total is None else _repeat(lambda x: u + M @ x, total, left)


def recurrence(
    V: Matrix, mu: Array, g: Rows, steps: int, squarings: int, square: Callable[[Matrix], Matrix]
) -> tuple[Rows, Rows]:
    """(m_1 + ... + m_T, m_T) with m_0 = 0, m_1 = g, m_{t+1} = V m_t - mu m_{t-1}."""
    zero = jnp.zeros_like(g)
    constant = g  # the sums y_t follow y_{t+2N} = V_N y_{t+N} - mu^N y_t + constant_N
    y, m = (zero, g), (zero, g)  # at t and at t + N

    def advance(pairs: Any) -> Any:
        (y0, y1), (m0, m1) = pairs
        return (y1, V @ y1 - mu * y0 + constant), (m1, V @ m1 - mu * m0)

    for level in range(squarings):
        if steps >> level & 1:
            y, m = advance((y, m))
        further = advance((y, m))
        y, m = (y[0], further[0][1]), (m[0], further[1][1])
        constant = constant + mu * constant + V @ constant
        V = square(V) - 2 * mu * jnp.eye(len(V), dtype=V.dtype)
        mu = mu * mu
    y, m = _repeat(advance, (y, m), (steps >> squarings) - 1)
    return y[1], m[1]


def _repeat(function: Callable[[Any], Any], x: Any, times: int) -> Any:
    return jax.lax.scan(lambda x, _: (function(x), None), x, length=times)[0]


@jax.custom_jvp
def square_of_symmetric(M: Matrix) -> Matrix:
    """M M, with a derivative of one product in place of two: dM is symmetric with M, so M dM = (dM M)^T."""
    return M @ M


@square_of_symmetric.defjvp
def _(primals: tuple[Matrix], tangents: tuple[Matrix]) -> tuple[Matrix, Matrix]:
    (M,), (dM,) = primals, tangents
    product = dM @ M
    return square_of_symmetric(M), product + product.T
