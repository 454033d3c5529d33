"""Is this hypergradient right? Finite differences and forward mode, for a training step in PyTorch."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.flatten_util import ravel_pytree

from hyperax.certificate.differences import Along, Comparison
from hyperax.precision import float64
from hyperax.rollout import check_steps
from hyperax.torch.checks import variables_of
from hyperax.torch.crossing import is_torch, to_jax, to_torch
from hyperax.torch.hypergradient import TorchHypergradient
from hyperax.torch.problem import floats_of


@dataclass(frozen=True)
class TorchCertificate:
    """What `hyperax.torch.certify` found; `print` it.

    Fields:
        method, target: the method, and what it claims to differentiate: "f_T", "f" or "approximately" (f_T).
        dtype: the coarsest precision of lam, the state and f_T: what finite differences are limited by.
        value, gradient_norm: f_T(lam) and the norm of the hypergradient.
        comparisons: along random unit directions: hypergradient, finite difference of f_T, forward mode (`Comparison`).
        leaves: the same along each leaf of lam, if there are several.
        epsilon: the step of the finite differences, in units of lam.
        seconds: the time of one hypergradient.
        verdict: what the hypergradient is, in a sentence.
        advice: what looks wrong and what to do; empty if nothing does.
    """

    method: str
    target: str
    dtype: str
    value: float
    gradient_norm: float
    comparisons: tuple[Comparison, ...]
    leaves: tuple[Comparison, ...]
    epsilon: float
    seconds: float
    verdict: str
    advice: tuple[str, ...]

    def __str__(self) -> str:
        rows = (*self.comparisons, *self.leaves)
        width = max((len(row.along) for row in rows), default=5)
        lines = (
            self.verdict,
            f"  {self.method} in {self.dtype}: value {self.value:.6g}, gradient norm {self.gradient_norm:.6g}, "
            f"{self.seconds:.2g} s",
            f"    {'along':{width}s}  hypergradient  finite difference   forward mode     error",
            *(
                f"    {row.along:{width}s}  {row.hypergradient:13.6g} {row.finite_difference:18.6g}"
                f" {row.other:14.6g} {row.relative_error:9.0e}"
                for row in rows
            ),
            *(f"  ! {sentence}" for sentence in self.advice),
        )
        return "\n".join(lines if self.advice else (*lines, "  nothing looks wrong"))


class _Subject:
    """What `Along` measures: f_T of a problem in PyTorch around one lam."""

    def __init__(self, function: TorchHypergradient, lam: Any, data: Any, dtype: torch.dtype):
        self.function, self.lam, self.data = function, lam, data
        self.floats, self.dtype = to_jax(lam), dtype
        self.no_forward = ""

    def precision(self, measure: Any, floats: Any, shared: Any, mapped: Any) -> np.dtype:
        """The coarsest type on the way; read from the tensors, for there is no trace."""
        return np.dtype(str(self.dtype).removeprefix("torch."))

    def each(self, measure: Any, point: Any, v: Any, mapped: Any) -> tuple[np.ndarray, np.ndarray]:
        """(f_T, its derivative along v), the latter at lam itself only: elsewhere nobody asks for it."""
        at, direction = (
            jax.tree.map(lambda x, like: x.to(like), to_torch(tree, self.function.problem.device), self.lam)
            for tree in (point, v)
        )
        if all(torch.equal(x, y) for x, y in zip(floats_of(at), floats_of(self.lam), strict=True)):
            try:
                value, slope = self.function.along(at, direction, self.data)
                return np.asarray([float(value)]), np.asarray([float(slope)])
            except ValueError as error:  # operations without a forward rule: finite differences have to do
                self.no_forward = str(error)
        return np.asarray([float(self.function.value(at, self.data))]), np.asarray([math.nan])


def certify(
    hypergradient: TorchHypergradient,
    lam: Any,
    data: Any = None,
    *,
    directions: int = 3,
    epsilon: float | None = None,
    seed: int = 0,
) -> TorchCertificate:
    """Whether a hypergradient of a step in PyTorch is right at lam.

        <h, v>  against  (f_T(lam + epsilon v) - f_T(lam - epsilon v)) / (2 epsilon)  and forward mode,  |v| = 1

    Arguments:
        hypergradient: what `hyperax.torch.hypergradient` returned.
        lam, data: where to look; tensors or JAX arrays.
        directions: how many directions v, at least one.
        epsilon: the step along v; by default machine precision^(1/3) times the norm of lam, and where that settles
            nothing a tenth and a hundredth of it.
        seed: of the directions.

    Returns: a `TorchCertificate`; its `advice` is empty if nothing looks wrong.
    Raises: `ValueError` for what is not such a function, a method without steps or online (`RealTime`),
        directions < 1 or epsilon <= 0.
    Cost: one hypergradient; for every direction, and every leaf of lam up to eight, five plain inner runs and one in
    forward mode; three times that where the first epsilon settles nothing.
    Reference: Franceschi et al. 2018, eq. 6.
    Do not use it in float32 for more than three digits: a module and data in float64 give ten (`module.double()`). Nor
    for convergence or curvature of the inner problem: `hyperax.certify` measures them, of problems in JAX.

    >>> import hyperax as hx
    >>> from hyperax.torch import Problem, hypergradient, inner_gradient
    >>> def step(t, w, lam, batch):
    ...     return w - 0.25 * inner_gradient(lambda w: (w - lam) ** 4, w)
    >>> lam = torch.tensor(1.0, dtype=torch.float64)
    >>> problem = Problem(step, outer=lambda w, lam, data: w**2, init=lambda lam, data: 0 * lam)
    >>> print(certify(hypergradient(problem, hx.Reverse(5)), lam))
    The gradient of f_T to ... digits.
    ...
      nothing looks wrong
    """
    if not isinstance(hypergradient, TorchHypergradient):
        raise ValueError(f"certify needs what hyperax.torch.hypergradient returns, not {type(hypergradient).__name__}")
    method = hypergradient.method
    if method.differentiates == "online" or not hasattr(method, "steps"):
        raise ValueError(f"{type(method).__name__} has no f_T of its own: certify Reverse with as many steps")
    check_steps(directions, "directions", 1)
    if epsilon is not None and not epsilon > 0:
        raise ValueError(f"epsilon is {epsilon!r}; it must be a positive number, or None for a default")
    with float64():  # lam may be in float64 whatever JAX is told elsewhere
        lam = variables_of(lam) if is_torch(lam) else to_torch(lam, hypergradient.problem.device)
        data = to_torch(data, hypergradient.problem.device)
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* is not finite", RuntimeWarning)  # the verdict says it
            h = hypergradient(lam, data)
        seconds = time.perf_counter() - start
        types = {x.dtype for x in floats_of((lam, h.state, h.value))}
        dtype = max(types, key=lambda dtype: torch.finfo(dtype).eps)
        gradient = np.asarray(ravel_pytree(to_jax(h.grad))[0], np.float64)
        finite = bool(np.isfinite(gradient).all()) and math.isfinite(float(h.value))
        subject, tried = _Subject(hypergradient, lam, data, dtype), []
        for shrink in _SHRINK if finite and epsilon is None else (1.0,):
            step = tried[0].epsilon * shrink if tried else epsilon
            along = Along(subject, gradient, None, None, step)  # pyright: ignore[reportArgumentType]
            draw = np.random.default_rng(seed)
            comparisons = tuple(along.random(draw, directions)) if finite else ()
            several = finite and 1 < len(along.names) <= 8 and method.differentiates == "f_T"
            leaves = tuple(along.leaves(draw)) if several else ()
            tried.append(_Tried(along.epsilon, 3 * along.machine ** (1 / 3), comparisons, leaves))
            if tried[-1].settled:
                break
    best = min(tried, key=lambda one: one.doubt)
    verdict, advice = _judged(method.differentiates, finite, tried, best)
    if subject.no_forward:
        advice = (*advice, f"There is nothing from forward mode to compare with: {subject.no_forward}")
    settings = ", ".join(f"{name}={value}" for name, value in vars(method).items() if value is not None)
    return TorchCertificate(
        f"{type(method).__name__}({settings})",
        method.differentiates,
        str(dtype).removeprefix("torch."),
        float(h.value),
        float(jnp.linalg.norm(gradient)),
        best.comparisons,
        best.leaves,
        best.epsilon,
        seconds,
        verdict,
        advice,
    )


_READABLE = 0.1
"""The relative error below which digits are counted."""
_SHRINK = (1.0, 0.1, 0.01)
"""Steps of the finite differences, in units of the default: a long run may bend much within it, or have kinks."""


class _Tried(NamedTuple):
    """The comparisons with one epsilon."""

    epsilon: float
    tolerance: float
    comparisons: tuple[Comparison, ...]
    leaves: tuple[Comparison, ...]

    @property
    def typical(self) -> float:
        """The derivative along a direction, root mean square."""
        return self._root(c.hypergradient for c in self.comparisons)

    @property
    def error(self) -> float:
        """The distance to finite differences, relative to the larger of both."""
        distance = self._root(c.hypergradient - c.finite_difference for c in self.comparisons)
        return distance / max(self.typical, self._root(c.finite_difference for c in self.comparisons), 1e-300)

    @property
    def doubt(self) -> float:
        """What finite differences may be off by: rounding, and what ten times the epsilon changes."""
        return sum(c.noise + abs(2 * c.finite_difference - c.wide_left - c.wide_right) / 2 for c in self.comparisons)

    @property
    def kinked(self) -> bool:
        """Whether one-sided quotients disagree as at a kink."""
        return any(c.kinked(self.typical) for c in self.comparisons)

    @property
    def contradicted(self) -> set[str]:
        """Where finite differences contradict the hypergradient."""
        of_leaves = {c.along for c in self.leaves if c.off(self.tolerance, 1e-3 * self.typical)}
        return of_leaves | {c.along for c in self.comparisons if c.off(self.tolerance, self.typical)}

    @property
    def settled(self) -> bool:
        """Whether no other epsilon is needed."""
        return not self.comparisons or (self.error <= self.tolerance and not self.kinked and not self.contradicted)

    def _root(self, numbers: Iterable[float]) -> float:
        return math.sqrt(sum(x * x for x in numbers) / len(self.comparisons))


def _judged(target: str, finite: bool, tried: Sequence[_Tried], best: _Tried) -> tuple[str, tuple[str, ...]]:
    """(verdict, advice)."""
    if not finite:
        return "Not usable: the value or the gradient is not finite.", (
            "The inner run overflows: use a smaller step size; or a function in it has a derivative that is not finite "
            "(a square root or a norm at 0, a logarithm of 0).",
        )
    if all(one.kinked for one in tried) and any(c.contradicted(1e-3, best.typical) for c in best.comparisons):
        return "Not a gradient: f_T has a kink or a jump at this lam, up to rounding.", (
            "f_T is not smooth here (rounding, argmax, random numbers that depend on lam): look at the step and E.",
        )
    # What contradicts the hypergradient must do so whatever the epsilon: else it is the quotient that is off.
    wrong = set.intersection(*(one.contradicted for one in tried))
    if not wrong and best.error < _READABLE and not best.kinked:
        return f"The gradient of f_T to {min(15, int(-math.log10(max(best.error, 1e-15))))} digits.", ()
    if target == "approximately":
        return f"An approximation of the gradient of f_T, by design: off by {100 * best.error:.2g} % here.", ()
    if target == "f":
        return f"Not the gradient of f_T: off by {100 * best.error:.2g} %.", (
            "Implicit differentiates the exact inner solution, and f_T is far from it: use more steps, or Reverse.",
        )
    if not wrong or all(one.kinked for one in tried):
        return "The derivative of f_T as forward mode has it; finite differences see kinks, bends or rounding.", (
            "Within epsilon of lam f_T bends, has kinks (relu, max-pooling) or rounding of its own size, as long runs "
            "do: to see more use float64 (module.double()), another epsilon, or fewer steps.",
        )
    leaves = [c.along for c in best.leaves if c.along in wrong]
    places = f" along {', '.join(leaves)}" if leaves else ""
    return f"Wrong: finite differences contradict the hypergradient{places}.", (
        "Something that f_T depends on was detached (.detach(), .item(), .data, torch.no_grad, running statistics that "
        "PyTorch overwrites), or an operation has another derivative than its value: see which leaf is off.",
    )
