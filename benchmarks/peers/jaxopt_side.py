"""jaxopt: its gradient descent, differentiated by unrolling and implicitly, under jit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import jaxopt
from jaxopt import linear_solve

from benchmarks.peers.jax_objectives import features, inner, outer
from benchmarks.peers.jax_objectives import objectives as objectives
from benchmarks.peers.jax_objectives import to_numpy as to_numpy
from benchmarks.peers.problems import Numbers
from benchmarks.peers.side import ALL, CG_STEPS, CG_TOLERANCE, CONVEX, Row, Run

PACKAGES = ("jaxopt", "jax", "jaxlib")


def gradient_of(numbers: Numbers, **options) -> Run:
    """The gradient of E(w_T(lam), lam), with tol = 0 so that all T steps are made."""
    lam, w, data = jax.tree.map(jnp.asarray, (numbers.lam, numbers.w, numbers.data))

    def f(lam: jax.Array, w: list[jax.Array], data: dict[str, jax.Array]) -> jax.Array:
        prepared = features(numbers.name, lam, data)
        eta = (lambda t: jnp.exp(lam[t])) if numbers.step_size is None else numbers.step_size
        solver = jaxopt.GradientDescent(
            lambda w, lam, d: inner(numbers.name, w, lam, d),
            stepsize=eta,
            maxiter=numbers.steps,
            tol=0.0,
            acceleration=False,
            **options,
        )
        return outer(numbers.name, solver.run(w, lam, prepared).params, lam, prepared)

    gradient = jax.jit(jax.value_and_grad(f))
    return lambda: jax.block_until_ready(gradient(lam, w, data))[1]


def implicit(numbers: Numbers) -> Run:
    tolerance = CG_TOLERANCE[str(numbers.lam.dtype)]
    solve = lambda product, right: linear_solve.solve_cg(product, right, tol=tolerance, maxiter=CG_STEPS)
    return gradient_of(numbers, implicit_diff=True, implicit_diff_solve=solve)


ROWS = {
    "jaxopt unrolled": Row("unrolled", ALL, lambda numbers: gradient_of(numbers, implicit_diff=False)),
    "jaxopt implicit": Row("implicit", CONVEX, implicit),
}
