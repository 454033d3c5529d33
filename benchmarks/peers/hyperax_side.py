"""hyperax, as a user calls it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

import hyperax as hx
from benchmarks.peers.jax_objectives import features, inner, outer
from benchmarks.peers.jax_objectives import objectives as objectives
from benchmarks.peers.jax_objectives import to_numpy as to_numpy
from benchmarks.peers.problems import Numbers
from benchmarks.peers.side import ALL, CG_STEPS, CG_TOLERANCE, CONVEX, QUADRATIC, Row, Run
from hyperax.linear_solvers import ConjugateGradient
from hyperax.methods.closed_form import ClosedForm
from hyperax.methods.doubling import Doubling
from hyperax.methods.implicit import Implicit

PACKAGES = ("jax", "jaxlib", "equinox", "optax", "lineax", "numpy")


def problem_of(numbers: Numbers) -> tuple[hx.Problem, hx.Dynamics]:
    """The problem and the dynamics; w_0 is in the data."""
    name = numbers.name
    problem = hx.Problem(
        inner=lambda w, lam, d: inner(name, w, lam, d),
        outer=lambda w, lam, d: outer(name, w, lam, d),
        init=lambda lam, d: d["w"],
        prepare=lambda lam, d: features(name, lam, d),
    )
    rate = (lambda lam, t: jnp.exp(lam[t - 1])) if numbers.step_size is None else numbers.step_size
    return problem, hx.GradientDescent(rate)


def solution(name: str, lam: jax.Array, data: dict[str, jax.Array]) -> list[jax.Array]:
    """w_lam = argmin L(., lam) of the quadratic problems."""
    z, y = data["z"], data["y"]
    if name == "ridge":
        matrix, right = z.T @ z / len(z) + jnp.diag(jnp.exp(lam)), z.T @ y / len(z)
    else:
        matrix, right = z.T @ z + data["rho"] * jnp.eye(z.shape[1], dtype=z.dtype), z.T @ y
    return [jax.scipy.linalg.solve(matrix, right, assume_a="pos")]


def run_of(numbers: Numbers, method: hx.Method) -> Run:
    """Value and hypergradient under jit, as jaxopt's are: what a loop of one's own would call."""
    problem, dynamics = problem_of(numbers)
    function = hx.hypergradient(problem, dynamics if method.needs_dynamics else None, method)
    lam, data = jax.tree.map(jnp.asarray, (numbers.lam, {**numbers.data, "w": numbers.w}))

    @jax.jit
    def value_and_gradient(lam: jax.Array, data: dict) -> tuple[jax.Array, jax.Array]:
        h = function(lam, data)
        return h.value, h.grad

    return lambda: jax.block_until_ready(value_and_gradient(lam, data))[1]


def implicit(numbers: Numbers) -> Run:
    solver = ConjugateGradient(CG_TOLERANCE[str(numbers.lam.dtype)], CG_STEPS)
    return run_of(numbers, Implicit(numbers.steps, solver))


def closed_form(numbers: Numbers) -> Run:
    return run_of(numbers, ClosedForm(lambda lam, d: solution(numbers.name, lam, d)))


ROWS = {
    "Reverse": Row("unrolled", ALL, lambda numbers: run_of(numbers, hx.Reverse(numbers.steps))),
    "Doubling": Row("unrolled", QUADRATIC, lambda numbers: run_of(numbers, Doubling(numbers.steps))),
    "Implicit": Row("implicit", CONVEX, implicit),
    "ClosedForm": Row("exact", QUADRATIC, closed_form),
}
