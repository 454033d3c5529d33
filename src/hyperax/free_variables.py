"""Between lam and what the optimizer moves: the free variables u, one array for each array leaf of lam."""

from __future__ import annotations

from typing import Any, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from hyperax.constraints import Constraint, Projected

Sets: TypeAlias = tuple[Constraint | None, ...]
"""One entry for each array leaf of lam, in the order of `jax.tree.leaves`; `None` is a free leaf."""


def resolve(constraint: PyTree, lam: PyTree) -> Sets:
    """The sets of all array leaves of lam, from one set or a pytree prefix of lam with sets and `None`.

    Arguments:
        constraint: a `Constraint`, `None`, or a prefix of lam with those at its leaves.
        lam: the arrays of lam, `None` elsewhere.

    Raises: ValueError if `constraint` is no prefix of lam, or lam does not start inside (on the border is fine under
    `Projected`), naming the leaf.

    >>> import jax.numpy as jnp
    >>> from hyperax.constraints import Positive
    >>> resolve({"decay": Positive(), "net": None}, {"decay": jnp.ones(()), "net": [jnp.ones(2), jnp.zeros(2)]})
    (Positive(), None, None)
    """
    sets: list[Constraint | None] = []

    def spread(path: Any, entry: Any, part: PyTree) -> None:
        leaves = jax.tree_util.tree_leaves_with_path(part)
        if leaves and not (entry is None or isinstance(entry, Constraint)):
            raise ValueError(
                f"constraint{jax.tree_util.keystr(path)} is {entry!r}; use a set (Positive(), Box(low, high), "
                "UnitInterval(), Simplex(), Projected(...)) or None for no constraint."
            )
        if not leaves and isinstance(entry, Constraint):
            raise ValueError(
                f"constraint{jax.tree_util.keystr(path)} is {entry!r}, and lam has no hyperparameter there; in a "
                "module only arrays are: make the number an array, or give None."
            )
        for inner, leaf in leaves:
            if entry is not None:
                _require_inside(entry, leaf, f"lam{jax.tree_util.keystr((*path, *inner))}")
            sets.append(entry)

    def is_entry(node: Any) -> bool:
        return node is None or isinstance(node, Constraint)

    try:
        # A prefix that does not fit is found by the flattening, before `spread` sees anything.
        jax.tree.map(lambda entry, part: None, constraint, lam, is_leaf=is_entry)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"constraint does not fit lam: {error}. Give one set for all of lam, or a pytree with the upper levels "
            "of lam and a set or None at each leaf."
        ) from None
    jax.tree_util.tree_map_with_path(spread, constraint, lam, is_leaf=is_entry)
    return tuple(sets)


def _require_inside(entry: Constraint, leaf: Array, name: str) -> None:
    if not entry.bijective:
        raise ValueError(f"{entry!r} for {name}: the set has no bijection; keep lam in it by Projected({entry!r}).")
    try:
        inside = np.asarray(jnp.broadcast_to(entry.interior(leaf), leaf.shape))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{entry!r} does not broadcast to {name} of shape {leaf.shape}: {error}") from None
    if inside.all():
        return
    if isinstance(entry, Projected):
        advice = f"start inside it, for instance at {entry.set!r}.project(lam)"
    else:
        advice = f"start strictly inside, or keep it there by projection: Projected({entry!r})"
    if (entry.set if isinstance(entry, Projected) else entry).couples:
        found = np.asarray(leaf)
        raise ValueError(
            f"{name}, with entries from {found.min():.6g} to {found.max():.6g} and sum {found.sum():.9g}, is not "
            f"inside {entry!r}; {advice}."
        )
    index = cast(tuple[int, ...], tuple(int(i) for i in np.argwhere(~inside)[0]))
    where = f"{name}[{', '.join(map(str, index))}]" if index else name
    raise ValueError(f"{where} = {leaf[index]} is not inside {entry!r}; {advice}.")


def _each(function: Any, sets: Sets, tree: PyTree) -> PyTree:
    leaves, structure = jax.tree.flatten(tree)
    assert len(leaves) == len(sets)
    return jax.tree.unflatten(structure, [function(s, leaf) for s, leaf in zip(sets, leaves, strict=True)])


def free(sets: Sets, lam: PyTree) -> PyTree:
    """The free variables u of lam: `inverse` leaf by leaf."""
    return _each(lambda s, leaf: leaf if s is None else s.inverse(leaf), sets, lam)


def constrained(sets: Sets, u: PyTree) -> PyTree:
    """The lam of the free variables u: `forward` leaf by leaf."""
    return _each(lambda s, leaf: leaf if s is None else s.forward(leaf), sets, u)


def projected(sets: Sets, u: PyTree) -> PyTree:
    """Project what is kept by projection, and leave the rest."""
    return _each(lambda s, leaf: s.project(leaf) if isinstance(s, Projected) else leaf, sets, u)


def residual(sets: Sets, u: PyTree, grad: PyTree) -> PyTree:
    """What is zero at a solution: the gradient, or u - project(u - grad) for what is kept by projection."""
    moved = projected(sets, jax.tree.map(lambda a, g: a - g, u, grad))
    leaves = zip(sets, *(jax.tree.leaves(tree) for tree in (u, grad, moved)), strict=True)
    return [a - p if isinstance(s, Projected) else g for s, a, g, p in leaves]
