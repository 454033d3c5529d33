"""Small problems that several tests share, and a plain implementation of f_T to compare every method with."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import hyperax as hx

EXAMPLES, INPUTS, STEPS, TASKS = 6, 3, 6, 4

# One entry of lam for each way into f_T: Phi_0, Phi_t, prepare, E. Three weights and a bias: d = 4.
LAM = {
    "init": {"weight": np.array([0.3, -0.2, 0.5]), "bias": np.array(0.1)},
    "steps": {
        "log_rates": np.array([-1.4, -1.6]),
        "logit_memory": np.array([0.7, 1.5]),
        "log_decay": np.array(-2.0),
        "example_weights": np.array([1.0, 0.5, 0.8, 1.2, 0.9, 0.6]),
    },
    "prepare": np.array([0.9, 1.1, -0.7]),
    "outer": np.array([0.4, -0.3]),
}
ENTRIES = tuple(LAM)


def _loss(w: dict, x: jax.Array, y: jax.Array, weights: Any = 1.0) -> jax.Array:
    error = x @ w["weight"] + w["bias"] - y
    return jnp.mean(weights * jnp.log(jnp.cosh(error)))


def regression(lam_of: Any, batches: bool) -> hx.Problem:
    """Robust regression on scaled and bent features; `lam_of(lam)` has all four entries, whatever lam has."""

    def prepare(lam, data):
        x = jnp.concatenate([data["x"], data["x_outer"]])
        x = jnp.tanh(x * lam_of(lam)["prepare"])
        return {**data, "x": x[:EXAMPLES], "x_outer": x[EXAMPLES:], "weights": jnp.ones(EXAMPLES)}

    def inner(w, lam, data):
        lam = lam_of(lam)["steps"]
        decay = jnp.exp(lam["log_decay"]) * (jnp.sum(w["weight"] ** 2) + jnp.sin(w["bias"]))
        return _loss(w, data["x"], data["y"], lam["example_weights"] * data["weights"]) + decay

    def outer(w, lam, data):
        lam = lam_of(lam)["outer"]
        return _loss(w, data["x_outer"], data["y_outer"]) + lam[0] * jnp.sum(w["weight"]) ** 2 + jnp.sum(lam**3)

    def batch(data, t):
        return {**data, "weights": 2.0 * jax.random.bernoulli(jax.random.fold_in(data["key"], t), 0.5, (EXAMPLES,))}

    init = lambda lam, data: lam_of(lam)["init"]
    return hx.Problem(inner, outer, init, prepare, batch=batch if batches else None)


def dynamics_table(lam_of: Any) -> dict[str, hx.Dynamics]:
    """Every dynamics, with its settings from lam: one row each."""

    rates = lambda lam: jnp.exp(lam_of(lam)["steps"]["log_rates"])
    memory = lambda lam: jax.nn.sigmoid(lam_of(lam)["steps"]["logit_memory"])

    def per_parameter(lam):
        return {"weight": rates(lam)[0], "bias": rates(lam)[1]}

    def schedule(lam, t):
        return jax.tree.map(lambda rate: rate * (1.0 + jnp.sum(memory(lam) ** t)), per_parameter(lam))

    def adam(lam):
        b1, b2 = memory(lam)
        return optax.adam(jnp.sum(rates(lam)), b1=b1, b2=b2, eps=1e-3, eps_root=1e-4)

    return {
        "GradientDescent": hx.GradientDescent(schedule),
        "HeavyBall": hx.HeavyBall(per_parameter, lambda lam, t: memory(lam)[0] * (1.0 - memory(lam)[1] / (t + 1))),
        "Optax(adam)": hx.Optax(adam),
        "Optax(sgd)": hx.Optax(lambda lam: optax.sgd(jnp.sum(rates(lam)), momentum=memory(lam)[0])),
    }


DYNAMICS = tuple(dynamics_table(None))


def regression_data(tasks: int | None = None) -> dict[str, Any]:
    """Data of one task, or of several on a leading axis, with a key for the mini-batches."""
    draw = np.random.default_rng(0)
    lead = () if tasks is None else (tasks,)
    arrays = {
        "x": draw.normal(size=(*lead, EXAMPLES, INPUTS)),
        "y": draw.normal(size=(*lead, EXAMPLES)),
        "x_outer": draw.normal(size=(*lead, EXAMPLES, INPUTS)),
        "y_outer": draw.normal(size=(*lead, EXAMPLES)),
    }
    key = jax.random.key(7)
    return {**jax.tree.map(jnp.asarray, arrays), "key": key if tasks is None else jax.random.split(key, tasks)}


def case(entry: str, dynamics: str, batches: bool) -> tuple[hx.Problem, hx.Dynamics, Any]:
    """(problem, dynamics, lam) with lam the named entry of LAM, or all of them for "all"."""
    if entry == "all":
        lam, lam_of = LAM, lambda lam: lam
    else:
        lam, lam_of = {entry: LAM[entry]}, lambda lam: {**jax.tree.map(jnp.asarray, LAM), **lam}
    return regression(lam_of, batches), dynamics_table(lam_of)[dynamics], jax.tree.map(jnp.asarray, lam)


def plain_value(problem: hx.Problem, dynamics: hx.Dynamics, steps: int, lam: Any, data: Any) -> jax.Array:
    """f_T(lam) in a Python loop: nothing of rollout.py or methods/."""
    prepared = problem.prepare(lam, data)
    state = dynamics.init(problem.init(lam, prepared), lam)
    for t in range(1, steps + 1):
        seen = prepared if problem.batch is None else problem.batch(prepared, t)
        gradient = jax.grad(lambda w, lam, seen=seen: problem.inner(w, lam, seen))
        state = dynamics.step(gradient, state, lam, jnp.asarray(t))
    return problem.outer(state.w, lam, prepared)


def finite_differences(function: Any, lam: Any, epsilon: float = 1e-4) -> Any:
    """The gradient by fourth-order central differences, all points in one mapped call."""
    flat, unravel = ravel_pytree(lam)
    offsets = epsilon * jnp.array([-2.0, -1.0, 1.0, 2.0])[:, None, None] * jnp.eye(flat.size)
    values = jax.jit(jax.vmap(jax.vmap(lambda offset: function(unravel(flat + offset)))))(offsets)
    return unravel((values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * epsilon))


@cache
def reference(entry: str, dynamics: str, batches: bool) -> tuple[Any, Any]:
    """(value, finite-difference gradient) of a case, computed once."""
    problem, phi, lam = case(entry, dynamics, batches)
    function = lambda lam: plain_value(problem, phi, STEPS, lam, regression_data())
    return jax.jit(function)(lam), finite_differences(function, lam)


@cache
def reverse_gradient(entry: str, dynamics: str, batches: bool) -> hx.Hypergradient:
    """What `Reverse` says of a case, computed once."""
    problem, phi, lam = case(entry, dynamics, batches)
    return hx.hypergradient(problem, phi, hx.Reverse(STEPS))(lam, regression_data())


def quadratic(curvature: Any = (1.0, 2.0)) -> hx.Problem:
    """L = (1/2) sum over i of a_i (w_i - lam_i)^2, E = (1/2) |w - data|^2, w_0 = 0: everything in closed form."""
    a = jnp.asarray(curvature)
    return hx.Problem(
        inner=lambda w, lam, data: 0.5 * jnp.sum(a * (w - lam) ** 2),
        outer=lambda w, lam, data: 0.5 * jnp.sum((w - data) ** 2),
        init=lambda lam, data: jnp.zeros_like(lam),
    )


def assert_trees_close(actual: Any, expected: Any, rtol: float, atol: float = 0.0) -> None:
    """Leaf by leaf, relative to the largest entry of the expected leaf."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, one), other in zip(
        jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True
    ):
        one, other = np.asarray(one), np.asarray(other)
        assert one.shape == other.shape
        bound = rtol * np.max(np.abs(other), initial=0.0) + atol
        distance = np.max(np.abs(one - other), initial=0.0)
        assert distance <= bound, f"{jax.tree_util.keystr(path)}: {one} and {other} differ by {distance}, over {bound}"
