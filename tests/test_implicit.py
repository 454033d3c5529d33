"""Implicit differentiation: closed forms for every solver, warm starts, tolerances, and what is refused."""

from functools import cache

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import pytest

import hyperax as hx
from hyperax.dynamics.adam import Adam
from hyperax.linear_solvers import ConjugateGradient, FixedPoint, Neumann, Nystrom
from hyperax.methods.implicit import ExponentialTolerance, Implicit, PolynomialTolerance
from problems import assert_trees_close, quadratic

SOLVERS = {
    "ConjugateGradient": ConjugateGradient(),
    "Neumann": Neumann(200, 0.1),
    "FixedPoint": FixedPoint(400, tolerance=1e-13),
    "Nystrom(full rank)": Nystrom(10, 1e-11),
    "lineax.CG": lx.CG(1e-12, 1e-12),
    "lineax.GMRES": lx.GMRES(1e-12, 1e-12),
    "lineax.Normal": lx.Normal(lx.CG(1e-13, 1e-13)),
    "lineax.Cholesky": lx.Cholesky(),
    "lineax.LU": lx.LU(),
    "lineax.SVD": lx.SVD(),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_finds_the_closed_form(name):
    b, c = jnp.array([0.0, -1.0, 12.0, 18.0]), jnp.array([0.1, -1.1, 12.1, 18.1])
    problem = hx.Problem(
        inner=lambda w, e, d: jnp.sum(e * w**2 + (w - b) ** 2),
        outer=lambda w, e, d: jnp.sum((w - c) ** 2),
        init=lambda e, d: jnp.zeros(4),
    )
    e = jnp.array([3.0, 1.1, 1.0, 0.1])
    h = hx.hypergradient(problem, hx.GradientDescent(0.2), Implicit(200, SOLVERS[name]))(e)
    exact = -2 * (b / (1 + e) - c) * b / (1 + e) ** 2
    np.testing.assert_allclose(h.grad, exact, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(h.grad, [0, 0.2829068, 36.6, 51.6605], rtol=2e-6)
    np.testing.assert_allclose(h.value, np.sum((b / (1 + e) - c) ** 2), rtol=1e-12)
    assert h.info["residual"] < 1e-11
    assert h.info["inner_gradient"] < 1e-11
    assert h.info["inner_steps"] == 200
    reports = isinstance(SOLVERS[name], ConjugateGradient | Neumann | FixedPoint | lx.CG | lx.GMRES | lx.Normal)
    assert ("linear_steps" in h.info) == reports


def logistic() -> hx.Problem:
    """Logistic regression of a pytree w on prepared features; lam enters L, E and `prepare`."""

    def loss(w, d):
        return jnp.mean(jnp.logaddexp(0.0, -d["y"] * (d["z"] @ w["slope"] + w["offset"])))

    def prepare(lam, d):
        z = d["x"] * lam["scale"]
        return {**d, "z": z + 0.3 * z**2}

    def inner(w, lam, d):
        return loss(w, d) + jnp.sum(lam["decay"] * w["slope"] ** 2) + 0.2 * w["offset"] ** 2

    def outer(w, lam, d):
        return loss(w, {**d, "y": d["y_outer"]}) + lam["direct"] * jnp.sum(w["slope"])

    init = lambda lam, d: {"slope": jnp.zeros(3), "offset": jnp.zeros(())}
    return hx.Problem(inner, outer, init, prepare)


LAM = {"scale": jnp.array([0.9, 1.1, -0.7]), "decay": jnp.array([0.3, 0.2, 0.4]), "direct": jnp.array(0.1)}


def data():
    draw = np.random.default_rng(3)
    signs = lambda: jnp.asarray(np.sign(draw.normal(size=12)))
    return {"x": jnp.asarray(draw.normal(size=(12, 3))), "y": signs(), "y_outer": signs()}


@cache
def exact():
    """(w_lam, the hypergradient) by Newton's method, and by a dense Hessian without any of hyperax's derivatives."""
    problem, d = logistic(), data()
    flat, unravel = jax.flatten_util.ravel_pytree(problem.init(LAM, d))
    slope = jax.grad(lambda w, lam: problem.inner(unravel(w), lam, problem.prepare(lam, d)))
    value = lambda w, lam: problem.outer(unravel(w), lam, problem.prepare(lam, d))

    @jax.jit
    def solve(w):
        w = jax.lax.fori_loop(0, 20, lambda _, w: w - jnp.linalg.solve(jax.jacfwd(slope)(w, LAM), slope(w, LAM)), w)
        q = jnp.linalg.solve(jax.jacfwd(slope)(w, LAM), jax.grad(value)(w, LAM))
        cross = jax.jacrev(slope, argnums=1)(w, LAM)
        direct = jax.grad(value, argnums=1)(w, LAM)
        return w, jax.tree.map(lambda a, c: a - jnp.tensordot(q, c, 1), direct, cross)

    w, grad = solve(flat)
    return unravel(w), grad


@pytest.mark.parametrize(
    ("dynamics", "solver", "steps"),
    [
        (hx.GradientDescent(0.7), ConjugateGradient(), 300),
        (hx.HeavyBall(0.5, 0.5), FixedPoint(200), 200),
        (Adam(1.0, b1=0.5, b2=0.5, eps=1.0), FixedPoint(200), 300),
    ],
    ids=str,
)
def test_logistic_regression_equals_a_dense_solve(dynamics, solver, steps):
    h = hx.hypergradient(logistic(), dynamics, Implicit(steps, solver))(LAM, data())
    w, grad = exact()
    assert_trees_close(h.state.w, w, 1e-11)
    assert_trees_close(h.grad, grad, 1e-9)


def test_a_long_reverse_agrees():
    h = hx.hypergradient(logistic(), hx.HeavyBall(0.5, 0.5), hx.Reverse(300))(LAM, data())
    assert_trees_close(h.grad, exact()[1], 1e-9)


def test_a_random_quadratic_with_a_full_hessian():
    draw = np.random.default_rng(5)
    root, target, b = (jnp.asarray(draw.normal(size=shape)) for shape in ((6, 6), (6,), (6,)))
    hessian = lambda lam: root @ root.T + jnp.diag(jnp.exp(lam))
    problem = hx.Problem(
        inner=lambda w, lam, d: 0.5 * w @ hessian(lam) @ w - b @ w,
        outer=lambda w, lam, d: jnp.sum((w - target) ** 2),
        init=lambda lam, d: jnp.ones(6),
    )
    lam = jnp.asarray(0.3 * draw.normal(size=6))
    step_size = 1.9 / float(jnp.linalg.eigvalsh(hessian(lam))[-1])
    h = hx.hypergradient(problem, hx.GradientDescent(step_size), Implicit(1500))(lam)
    solution = lambda lam: jnp.sum((jnp.linalg.solve(hessian(lam), b) - target) ** 2)
    assert_trees_close(h.grad, jax.jit(jax.grad(solution))(lam), 1e-9)


def test_the_fixed_point_of_a_dynamics_with_its_own_decay():
    # w <- w - eta (w - b + lam w): the minimiser of L is b, the fixed point b / (1 + lam).
    problem = hx.Problem(
        inner=lambda w, lam, d: 0.5 * jnp.sum((w - 3.0) ** 2), outer=lambda w, lam, d: w**2, init=lambda lam, d: 0.0
    )
    dynamics = hx.Optax(lambda lam: optax.chain(optax.add_decayed_weights(lam), optax.scale(-0.3)))
    h = hx.hypergradient(problem, dynamics, Implicit(100, FixedPoint(100)))(jnp.asarray(0.5))
    np.testing.assert_allclose([h.state.w, h.grad], [2.0, -2 * 9 / 1.5**3], rtol=1e-10)
    with pytest.raises(ValueError, match=r"lam reaches w_T only through the dynamics or Phi_0"):
        hx.hypergradient(problem, dynamics, Implicit(100))(jnp.asarray(0.5))


def test_inner_variables_may_be_a_module_and_derivatives_forward():
    layer = eqx.nn.Linear(3, 1, key=jax.random.key(0))

    def inner(w, lam, d):
        return jnp.mean((jax.vmap(w)(d["x"])[:, 0] - d["y"]) ** 2) + jnp.exp(lam) * jnp.sum(w.weight**2)

    outer = lambda w, lam, d: jnp.mean((jax.vmap(w)(d["x"])[:, 0] - d["y_outer"]) ** 2)
    f = hx.hypergradient(hx.Problem(inner, outer, lambda lam, d: layer), hx.GradientDescent(0.15), Implicit(600))
    ones = jax.tree.map(lambda x: x.astype(jnp.float64), layer)
    f = eqx.tree_at(lambda f: f.problem.init, f, lambda lam, d: ones)
    d, lam = data(), jnp.asarray(-0.5)
    h = f(lam, d)
    x = jnp.concatenate([d["x"], jnp.ones((12, 1))], 1)

    def solution(lam):
        w = jnp.linalg.solve(x.T @ x / 12 + jnp.exp(lam) * jnp.diag(jnp.array([1.0, 1, 1, 0])), x.T @ d["y"] / 12)
        return jnp.mean((x @ w - d["y_outer"]) ** 2)

    value, slope = jax.jit(jax.value_and_grad(solution))(lam)
    np.testing.assert_allclose([h.value, h.grad], [value, slope], rtol=1e-9)
    _, forward = jax.jit(lambda lam: jax.jvp(lambda x: f.value(x, d, ())[0], (lam,), (jnp.ones(()),)))(lam)
    np.testing.assert_allclose(forward, h.grad, rtol=1e-12)


def test_a_warm_start_keeps_the_functions_of_a_module():
    class Model(eqx.Module):
        slope: jax.Array
        activation: object  # a leaf that is no array: Phi_0 alone has it

    problem = hx.Problem(
        inner=lambda w, lam, d: (w.activation(w.slope) - d) ** 2 + lam * w.slope**2,
        outer=lambda w, lam, d: w.slope**2,
        init=lambda lam, d: Model(jnp.asarray(0.5), jnp.tanh),
    )
    lam, target = jnp.asarray(0.3), jnp.asarray(0.8)
    cold, warm = (
        hx.hypergradient(problem, hx.GradientDescent(0.2), Implicit(200, warm_start=warm)) for warm in (False, True)
    )
    expected, first = cold(lam, target), warm(lam, target)
    np.testing.assert_allclose([first.grad, warm(lam, target, first.carry).grad], expected.grad, rtol=1e-9)


CURVATURE = (1.0, 0.8, 0.5, 0.3, 0.2, 0.1)
TARGETS = jnp.asarray(np.random.default_rng(7).normal(size=(2, 6)))
LAM_6 = jnp.linspace(0.5, -1.0, 6)


def test_a_mean_over_tasks_is_the_average():
    method = Implicit(30, warm_start=True, tolerance=PolynomialTolerance(first=1e-2))
    single = hx.hypergradient(quadratic(CURVATURE), hx.GradientDescent(0.7), method)
    alone = [single(LAM_6, target) for target in TARGETS]
    for parallel in (None, 1):
        mean = hx.mean_over_tasks(single, parallel)
        h = mean(LAM_6, TARGETS)
        assert_trees_close(h.grad, (alone[0].grad + alone[1].grad) / 2, 1e-9)
        for name in ("inner_steps", "linear_steps", "residual"):
            np.testing.assert_allclose(h.info[name], [a.info[name] for a in alone], atol=1e-12)
        first = jax.eval_shape(lambda m=mean: m.init(LAM_6, TARGETS))
        assert jax.tree.map(lambda x: (x.shape, x.dtype), h.carry) == jax.tree.map(lambda x: (x.shape, x.dtype), first)
    assert not np.allclose(alone[0].grad, alone[1].grad, rtol=0.1)
    assert single.remembers_tasks
    assert mean.remembers_tasks
    assert not Implicit(3, tolerance=PolynomialTolerance()).remembers_tasks


def over_hyperiterations(method, count=6):
    """(info, w_T) of `count` hyperiterations of gradient descent, in a scan."""
    f = hx.hypergradient(quadratic(CURVATURE), hx.GradientDescent(0.7), method)

    def hyperiteration(carry, _):
        lam, memory = carry
        h = f.evaluate(lam, TARGETS[0], memory)
        return (lam - 0.05 * h.grad, h.carry), (h.info, h.state.w)

    return jax.jit(lambda: jax.lax.scan(hyperiteration, (LAM_6, f.init(LAM_6, TARGETS[0])), length=count)[1])()


def test_warm_starts_leave_less_to_do():
    run = lambda warm: over_hyperiterations(Implicit(8, Neumann(4, 0.7), warm_start=warm))[0]
    cold, warm = run(False), run(True)
    for name in ("inner_gradient", "residual"):  # of w, and of q
        np.testing.assert_allclose(warm[name][0], cold[name][0], rtol=1e-12)
        assert warm[name][5] < 0.5 * cold[name][5]


@pytest.mark.parametrize("solver", [ConjugateGradient(), FixedPoint(500), lx.CG(1e-3, 1e-3)], ids=str)
def test_a_tolerance_is_kept_and_saves_steps(solver):
    epsilon = ExponentialTolerance(first=0.05, ratio=0.6)
    info, w = over_hyperiterations(Implicit(300, solver, warm_start=True, tolerance=epsilon), 8)
    allowed = np.array([epsilon(k) for k in range(8)])
    assert np.all(info["inner_gradient"] <= allowed)
    assert np.all(info["residual"] * np.linalg.norm(w - TARGETS[0], axis=1) <= allowed * (1 + 1e-6))
    assert np.all(info["inner_steps"] < 40)
    assert np.max(info["inner_gradient"] / allowed) > 0.5  # not far below: it does stop there


def test_steps_are_counted_up_to_the_first_that_meets_the_tolerance():
    # From 1 with factor 1 - eta = 1/2 and L = (w - lam)^2 / 2: the gradient after t steps is 2^-t.
    problem = quadratic((1.0,))
    f = hx.hypergradient(problem, hx.GradientDescent(0.5), Implicit(10, tolerance=lambda k: 0.1 / 10.0**k))
    lam, target = jnp.array([-1.0]), jnp.zeros(1)
    h = f(lam, target)
    assert [int(h.info["inner_steps"]), int(h.carry.k)] == [4, 1]
    np.testing.assert_allclose(h.info["inner_gradient"], 2.0**-4)
    h = f(lam, target, h.carry)
    assert [int(h.info["inner_steps"]), int(h.carry.k)] == [7, 2]
    h = f(lam, target, f(lam, target, h.carry).carry)
    assert [int(h.info["inner_steps"]), int(h.carry.k)] == [10, 4]  # T is the most


def test_warm_starts_inside_minimize():
    # Ten inner steps in all do not converge from zero; from the last w they do.
    curvature, target = (1.0, 0.2), jnp.array([1.0, -2.0])
    found = {}
    for warm in (False, True):
        f = hx.hypergradient(quadratic(curvature), hx.GradientDescent(0.5), Implicit(5, warm_start=warm))
        found[warm] = hx.minimize(f, jnp.array([0.3, 0.3]), data=target, optimizer=optax.sgd(0.3), steps=60)
    np.testing.assert_allclose(found[True].lam, target, rtol=1e-4)
    assert np.max(np.abs(found[False].lam - target)) > 0.5
    np.testing.assert_allclose(found[True].carry.w, target, rtol=1e-4)


def system(eigenvalues):
    draw = np.random.default_rng(1)
    size = len(eigenvalues)
    basis = np.linalg.qr(draw.normal(size=(size, size)))[0]
    matrix = jnp.asarray(basis @ np.diag(eigenvalues) @ basis.T)
    return matrix, jnp.asarray(draw.normal(size=size))


def test_conjugate_gradients_keep_the_iterate_that_solves_the_system():
    g = {"a": jnp.array([3.0, -1.0]), "b": jnp.array(2.0)}
    solve = jax.jit(lambda start: ConjugateGradient().solve(lambda v: jax.tree.map(jnp.add, v, v), g, start, None))
    q, steps = solve(None)
    assert steps == 1
    assert_trees_close(q, jax.tree.map(lambda x: x / 2, g), 1e-15)
    again, steps = solve(q)
    assert steps == 0
    assert_trees_close(again, q, 0.0)


def test_conjugate_gradients_in_float32_with_small_curvature():
    # Lineax's stop at NaN here: the curvature is below 100 d eps.
    h = jnp.geomspace(1e-3, 1.0, 10_000).astype(jnp.float32)
    q, _ = jax.jit(lambda: ConjugateGradient().solve(lambda v: h * v, jnp.ones_like(h), None, None))()
    assert q.dtype == jnp.float32
    np.testing.assert_allclose(h * q, 1.0, atol=2e-3)


def test_where_the_hessian_is_not_positive_the_residual_says_so():
    problem = hx.Problem(
        inner=lambda w, lam, d: 0.5 * (w[0] ** 2 - w[1] ** 2) - lam @ w,
        outer=lambda w, lam, d: w[0] + 3.0 * w[1],
        init=lambda lam, d: jnp.stack([lam[0], -lam[1]]),  # the saddle, where the gradient is zero
    )
    lam = jnp.ones(2)
    of = lambda solver: hx.hypergradient(problem, hx.GradientDescent(0.1), Implicit(1, solver))(lam)
    assert of(ConjugateGradient()).info["residual"] > 0.5
    h = of(lx.LU())
    assert h.info["residual"] < 1e-12
    np.testing.assert_allclose(h.grad, [1.0, -3.0], rtol=1e-12)


def test_a_solver_stopped_early_is_reported():
    stopped = Implicit(300, ConjugateGradient(max_steps=1))
    h = hx.hypergradient(quadratic(CURVATURE), hx.GradientDescent(1.0), stopped)(LAM_6, TARGETS[0])
    assert h.info["linear_steps"] == 1
    assert h.info["residual"] > 0.05
    assert np.linalg.norm(h.grad - (LAM_6 - TARGETS[0])) > 0.05  # at w_lam = lam


def test_nystrom_has_the_rank_it_is_given():
    decaying, g = system(np.geomspace(1.0, 1e-8, 9))
    low, _ = system([1.0, 0.5, 0.2, 0, 0, 0, 0, 0, 0])
    solve = jax.jit(lambda matrix, k: Nystrom(k, 1e-3).solve(lambda v: matrix @ v, g, None, None)[0], static_argnums=1)
    damped, damped_low = (np.linalg.solve(m + 1e-3 * np.eye(9), g) for m in (decaying, low))
    distance = lambda q: np.linalg.norm(q - damped) / np.linalg.norm(damped)
    assert 0.005 < distance(solve(decaying, 5)) < 0.1 < distance(solve(decaying, 2))
    # A matrix of rank 3 is known from 3 directions; more do no harm.
    np.testing.assert_allclose(solve(low, 5), damped_low, rtol=1e-8)


def test_float32_stays_float32():
    half = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)
    problem = logistic()
    problem = eqx.tree_at(lambda p: p.init, problem, lambda lam, d: half(logistic().init(lam, d)))
    for solver in (ConjugateGradient(), Nystrom(2, 0.1), lx.CG(1e-5, 1e-5)):
        method = Implicit(40, solver, warm_start=True)
        f = hx.hypergradient(problem, hx.GradientDescent(0.7), method)
        h = jax.eval_shape(lambda f=f: f.evaluate(half(LAM), half(data()), f.init(half(LAM), half(data()))))
        floats = [x.dtype for x in jax.tree.leaves(h) if jnp.issubdtype(x.dtype, jnp.floating)]
        assert set(floats) == {jnp.dtype(jnp.float32)}


def test_a_second_call_does_not_trace_again():
    traced = []

    def inner(w, lam, d):
        traced.append(None)
        return jnp.sum((w - lam) ** 2)

    problem = hx.Problem(inner, lambda w, lam, d: jnp.sum(w**2), lambda lam, d: jnp.zeros(2))
    of = lambda: hx.hypergradient(problem, hx.GradientDescent(0.1), Implicit(5, tolerance=ExponentialTolerance()))
    h = of()(jnp.ones(2))
    count = len(traced)
    h = of()(jnp.zeros(2), None, h.carry)
    of()(jnp.ones(2), None, h.carry)
    once_more = len(traced)  # with a carry it is another program, once
    of()(2 * jnp.ones(2), None, h.carry)
    assert count < once_more == len(traced)


def call(method, lam, dynamics=None, **changes):
    problem = hx.Problem(
        **{
            "inner": lambda w, lam, d: jnp.sum((w - lam["target"]) ** 2),
            "outer": lambda w, lam, d: jnp.sum(w**2),
            "init": lambda lam, d: jnp.zeros(2) + lam.get("start", 0.0),
            **changes,
        }
    )
    dynamics = dynamics or hx.GradientDescent(lambda lam: lam.get("step_size", 0.1))
    return hx.hypergradient(problem, dynamics, method)({"target": jnp.ones(2), **lam})


@pytest.mark.parametrize(
    ("message", "attempt"),
    [
        (r"steps must be a whole number", lambda: Implicit(-1)),
        (r"solver is 'cg'; use ConjugateGradient\(\)", lambda: Implicit(3, "cg")),
        (r"use a function k -> epsilon_k", lambda: Implicit(3, tolerance=0.1)),
        (r"LU cannot be stopped at the residual", lambda: Implicit(3, lx.LU(), tolerance=ExponentialTolerance())),
        (r"Nystrom cannot be stopped", lambda: Implicit(3, Nystrom(2, 0.1), tolerance=ExponentialTolerance())),
        (r"Normal cannot", lambda: Implicit(3, lx.Normal(lx.CG(0.1, 0.1)), tolerance=ExponentialTolerance())),
        (r"ratio is 1.0; it must be in", lambda: ExponentialTolerance(ratio=1.0)),
        (r"first is 0.0; it must be a number > 0", lambda: PolynomialTolerance(first=0.0)),
        (r"power is 1; it must be over 1", lambda: PolynomialTolerance(power=1)),
        (r"terms must be", lambda: Neumann(0, 0.1)),
        (r"step_size is -1.0", lambda: Neumann(3, -1.0)),
        (r"iterations must be", lambda: FixedPoint(0)),
        (r"damping is 0.0", lambda: Nystrom(3, 0.0)),
        (r"max_steps must be", lambda: ConjugateGradient(max_steps=0)),
        (r"lam\['step_size'\] reaches w_T only .* use Reverse", lambda: call(Implicit(3), {"step_size": 0.1})),
        (r"lam\['start'\] reaches w_T only .* or Phi_0", lambda: call(Implicit(3), {"start": jnp.ones(2)})),
        (r"lam\['start'\] reaches w_T only", lambda: call(Implicit(3, FixedPoint(2)), {"start": jnp.ones(2)})),
        (r"lam\['start'\], lam\['step_size'\] reach w_T", lambda: call(Implicit(3), {"start": 1.0, "step_size": 0.1})),
        (r"with Problem.batch .* leave batch out", lambda: call(Implicit(3), {}, batch=lambda d, t: d)),
        (
            r"of Optax is int32, and FixedPoint .* use ConjugateGradient\(\)",
            lambda: call(Implicit(3, FixedPoint(2)), {}, hx.Optax(optax.adam(0.1))),
        ),
    ],
)
def test_what_is_refused(message, attempt):
    with pytest.raises(ValueError, match=message):
        attempt()


def test_a_leaf_that_nothing_uses_is_a_warning():
    with pytest.warns(hx.UnusedLeafWarning, match=r"lam\['other'\] does not reach f_T"):
        h = call(Implicit(50), {"other": 1.0})
    assert h.grad["other"] == 0.0


def test_a_gradient_of_zero_is_solved_by_zero():
    h = hx.hypergradient(quadratic((1.0, 2.0)), hx.GradientDescent(0.5), Implicit(1))(jnp.zeros(2), jnp.zeros(2))
    assert_trees_close(h.grad, jnp.zeros(2), 0.0)
    assert h.info["residual"] == 0.0
