"""Random small problems: every exact method gives the same hypergradient of f_T, and with many steps that of f."""

from functools import cache

import jax.numpy as jnp
import lineax as lx
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import hyperax as hx
from hyperax.linear_solvers import FixedPoint
from problems import assert_trees_close

EXAMPLES, INPUTS = 7, 4


def regression(quadratic):
    """Scaled features, an L2 coefficient per feature, example weights; all settings and the start are in lam too."""

    def inner(w, lam, d):
        error = d["x"] @ w - d["y"]
        loss = 0.5 * error**2 if quadratic else jnp.log(jnp.cosh(error))
        return jnp.mean(lam["weights"] * loss) + 0.5 * jnp.sum(jnp.exp(lam["decay"]) * w**2)

    return hx.Problem(
        inner=inner,
        outer=lambda w, lam, d: jnp.mean((d["x_val"] @ w - d["y_val"]) ** 2) + 0.1 * jnp.sum(lam["decay"] ** 2),
        init=lambda lam, d: lam["start"],
        prepare=lambda lam, d: d | {"x": d["x"] * lam["scale"], "x_val": d["x_val"] * lam["scale"]},
    )


def solve(lam, d):
    gram = d["x"].T @ (lam["weights"][:, None] * d["x"]) / EXAMPLES + jnp.diag(jnp.exp(lam["decay"]))
    return jnp.linalg.solve(gram, d["x"].T @ (lam["weights"] * d["y"]) / EXAMPLES)


@st.composite
def problems(draw, slowest=-3.0):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    spread = draw(st.floats(0.3, 2.0))
    array = lambda *shape: jnp.asarray(rng.normal(size=shape))
    data = {
        "x": spread * array(EXAMPLES, INPUTS),
        "y": array(EXAMPLES),
        "x_val": array(EXAMPLES, INPUTS),
        "y_val": array(EXAMPLES),
    }
    lam = {
        "decay": jnp.asarray(rng.uniform(slowest, 0.5, INPUTS)),
        "weights": jnp.asarray(rng.uniform(0.0, 1.5, EXAMPLES)),
        "scale": array(INPUTS),
        "start": array(INPUTS),
        "rate": jnp.asarray(draw(st.floats(0.001, 0.2))),
        "momentum": jnp.asarray(draw(st.integers(500, 950)) / 1000),
    }
    return lam, data


HEAVY_BALL = hx.HeavyBall(lambda lam: lam["rate"], lambda lam: lam["momentum"])
ADAM = hx.Adam(lambda lam: lam["rate"], b1=lambda lam: lam["momentum"], eps=1e-3)

EXACT = (hx.Reverse(9, segment="sqrt"), hx.Forward(9, chunk=8))


@cache  # one compiled program each, whatever is drawn
def compiled(quadratic, dynamics, method):
    return hx.hypergradient(regression(quadratic), dynamics, method)


@given(problems())
@settings(max_examples=12)
def test_exact_methods_agree(case):
    lam, data = case
    exact = compiled(False, ADAM, hx.Reverse(9))(lam, data)
    for method in EXACT:
        h = compiled(False, ADAM, method)(lam, data)
        assert_trees_close(h.grad, exact.grad, 1e-9, 1e-12)
        assert_trees_close(h.value, exact.value, 1e-12)


@given(problems())
@settings(max_examples=20)
def test_exact_methods_of_heavy_ball_agree(case):
    lam, data = case
    exact = compiled(True, HEAVY_BALL, hx.Reverse(9))(lam, data)
    doubled = compiled(True, HEAVY_BALL, hx.Doubling(9))(lam, data)
    assert_trees_close(doubled.grad, exact.grad, 1e-9, 1e-11)
    assert_trees_close(doubled.state, exact.state, 1e-9, 1e-12)
    h = compiled(True, HEAVY_BALL, hx.Reversible(9))(lam, data)
    assert bool(h.info["returned"])
    assert_trees_close(h.grad, exact.grad, 1e-8, 1e-9)


@given(problems(slowest=-1.0))
@settings(max_examples=12)
def test_many_steps_are_the_exact_problem(case):
    lam, data = case
    # The inner solution depends on these alone.
    lam = lam | {"rate": jnp.asarray(0.05), "momentum": jnp.asarray(0.8)}
    inner = ("decay", "weights", "scale")
    fixed = {name: lam[name] for name in ("start", "rate", "momentum")}
    data = data | {"fixed": fixed, "x": data["x"] / jnp.linalg.norm(data["x"])}
    outer = {name: lam[name] for name in inner}
    exact = exact_problem(hx.ClosedForm(lambda lam, d: solve(lam, d)))(outer, data)
    for method in LIMIT:
        h = exact_problem(method)(outer, data)
        assert_trees_close(h.grad, exact.grad, 1e-7, 1e-10)
        assert_trees_close(h.state.w, exact.state.w, 1e-9, 1e-11)


LIMIT = (
    hx.Reverse(500),
    hx.Implicit(500, lx.CG(1e-12, 1e-12)),
    hx.Implicit(500, FixedPoint(500)),
    hx.Doubling(512),
)


@cache
def exact_problem(method):
    """The same problem with only those hyperparameters that the inner solution depends on."""
    whole = regression(True)
    problem = hx.Problem(
        inner=whole.inner,
        outer=whole.outer,
        init=lambda lam, d: d["fixed"]["start"],
        prepare=whole.prepare,
    )
    return hx.hypergradient(problem, hx.HeavyBall(0.05, 0.8), method)
