"""What the measurements of `certify` mean: one sentence of verdict, advice where something is wrong, and notes."""

from __future__ import annotations

import math
from collections.abc import Iterator

from hyperax.certificate.differences import Comparison
from hyperax.certificate.evidence import CONVERGED, Evidence


def judge(found: Evidence) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """(verdict, advice, notes); no advice means that nothing looks wrong."""
    if not found.finite:
        return _verdict(found), tuple(_curvature(found)) or tuple(_overflow(found)), ()
    return _verdict(found), tuple(sentence for rule in _RULES for sentence in rule(found)), tuple(_notes(found))


def _verdict(found: Evidence) -> str:
    if not found.finite:
        return "Not usable: the value or the gradient is not finite."
    if found.kinked:
        return "Not a gradient: f_T has a kink or a jump at this lam, up to rounding."
    digits = f"to {min(15, int(-math.log10(max(found.error, 1e-15))))} digits" if found.error < 1 else "to no digit"
    if found.target == "f":
        return _verdict_on_f(found, digits)
    if found.target == "f_T" and found.off:
        return "Wrong: finite differences contradict the hypergradient."
    if found.target == "online":
        return f"Online; in its first call the gradient of the value {digits}."
    if found.error > found.tolerance and found.target == "approximately":
        return f"An approximation of the gradient of f_T, by design: off by {_percent(found.error)} here."
    if found.too_large:
        return f"The gradient of f_T {digits}; its inner run does not converge."
    if found.distance is None:
        return f"The gradient of f_T {digits}; how far f_T is from f is not known."
    if found.distance > CONVERGED:
        return f"The gradient of f_T {digits}; f_T is not yet close to f."
    return f"The gradient of f_T {digits}, and f_T is close to f."


def _verdict_on_f(found: Evidence, digits: str) -> str:
    if not found.solved:
        if found.formula:
            return "Wrong: the closed form is no solution of the inner problem."
        return "The gradient of neither f nor f_T: w_T is not at the inner solution."
    if not found.exact:
        return "Not certified: the inner solution could not be found, so f is not known."
    return "Wrong: finite differences contradict the hypergradient." if found.off else f"The gradient of f {digits}."


def _overflow(found: Evidence) -> Iterator[str]:
    what = "gradient" if math.isfinite(found.value) else "value"
    step = f" ({_step_size(found)})" if found.too_large else ""
    yield (
        f"The {what} is not finite: the inner run overflows{step}: use a smaller step size; or an objective has a "
        "derivative that is not finite (a square root or a norm at 0, a logarithm of 0, Adam without eps_root)."
    )


def _smoothness(found: Evidence) -> Iterator[str]:
    worst = max(found.comparisons, key=lambda c: abs(c.right - c.left), default=None)
    if worst is not None and found.kinked:
        yield (
            f"The one-sided difference quotients of f_T are {worst.left:.3g} and {worst.right:.3g} along a direction: "
            "there is a kink or a jump at this lam, or along the run (|.|, max, relu, clip, argmax, rounding, a random "
            "number that is not drawn from a key in data), so there is no gradient here. Use a smooth version, or "
            "look at another lam."
        )
    elif any(not c.finite for c in found.comparisons):
        yield (
            "f_T is not finite at a distance epsilon from lam, so finite differences say nothing: give a smaller "
            "epsilon, or look at a lam farther inside its set."
        )


def _differentiation(found: Evidence) -> Iterator[str]:
    finite = all(c.finite for c in found.comparisons)
    if found.kinked or not finite or not (found.target == "f_T" or (found.exact and found.solved)):
        return
    if found.off:
        named = "; ".join(_about(leaf) for leaf in found.wrong_leaves)
        error = max((leaf.relative_error for leaf in found.wrong_leaves), default=found.error)
        yield (
            f"Finite differences of {found.against} disagree, by {_percent(error)}"
            + (f": {named}. " if named else ". ")
            + _culprit(found)
        )
    elif any(c.contradicted(10 * found.tolerance, found.typical) for c in found.comparisons):
        yield (
            "Finite differences agree with the hypergradient, and forward mode does not: a custom_jvp rule is wrong, "
            "or values are rounded so coarsely that derivatives drown."
        )


def _about(leaf: Comparison) -> str:
    cut = " (its effect is cut off, as by a stop_gradient)" if leaf.hypergradient == 0 else ""
    return (
        f"along {leaf.along} the hypergradient is {leaf.hypergradient:.3g} and it is {leaf.finite_difference:.3g}{cut}"
    )


def _culprit(found: Evidence) -> str:
    both = not any(c.contradicted(found.tolerance, found.typical) for c in found.comparisons)
    known = not any(math.isnan(c.other) for c in found.comparisons)
    if known and not both:
        return (
            f"Forward mode disagrees with {found.method} too, so either a custom_vjp or custom_jvp rule is wrong or "
            "the method is: compare with Reverse."
        )
    return (
        "The method is exact"
        + (" and forward mode agrees with it" if known else "")
        + ", so a function is differentiated wrongly: look for a stop_gradient, or a custom_jvp or custom_vjp rule."
    )


def _approximation(found: Evidence) -> Iterator[str]:
    if found.target in ("approximately", "online") and not found.kinked and found.error > 0.5:
        yield _by_design(found)


def _by_design(found: Evidence) -> str:
    exact = f"Reverse(steps={found.steps})" if found.steps else "Reverse"
    return (
        f"{found.method} approximates the gradient of f_T, by design: here it is off by {_percent(found.error)}; "
        f"{exact} gives the gradient of f_T."
    )


def _step(found: Evidence) -> Iterator[str]:
    if found.too_large:
        yield (
            f"{_step_size(found)}: the inner run cannot settle at w_T, and assumption (vi), that w_T converges, fails. "
            "Use a smaller step size."
        )


def _step_size(found: Evidence) -> str:
    curvature = found.report.curvature
    return (
        f"The step size {curvature.step_size:.3g} is beyond {curvature.limit:.3g}, the limit 2 / nu (with momentum "
        f"2 (1 + momentum) / nu) for nu = {curvature.nu:.3g}, the Lipschitz constant of the inner gradient"
    )


def _convergence(found: Evidence) -> Iterator[str]:
    run, curvature = found.report.run, found.report.curvature
    if found.target == "f" and not found.solved:
        yield from _not_at_the_solution(found)
    elif found.distance is not None and found.distance > CONVERGED and not found.formula and not found.too_large:
        if run.distance is None and run.rate is not None and not run.rate < 1:
            yield _does_not_contract(found)
            return
        slow = run.rate is not None and run.rate > 0.9
        distance = run.extrapolated if run.distance is None else run.distance
        by_rate = "" if run.rate is None else f" (each step is {run.rate:.3g} times the one before)"
        condition = f"; nu / mu is {curvature.condition:.3g}" if slow and curvature.exact and curvature.mu > 0 else ""
        yield (
            f"w_T is {distance:.3g} from the inner solution, and |w_T| is {run.w_norm:.3g}: fine if f_T is what you "
            f"minimise; for the exact problem use more steps{', or momentum (HeavyBall)' if slow else ''}"
            f"{by_rate}{condition}."
        )


def _does_not_contract(found: Evidence) -> str:
    run, curvature = found.report.run, found.report.curvature
    begin = f"The inner run does not contract: each of its next steps is {run.rate:.3g} times the one before"
    if curvature.indefinite:
        return (
            f"{begin}; L curves downwards at w_T (mu = {curvature.mu:.3g}), so it is leaving a saddle. Use more steps."
        )
    if curvature.limit is not None:
        return (
            f"{begin}, though the step size is below 2 / nu at w_T: L has a kink there, which the iterates jump across "
            "(|.|, max, relu), or bends sharply. Use a smooth version, or step sizes that decrease."
        )
    return f"{begin}. Use a smaller step size; gradient descent needs one below 2 / nu, here {2 / curvature.nu:.3g}."


def _not_at_the_solution(found: Evidence) -> Iterator[str]:
    run, curvature = found.report.run, found.report.curvature
    away = "" if run.distance is None else f"; the nearest minimiser found is {run.distance:.3g} away"
    if found.formula:
        yield (
            f"The closed form is not the minimiser of L: |grad_w L| is {run.gradient_norm:.3g} at solve(lam), where "
            f"|w| is {run.w_norm:.3g}{away}. Compare solve with the inner objective, factors of 2 and means included."
        )
    elif not curvature.indefinite:
        yield (
            f"{found.method} needs the inner solution, and w_T is not there: |grad_w L| is {run.gradient_norm:.3g}, "
            f"where |w_T| is {run.w_norm:.3g}{away}. Its result is the gradient of neither f nor f_T: use more steps, "
            "or Reverse, which is exact for f_T."
        )


def _curvature(found: Evidence) -> Iterator[str]:
    curvature = found.report.curvature
    if found.target == "f":
        if curvature.indefinite:
            yield (
                f"The Hessian of L is indefinite at w (mu = {curvature.mu:.3g}, nu = {curvature.nu:.3g}), so w is no "
                "minimiser, and the implicit equation means nothing there: use more steps, or Reverse."
            )
        elif curvature.singular:
            yield (
                f"The Hessian of L is singular at w (mu = {curvature.mu:.3g}, nu = {curvature.nu:.3g}): the minimiser "
                "is not unique, assumption (iii), and the implicit equation has no unique solution. Add a regulariser."
            )
        elif found.residual is not None and not found.residual <= 1e-3:
            yield (
                f"The linear system of {found.method} is solved to a relative residual of {found.residual:.2g} only "
                f"(nu / mu is {curvature.condition:.3g}): give its solver more steps, or a smaller tolerance."
            )


def _uniqueness(found: Evidence) -> Iterator[str]:
    if found.target == "f" or (found.distance is not None and found.distance <= CONVERGED):
        yield from _second_minimiser(found)


def _second_minimiser(found: Evidence) -> Iterator[str]:
    others = [other for other in found.report.others if other.relation != "higher"]
    if not others:
        return
    other = others[0]
    begin = f"L has more than one minimiser: one at a distance of {other.distance:.3g} from w* has"
    there = f"E = {other.outer:.4g} in place of {other.outer_here:.4g}"
    if other.relation == "equal":
        yield (
            f"{begin} the same L and {there}. Assumption (iii), a unique minimiser, fails: which one the dynamics "
            "finds depends on Phi_0, and f_T need not approach f. Add a regulariser, or choose Phi_0 for a reason."
        )
    else:
        yield (
            f"{begin} L = {other.inner:.4g}, below {other.inner_here:.4g} at w*, and {there}. Assumption (vi), that "
            "w_T converges to the minimiser, fails, and (iii) is in doubt: choose another Phi_0, or add a regulariser."
        )


def _rounding(found: Evidence) -> Iterator[str]:
    if found.rounding is not None and found.rounding > 0.05:
        yield (
            f"In {found.dtype} the hypergradient differs from that in float64 by {_percent(found.rounding)}: rounding "
            "(compute in float64), or random numbers, which are others in another precision."
        )


def _notes(found: Evidence) -> Iterator[str]:
    curvature, others = found.report.curvature, found.report.others
    if found.target in ("approximately", "online") and not found.kinked and found.tolerance < found.error <= 0.5:
        yield _by_design(found)
    if found.target == "online":
        yield f"{found.method} was looked at in its first call, from Phi_0; later ones go on with earlier lam."
    if found.batches:
        yield "The inner steps see mini-batches, so they need not shrink: convergence is not judged."
    elif found.target != "f" and (curvature.indefinite or curvature.singular):
        yield (
            f"L is not strongly convex at w_T (mu = {curvature.mu:.3g}, nu = {curvature.nu:.3g}): f_T may depend on "
            "Phi_0 however large T is (assumption (iii))."
        )
    if found.target != "f" and found.distance is not None and found.distance > CONVERGED:
        yield from _second_minimiser(found)
    if others and all(other.relation == "higher" for other in others):
        yield f"L has local minimisers besides w*, {len(others)} found; L is lower at w*."


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 10 else f"a factor of {share:.2g}"


_RULES = (
    _smoothness,
    _differentiation,
    _approximation,
    _step,
    _convergence,
    _curvature,
    _uniqueness,
    _rounding,
)
