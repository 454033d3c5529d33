"""The hypergradient along a few directions, against finite differences and against another exact method."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from hyperax.certificate.curvature import newton
from hyperax.certificate.measuring import Measure, Subject
from hyperax.checks import leaf_name
from hyperax.dynamics import Dynamics
from hyperax.methods.method import Method, unrolled_value
from hyperax.problem import Data, Lam, Problem, Scalar

_WIDER = 10.0
_ALWAYS, _MOST_LEAVES = 8, 64


class Comparison(NamedTuple):
    """The derivative along one unit direction v, found in several ways.

    Fields:
        along: what v moves: "lam", or the name of one leaf.
        hypergradient: <h, v>.
        finite_difference: (f(lam + epsilon v) - f(lam - epsilon v)) / (2 epsilon).
        other: <grad f, v> by the other method; NaN if it could not be computed.
        left, right: the one-sided difference quotients that `finite_difference` is the mean of.
        wide_left, wide_right: the same with 10 epsilon.
        noise: how far rounding alone moves a finite difference, about; less than this says nothing.
    """

    along: str
    hypergradient: float
    finite_difference: float
    other: float
    left: float
    right: float
    wide_left: float
    wide_right: float
    noise: float

    @property
    def relative_error(self) -> float:
        """The distance of hypergradient and finite difference, relative to the larger of the two."""
        largest = max(abs(self.hypergradient), abs(self.finite_difference), float(np.finfo(float).tiny))
        return abs(self.hypergradient - self.finite_difference) / largest

    def off(self, tolerance: float, typical: float) -> bool:
        """Whether the finite difference contradicts the hypergradient, given how far it can be trusted itself.

        Between epsilon and 10 epsilon a smooth f changes the quotient by 99 times the error that it has at epsilon, and
        rounding changes it by about itself.
        """
        error = abs(self.hypergradient - self.finite_difference)
        trust = self.noise + abs(self.finite_difference - (self.wide_left + self.wide_right) / 2)
        return not error <= tolerance * self._scale(typical) + trust

    def contradicted(self, tolerance: float, typical: float) -> bool:
        """Whether the other method contradicts the hypergradient; False if there is none."""
        error = abs(self.hypergradient - self.other)
        return not np.isnan(self.other) and not error <= tolerance * self._scale(typical)

    def kinked(self, typical: float) -> bool:
        """Whether the one-sided quotients disagree, and at epsilon no less than at 10 epsilon: a kink or a jump.

        For a smooth f their distance is epsilon f'', a tenth of what it is at 10 epsilon; at a kink it is the same.
        """
        near, wide = abs(self.right - self.left), abs(self.wide_right - self.wide_left)
        return near > 0.01 * self._scale(typical) + 4 * self.noise and near > 0.3 * wide

    @property
    def finite(self) -> bool:
        """Whether f is finite at all points."""
        return bool(np.isfinite([self.left, self.right, self.wide_left, self.wide_right]).all())

    def _scale(self, typical: float) -> float:
        return max(abs(self.hypergradient), abs(self.finite_difference), 1e-3 * typical)


class Along:
    """Derivatives of f along directions: f at lam and around it, by a measure (value, derivative) of each task.

    Arguments:
        subject: where.
        gradient: the hypergradient, flat.
        measure: the function f and its derivative by another method, for one task.
        mapped: what the measure needs of each task.
        epsilon: the step, in units of lam, or `None`: machine^(1/3) |s|, with the precision of the coarsest type that
            lam passes through, and s the root mean square of the leaf that an entry of lam belongs to (1 for a leaf of
            zeros). Directions are random, their entries in proportion to s, so that a leaf of small numbers (a step
            size) is moved by as small a part of itself as one of large ones.
    """

    def __init__(
        self,
        subject: Subject,
        gradient: Float[np.ndarray, " m"],
        measure: Measure,
        mapped: Any,
        epsilon: float | None,
    ):
        self.gradient = gradient
        self.point, unravel = ravel_pytree(subject.floats)
        self.dtype = subject.precision(measure, subject.floats, subject.floats, mapped)
        self.machine = float(jnp.finfo(self.dtype).eps)
        leaves = jax.tree_util.tree_leaves_with_path(subject.floats)
        self.names = [leaf_name("lam", path) for path, _ in leaves]
        self.leaf_of = np.repeat(np.arange(len(leaves)), [leaf.size for _, leaf in leaves])
        sizes = [float(np.sqrt(np.mean(np.asarray(leaf, np.float64) ** 2))) if leaf.size else 1.0 for _, leaf in leaves]
        self.scales = np.asarray([size if size > 0 else 1.0 for size in sizes])[self.leaf_of]
        self.epsilon = self.machine ** (1 / 3) * float(np.linalg.norm(self.scales)) if epsilon is None else epsilon

        def evaluate(shift: Float[np.ndarray, " m"], v: Float[np.ndarray, " m"]) -> tuple[float, float]:
            as_point = lambda x: unravel(jnp.asarray(x, self.point.dtype))
            point = unravel(self.point + jnp.asarray(shift, self.point.dtype))
            value, slope = subject.each(measure, point, as_point(v), mapped)
            return float(np.mean(value, dtype=np.float64)), float(np.mean(slope, dtype=np.float64))

        self.evaluate: Callable[..., tuple[float, float]] = evaluate

    def random(self, draw: np.random.Generator, count: int) -> list[Comparison]:
        """Along random directions in all of lam."""
        return [self._compare("lam", np.ones(len(self.gradient)), draw) for _ in range(count)]

    def leaves(self, draw: np.random.Generator) -> Iterator[Comparison]:
        """Along a random direction in each leaf of lam."""
        for j, name in enumerate(self.names):
            if (self.leaf_of == j).any():
                yield self._compare(name, self.leaf_of == j, draw)

    def _compare(self, along: str, mask: np.ndarray, draw: np.random.Generator) -> Comparison:
        v = draw.normal(size=self.point.shape) * self.scales * mask
        v = v / np.linalg.norm(v)
        epsilon = self.epsilon * float(np.linalg.norm(self.scales * mask) / np.linalg.norm(self.scales))
        here, other = self.evaluate(0 * v, v)
        at = lambda s: self.evaluate(s * epsilon * v, v)[0]
        right, left = (at(1.0) - here) / epsilon, (here - at(-1.0)) / epsilon
        wide = _WIDER * epsilon
        wide_right, wide_left = (at(_WIDER) - here) / wide, (here - at(-_WIDER)) / wide
        return Comparison(
            along,
            float(self.gradient @ v),
            (left + right) / 2,
            other,
            left,
            right,
            wide_left,
            wide_right,
            10 * self.machine * abs(here) / epsilon,
        )


class Unrolled(eqx.Module):
    """f_T, run from Phi_0, and its derivative along v in forward mode: another exact method than any in reverse."""

    steps: int
    forward: bool = True

    def __call__(
        self, problem: Problem, dynamics: Dynamics, lam: Lam, data: Data, v: Lam, mapped: None
    ) -> tuple[Scalar, Scalar]:
        """(value, derivative)."""

        def f_T(lam: Lam) -> Scalar:
            return unrolled_value(problem, dynamics, self.steps, lam, data, ())[0]

        return _with_derivative(f_T, lam, v, self.forward)


class AtSolution(eqx.Module):
    """f = E(w_lam, lam), w_lam by three steps of Newton's method from the solution at lam, and its derivative along v.

    The derivative of the last of these steps is the implicit function theorem, d w_lam = -H^-1 d grad_w L.
    """

    forward: bool = True

    def __call__(
        self, problem: Problem, dynamics: Dynamics, lam: Lam, data: Data, v: Lam, mapped: Array
    ) -> tuple[Scalar, Scalar]:
        """(value, derivative)."""

        def f(lam: Lam) -> Scalar:
            prepared = problem.prepare(lam, data)
            unravel = ravel_pytree(problem.start(lam, prepared))[1]
            slope = jax.grad(lambda w: problem.objective(prepared, 1)(unravel(w), lam))
            w, _ = newton(slope, mapped, 3, always=True)
            return problem.evaluate(unravel(w), lam, prepared)[0]

        return _with_derivative(f, lam, v, self.forward)


class OwnValue(eqx.Module):
    """The value as the method itself computes it, and no derivative."""

    method: Method
    forward: bool = False

    def __call__(
        self, problem: Problem, dynamics: Dynamics, lam: Lam, data: Data, v: Lam, mapped: None
    ) -> tuple[Scalar, Scalar]:
        """(value, derivative)."""
        carry = self.method.init(problem, dynamics, lam, data)
        value = self.method.value(problem, dynamics, lam, data, carry)[0]
        return value, jnp.full_like(value, jnp.nan)


def _with_derivative(f: Callable[[Lam], Scalar], lam: Lam, v: Lam, forward: bool) -> tuple[Scalar, Scalar]:
    floats, rest = eqx.partition(lam, eqx.is_inexact_array)
    of_floats = lambda floats: f(eqx.combine(floats, rest))
    if forward:
        return jax.jvp(of_floats, (floats,), (v,))
    value = of_floats(floats)
    return value, jnp.full_like(value, jnp.nan)


class Compared(NamedTuple):
    """What `compare` returns: comparisons along random directions and, where those are off, along each leaf of lam.

    Fields:
        against, other_method: what was differenced ("f_T", "f", "own"), and how `Comparison.other` was found.
        dtype: the coarsest type that lam passes through on its way into f.
        epsilon, tolerance: the step, and the relative error that a right gradient stays below.
    """

    comparisons: tuple[Comparison, ...]
    leaves: tuple[Comparison, ...]
    against: str
    other_method: str
    dtype: str
    epsilon: float
    tolerance: float


def compare(
    subject: Subject,
    gradient: np.ndarray,
    solutions: np.ndarray | None,
    draw: np.random.Generator,
    directions: int,
    epsilon: float | None,
) -> Compared:
    """Finite differences and derivatives by another method, of what the method claims to differentiate.

    `solutions` are the inner solutions of the tasks, flat; `None` if they are not known.
    """
    method, mapped = subject.single.method, None
    if method.differentiates == "f" and solutions is not None:
        mapped = jnp.asarray(solutions if subject.tasks is not None else solutions[0])
        measure, against, other = AtSolution(), "f", "the implicit function theorem at the solution, in forward mode"
    elif method.needs_dynamics and method.differentiates != "online" and hasattr(method, "steps"):
        measure, against, other = Unrolled(subject.steps), "f_T", "forward mode through the T steps from Phi_0"
    else:
        measure, against, other = OwnValue(method), "own", "none"
    try:
        along = Along(subject, gradient, measure, mapped, epsilon)
        comparisons = along.random(draw, directions)
    except TypeError as error:
        if "custom_vjp" not in str(error):
            raise
        other = "none: a custom_vjp rule of the objectives has no forward mode"
        along = Along(subject, gradient, dataclasses.replace(measure, forward=False), mapped, epsilon)
        comparisons = along.random(draw, directions)
    tolerance = 3 * along.machine ** (1 / 3)
    if method.differentiates == "f":
        tolerance = max(tolerance, 1e-3)  # w_T and the linear system are solved to some digits, not to all
    typical = float(np.sqrt(np.mean([c.hypergradient**2 for c in comparisons]))) if comparisons else 0.0
    exact = against == method.differentiates
    leaves = []
    off = any(c.off(tolerance, typical) for c in comparisons)
    # Leaf by leaf also where all looks well: an effect that is cut off may be small beside those of other leaves.
    if exact and comparisons and 1 < len(along.names) <= (_MOST_LEAVES if off else _ALWAYS):
        leaves = list(along.leaves(draw))
    return Compared(tuple(comparisons), tuple(leaves), against, other, str(along.dtype), along.epsilon, tolerance)
