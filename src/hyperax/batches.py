"""Mini-batches as a pure function of the step."""

from __future__ import annotations

import jax
from jaxtyping import Array, Int, Key


def minibatch(key: Key[Array, ""], t: Int[Array, ""] | int, count: int, size: int) -> Int[Array, " size"]:
    """Indices of the mini-batch B_t: every epoch is a new permutation of the examples, cut into batches.

        epoch e = (t - 1) // (count // size),   B_t = the ((t - 1) mod (count // size))-th batch of permutation e

    Arguments:
        key: decides all permutations; keep it in `data`, so that runs differ by data and not by hidden state.
        t: the step, 1, 2, ...; may be traced.
        count: how many examples there are.
        size: examples a batch; what is left over at the end of an epoch (count mod size) sits out that epoch.

    Returns: int32 indices, shape [size], without repetition.
    Raises: `ValueError` unless 1 <= size <= count.
    Cost: one permutation of the examples a step.
    Reference: Bridge paper 2017, eq. 2.1 (B_t).
    Do not use it with millions of examples: draw indices with replacement there, `jax.random.randint(fold_in(key, t))`.

    >>> import jax, jax.numpy as jnp
    >>> key = jax.random.key(0)
    >>> epoch = jnp.concatenate([minibatch(key, t, 6, 2) for t in (1, 2, 3)])
    >>> sorted(epoch.tolist())
    [0, 1, 2, 3, 4, 5]

    In a problem: `batch=lambda d, t: {**d, "index": hx.minibatch(d["key"], t, len(d["x"]), 32)}`, with an inner
    objective that reads `d["x"][d["index"]]`.
    """
    if not (isinstance(size, int) and isinstance(count, int) and 1 <= size <= count):
        raise ValueError(f"a mini-batch of {size!r} examples cannot be drawn from {count!r}: use 1 <= size <= count")
    per_epoch = count // size
    permutation = jax.random.permutation(jax.random.fold_in(key, (t - 1) // per_epoch), count)
    return jax.lax.dynamic_slice_in_dim(permutation, (t - 1) % per_epoch * size, size)
