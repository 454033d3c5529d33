"""A leaf of lam that cannot influence f_T is named in a warning, and no other."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hyperax as hx
from test_checks import DATA, LAM, REVERSE, problem, run


def unused(*arguments, **named):
    """The names in the warning."""
    with pytest.warns(hx.UnusedLeafWarning) as caught:
        h = run(*arguments, **named)
    (message,) = {str(w.message) for w in caught}
    return message.split(" do")[0], message, h


def test_a_leaf_that_nobody_uses_is_named():
    names, message, h = unused(problem(), {**LAM, "d": [1.0, jnp.ones(2)]})
    assert names == "lam['d'][0], lam['d'][1]"
    assert "Remove them from lam" in message
    assert not np.any(h.grad["d"][1])


def test_a_leaf_behind_stop_gradient_is_named():
    stopped = problem(outer=lambda w, lam, d: jnp.sum((w - jax.lax.stop_gradient(lam["b"]["c"])) ** 2))
    names, message, _ = unused(stopped)
    assert names == "lam['b']['c']"
    assert "stop_gradient" in message


def test_a_leaf_that_enters_the_inner_objective_alone_is_named_under_first_order():
    names, message, h = unused(problem(), method=hx.FirstOrder(3))
    assert names == "lam['a']"
    assert "FirstOrder" in message
    assert h.grad["a"] == 0.0


@pytest.mark.parametrize("method", [hx.Reverse(0), hx.Forward(0), hx.Truncated(0, 0), hx.Truncated(3, 0)], ids=str)
def test_a_leaf_that_no_differentiated_step_sees_is_named(method):
    names, message, h = unused(problem(), method=method)
    assert names == "lam['a']"
    assert "T = 0" in message
    assert h.grad["a"] == 0.0


def test_an_initial_point_before_the_window_is_named():
    started = problem(init=lambda lam, d: lam["b"]["c"], outer=lambda w, lam, d: jnp.sum(w**2))
    assert unused(started, method=hx.Truncated(3, 2))[0] == "lam['b']['c']"
    run(started, method=hx.Truncated(3, 3))


def test_an_unused_leaf_is_named_under_a_mean_over_tasks():
    f = hx.mean_over_tasks(hx.hypergradient(problem(), hx.GradientDescent(0.1), REVERSE))
    with pytest.warns(hx.UnusedLeafWarning, match=r"^lam\['extra'\] does not reach"):
        f({**LAM, "extra": 1.0}, jnp.ones((2, 2)))


@jax.custom_jvp
def double(x):
    return 2 * x


@double.defjvp
def _(primals, tangents):
    return double(*primals), 2 * tangents[0]


@jax.custom_vjp
def triple(x):
    return 3 * x


triple.defvjp(lambda x: (3 * x, None), lambda _, g: (3 * g,))

THROUGH = {
    "scan carry": lambda x: jax.lax.scan(lambda c, _: (c * x[0] + x[1], None), 1.0, length=2)[0],
    "scan carry after two rounds": lambda x: jax.lax.scan(
        lambda c, _: ((x[0] + x[1], c[0]), None), (0.0, 0.0), length=3
    )[0][1],
    "scan inputs": lambda x: jax.lax.scan(lambda c, y: (c + y**2, y), 0.0, x)[1].sum(),
    "jit": jax.jit(lambda x: jnp.sum(x**2)),
    "cond": lambda x: jax.lax.cond(x[0] > 0, lambda x: jnp.sum(x), lambda x: jnp.sum(x**2), x),
    "switch": lambda x: jax.lax.switch(1, [jnp.sum, lambda x: jnp.sum(x**2)], x),
    "custom_jvp": lambda x: jnp.sum(double(x)),
    "custom_vjp": lambda x: jnp.sum(triple(x)),
    "vmap": lambda x: jnp.sum(jax.vmap(lambda y: y**2)(x)),
    "checkpoint": lambda x: jnp.sum(jax.checkpoint(jnp.sin)(x)),
    "solve": lambda x: jnp.sum(jnp.linalg.solve(jnp.eye(2) + jnp.outer(x, x), x)),
}


@pytest.mark.parametrize("use", THROUGH.values(), ids=THROUGH.keys())
def test_no_warning_where_a_leaf_is_used(use):
    h = run(problem(outer=lambda w, lam, d: jnp.sum(w**2) + use(lam["b"]["c"])))
    assert np.all(np.isfinite(h.grad["b"]["c"]))
    assert np.any(h.grad["b"]["c"])


def test_no_warning_where_a_leaf_is_used_in_a_while_loop():
    """Reverse mode cannot pass a while loop, forward mode can."""
    loop = lambda x: jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] * x[0] + x[1]), (0, 1.0))[1]
    used = problem(outer=lambda w, lam, d: jnp.sum(w**2) + loop(lam["b"]["c"]))
    assert np.all(run(used, method=hx.Forward(3)).grad["b"]["c"])


def test_the_warning_does_not_come_again_with_every_call():
    f = hx.hypergradient(problem(), hx.GradientDescent(0.1), REVERSE)
    with pytest.warns(hx.UnusedLeafWarning):
        f({**LAM, "d": 1.0}, DATA)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        f({**LAM, "d": 2.0}, DATA)


def test_rounding_and_comparison_cut_the_path():
    problem = hx.Problem(
        inner=lambda w, lam, d: jnp.sum((w - jnp.round(lam["a"]) * (lam["b"] > 0) * lam["c"]) ** 2),
        outer=lambda w, lam, d: jnp.sum(w**2),
        init=lambda lam, d: jnp.zeros(2),
    )
    with pytest.warns(hx.UnusedLeafWarning, match=r"lam\['a'\], lam\['b'\] do not reach"):
        h = hx.hypergradient(problem, hx.GradientDescent(0.1), hx.Reverse(2))({"a": 1.2, "b": 1.0, "c": 2.0})
    assert h.grad["a"] == h.grad["b"] == 0 != h.grad["c"]
