"""Is this hypergradient right? Finite differences, contraction of the inner run, memory and time, and advice."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Key

from hyperax.checks import variables_of
from hyperax.convergence import InnerRun, inner_runs, over_tasks
from hyperax.methods import FirstOrder, Forward, HypergradientFunction, Method, Reverse, Truncated
from hyperax.methods.hypergradient import compiled
from hyperax.problem import Data, Lam
from hyperax.rollout import check_steps
from hyperax.tasks import MeanOverTasks, count_tasks


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found; `print` it.

    Fields:
        method: the method, as it was built.
        dtype: the precision of lam (its coarsest leaf).
        value, gradient_norm: f_T(lam) and the norm of the hypergradient.
        directional: for each random unit direction v, <hypergradient, v>.
        finite_differences: for each v, (f_T(lam + epsilon v) - f_T(lam - epsilon v)) / (2 epsilon).
        relative_errors: their distances, relative to the larger of the two.
        epsilon: the step of the finite differences, in units of lam.
        noise: how far rounding alone moves a finite difference, about; less than this says nothing.
        tasks, worst_task: how many tasks there are, and which one `inner` is of; `None` for a single problem.
        inner: how far the inner run has converged (of the task that is worst solved): `InnerRun`.
        batches: whether the inner steps see mini-batches, so that they need not shrink.
        memory: temporary memory of the compiled program in bytes, `None` where the backend does not say.
        seconds: the time of one compiled call, the best of three.
        advice: what looks wrong and what to do, a sentence or two each; empty if nothing does.
    """

    method: str
    dtype: str
    value: float
    gradient_norm: float
    directional: tuple[float, ...]
    finite_differences: tuple[float, ...]
    relative_errors: tuple[float, ...]
    epsilon: float
    noise: float
    tasks: int | None
    worst_task: int | None
    inner: InnerRun
    batches: bool
    memory: int | None
    seconds: float
    advice: tuple[str, ...] = ()

    def __str__(self) -> str:
        known = lambda x: "unknown" if x is None else f"{x:.3g}"
        worst = "" if self.worst_task is None else f" (task {self.worst_task} of {self.tasks}, the worst solved)"
        memory = "unknown" if self.memory is None else f"{self.memory:,} bytes"
        lines = [
            f"{self.method} in {self.dtype}",
            f"  value {self.value:.6g}, gradient norm {self.gradient_norm:.6g}",
            f"  along random unit directions, epsilon {self.epsilon:.2g} (rounding moves them by {self.noise:.1g}):",
            "    hypergradient  finite difference  relative error",
            *(
                f"    {one:13.6g}  {other:17.6g}  {error:14.1e}"
                for one, other, error in zip(
                    self.directional, self.finite_differences, self.relative_errors, strict=True
                )
            ),
            f"  inner run{worst}:",
            f"    inner gradient at w_T {self.inner.gradient_norm:.3g}, norm of w_T {self.inner.w_norm:.3g}",
            f"    last step {known(self.inner.last_step)}, contraction rate {known(self.inner.rate)}, "
            f"distance to the inner solution about {known(self.inner.distance)}",
            f"  memory {memory}, {self.seconds:.3g} s a call",
            *(f"  ! {sentence}" for sentence in self.advice or ()),
        ]
        return "\n".join(lines if self.advice else [*lines, "  nothing looks wrong"])


def diagnose(
    hypergradient: HypergradientFunction | MeanOverTasks,
    lam: Lam,
    data: Data = None,
    *,
    key: Key[Array, ""] | None = None,
    directions: int = 3,
    epsilon: float | None = None,
) -> Diagnosis:
    """Whether a hypergradient is right at lam, whether its inner run has converged, and what it costs.

        <h, v>  against  (f_T(lam + epsilon v) - f_T(lam - epsilon v)) / (2 epsilon),  v random, |v| = 1

    Arguments:
        hypergradient: what `hx.hypergradient` or `hx.mean_over_tasks` returned.
        lam, data: where to look, concrete arrays.
        key: for the directions; `jax.random.key(0)` by default.
        directions: how many directions v, at least one.
        epsilon: the step along v; by default the cube root of the machine precision times the norm of lam (if that
            is over 1). In float64 a right gradient then agrees to 6 digits or more; in float32 to 2, less where f_T
            hardly changes along v: compare in float64 if in doubt (`jax.config.update("jax_enable_x64", True)` and a
            lam and data of that type).

    Returns: a `Diagnosis`; `diagnosis.advice` is empty if nothing looks wrong.
    Raises: `ValueError` inside `jit` or another transformation, for what is not a hypergradient function,
        directions < 1 or epsilon <= 0, and as the hypergradient itself does.
    Cost: five hypergradients, 2 `directions` values, two inner runs and three compilations; the memory of one
    hypergradient.
    The contraction rate (`InnerRun`) is meaningful for full-batch descent near a minimiser: (nu - mu) / (nu + mu) at
    the best step size, nu the Lipschitz constant of the inner gradient and mu the modulus of strong convexity. Adam and
    large momenta oscillate, and mini-batches never settle: judge them by the inner gradient.
    Reference: Franceschi et al. 2018, Remark 3.3.
    Do not use it in the outer loop; once at lam_0 and once at the end is enough.

    >>> from hyperax import GradientDescent, Problem, Reverse, hypergradient
    >>> problem = Problem(
    ...     inner=lambda w, lam, d: (w - d) ** 2 + lam * w**2,
    ...     outer=lambda w, lam, d: (w - 1.0) ** 2,
    ...     init=lambda lam, d: jnp.zeros(()),
    ... )
    >>> f = hypergradient(problem, GradientDescent(0.1), Reverse(steps=5))
    >>> diagnosis = diagnose(f, jnp.asarray(0.5), jnp.asarray(3.0))
    >>> print(f"{diagnosis.inner.rate:.2f} {diagnosis.inner.distance:.3f}")
    0.70 0.336
    >>> diagnosis.advice
    ('w_T is still about 0.336 from the inner solution, ...',)
    """
    _check_arguments(hypergradient, lam, data, directions, epsilon)
    single = hypergradient.hypergradient if isinstance(hypergradient, MeanOverTasks) else hypergradient
    tasks = count_tasks(data) if isinstance(hypergradient, MeanOverTasks) else None
    lam = variables_of(lam)

    program = compiled.lower(hypergradient, lam, data, None).compile()  # pyright: ignore[reportFunctionMemberAccess]
    h = jax.block_until_ready(program(hypergradient, lam, data, None))
    seconds = min(_time(lambda: program(hypergradient, lam, data, None)) for _ in range(3))

    floats, rest = eqx.partition(lam, eqx.is_inexact_array)
    gradient = np.asarray(ravel_pytree(eqx.filter(h.grad, eqx.is_inexact_array))[0], np.float64)
    dtype = max((leaf.dtype for leaf in jax.tree.leaves(floats)), key=lambda dtype: float(jnp.finfo(dtype).eps))
    machine = float(jnp.finfo(dtype).eps)
    flat, unravel = ravel_pytree(floats)
    along = machine ** (1 / 3) * max(1.0, float(jnp.linalg.norm(flat))) if epsilon is None else epsilon

    value = lambda lam, data: single.value(lam, data, single.init(lam, data))[0]
    value_of = over_tasks(hypergradient, data, rest, value)
    directional, finite = [], []
    for k in jax.random.split(jax.random.key(0) if key is None else key, directions):
        v = np.asarray(jax.random.normal(k, flat.shape, flat.dtype), np.float64)
        v = v / np.linalg.norm(v)
        above, below = (value_of(unravel(flat + jnp.asarray(s * along * v, flat.dtype))) for s in (1, -1))
        directional.append(float(gradient @ v))
        finite.append(float(above.mean() - below.mean()) / (2 * along))

    runs = inner_runs(hypergradient, lam, data, machine)
    worst = max(range(len(runs)), key=lambda j: runs[j].badness)
    diagnosis = Diagnosis(
        method=f"{type(single.method).__name__}({_settings(single.method)})",
        dtype=str(dtype),
        value=float(h.value),
        gradient_norm=float(np.linalg.norm(gradient)),
        directional=tuple(directional),
        finite_differences=tuple(finite),
        relative_errors=tuple(_relative(a, b) for a, b in zip(directional, finite, strict=True)),
        epsilon=along,
        noise=10 * machine * abs(float(h.value)) / along,
        tasks=tasks,
        worst_task=None if tasks is None else worst,
        inner=runs[worst],
        batches=single.problem.batch is not None,
        memory=_temporary_memory(program),
        seconds=seconds,
    )
    # Ten times what central differences reach at their best step: machine precision to the power 2/3, and f_T's bends.
    return replace(diagnosis, advice=tuple(_advice(diagnosis, single.method, 3 * machine ** (1 / 3))))


def _advice(found: Diagnosis, method: Method, tolerance: float) -> Iterator[str]:
    if not (np.isfinite(found.value) and np.isfinite(found.gradient_norm)):
        what = "value" if not np.isfinite(found.value) else "gradient"
        yield (
            f"The {what} is not finite: the inner run overflows (use a smaller step size), or an objective has a "
            "derivative that is not finite (a square root or a norm at 0, a logarithm of 0, Adam without eps_root)."
        )
    elif any(
        abs(one - other) > tolerance * max(abs(one), abs(other)) + found.noise
        for one, other in zip(found.directional, found.finite_differences, strict=True)
    ):
        off = f"Finite differences disagree, by up to {100 * max(found.relative_errors):.2g} %: "
        if isinstance(method, Truncated):
            advice = "Truncated leaves out the steps before its window, by design; a longer window, or Reverse"
            yield f"{off}{advice}(steps={method.steps}), gives the gradient of f_T."
        elif isinstance(method, FirstOrder):
            advice = "FirstOrder takes the inner gradients as constants, by design; Reverse"
            yield f"{off}{advice}(steps={method.steps}) gives the gradient of f_T."
        elif isinstance(method, Reverse | Forward):
            yield (
                f"{off}the method is exact, so a function is differentiated wrongly (a stop_gradient, a custom_jvp or "
                "custom_vjp rule) or has kinks or jumps near lam (argmax, rounding, a random number that is not drawn "
                "from a key in data)."
            )
        else:
            yield f"{off}the method approximates the gradient of f_T; Reverse is exact."
    rate, distance, w_norm = found.inner.rate, found.inner.distance, found.inner.w_norm
    if rate is None or distance is None or found.batches:
        return
    if not rate < 1:
        yield (
            f"The inner run does not contract: each of its last steps is {rate:.3g} times the one before. Use a "
            "smaller step size; gradient descent needs one below 2 / nu, nu the Lipschitz constant of the inner "
            "gradient."
        )
    elif distance > 0.01 * w_norm:
        remedy = "more steps, or momentum (HeavyBall)" if rate > 0.9 else "more steps"
        yield (
            f"w_T is still about {distance:.3g} from the inner solution, and |w_T| is {w_norm:.3g}: fine if f_T is "
            f"what you minimise; for the exact problem use {remedy} (each step is {rate:.3g} times the one before)."
        )


def _check_arguments(hypergradient: Any, lam: Lam, data: Data, directions: int, epsilon: float | None) -> None:
    if not isinstance(hypergradient, HypergradientFunction | MeanOverTasks):
        raise ValueError(
            "diagnose needs what hypergradient(...) or mean_over_tasks(...) returns, not "
            f"{type(hypergradient).__name__}"
        )
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((lam, data))):
        raise ValueError(
            "diagnose measures a program, so it cannot be part of one: call it outside jit, vmap, grad and scan, with "
            "concrete arrays"
        )
    check_steps(directions, "directions", 1)
    if epsilon is not None and not epsilon > 0:
        raise ValueError(f"epsilon is {epsilon!r}; it must be a positive number, or None for a default")


def _relative(one: float, other: float) -> float:
    return abs(one - other) / max(abs(one), abs(other), float(np.finfo(float).tiny))


def _time(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def _temporary_memory(program: Any) -> int | None:
    analysis = program.compiled.memory_analysis()
    return None if analysis is None else int(analysis.temp_size_in_bytes)


def _settings(method: Method) -> str:
    return ", ".join(f"{name}={value}" for name, value in vars(method).items() if value is not None)
