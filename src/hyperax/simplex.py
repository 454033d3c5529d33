"""Sets that couple the entries of a leaf: weights that sum to one, weights with a budget."""

from __future__ import annotations

from typing import ClassVar, NoReturn, final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from hyperax.constraints import Constraint, Leaf, Mask


@final
class Simplex(Constraint):
    """The weights that are not negative and sum to one, over all entries of a leaf.

        lam = softmax(u),   u = log lam - mean(log lam)
        project(lam) = max(lam - tau, 0),   with the tau that makes the sum 1

    The u of a lam is fixed up to a constant, which changes nothing; `inverse` takes the one of mean zero. On the
    simplex only the part of the hypergradient along it matters, grad - mean(grad): a constant added to all entries of
    grad changes neither the update through softmax nor the projection.

    Cost: elementwise; the projection sorts the leaf, O(n log n).
    Reference: Duchi et al. 2008, Fig. 1 (projection).
    Do not use the bijection where the optimum has weights that are exactly 0: use `Projected(Simplex())` there.

    >>> import jax.numpy as jnp
    >>> from hyperax.constraints import Projected
    >>> Simplex().forward(jnp.zeros(4)).tolist()
    [0.25, 0.25, 0.25, 0.25]
    >>> Projected(Simplex()).project(jnp.array([2.0, 1.5, -3.0])).tolist()
    [0.75, 0.25, 0.0]
    """

    couples: ClassVar[bool] = True

    def forward(self, u: Leaf) -> Leaf:
        """Softmax over the whole leaf; what underflows stays at the smallest normal number, so that log is finite."""
        return jnp.maximum(jax.nn.softmax(u.ravel()), jnp.finfo(u.dtype).tiny).reshape(u.shape)

    def inverse(self, lam: Leaf) -> Leaf:
        """The free variables of mean zero."""
        u = jnp.log(lam)
        return u - jnp.mean(u)

    def project(self, lam: Leaf) -> Leaf:
        """max(lam - tau, 0); a point of the set stays as it is, to the last bit."""
        flat = lam.ravel()
        # The largest entry moves to 0: tau is then between -1 and 0 however large lam is, and the differences of all
        # entries that stay positive are exact.
        shifted = flat - jnp.max(flat)
        descending = jnp.sort(shifted, descending=True)
        count = jnp.arange(1, flat.size + 1)
        tau = (jnp.cumsum(descending) - 1) / count
        last = jnp.sum(descending > tau) - 1
        nearest = _corrected(shifted, tau[last], jnp.ones((), lam.dtype), high=jnp.inf)
        return jnp.where(self.closure(lam), lam, nearest.reshape(lam.shape))

    def interior(self, lam: Leaf) -> Mask:
        """Positive entries, all of them if the sum is 1 within rounding and none otherwise."""
        return (lam > 0) & self._sums_to_one(lam)

    def closure(self, lam: Leaf) -> Mask:
        """Entries that are not negative, all of them if the sum is 1 within rounding and none otherwise."""
        return (lam >= 0) & self._sums_to_one(lam)

    def _sums_to_one(self, lam: Leaf) -> Bool[Array, ""]:
        return jnp.abs(jnp.sum(lam) - 1) <= _rounding(lam)


@final
class CappedSimplex(Constraint):
    """The weights between 0 and 1 with a sum of at most R, over all entries of a leaf: a budget of R whole examples.

        project(lam) = clip(lam, 0, 1) if that sums to R or less,
                       else clip(lam - tau, 0, 1), with the tau > 0 that makes the sum R

    Arguments:
        total: R > 0, finite; from the size of the leaf on it changes nothing.

    tau is found exactly, among the breakpoints lam and lam - 1 of the sum, which falls linearly between them: no
    tolerance, no iteration. The set has no useful bijection: write `Projected(CappedSimplex(R))`.

    Raises: ValueError if R is not a positive number, and without `Projected` when lam is to start in it.
    Cost: a sort of 2 n numbers, O(n log n).
    Reference: Franceschi et al. 2017 (ICML), Sec. 5.1 (data hyper-cleaning).
    Do not use it with Adam where the exact path matters: the projection is Euclidean, Adam's steps are not.

    >>> import jax.numpy as jnp
    >>> from hyperax.constraints import Projected
    >>> Projected(CappedSimplex(1.5)).project(jnp.array([2.0, 0.75, 0.25, -1.0])).tolist()
    [1.0, 0.5, 0.0, 0.0]
    """

    total: float
    couples: ClassVar[bool] = True
    bijective: ClassVar[bool] = False

    def __check_init__(self) -> None:
        total = np.asarray(self.total)
        if total.ndim != 0 or total.dtype.kind not in "if" or not (np.isfinite(total) and total > 0):
            raise ValueError(
                f"CappedSimplex(total={self.total!r}) needs a positive, finite number: the largest sum of the weights."
            )

    def forward(self, u: Leaf) -> NoReturn:
        """Refused: there is none."""
        self._refuse()

    def inverse(self, lam: Leaf) -> NoReturn:
        """Refused: there is none."""
        self._refuse()

    def project(self, lam: Leaf) -> Leaf:
        """The nearest point, clip(lam - tau, 0, 1)."""
        flat = lam.ravel()
        total = jnp.asarray(self.total, lam.dtype)
        clipped = jnp.clip(flat, 0, 1)
        # With u the ceil(R)-th largest entry, u - 1 <= tau <= u: what is 1 or further from u ends at 0 or 1 either way,
        # and beside it the breakpoints lie within 2 of each other, however large lam is.
        largest = jnp.clip(jnp.ceil(total).astype(int), 1, flat.size)
        near = jnp.clip(flat - jnp.sort(flat, descending=True)[largest - 1], -1, 1)
        nearest = _corrected(near, _threshold(near, total), total, high=1.0)
        return jnp.where(jnp.sum(clipped) <= total + self._slack(lam), clipped, nearest).reshape(lam.shape)

    def interior(self, lam: Leaf) -> Mask:
        """Entries strictly between 0 and 1, all of them if the sum is below R and none otherwise."""
        return (lam > 0) & (lam < 1) & (jnp.sum(lam) < jnp.asarray(self.total, lam.dtype))

    def closure(self, lam: Leaf) -> Mask:
        """Entries in [0, 1], all of them if the sum is at most R within rounding and none otherwise."""
        total = jnp.asarray(self.total, lam.dtype)
        return (lam >= 0) & (lam <= 1) & (jnp.sum(lam) <= total + self._slack(lam))

    def _slack(self, lam: Leaf) -> Float[Array, ""]:
        return _rounding(lam) * jnp.asarray(self.total, lam.dtype)

    def _refuse(self) -> NoReturn:
        raise ValueError(f"{self!r} has no bijection: keep lam in it by projection, Projected({self!r}).")


def _rounding(lam: Leaf) -> Float[Array, ""]:
    """By how much, relatively, a sum of n positive numbers may be off: about sqrt(n) roundings, and some room."""
    return jnp.asarray(8 * float(jnp.finfo(lam.dtype).eps) * max(1.0, lam.size**0.5), lam.dtype)


def _threshold(flat: Float[Array, " n"], total: Float[Array, ""]) -> Float[Array, ""]:
    """The tau with sum clip(lam - tau, 0, 1) = R, for 0 < R < n.

    From the largest breakpoint downwards the sum grows from 0, with as many units per unit of tau as there are entries
    strictly between 0 and 1: one more after each breakpoint lam_i, one fewer after each lam_i - 1.
    """
    breakpoints = jnp.concatenate([flat, flat - 1])
    change = jnp.concatenate([jnp.ones_like(flat), -jnp.ones_like(flat)])
    order = jnp.argsort(-breakpoints)
    breakpoints, slope = breakpoints[order], jnp.cumsum(change[order])
    grown = jnp.cumsum(slope[:-1] * -jnp.diff(breakpoints))  # the sum at breakpoint j + 1
    # Rounding may leave the sum just below R to the end, or carry it to R where it is flat.
    first = jnp.argmax(grown >= jnp.minimum(total, jnp.max(grown)))
    return breakpoints[first + 1] + (grown[first] - total) / jnp.maximum(slope[first], 1)


def _corrected(
    flat: Float[Array, " n"], tau: Float[Array, ""], total: Float[Array, ""], high: float
) -> Float[Array, " n"]:
    """clip(lam - tau, 0, high), with what the rounding of tau left of the sum shared among the entries inside."""
    point = jnp.clip(flat - tau, 0, high)
    inside = (point > 0) & (point < high)
    excess = (jnp.sum(point) - total) / jnp.maximum(jnp.sum(inside), 1)
    return jnp.where(inside, jnp.clip(point - excess, 0, high), point)
