"""Which part of one network is learned from a common start in every task, and which part all tasks share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from hyperax.fewshot.networks import Network, stages_of

Filter = bool | Callable[[Any], Any]
"""`True`: the whole network is adapted, `False`: nothing of it. Else a function: network -> a tree like it, or a prefix
of one, of `True`, `False` and boolean arrays that broadcast to the leaf."""

Masks = Any
"""A tree like the network: for each floating-point array `True`, `False` or a boolean array, elsewhere `None`."""


class LastStages(eqx.Module):
    """A filter in depth: lower stages are hyperparameters, the upper ones are initialised and adapted.

    Arguments:
        count: how many stages are adapted; a stage is a layer of `OmniglotNet` and `C4L`, a block of `ResidualNet`.

    Raises: `ValueError` for count < 1, and for a network with fewer stages.
    Reference: Bridge paper 2017, end of Sec. 4 (in depth).
    Do not use it on a network without the property `stages`: that has a single one.

    >>> from hyperax.fewshot import OmniglotNet
    >>> mask = LastStages(1)(OmniglotNet((28, 28, 1), jax.random.key(0)))
    >>> [convolution.weight for convolution in mask.convolutions]
    [False, False, False, True]
    """

    count: int

    def __check_init__(self):
        if isinstance(self.count, bool) or not isinstance(self.count, int) or self.count < 1:
            raise ValueError(f"count is {self.count!r}; it must be a whole number of stages, at least 1")

    def __call__(self, network: Network) -> Any:
        """The tree of truth values."""
        stages = stages_of(network)
        if len(stages) < self.count:
            raise ValueError(
                f"{type(network).__name__} has {len(stages)} stages, and the last {self.count} are to be adapted: use "
                "a smaller count, or True for the whole network"
            )
        nothing = jax.tree.map(lambda _: False, network)
        upper = lambda tree: jax.tree.leaves(stages_of(tree)[-self.count :])
        return eqx.tree_at(upper, nothing, replace_fn=lambda _: True)


class ShareOfFilters(eqx.Module):
    """A filter in width: the first filters of every layer are initialised and adapted, the others hyperparameters.

        the first ceil(share c) of the c entries along the last axis of every array are adapted

    Arguments:
        share: in (0, 1].

    In this package's networks the last axis counts filters: weights [size, size, inputs, outputs], shifts [outputs].

    Raises: `ValueError` for a share outside (0, 1].
    Reference: Bridge paper 2017, end of Sec. 4 (in width).
    Do not use it for layers with the outputs on another axis (Equinox's): write a filter of your own.

    >>> import jax.numpy as jnp
    >>> ShareOfFilters(0.5)({"weight": jnp.zeros((3, 3, 1, 4))})["weight"].tolist()
    [True, True, False, False]
    """

    share: float

    def __check_init__(self):
        if not 0 < self.share <= 1:
            raise ValueError(f"share is {self.share!r}; it must be over 0 and at most 1")

    def __call__(self, network: Network) -> Any:
        """The tree of boolean arrays, each as long as the last axis."""

        def first(leaf: Any) -> Any:
            if not eqx.is_inexact_array(leaf) or leaf.ndim == 0:
                return False
            return np.arange(leaf.shape[-1]) < np.ceil(self.share * leaf.shape[-1])

        return jax.tree.map(first, network)


def masks_of(adapted: Filter, network: Network) -> Masks:
    """What a filter says of each array of a network.

    Raises: `ValueError` for a tree that does not fit the network, and for entries that are neither truth values nor
    boolean arrays that broadcast to the leaf.
    """
    found = adapted(network) if callable(adapted) else adapted
    arrays = eqx.filter(network, eqx.is_inexact_array)
    try:
        spread = jax.tree.map(lambda mask, part: jax.tree.map(lambda _: mask, part), found, arrays)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the filter must return a tree like the network, or a prefix of one; for {jax.tree.structure(arrays)} it "
            f"returned {jax.tree.structure(found)}: start from jax.tree.map(lambda _: False, network)"
        ) from error
    return jax.tree.map(_checked, spread, arrays)


def _checked(mask: Any, leaf: Any) -> Any:
    if isinstance(mask, bool | np.bool_):
        return bool(mask)
    if getattr(mask, "dtype", None) == np.bool_ and _broadcasts(mask.shape, leaf.shape):
        return mask
    raise ValueError(
        f"the filter has {mask!r} for an array of shape {leaf.shape}: use True, False or a boolean array that "
        "broadcasts to that shape"
    )


def _broadcasts(shape: tuple[int, ...], into: tuple[int, ...]) -> bool:
    try:
        return np.broadcast_shapes(shape, into) == into
    except ValueError:
        return False


def adapted_part(masks: Masks, network: Network) -> Any:
    """What a task has its own copy of: the arrays that the masks do not exclude, `None` elsewhere."""
    arrays = eqx.filter(network, eqx.is_inexact_array)
    return jax.tree.map(lambda mask, leaf: None if mask is False else leaf, masks, arrays)


def merged(masks: Masks, own: Any, network: Network) -> Network:
    """The network of a task: its own entries where the masks are true, those of all tasks elsewhere."""
    arrays, rest = eqx.partition(network, eqx.is_inexact_array)

    def entry(mask: Any, mine: Any, shared: Any) -> Any:
        return shared if mask is False or mask is None else mine if mask is True else jnp.where(mask, mine, shared)

    return eqx.combine(jax.tree.map(entry, masks, own, arrays, is_leaf=lambda node: node is None), rest)


def shared_stages(masks: Masks) -> int:
    """How many of the first stages have nothing that is adapted: their activations are computed once a task."""
    adapted = [any(mask is not False for mask in jax.tree.leaves(stage)) for stage in stages_of(masks)]
    return adapted.index(True) if True in adapted else len(adapted)
