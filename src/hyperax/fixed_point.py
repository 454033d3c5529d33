"""Fixed-point numbers and a multiplication that can be undone: the integers behind `Reversible`.

A real number x is the integer X = round(2^S x). Multiplying X by mu < 1 loses log2(1 / mu) bits; they are kept in an
integer beside it, the buffer, as digits of changing base.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

Integers: TypeAlias = Int[Array, "..."]
Reals: TypeAlias = Float[Array, "..."]
Truths: TypeAlias = Bool[Array, "..."]

DIGIT_BITS = 8
"""log2 of d. A product is off by up to d units, so d is small; buffers fill at log2(d / n) bits, so not too small."""

LIMIT = 2**61
"""What an integer must stay below, so that a sum of three fits into 64 bits."""

_D = 2**DIGIT_BITS


class Factor(NamedTuple):
    """A factor mu in (0, 1) as mu = (n / d) (1 + excess), with d = 256, n = floor(mu d) and 0 <= excess < 1 / n."""

    n: Integers
    excess: Reals


def as_factor(mu: Reals | float) -> Factor:
    """The two parts of a factor, exact to the last bit or two of mu."""
    mu = jnp.asarray(mu, jnp.float64)
    n = jnp.clip(jnp.floor(mu * _D), 1, _D - 1)
    return Factor(n.astype(jnp.int64), mu * _D / n - 1)


def to_fixed(x: Reals, bits: int) -> Integers:
    """round(2^bits x), and `LIMIT` for what is too large or not a number."""
    scaled = x.astype(jnp.float64) * 2.0**bits
    return jnp.where(jnp.abs(scaled) < LIMIT, jnp.round(scaled), LIMIT).astype(jnp.int64)


def to_float(X: Integers, bits: int, dtype: jnp.dtype) -> Reals:
    """2^-bits X."""
    return (X.astype(jnp.float64) * 2.0**-bits).astype(dtype)


def fits(X: Integers) -> Truths:
    """Where an integer is below `LIMIT` in absolute value."""
    return (X > -LIMIT) & (X < LIMIT)


def in_range(mu: Reals, lowest: int) -> Truths:
    """Where a factor is below 1, with a numerator of at least `lowest`."""
    return (mu < 1) & (jnp.floor(mu.astype(jnp.float64) * _D) >= lowest)


def multiply(C: Integers, buffer: Integers, factor: Factor) -> tuple[Integers, Integers]:
    """(mu C, buffer), which `divide` undoes bit for bit.

        i <- i d + (C mod d),  C <- floor(C / d),  C <- C n + (i mod n),  i <- floor(i / n),
        C <- C + round(excess C)

    The first line is a bijection of (C, i), off by less than d units. The second is strictly increasing, so it can be
    undone without keeping anything.

    Reference: Maclaurin, Duvenaud and Adams 2015, Algorithm 3 (the first line).
    """
    n = factor.n
    buffer = (buffer << DIGIT_BITS) + (C & (_D - 1))
    C = (C >> DIGIT_BITS) * n + jax.lax.rem(*jnp.broadcast_arrays(buffer, n))
    return C + _part(factor.excess, C), jax.lax.div(*jnp.broadcast_arrays(buffer, n))


def divide(C: Integers, buffer: Integers, factor: Factor, rounds: int) -> tuple[Integers, Integers]:
    """What `multiply` received; `rounds` is from `undo_rounds`."""
    n = factor.n
    product = C
    # Double precision leaves at most 2^11 units at |C| < 2^62; each round divides what is left by n.
    C = product - jnp.round(product * (factor.excess / (1 + factor.excess))).astype(jnp.int64)
    for _ in range(rounds):
        C = product - _part(factor.excess, C)
    floor = C // n
    buffer = buffer * n + (C - floor * n)
    return (floor << DIGIT_BITS) + (buffer & (_D - 1)), buffer >> DIGIT_BITS


def _part(excess: Reals, C: Integers) -> Integers:
    return jnp.round(excess * C.astype(jnp.float64)).astype(jnp.int64)


def lowest_numerator(lowest: float) -> int:
    """The least n of factors from `lowest` on."""
    return int(lowest * _D)


def undo_rounds(n: int) -> int:
    """Rounds after which `divide` is exact for numerators from n >= 4 on.

    The error e of C goes to at most e / n + 1: from 2^11 to 1 in 11 / log2(n) + 1 rounds. Then two more: the rounded
    excess jumps at most once within n units, so an error of one cannot come back a third time.
    """
    return 12 // (n.bit_length() - 1) + 3


def products_per_word(n: int) -> int:
    """How many products with numerators from n on fit into a buffer of 64 bits that starts at zero, at worst."""
    count, largest = 0, 0
    # i d + (d - 1) is the largest number on the way; it is a signed one.
    while (largest + 1) * _D <= 2**63:
        count, largest = count + 1, ((largest + 1) * _D - 1) // n
    return count


def multiply_add(C: PyTree, buffer: PyTree, added: PyTree, factor: PyTree) -> tuple[PyTree, PyTree]:
    """(mu C + added, buffer) for trees of integers, and of factors."""
    C, buffer = _pair(jax.tree.map(multiply, C, buffer, factor), C)
    return jax.tree.map(jnp.add, C, added), buffer


def subtract_divide(C: PyTree, buffer: PyTree, added: PyTree, factor: PyTree, rounds: int) -> tuple[PyTree, PyTree]:
    """What `multiply_add` received."""
    undo = lambda C, i, a, factor: divide(C - a, i, factor, rounds)
    return _pair(jax.tree.map(undo, C, buffer, added, factor), C)


def _pair(pairs: PyTree, like: PyTree) -> tuple[PyTree, PyTree]:
    return jax.tree.transpose(jax.tree.structure(like), jax.tree.structure((0, 0)), pairs)
