"""Small problems that several tests share, and a plain implementation of f_T to compare every method with."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import hyperax as hx
from hyperax.fewshot.layers import BatchNorm, Convolution, own_moments

EXAMPLES, INPUTS, STEPS, TASKS = 5, 3, 6, 4

# For `jax.jit(..., compiler_options=OPTIMISED)`: as programs are compiled outside of the tests (see conftest.py).
OPTIMISED: dict[str, Any] = {"xla_backend_optimization_level": 3}
if "fusion_emitters" in os.environ.get("XLA_FLAGS", ""):
    OPTIMISED["xla_cpu_use_fusion_emitters"] = True

# One entry of lam for each way into f_T: Phi_0, every Phi_t, prepare, and E itself. Polynomials, so that the table
# compiles fast; what is differentiated is a polynomial of degree 3^T all the same.
LAM = {
    "init": np.array([0.3, -0.2, 0.5]),
    "steps": {
        "rates": np.array([0.2, 0.15, 0.25]),
        "memory": np.array([0.6, 0.8]),
        "decay": np.array(0.1),
        "example_weights": np.array([1.0, 0.5, 0.8, 1.2, 0.9]),
    },
    "prepare": np.array([0.9, 1.1, -0.7]),
    "outer": np.array([0.4, -0.3]),
}
ENTRIES = tuple(LAM)
SIZE = sum(leaf.size for leaf in jax.tree.leaves(LAM))


def _loss(w: jax.Array, x: jax.Array, y: jax.Array, weights: Any = 1.0) -> jax.Array:
    square = (x @ w - y) ** 2
    return jnp.mean(weights * square * (1.0 + 0.1 * square))


def regression(lam_of: Any, batches: bool) -> hx.Problem:
    """Regression on scaled features; `lam_of(lam)` has all four entries, whatever lam has."""

    def prepare(lam, data):
        scaled = data["x"] * lam_of(lam)["prepare"]
        return {**data, "x": scaled + 0.3 * scaled**2, "chosen": jnp.ones(EXAMPLES)}

    def inner(w, lam, data):
        settings = lam_of(lam)["steps"]
        weights = settings["example_weights"] * data["chosen"]
        return _loss(w, data["x"], data["y"], weights) + settings["decay"] * jnp.sum(w**2)

    def outer(w, lam, data):
        a, b = lam_of(lam)["outer"]
        return _loss(w, data["x"], data["y_outer"]) + a * jnp.sum(w) ** 2 + a * b

    def batch(data, t):
        return {**data, "chosen": 2.0 * jax.random.bernoulli(jax.random.fold_in(data["key"], t), 0.5, (EXAMPLES,))}

    init = lambda lam, data: lam_of(lam)["init"]
    return hx.Problem(inner, outer, init, prepare, batch=batch if batches else None)


def dynamics_table(lam_of: Any) -> dict[str, hx.Dynamics]:
    """Every dynamics, with its settings from lam (per parameter, scheduled, or one number): one row each."""
    rates = lambda lam: lam_of(lam)["steps"]["rates"]
    memory = lambda lam: lam_of(lam)["steps"]["memory"]

    def adam(lam):
        b1, b2 = memory(lam)
        return optax.adam(jnp.sum(rates(lam)) / 3, b1=b1, b2=b2, eps=1e-3, eps_root=1e-2)

    return {
        "GradientDescent": hx.GradientDescent(lambda lam, t: rates(lam) * (1.0 + jnp.sum(memory(lam)) / t)),
        "HeavyBall": hx.HeavyBall(rates, lambda lam, t: memory(lam)[0] * (1.0 - memory(lam)[1] / (t + 1))),
        "Adam": hx.Adam(rates, lambda lam: memory(lam)[0], lambda lam, t: memory(lam)[1] ** (1.0 / t), eps=0.1),
        "Optax(adam)": hx.Optax(adam),
        "Optax(sgd)": hx.Optax(lambda lam: optax.sgd(jnp.sum(rates(lam)) / 3, momentum=memory(lam)[0])),
    }


DYNAMICS = tuple(dynamics_table(None))


def regression_data(tasks: int | None = None) -> dict[str, Any]:
    """Data of one task, or of several on a leading axis, with a key for the mini-batches."""
    draw = np.random.default_rng(0)
    lead = () if tasks is None else (tasks,)
    arrays = {
        "x": draw.normal(size=(*lead, EXAMPLES, INPUTS)),
        "y": draw.normal(size=(*lead, EXAMPLES)),
        "y_outer": draw.normal(size=(*lead, EXAMPLES)),
    }
    key = jax.random.key(7)
    return {**jax.tree.map(jnp.asarray, arrays), "key": key if tasks is None else jax.random.split(key, tasks)}


@cache  # the same functions again are the same compiled program again
def case(entry: str, dynamics: str, batches: bool) -> tuple[hx.Problem, hx.Dynamics, Any]:
    """(problem, dynamics, lam) with lam the named entry of LAM, or all of them for "all"."""
    every = jax.tree.map(jnp.asarray, LAM)
    lam, lam_of = (every, lambda lam: lam) if entry == "all" else ({entry: every[entry]}, lambda lam: {**every, **lam})
    return regression(lam_of, batches), dynamics_table(lam_of)[dynamics], lam


def plain_values(problem: hx.Problem, dynamics: hx.Dynamics, steps: int, lams: Any, data: Any) -> jax.Array:
    """f_T at many lam (on a leading axis), in a Python loop: nothing of rollout.py or methods/."""

    def start(lam):
        prepared = problem.prepare(lam, data)
        return prepared, dynamics.init(problem.init(lam, prepared), lam)

    def step(lam, prepared, state, t):
        seen = prepared if problem.batch is None else problem.batch(prepared, t)
        return dynamics.step(jax.grad(lambda w, lam: problem.inner(w, lam, seen)), state, lam, t)

    prepared, states = jax.jit(jax.vmap(start))(lams)
    step = jax.jit(jax.vmap(step, in_axes=(0, 0, 0, None)))
    for t in range(1, steps + 1):
        states = step(lams, prepared, states, jnp.asarray(t))
    return jax.jit(jax.vmap(lambda w, lam, prepared: problem.outer(w, lam, prepared)))(states.w, lams, prepared)


def differences(values: Any, lam: Any, epsilon: float = 1e-4) -> tuple[jax.Array, Any]:
    """(f, gradient of f by fourth-order central differences), with `values` f at many lam."""
    flat, unravel = ravel_pytree(lam)
    offsets = epsilon * jnp.array([-2.0, -1.0, 1.0, 2.0])[:, None, None] * jnp.eye(flat.size)
    points = jnp.concatenate([flat[None], (flat + offsets).reshape(-1, flat.size)])
    value, *around = jnp.split(values(jax.vmap(unravel)(points)), [1, *range(1 + flat.size, len(points), flat.size)])
    weights = (1.0, -8.0, 8.0, -1.0)
    return value[0], unravel(sum(a * b for a, b in zip(weights, around, strict=True)) / (12 * epsilon))


@cache
def reference(entry: str, dynamics: str, batches: bool) -> tuple[jax.Array, Any]:
    """(f_T, its gradient by finite differences) of a case, computed once."""
    problem, phi, lam = case(entry, dynamics, batches)
    return differences(lambda lams: plain_values(problem, phi, STEPS, lams, regression_data()), lam)


@cache
def reverse(entry: str, dynamics: str, batches: bool) -> hx.Hypergradient:
    """What `Reverse` says of a case, computed once."""
    problem, phi, lam = case(entry, dynamics, batches)
    return hx.hypergradient(problem, phi, hx.Reverse(STEPS))(lam, regression_data())


def quadratic(curvature: Any = (1.0, 2.0)) -> hx.Problem:
    """L = (1/2) sum over i of a_i (w_i - lam_i)^2, E = (1/2) |w - data|^2, w_0 = 0: everything in closed form."""
    a = np.asarray(curvature)
    return hx.Problem(
        inner=lambda w, lam, data: 0.5 * jnp.sum(a.astype(lam.dtype) * (w - lam) ** 2),
        outer=lambda w, lam, data: 0.5 * jnp.sum((w - data) ** 2),
        init=lambda lam, data: jnp.zeros_like(lam),
    )


def assert_trees_close(actual: Any, expected: Any, rtol: float, atol: float = 0.0) -> None:
    """Leaf by leaf, relative to the largest entry of the expected leaf."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    leaves = zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True)
    for (path, one), other in leaves:
        one, other = np.asarray(one), np.asarray(other)
        assert one.shape == other.shape
        bound = rtol * np.max(np.abs(other), initial=0.0) + atol
        distance = np.max(np.abs(one - other), initial=0.0)
        assert distance <= bound, f"{jax.tree_util.keystr(path)}: {one} and {other} differ by {distance}, over {bound}"


class SmallNet(eqx.Module):
    """One layer of the papers' networks, for what does not depend on how many there are."""

    convolution: Convolution
    normalisation: BatchNorm

    def __call__(self, images, moments=own_moments):
        return jnp.tanh(self.normalisation(self.convolution(images), moments)).reshape(len(images), -1)


def small_net() -> SmallNet:
    """In float64: 18 features, 9 of each filter, from images of 9 x 9 x 1."""
    net = SmallNet(Convolution(1, 2, jax.random.key(1), stride=3), BatchNorm(jnp.array([0.1, -0.2])))
    return jax.tree.map(lambda x: x.astype(jnp.float64), net)
