"""The set Lambda of the outer variables: "where may lam go?", kept by a change of variables or by projection.

Every set works on one whole leaf of lam at a time, so a set that couples the entries of a leaf (`simplex.py`) fits the
same five operations as one that does not.
"""

from __future__ import annotations

import abc
from typing import ClassVar, TypeAlias, final

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, Float

Leaf: TypeAlias = Float[Array, "..."]
Mask: TypeAlias = Bool[Array, "..."]


class Constraint(eqx.Module):
    """A set for one leaf of lam, with the two ways to stay in it.

    By bijection (the default of `minimize`) the optimizer moves a free variable u, and

        lam = forward(u),   grad_u f = J_forward(u)^T grad_lam f

    By projection (`Projected(set)`) it moves lam itself, and each update ends at the nearest point of the set.
    A method computes grad_lam f in the ambient space, as if there were no set, in both; only what the optimizer sees
    differs. A solution has J_forward(u)^T grad_lam f = 0 by bijection, lam = project(lam - grad_lam f) by projection.

    Cost: one elementwise pass over the leaf; nothing next to one hypergradient.
    Reference: Franceschi et al. 2018 (ICML), the set Lambda of eq. 1.
    Do not use a bijection where the optimum is on the border (u runs to infinity, ever more slowly): project there.
    """

    couples: ClassVar[bool] = False
    """Whether the set couples the entries of a leaf, so that none is inside on its own."""

    bijective: ClassVar[bool] = True
    """Whether there is a bijection; without one the set is for `Projected` alone."""

    @abc.abstractmethod
    def forward(self, u: Leaf) -> Leaf:
        """The point of the set that the free variable u stands for."""

    @abc.abstractmethod
    def inverse(self, lam: Leaf) -> Leaf:
        """The free variable of a point inside the set: forward(inverse(lam)) = lam up to rounding."""

    @abc.abstractmethod
    def project(self, lam: Leaf) -> Leaf:
        """The point of the closed set nearest to lam, in the Euclidean norm."""

    @abc.abstractmethod
    def interior(self, lam: Leaf) -> Mask:
        """Which entries are strictly inside, where `inverse` is finite."""

    @abc.abstractmethod
    def closure(self, lam: Leaf) -> Mask:
        """Which entries are inside or on the border."""


class _HalfLine(Constraint):
    """What the two sets of positive numbers share."""

    def project(self, lam: Leaf) -> Leaf:
        """max(lam, 0)."""
        return jnp.maximum(lam, 0)

    def interior(self, lam: Leaf) -> Mask:
        """0 < lam < infinity."""
        return (lam > 0) & jnp.isfinite(lam)

    def closure(self, lam: Leaf) -> Mask:
        """0 <= lam < infinity."""
        return (lam >= 0) & jnp.isfinite(lam)


@final
class Positive(_HalfLine):
    """The positive numbers.

        lam = log(1 + exp(u)),   u = lam + log(1 - exp(-lam)),   project(lam) = max(lam, 0)

    Near 0 the bijection acts like exp (u is the logarithm of lam), far from 0 like the identity, so no u overflows;
    below the smallest normal number of the type lam stays at that number, so that log(lam) is finite.

    Cost: elementwise.
    Do not use it by projection for what must not be 0 (a step size that divides): projection reaches the border.

    >>> import jax.numpy as jnp
    >>> Positive().forward(jnp.array([0.0, 1e30])).tolist()
    [0.69314, 1e+30]
    """

    def forward(self, u: Leaf) -> Leaf:
        """log(1 + exp(u))."""
        return jnp.maximum(jax.nn.softplus(u), jnp.finfo(u.dtype).tiny)

    def inverse(self, lam: Leaf) -> Leaf:
        """The inverse, as lam + log(1 - exp(-lam)), which unlike log(exp(lam) - 1) neither overflows nor cancels."""
        return lam + jnp.log(-jnp.expm1(-lam))


@final
class Logarithmic(_HalfLine):
    """The positive numbers, moved on a logarithmic scale.

        lam = exp(u),   u = log(lam),   project(lam) = max(lam, 0)

    An update of u multiplies lam, whatever its size; below the smallest normal number of the type lam stays there, so
    that log(lam) is finite.

    Cost: elementwise.
    Do not use it where lam may have to grow far in one update (exp overflows): `Positive` is linear far from 0.

    >>> import jax.numpy as jnp
    >>> Logarithmic().inverse(jnp.array([1.0, 100.0])).tolist()
    [0.0, 4.60517]
    """

    def forward(self, u: Leaf) -> Leaf:
        """exp(u)."""
        return jnp.maximum(jnp.exp(u), jnp.finfo(u.dtype).tiny)

    def inverse(self, lam: Leaf) -> Leaf:
        """log(lam)."""
        return jnp.log(lam)


class _Interval(Constraint):
    """What the sets between two bounds share."""

    @abc.abstractmethod
    def _bounds(self, like: Leaf) -> tuple[Leaf, Leaf]:
        """Low and high, in the type of `like`."""

    def forward(self, u: Leaf) -> Leaf:
        """Low + (high - low) sigmoid(u), measured from the nearer bound."""
        # sigmoid(u) rounds to 1 at u = 17 in float32, and its derivative s (1 - s) to 0; sigmoid(-u) does not, so the
        # upper half is computed from `high`. That also makes rounding beyond a bound impossible.
        low, high = self._bounds(u)
        below = u < 0
        share = (high - low) * jax.nn.sigmoid(jnp.where(below, u, -u))
        return jnp.where(below, low + share, high - share)

    def inverse(self, lam: Leaf) -> Leaf:
        """log((lam - low) / (high - lam))."""
        low, high = self._bounds(lam)
        return jnp.log(lam - low) - jnp.log(high - lam)

    def project(self, lam: Leaf) -> Leaf:
        """clip(lam, low, high)."""
        return jnp.clip(lam, *self._bounds(lam))

    def interior(self, lam: Leaf) -> Mask:
        """Strictly between the bounds."""
        low, high = self._bounds(lam)
        return (low < lam) & (lam < high)

    def closure(self, lam: Leaf) -> Mask:
        """Between the bounds, or on one."""
        low, high = self._bounds(lam)
        return (low <= lam) & (lam <= high)


@final
class Box(_Interval):
    """The numbers between two bounds.

        lam = low + (high - low) sigmoid(u),   u = log((lam - low) / (high - lam))
        project(lam) = clip(lam, low, high)

    Arguments:
        low, high: finite, low < high; numbers, or arrays that broadcast to the leaf, in the units of lam.

    For large |u| lam may round to a bound but never passes it, and the derivative stays right until it underflows.

    Raises: ValueError if a bound is infinite or low >= high.
    Cost: elementwise.
    Do not use it with bounds far wider than where lam lives: the bijection is then almost linear and does nothing.

    >>> import jax.numpy as jnp
    >>> Box(0.0, 4.0).forward(jnp.array([-1e9, 0.0, 1e9])).tolist()
    [0.0, 2.0, 4.0]
    """

    low: ArrayLike
    high: ArrayLike

    def __check_init__(self) -> None:
        low, high = np.asarray(self.low), np.asarray(self.high)
        if not (np.isfinite(low).all() and np.isfinite(high).all() and (low < high).all()):
            raise ValueError(
                f"Box(low={self.low}, high={self.high}) needs finite bounds with low < high; use Positive() for a "
                "lower bound of 0 alone, and None for no constraint."
            )

    def _bounds(self, like: Leaf) -> tuple[Leaf, Leaf]:
        return jnp.asarray(self.low, like.dtype), jnp.asarray(self.high, like.dtype)


@final
class UnitInterval(_Interval):
    """The numbers between 0 and 1 (weights of examples, momentum, mixing coefficients).

        lam = sigmoid(u),   u = log(lam / (1 - lam)),   project(lam) = clip(lam, 0, 1)

    Cost: elementwise.
    Do not use it by bijection for what should reach 0 or 1 exactly (weights that drop examples): project.

    >>> import jax.numpy as jnp
    >>> UnitInterval().project(jnp.array([-0.5, 0.25, 3.0])).tolist()
    [0.0, 0.25, 1.0]
    """

    def _bounds(self, like: Leaf) -> tuple[Leaf, Leaf]:
        return jnp.zeros((), like.dtype), jnp.ones((), like.dtype)


@final
class Projected(Constraint):
    """A set kept by projection after each outer update, in place of a change of variables.

        lam_{k+1} = project(lam_k - optimizer's update)

    Arguments:
        set: the set, for instance `Box(0.0, 1.0)`.

    lam may start, and end, on the border. The optimizer sees the hypergradient grad as it is, in the ambient space. At
    an optimum on the border it is not zero; what `minimize` records as `gradient_norm` is the norm of
    lam - project(lam - grad), which is.

    Cost: that of the set's projection: elementwise, or a sort (`Simplex`, `CappedSimplex`).
    Do not use it with an optimizer that rescales entries (Adam) and a set that couples them: the projection is
    Euclidean, the update is not.

    >>> import jax.numpy as jnp
    >>> float(Projected(Box(0.0, 1.0)).project(jnp.asarray(1.5)))
    1.0
    """

    set: Constraint

    def __check_init__(self) -> None:
        if not isinstance(self.set, Constraint) or isinstance(self.set, Projected):
            raise ValueError(f"Projected({self.set!r}): give it a set, for instance Projected(Box(0.0, 1.0)).")

    def forward(self, u: Leaf) -> Leaf:
        """The identity: the optimizer moves lam itself."""
        return u

    def inverse(self, lam: Leaf) -> Leaf:
        """The identity."""
        return lam

    def project(self, lam: Leaf) -> Leaf:
        """The projection of the set."""
        return self.set.project(lam)

    def interior(self, lam: Leaf) -> Mask:
        """The closed set: projection has no trouble with the border."""
        return self.set.closure(lam)

    def closure(self, lam: Leaf) -> Mask:
        """The closed set."""
        return self.set.closure(lam)
