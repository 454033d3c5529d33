"""Our methods beside each other: time, memory and error against T, the size m of lam and the size d of w.

    python -m benchmarks.methods [--rounds 5] [--no-figures]

One quadratic on which every method applies, in float64, with heavy ball (`Reversible` needs it):

    L = (1/2) w^T A w - b^T w + (1/2) sum over i of exp(lam_{i mod m}) w_i^2,   E = (1/2) |w - c|^2 / d,   w_0 = 0

Errors are relative, in the 2-norm: to the gradient of f_T (`Reverse`) and to that of f (a factorisation).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import hyperax as hx
from benchmarks.timing import SLICE, circumstances, seconds_of, temporary_bytes
from hyperax.linear_solvers import ConjugateGradient, Neumann
from hyperax.methods.closed_form import ClosedForm
from hyperax.methods.doubling import Doubling
from hyperax.methods.evolution_strategy import EvolutionStrategy
from hyperax.methods.finite_difference import FiniteDifference
from hyperax.methods.implicit import Implicit
from hyperax.methods.reversible import Reversible

T, M, D = 100, 100, 100  # where the other two are varied
STEPS = (1, 10, 100, 1000, 10_000)
SIZES_LAM = (1, 10, 100, 1000)
SIZES_W = (10, 100, 1000)
WINDOW, TERMS, PAIRS, MOMENTUM = 20, 200, 64, 0.8
BUDGET = 1000  # bytes for each of the d inner variables: 62 states of 16 bytes
STEP_SIZE = 0.2
# A bound on the multiplications of the methods that repeat the inner run: over it they are left out.
MOST_WORK = 2e10
LEFT_OUT = {
    "FirstOrder": "lam acts through second derivatives only: nothing is left of the hypergradient, and it says so",
    "RealTime": "takes its hypergradients while w is trained: no value at one lam to compare",
}
RECORD = Path(__file__).parent / "records" / "methods.json"
FIGURES = Path(__file__).parent.parent / "docs" / "figures"

METHODS: dict[str, Callable[[int, int], hx.Method]] = {
    "Reverse": lambda steps, d: hx.Reverse(steps),
    'Reverse(segment="sqrt")': lambda steps, d: hx.Reverse(steps, segment="sqrt"),
    "Reverse(memory)": lambda steps, d: hx.Reverse(steps, memory=BUDGET * d),
    "Reversible": lambda steps, d: Reversible(steps),
    "Forward": lambda steps, d: hx.Forward(steps),
    "Doubling": lambda steps, d: Doubling(steps),
    "Truncated": lambda steps, d: hx.Truncated(steps, window=min(WINDOW, steps)),
    "FiniteDifference": lambda steps, d: FiniteDifference(steps, window=min(WINDOW, steps)),
    "Implicit": lambda steps, d: Implicit(steps, ConjugateGradient(1e-10, 1000)),
    "Implicit(Neumann)": lambda steps, d: Implicit(steps, Neumann(terms=TERMS, step_size=STEP_SIZE)),
    "EvolutionStrategy": lambda steps, d: EvolutionStrategy(steps, pairs=PAIRS, sigma=1e-3),
    "ClosedForm": lambda steps, d: ClosedForm(solution),
}


@cache
def problem_of(m: int, d: int) -> tuple[hx.Problem, jax.Array, dict[str, jax.Array]]:
    """(problem, lam, data): eigenvalues of A from 0.01 to 4, regularisers exp(lam) around 0.1."""
    draw = np.random.default_rng(d)
    basis, _ = np.linalg.qr(draw.normal(size=(d, d)))
    matrix = basis * np.geomspace(0.01, 4.0, d) @ basis.T
    data = {"A": matrix, "b": draw.normal(size=d), "c": draw.normal(size=d), "group": np.arange(d) % m}
    problem = hx.Problem(
        inner=lambda w, lam, d: 0.5 * w @ d["A"] @ w - d["b"] @ w + 0.5 * jnp.sum(jnp.exp(lam)[d["group"]] * w**2),
        outer=lambda w, lam, d: 0.5 * jnp.mean((w - d["c"]) ** 2),
        init=lambda lam, d: jnp.ones_like(d["b"]),
    )
    lam = np.log(0.1) + 0.3 * np.random.default_rng(m).normal(size=m)
    return problem, jnp.asarray(lam), jax.tree.map(jnp.asarray, data)


def solution(lam: jax.Array, data: dict[str, jax.Array]) -> jax.Array:
    """w_lam."""
    return jnp.linalg.solve(data["A"] + jnp.diag(jnp.exp(lam)[data["group"]]), data["b"])


def work(name: str, steps: int, m: int, d: int) -> float:
    """Multiplications of the methods that repeat the inner run."""
    runs = {"Forward": m, "EvolutionStrategy": 2 * PAIRS}.get(name, 1)
    return float(runs) * steps * d * d


def compiled(method: hx.Method, m: int, d: int) -> tuple[Any, tuple]:
    problem, lam, data = problem_of(m, d)
    dynamics = hx.HeavyBall(STEP_SIZE, MOMENTUM) if method.needs_dynamics else None
    function = hx.hypergradient(problem, dynamics, method)

    @jax.jit
    def run(lam: jax.Array, data: dict) -> Any:
        h = function(lam, data)
        return h.value, h.grad

    return run.lower(lam, data).compile(), (lam, data)


@cache
def references(steps: int, m: int, d: int) -> dict[str, np.ndarray]:
    """The gradients of f_T and f."""
    methods = {"f_T": hx.Reverse(steps), "f": ClosedForm(solution)}
    return {name: np.asarray(call(*compiled(method, m, d))[1]) for name, method in methods.items()}


def call(function: Any, arguments: tuple) -> Any:
    return jax.block_until_ready(function(*arguments))


def row(name: str, steps: int, m: int, d: int, rounds: int) -> dict[str, Any]:
    """What one method costs, and how far it is from both gradients."""
    where = {"method": name, "steps": steps, "m": m, "d": d}
    if m > d:
        return {**where, "reason": "m > d: some of lam would not be used"}
    if work(name, steps, m, d) > MOST_WORK:
        return {**where, "reason": f"over {MOST_WORK:.0e} multiplications"}
    try:
        method = METHODS[name](steps, d)
        function, arguments = compiled(method, m, d)
    except ValueError as error:  # a refusal is a result
        return {**where, "reason": str(error)[:200]}
    gradient = np.asarray(call(function, arguments)[1])
    repeats = max(1, int(SLICE / seconds_of(lambda: function(*arguments))))
    seconds = [seconds_of(lambda: function(*arguments), repeats) for _ in range(rounds)]
    errors = {
        f"error_{target}": float(np.linalg.norm(gradient - exact) / np.linalg.norm(exact))
        for target, exact in references(steps, m, d).items()
    }
    return {**where, "seconds": float(np.median(seconds)), "temporary_bytes": temporary_bytes(function), **errors}


def sweep(over: str, rounds: int) -> list[dict[str, Any]]:
    """Every method along one of T, m and d."""
    points = {
        "T": [(steps, M, D) for steps in STEPS],
        "m": [(T, m, max(SIZES_W)) for m in SIZES_LAM],
        "d": [(T, min(SIZES_W), d) for d in SIZES_W],
    }[over]
    table = []
    for name in METHODS:
        table += [row(name, *point, rounds) for point in points]
        for found in table[-len(points) :]:
            if "reason" in found:
                print(f"{over}: {name:26s}{found['steps']:6d}{found['m']:5d}{found['d']:5d}   {found['reason']}")
                continue
            print(
                f"{over}: {name:26s}{found['steps']:6d}{found['m']:5d}{found['d']:5d}{1000 * found['seconds']:10.2f} ms"
                f"{found['temporary_bytes'] / 1e6:10.2f} MB   error {found['error_f_T']:.0e} {found['error_f']:.0e}",
                flush=True,
            )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--no-figures", action="store_true")
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    record = {**circumstances("python -m benchmarks.methods"), "problem": (__doc__ or "").split("\n\n", 2)[2].strip()}
    settings = {
        "momentum": MOMENTUM,
        "step_size": STEP_SIZE,
        "window": WINDOW,
        "terms": TERMS,
        "pairs": PAIRS,
        "memory": BUDGET,
    }
    record |= {"settings": settings, "left_out": LEFT_OUT}
    record |= {f"over_{over}": sweep(over, options.rounds) for over in ("T", "m", "d")}
    options.record.write_text(json.dumps(record, indent=1) + "\n")
    if not options.no_figures:
        from benchmarks import figures

        figures.methods(record, FIGURES)


if __name__ == "__main__":
    main()
