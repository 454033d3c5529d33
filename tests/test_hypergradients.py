"""The one table: every method x dynamics x entry of lam agrees with every other, with finite differences and by hand.

A new exact method is one new row of EXACT; a new dynamics is one new row of `problems.dynamics_table`.
"""

from functools import cache

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import (
    DYNAMICS,
    ENTRIES,
    LAM,
    STEPS,
    TASKS,
    assert_trees_close,
    case,
    finite_differences,
    plain_value,
    quadratic,
    reference,
    regression_data,
    reverse_gradient,
)

import hyperax as hx

# A method as a function of T (and m, the size of lam): segments and chunks that divide it, that do not, and extremes.
SIZE = sum(np.size(leaf) for leaf in jax.tree.leaves(LAM))
EXACT = {
    "Reverse": lambda steps: hx.Reverse(steps),
    "Reverse(segment divides)": lambda steps: hx.Reverse(steps, segment=3),
    "Reverse(segment does not divide)": lambda steps: hx.Reverse(steps, segment=4),
    "Reverse(segment 1)": lambda steps: hx.Reverse(steps, segment=1),
    "Reverse(segment over T)": lambda steps: hx.Reverse(steps, segment=steps + 5),
    "Truncated(window T)": lambda steps: hx.Truncated(steps, window=steps),
    "Forward": lambda steps: hx.Forward(steps),
    "Forward(chunk divides)": lambda steps: hx.Forward(steps, chunk=5),
    "Forward(chunk does not divide)": lambda steps: hx.Forward(steps, chunk=3),
}
every_exact_method = pytest.mark.parametrize("method", EXACT.values(), ids=EXACT.keys())


def test_the_rows_are_what_they_say():
    assert STEPS % 3 == 0
    assert STEPS % 4 != 0
    assert SIZE % 5 == 0
    assert SIZE % 3 != 0


@pytest.mark.parametrize("dynamics", DYNAMICS)
@every_exact_method
def test_all_entries_on_mini_batches(method, dynamics):
    problem, phi, lam = case("all", dynamics, True)
    h = hx.hypergradient(problem, phi, method(STEPS))(lam, regression_data())
    value, differences = reference("all", dynamics, True)
    assert_trees_close(h.value, value, 1e-12)
    assert_trees_close(h.grad, differences, 1e-6, atol=1e-10)
    assert_trees_close(h.grad, reverse_gradient("all", dynamics, True).grad, 1e-9)
    assert_trees_close(h.state, reverse_gradient("all", dynamics, True).state, 1e-12)


@pytest.mark.parametrize("entry", ENTRIES)
@every_exact_method
def test_each_entry_alone(method, entry):
    problem, phi, lam = case(entry, "HeavyBall", False)
    h = hx.hypergradient(problem, phi, method(STEPS))(lam, regression_data())
    assert_trees_close(h.grad, reference(entry, "HeavyBall", False)[1], 1e-6, atol=1e-10)
    assert_trees_close(h.grad, reverse_gradient(entry, "HeavyBall", False).grad, 1e-9)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("dynamics", DYNAMICS)
def test_each_entry_alone_under_each_dynamics(dynamics, entry):
    h = reverse_gradient(entry, dynamics, False)
    assert_trees_close(h.grad, reference(entry, dynamics, False)[1], 1e-6, atol=1e-10)


@pytest.mark.parametrize("parallel", [None, 1, 2])
@pytest.mark.parametrize("name", ["Reverse", "Reverse(segment does not divide)", "Truncated(window T)", "Forward"])
def test_mean_over_tasks(name, parallel):
    problem, phi, lam = case("all", "GradientDescent", True)
    data = regression_data(TASKS)
    single = hx.hypergradient(problem, phi, EXACT[name](STEPS))
    h = hx.mean_over_tasks(single, parallel)(lam, data)
    alone = one_by_one()
    assert_trees_close(h.grad, jax.tree.map(lambda *leaves: sum(leaves) / TASKS, *(a.grad for a in alone)), 1e-9)
    assert_trees_close(h.value, sum(a.value for a in alone) / TASKS, 1e-12)
    assert_trees_close(h.state, jax.tree.map(lambda *leaves: jnp.stack(leaves), *(a.state for a in alone)), 1e-12)


@cache
def one_by_one():
    problem, phi, lam = case("all", "GradientDescent", True)
    data = regression_data(TASKS)
    single = hx.hypergradient(problem, phi, hx.Reverse(STEPS))
    return [single(lam, jax.tree.map(lambda x, j=j: x[j], data)) for j in range(TASKS)]
