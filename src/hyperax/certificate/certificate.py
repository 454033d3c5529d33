"""Is this hypergradient right, of f_T or of f, and what does it cost? Measurements, a verdict, and advice."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.flatten_util import ravel_pytree

from hyperax.certificate.differences import Comparison, compare
from hyperax.certificate.evidence import Evidence
from hyperax.certificate.inner_runs import TaskReport, inner_reports
from hyperax.certificate.measuring import Subject, in_double
from hyperax.certificate.verdict import judge
from hyperax.checks import UnusedLeafWarning, variables_of
from hyperax.methods import HypergradientFunction, Method
from hyperax.methods.hypergradient import compiled
from hyperax.precision import float64
from hyperax.problem import Data, Hypergradient, Lam
from hyperax.rollout import check_steps
from hyperax.tasks import MeanOverTasks


@dataclass(frozen=True)
class Certificate:
    """What `certify` found; `print` it.

    Fields:
        method, target: the method as it was built, and what it claims to differentiate: "f_T", "f", "approximately"
            (f_T), or "online".
        dtype: the precision of lam (its coarsest leaf).
        measured_in: the coarsest precision that lam passed through in the checks: float64 unless the objectives insist.
        value, gradient_norm: f_T(lam) and the norm of the hypergradient.
        comparisons: along random unit directions: hypergradient, finite difference, other method (`Comparison`).
        leaves: the same along each leaf of lam, if there are several (8 at most; 64 where the former disagree).
        against: what was differenced: "f_T" (run from Phi_0), "f" (at the inner solution) or the method's "own" value.
        other_method: what the column of the other method is.
        epsilon: the step of the finite differences, in units of lam.
        rounding: the relative distance of the hypergradients in `dtype` and in float64; `None` if one is the other.
        tasks, worst_task: how many tasks there are, and which one `inner` is of; `None` for a single problem.
        inner: the inner problem (of the task that is worst solved): `inner.run`, `inner.curvature`, `inner.others`.
        batches: whether the inner steps see mini-batches, so that they need not shrink.
        memory: temporary memory of the compiled program in bytes, `None` where the backend does not say.
        seconds: the time of one compiled call, the best of three.
        verdict: what the hypergradient is, in a sentence.
        advice: what looks wrong and what to do; empty if nothing does.
        notes: what is as it should be, and worth knowing.
    """

    method: str
    target: str
    dtype: str
    measured_in: str
    value: float
    gradient_norm: float
    comparisons: tuple[Comparison, ...]
    leaves: tuple[Comparison, ...]
    against: str
    other_method: str
    epsilon: float
    rounding: float | None
    tasks: int | None
    worst_task: int | None
    inner: TaskReport
    batches: bool
    memory: int | None
    seconds: float
    verdict: str
    advice: tuple[str, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        known = lambda x: "unknown" if x is None else f"{x:.3g}"
        run, curvature = self.inner.run, self.inner.curvature
        worst = "" if self.worst_task is None else f", task {self.worst_task} of {self.tasks}, the worst solved"
        rounding = "" if self.rounding is None else f" ({self.dtype} is off by {self.rounding:.1e})"
        at_most = "" if curvature.exact else "at most "
        limit = (
            "" if curvature.limit is None else f"; step size {known(curvature.step_size)}, limit {curvature.limit:.3g}"
        )
        width = max((len(c.along) for c in (*self.comparisons, *self.leaves)), default=5)
        rows = (
            f"    {c.along:{width}s}  {c.hypergradient:13.6g} {c.finite_difference:18.6g} {c.other:13.6g}"
            f" {c.relative_error:9.0e}"
            for c in (*self.comparisons, *self.leaves)
        )
        lines = (
            self.verdict,
            f"  {self.method} in {self.dtype}: value {self.value:.6g}, gradient norm {self.gradient_norm:.6g}",
            f"  derivatives of {self.against} in {self.measured_in}{rounding}, epsilon {self.epsilon:.2g}:",
            f"    {'along':{width}s}  hypergradient  finite difference  other method     error",
            *rows,
            f"    other method: {self.other_method}",
            f"  inner run{worst}:",
            f"    |w_T| {run.w_norm:.3g}, |grad_w L| {run.gradient_norm:.3g}, distance to the solution "
            f"{known(run.distance)}, by extrapolation {known(run.extrapolated)}, contraction {known(run.rate)}",
            f"    curvature of L from mu = {at_most}{curvature.mu:.3g} to nu = {curvature.nu:.3g}{limit}",
            f"  {'unknown' if self.memory is None else f'{self.memory:,} bytes'}, {self.seconds:.2g} s a call",
            *(f"  ! {sentence}" for sentence in self.advice),
            *(f"  - {sentence}" for sentence in self.notes),
        )
        return "\n".join(lines if self.advice else (*lines, "  nothing looks wrong"))


def certify(
    hypergradient: HypergradientFunction | MeanOverTasks,
    lam: Lam,
    data: Data = None,
    carry: Any = None,
    *,
    directions: int = 3,
    epsilon: float | None = None,
    starts: int = 6,
    seed: int = 0,
) -> Certificate:
    """Whether a hypergradient is right at lam, of f_T or of f, whether its inner run has converged, what it costs.

        <h, v>  against  (f(lam + epsilon v) - f(lam - epsilon v)) / (2 epsilon)  and another exact method,  |v| = 1

    f is f_T for methods that claim its gradient or approximate it; for those of the exact problem E(w*, lam), w* found
    from w_T by more steps and Newton's method. All is measured in float64 if the objectives let it, whatever lam is in.

    Arguments:
        hypergradient: what `hx.hypergradient` or `hx.mean_over_tasks` returned.
        lam, data: where to look, concrete arrays.
        carry: of the last hyperiteration, for a method with a warm start; `None`: as in a first call.
        directions: how many directions v, at least one.
        epsilon: the step along v; by default machine precision^(1/3) times the norm of lam: 6e-6 |lam| in float64.
        starts: how many other starting points of the inner run look for a second minimiser; 0 for none.
        seed: of the directions and starting points.

    Returns: a `Certificate`; `certificate.advice` is empty if nothing looks wrong.
    Raises: `ValueError` inside `jit` or another transformation, for what is not a hypergradient function,
        directions < 1, starts < 0 or epsilon <= 0, and as the hypergradient itself does.
    Cost: five hypergradients; 5 `directions` values with a derivative in forward mode; `starts` + 1 inner runs of 2 T
    steps, and from each 8 steps of Newton's method (a Hessian up to d = 400, 50 products with it beyond); the
    eigenvalues of one Hessian, or 32 products. Three compilations, four if lam is not in float64; the memory of one
    hypergradient.
    For methods that claim to be exact 5 values more for each leaf of lam, up to 8 leaves (64 if something is wrong).
    What is found is true at this lam and for these starting points: nothing here proves uniqueness or convexity
    elsewhere. Mini-batches never settle, so convergence is not judged with them.
    Reference: Franceschi et al. 2018, Sec. 3: assumptions (i)-(vi), Theorem 3.2, Remark 3.3.
    Do not use it in the outer loop; once at lam_0 and once at the end is enough.

    >>> from hyperax import GradientDescent, Problem, Reverse, hypergradient
    >>> problem = Problem(
    ...     inner=lambda w, lam, d: (w - d) ** 2 + lam * w**2,
    ...     outer=lambda w, lam, d: (w - 1.0) ** 2,
    ...     init=lambda lam, d: jnp.zeros(()),
    ... )
    >>> f = hypergradient(problem, GradientDescent(0.1), Reverse(steps=5))
    >>> certificate = certify(f, jnp.asarray(0.5), jnp.asarray(3.0))
    >>> print(certificate)
    The gradient of f_T to ... digits; f_T is not yet close to f.
      Reverse(steps=5) in float...: value 0.440..., gradient norm ...
    ...
        curvature of L from mu = 3 to nu = 3; step size 0.1, limit 0.667
    ...
      ! w_T is 0.336 from the inner solution, and |w_T| is 1.66: fine if f_T is what you minimise; ...
    """
    _check_arguments(hypergradient, lam, data, directions, epsilon, starts)
    draw = np.random.default_rng(seed)
    data = jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, data)
    own = Subject(hypergradient, variables_of(lam), data)
    program = compiled.lower(hypergradient, own.lam, data, carry).compile()  # pyright: ignore[reportFunctionMemberAccess]
    h = jax.block_until_ready(program(hypergradient, own.lam, data, carry))
    seconds = min(_time(lambda: program(hypergradient, own.lam, data, carry)) for _ in range(3))

    dtypes = {leaf.dtype for leaf in jax.tree.leaves(own.floats)}
    dtype = max(dtypes, key=lambda dtype: float(jnp.finfo(dtype).eps))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnusedLeafWarning)  # the call above has said it
        subject, precise, failure = own, h, None
        if any(d != np.float64 for d in dtypes) and np.isfinite(h.value):
            subject, precise, failure = _in_double(own, h, carry)
        with nullcontext() if subject is own else float64():
            gradient = _flat(precise)
            reports = inner_reports(subject, precise.state, starts, draw)
            worst = max(range(len(reports)), key=lambda j: reports[j].run.badness)
            finite = bool(np.isfinite(h.value) and np.isfinite(_flat(h)).all())
            ends = [report.run.solution for report in reports if report.run.distance is not None]
            solutions = np.stack(ends) if len(ends) == len(reports) else None
            found = compare(subject, gradient, solutions, draw, directions if finite else 0, epsilon)

    single, report = own.single, reports[worst]
    method, target = type(single.method).__name__, single.method.differentiates
    rounding = None
    if subject is not own:
        rounding = float(np.linalg.norm(gradient - _flat(h)) / max(np.linalg.norm(gradient), 1e-300))
    residual = h.info.get("residual")
    evidence = Evidence(
        method=method,
        target=target,
        formula=not single.method.needs_dynamics,
        steps=own.steps,
        value=float(h.value),
        gradient_norm=float(np.linalg.norm(_flat(h))),
        comparisons=found.comparisons,
        leaves=found.leaves,
        against=found.against,
        tolerance=found.tolerance,
        report=report,
        residual=None if residual is None else float(np.max(np.asarray(residual))),
        rounding=rounding,
        dtype=str(dtype),
        batches=single.problem.batch is not None,
    )
    verdict, advice, notes = judge(evidence)
    return Certificate(
        method=f"{method}({_settings(single.method)})",
        target=target,
        dtype=str(dtype),
        measured_in=found.dtype,
        value=evidence.value,
        gradient_norm=evidence.gradient_norm,
        comparisons=found.comparisons,
        leaves=found.leaves,
        against=found.against,
        other_method=found.other_method,
        epsilon=found.epsilon,
        rounding=rounding,
        tasks=own.tasks,
        worst_task=None if own.tasks is None else worst,
        inner=report,
        batches=evidence.batches,
        memory=_temporary_memory(program),
        seconds=seconds,
        verdict=verdict,
        advice=advice,
        notes=notes if failure is None else (*notes, failure),
    )


def _in_double(own: Subject, h: Hypergradient, carry: Any) -> tuple[Subject, Hypergradient, str | None]:
    """The subject and its hypergradient in float64, or as they are, with the reason, where the objectives refuse."""
    try:
        with float64():
            subject = Subject(own.whole, in_double(own.lam), in_double(own.data))
            precise = compiled(subject.whole, subject.lam, subject.data, in_double(carry))
            return subject, jax.block_until_ready(precise), None
    except (TypeError, ValueError) as error:
        reason = str(error).split("\n")[0]
        return own, h, f"Measured in the precision of lam, since the problem does not run in float64: {reason}"


def _check_arguments(
    hypergradient: Any, lam: Lam, data: Data, directions: int, epsilon: float | None, starts: int
) -> None:
    if not isinstance(hypergradient, HypergradientFunction | MeanOverTasks):
        hint = "; use hyperax.torch.certify" if type(hypergradient).__module__.startswith("hyperax.torch") else ""
        raise ValueError(
            "certify needs what hypergradient(...) or mean_over_tasks(...) returns, not "
            f"{type(hypergradient).__name__}{hint}"
        )
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((lam, data))):
        raise ValueError(
            "certify measures a program, so it cannot be part of one: call it outside jit, vmap, grad and scan, with "
            "concrete arrays"
        )
    check_steps(directions, "directions", 1)
    check_steps(starts, "starts")
    if epsilon is not None and not epsilon > 0:
        raise ValueError(f"epsilon is {epsilon!r}; it must be a positive number, or None for a default")


def _flat(h: Hypergradient) -> np.ndarray:
    return np.asarray(ravel_pytree(eqx.filter(h.grad, eqx.is_inexact_array))[0], np.float64)


def _time(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def _temporary_memory(program: Any) -> int | None:
    analysis = program.compiled.memory_analysis()
    return None if analysis is None else int(analysis.temp_size_in_bytes)


def _settings(method: Method) -> str:
    return ", ".join(f"{name}={value}" for name, value in vars(method).items() if value is not None)
