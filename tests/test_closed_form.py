"""ClosedForm is the exact problem (1)-(2): the limit of f_T, the implicit function theorem, and Example 3.4."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hyperax as hx
from hyperax.methods.closed_form import ClosedForm
from problems import assert_trees_close

DRAW = np.random.default_rng(0)
DATA = {
    name: jnp.asarray(DRAW.normal(size=shape))
    for name, shape in {"x": (9, 4), "y": (9,), "x_val": (5, 4), "y_val": (5,)}.items()
}
RIDGE = hx.Problem(
    inner=lambda w, lam, d: jnp.sum((d["x"] @ w - d["y"]) ** 2) + jnp.sum(jnp.exp(lam) * w**2),
    outer=lambda w, lam, d: jnp.sum((d["x_val"] @ w - d["y_val"]) ** 2) + 0.1 * jnp.sum(lam**2),
    init=lambda lam, d: jnp.zeros(4),
)
LAM = jnp.array([0.5, -0.3, 0.1, 0.8])


def solve(lam, d):
    return jnp.linalg.solve(d["x"].T @ d["x"] + jnp.diag(jnp.exp(lam)), d["x"].T @ d["y"])


def test_ridge_is_the_limit_of_f_t():
    h = hx.hypergradient(RIDGE, None, ClosedForm(solve))(LAM, DATA)
    limit = hx.hypergradient(RIDGE, hx.GradientDescent(0.02), hx.Reverse(2000))(LAM, DATA)
    np.testing.assert_allclose(h.value, limit.value, rtol=1e-9)
    assert_trees_close(h.grad, limit.grad, 1e-9)
    assert_trees_close(h.state, limit.state, 1e-9)
    assert h.info["inner_gradient"] < 1e-12
    assert h.carry == ()


def test_ridge_is_what_the_implicit_function_theorem_says():
    h = hx.hypergradient(RIDGE, None, ClosedForm(solve))(LAM, DATA)
    w = h.state.w
    hessian = 2 * DATA["x"].T @ DATA["x"] + 2 * jnp.diag(jnp.exp(LAM))
    adjoint = jnp.linalg.solve(hessian, 2 * DATA["x_val"].T @ (DATA["x_val"] @ w - DATA["y_val"]))
    assert_trees_close(h.grad, 0.2 * LAM - 2 * jnp.exp(LAM) * w * adjoint, 1e-11)


def test_example_3_4():
    """ICML 2018, eq. 8: a linear representation H, and w_H = ((XH)^T XH + rho I)^-1 (XH)^T Y."""
    rho, outputs = 0.3, jnp.asarray(DRAW.normal(size=(9, 2)))
    loss = lambda w, H, d: jnp.sum((outputs - d["z"] @ w) ** 2) + rho * jnp.sum(w**2)
    validation = lambda w, H, d: jnp.sum((DATA["x_val"] @ H @ w) ** 2)
    problem = hx.Problem(loss, validation, lambda H, d: jnp.zeros((4, 2)), lambda H, d: {"z": DATA["x"] @ H})
    closed = lambda H, d: jnp.linalg.solve(d["z"].T @ d["z"] + rho * jnp.eye(4), d["z"].T @ outputs)
    H = jnp.eye(4) + 0.1 * jnp.asarray(DRAW.normal(size=(4, 4)))
    h = hx.hypergradient(problem, None, ClosedForm(closed))(H)
    limit = hx.hypergradient(problem, hx.GradientDescent(0.02), hx.Reverse(1500))(H)
    assert_trees_close(h.grad, limit.grad, 1e-9)
    assert h.info["inner_gradient"] < 1e-12


def test_the_mean_over_tasks():
    f = hx.hypergradient(RIDGE, None, ClosedForm(solve))
    halved = {**DATA, "y": DATA["y"] / 2}
    tasks = jax.tree.map(lambda *x: jnp.stack(x), DATA, halved)
    mean, alone = hx.mean_over_tasks(f)(LAM, tasks), [f(LAM, DATA), f(LAM, halved)]
    assert_trees_close(mean.grad, (alone[0].grad + alone[1].grad) / 2, 1e-12)
    assert_trees_close(mean.state, jax.tree.map(lambda *x: jnp.stack(x), *(a.state for a in alone)), 1e-12)
    assert mean.info["inner_gradient"].shape == (2,)


def test_second_derivatives():
    method = ClosedForm(lambda lam, d: d / lam)
    problem = hx.Problem(lambda w, lam, d: (lam * w - d) ** 2, lambda w, lam, d: w**3, lambda lam, d: jnp.zeros(()))
    value = lambda lam: method.value(problem, hx.GradientDescent(0.0), lam, jnp.asarray(2.0), ())[0]
    np.testing.assert_allclose(jax.grad(jax.grad(value))(1.5), 12 * 8 / 1.5**5, rtol=1e-12)


def test_a_wrong_formula_shows():
    wrong = lambda lam, d: 0.9 * solve(lam, d)
    h = hx.hypergradient(RIDGE, None, ClosedForm(wrong))(LAM, DATA)
    np.testing.assert_allclose(h.info["inner_gradient"], 0.2 * np.linalg.norm(DATA["x"].T @ DATA["y"]), rtol=1e-9)


def test_modules():
    """As for Phi_0, the arrays of a module are its variables, and what else it holds is put back."""
    layer = eqx.nn.MLP(1, 1, 1, 0, use_bias=False, use_final_bias=False, key=jax.random.key(0))
    like = lambda weight: eqx.tree_at(lambda net: net.layers[0].weight, layer, weight)
    inner = lambda net, lam, d: jnp.sum((net(jnp.ones(1)) - lam) ** 2)
    problem = hx.Problem(inner, lambda net, lam, d: jnp.sum(net(jnp.array([2.0])) ** 2), lambda lam, d: layer)
    h = hx.hypergradient(problem, None, ClosedForm(lambda lam, d: like(lam.reshape(1, 1))))(jnp.array([3.0]))
    assert_trees_close(h.grad, jnp.array([24.0]), 1e-12)
    assert h.info["inner_gradient"] == 0.0


def test_what_only_phi_0_uses_is_named():
    problem = hx.Problem(lambda w, lam, d: (w - lam["a"]) ** 2, lambda w, lam, d: w, lambda lam, d: lam["b"])
    with pytest.warns(hx.UnusedLeafWarning, match=r"^lam\['b'\] does not reach"):
        hx.hypergradient(problem, None, ClosedForm(lambda lam, d: lam["a"]))({"a": 1.0, "b": 2.0})


@pytest.mark.parametrize(
    ("returned", "match"),
    [
        (lambda w: {"w": w}, r"solve returns PyTreeDef\(\{'w'.*let solve return a pytree like Phi_0"),
        (lambda w: w[:, None], r"w is float64\[4, 1\] from solve and float64\[4\] from Phi_0"),
        (lambda w: w.astype(jnp.float32), r"w is float32\[4\] from solve and float64\[4\]"),
    ],
)
def test_a_solution_unlike_phi_0_is_refused(returned, match):
    with pytest.raises(ValueError, match=match):
        hx.hypergradient(RIDGE, None, ClosedForm(lambda lam, d: returned(solve(lam, d))))(LAM, DATA)


def test_refusals():
    batched = hx.Problem(RIDGE.inner, RIDGE.outer, RIDGE.init, batch=lambda d, t: d)
    with pytest.raises(ValueError, match=r"mini-batches \(batch\).*use Reverse"):
        hx.hypergradient(batched, None, ClosedForm(solve))(LAM, DATA)
    with pytest.raises(ValueError, match="solve must be a function"):
        ClosedForm(jnp.zeros(4))
