"""Doubling is Reverse in O(log T): the same numbers, from the matrix it says, and refused where it would be wrong."""

from functools import cache

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hyperax as hx
from hyperax.matrix_powers import cheapest, geometric_sum, recurrence, square_of_symmetric
from hyperax.methods.doubling import Doubling, Layout, hessian
from hyperax.quadratic import column_axis, why_not_quadratic
from problems import assert_trees_close

EXAMPLES, FEATURES, CLASSES = 7, 4, 3
DRAW = np.random.default_rng(0)
DATA = {
    "x": jnp.asarray(DRAW.normal(size=(EXAMPLES, FEATURES))),
    "y": jnp.asarray(DRAW.normal(size=(EXAMPLES, CLASSES))),
    "labels": jnp.asarray(DRAW.integers(CLASSES, size=EXAMPLES)),
}
LAM = {
    "init": jnp.asarray(DRAW.normal(size=(FEATURES, CLASSES))),
    "rate": jnp.asarray(0.15),
    "rates": {"weights": jnp.array([[0.1], [0.2], [0.15], [0.12]]), "bias": jnp.asarray(0.3)},
    "each": {"weights": jnp.asarray(DRAW.uniform(0.1, 0.2, (FEATURES, CLASSES))), "bias": jnp.full(CLASSES, 0.2)},
    "momentum": jnp.asarray(0.6),
    "momenta": {"weights": jnp.array([[0.5], [0.6], [0.3], [0.2]]), "bias": jnp.asarray(0.4)},
    "decay": jnp.array([0.1, 0.2, 0.05, 0.3]),
    "examples": jnp.asarray(DRAW.uniform(0.5, 1.5, EXAMPLES)),
    "classes": jnp.array([1.0, 0.5, 1.5]),
    "coupling": jnp.asarray(0.1),
    "features": jnp.asarray(0.5 * DRAW.normal(size=(FEATURES, FEATURES))),
    "outer": jnp.asarray(0.3),
}
# How the columns of w meet in the inner objective.
ALIKE = lambda w, lam: 1.0
PER_CLASS = lambda w, lam: lam["classes"]
DYNAMICS = {
    "one rate": hx.GradientDescent(lambda lam: lam["rate"]),
    "rates": hx.GradientDescent(lambda lam: lam["rates"]),
    "a rate each": hx.GradientDescent(lambda lam: lam["each"]),
    "momentum": hx.HeavyBall(lambda lam: lam["rate"], lambda lam: lam["momentum"]),
    "rates, momentum": hx.HeavyBall(lambda lam: lam["rates"], lambda lam: lam["momentum"]),
    "rates, momenta": hx.HeavyBall(lambda lam: lam["rates"], lambda lam: lam["momenta"]),
}
STEPS = (0, 1, 2, 3, 7, 16, 100)
QUICK = {"xla_backend_optimization_level": 0}  # most of the time of these tests is XLA's


def linear_model(weight=ALIKE, coupled=False):
    """Least squares on learned features, lam in every way into f_T; a cubic outer objective."""

    def inner(w, lam, d):
        residual = d["z"] @ w["weights"] + w["bias"] - d["y"]
        loss = jnp.sum(lam["examples"][:, None] * weight(w, lam) * residual**2) / EXAMPLES
        loss += jnp.sum(lam["decay"][:, None] * w["weights"] ** 2)
        return loss + lam["coupling"] * jnp.sum((w["weights"][:, 0] - w["bias"][1]) ** 2) if coupled else loss

    def outer(w, lam, d):
        cubes = (d["z"] @ w["weights"] + w["bias"] - d["y"]) ** 3
        return jnp.mean(cubes) + lam["outer"] * jnp.sum(w["weights"] ** 2), {"cubes": cubes}

    init = lambda lam, d: {"weights": lam["init"], "bias": jnp.zeros(CLASSES)}
    return hx.Problem(inner, outer, init, lambda lam, d: {**d, "z": d["x"] @ lam["features"]}, has_metrics=True)


SMALL = hx.Problem(
    inner=lambda w, lam, d: jnp.sum(lam["classes"] * (w - lam["coupling"]) ** 2) + 0.1 * w[0] * w[2],
    outer=lambda w, lam, d: (jnp.sum(w**3) * lam["outer"], {"cubes": w**3}),
    init=lambda lam, d: 2.0 * lam["classes"],
    has_metrics=True,
)
PROBLEMS = {
    "small": SMALL,
    "alike": linear_model(),
    "per class": linear_model(PER_CLASS),
    "coupled": linear_model(coupled=True),
}


@cache
def reference_function(problem, dynamics):
    """(lam, T) -> (f_T, state), gradient: a plain scan over the longest T, in which the later steps do nothing."""
    problem, dynamics = PROBLEMS[problem], DYNAMICS[dynamics]

    def value(lam, steps):
        prepared = problem.prepare(lam, DATA)
        gradient = jax.grad(lambda w, lam: problem.inner(w, lam, prepared))

        def step(state, t):
            after = dynamics.step(gradient, state, lam, t)
            return jax.tree.map(lambda a, b: jnp.where(t <= steps, a, b), after, state), None

        start = dynamics.init(problem.init(lam, prepared), lam)
        state, _ = jax.lax.scan(step, start, jnp.arange(1, max(STEPS) + 1))
        return problem.outer(state.w, lam, prepared)[0], state

    return jax.jit(jax.value_and_grad(value, has_aux=True), compiler_options=QUICK)


def unchecked(f, lam=LAM, data=DATA):
    """The hypergradient, without the warning that no case uses all of LAM."""
    return jax.jit(lambda lam: f.evaluate(lam, data, ()), compiler_options=QUICK)(lam)


@pytest.mark.parametrize(
    ("problem", "dynamics", "steps", "size", "columns"),
    [
        *(("small", "one rate", steps, 3, 1) for steps in (0, 1, 7, 100)),
        *(("small", "momentum", steps, 3, 1) for steps in STEPS),
        ("alike", "one rate", 100, 5, 3),
        ("alike", "momentum", 16, 5, 3),
        ("alike", "rates", 100, 5, 3),
        ("alike", "rates, momentum", 7, 5, 3),
        ("alike", "rates, momenta", 7, 10, 3),
        ("alike", "a rate each", 7, 15, 1),
        ("per class", "one rate", 16, 15, 1),
        ("coupled", "momentum", 16, 15, 1),
    ],
)
def test_it_is_reverse(problem, dynamics, steps, size, columns):
    h = unchecked(hx.hypergradient(PROBLEMS[problem], DYNAMICS[dynamics], Doubling(steps)))
    (value, state), gradient = reference_function(problem, dynamics)(LAM, steps)
    np.testing.assert_allclose(h.value, value, rtol=1e-12)
    assert_trees_close(h.grad, gradient, 1e-9, 1e-13)
    assert_trees_close(h.state, state, 1e-9, 1e-13)
    used = {"size": size, "columns": columns}
    assert {name: int(h.info["doubling"][name]) for name in used} == used
    assert set(h.info["metrics"]) == {"cubes"}


def test_the_mean_over_tasks_is_that_of_reverse():
    tasks = jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), DATA)
    one, other = (
        unchecked(hx.mean_over_tasks(hx.hypergradient(PROBLEMS["alike"], DYNAMICS["one rate"], m)), LAM, tasks)
        for m in (Doubling(3), hx.Reverse(3))
    )
    assert_trees_close(one.grad, other.grad, 1e-9, 1e-13)
    assert_trees_close(one.state, other.state, 1e-9)
    assert one.info["doubling"]["columns"].tolist() == [CLASSES] * 2


def vector_problem(inner, start=jnp.array([0.5, -1.0, 2.0])):
    return hx.Problem(inner, lambda w, lam, d: jnp.sum(jnp.sin(w)), lambda lam, d: start)


SQUARES = vector_problem(lambda w, lam, d: jnp.sum(jnp.exp(lam) * (w - lam) ** 2) + 0.1 * w[0] * w[2])


def test_second_derivatives_are_those_of_reverse():
    lam, dynamics = jnp.array([0.1, 0.4, -0.3]), hx.HeavyBall(0.1, 0.5)

    def value(method):
        return lambda lam: method.value(SQUARES, dynamics, lam, None, ())[0]

    ours, theirs = (jax.jit(jax.hessian(value(m)), compiler_options=QUICK)(lam) for m in (Doubling(6), hx.Reverse(6)))
    assert_trees_close(ours, theirs, 1e-9)
    assert np.max(np.abs(theirs)) > 0.1
    assert cheapest(6, size=3, columns=2) == 1  # squares were among what was differentiated twice


def test_the_type_of_w_is_kept():
    lam, f32 = jnp.ones(3, jnp.float32), jnp.float32
    narrow = vector_problem(lambda w, lam, d: jnp.sum(lam * (w - d) ** 2), jnp.zeros(3, f32))
    h = hx.hypergradient(narrow, hx.HeavyBall(0.1, np.float64(0.5)), Doubling(40))(lam, jnp.arange(3.0))
    assert h.state.w.dtype == h.state.auxiliary.dtype == h.grad.dtype == f32
    np.testing.assert_allclose(h.state.w, jnp.arange(3.0), atol=1e-4)


def test_modules_with_their_outputs_first():
    """The weight of an Equinox layer is (outputs, inputs): columns run along the first axis."""
    layer = eqx.nn.Linear(FEATURES, CLASSES, key=jax.random.key(0))
    inner = lambda w, lam, d: jnp.mean((jax.vmap(w)(d["x"] * lam) - d["y"]) ** 2)
    problem = hx.Problem(inner, lambda w, lam, d: jnp.sum(jnp.sin(w.weight)) + w.bias[0] ** 2, lambda lam, d: layer)
    lam = jnp.array([1.0, 0.5, 2.0, 1.5])
    ours = hx.hypergradient(problem, hx.GradientDescent(0.1), Doubling(9))(lam, DATA)
    theirs = unchecked(hx.hypergradient(problem, hx.GradientDescent(0.1), hx.Reverse(9)), lam)
    assert_trees_close(ours.grad, theirs.grad, 1e-9)
    assert_trees_close(ours.state, theirs.state, 1e-9)
    assert (int(ours.info["doubling"]["size"]), int(ours.info["doubling"]["columns"])) == (FEATURES + 1, CLASSES)


@pytest.mark.parametrize(("size", "columns", "products"), [(4, 4, 1), (4, 9, 1), (5, 2, 3), (6, 3, 2), (3, 1, 3)])
def test_the_hessian_takes_as_many_products_as_w_has_times_more_rows_than_columns(size, columns, products):
    count = []
    true = DRAW.normal(size=(size, size))

    def product(v):
        jax.debug.callback(lambda v: count.append(v.shape), v)
        return true @ v

    axis = None if columns == 1 else -1
    H = hessian(product, Layout(axis, size, columns), jnp.zeros((size, columns)))
    jax.effects_barrier()
    np.testing.assert_allclose(H, true, rtol=1e-15)
    assert count == [(size, columns)] * products


@pytest.mark.parametrize("steps", [1, 2, 3, 13, 64])
def test_powers_do_not_depend_on_where_squaring_ends(steps):
    V = np.diag([0.9, 1.2, 0.3]) + 0.05 * np.ones((3, 3))
    g, mu = DRAW.normal(size=(3, 2)), 0.4
    powers, moves = np.zeros_like(g), [np.zeros_like(g), g]
    for _ in range(steps):
        powers = g + V @ powers
        moves.append(V @ moves[-1] - mu * moves[-2])

    def with_squarings(V, n, square):
        return geometric_sum(V, g, steps, n, square), *recurrence(V, mu, g, steps, n, square)

    last = steps.bit_length() - 1
    cases = ((0, square_of_symmetric), (last // 2, lambda M: M @ M), (last, square_of_symmetric))
    for way in jax.jit(lambda V: [with_squarings(V, *case) for case in cases])(V):
        for one, other in zip(way, (powers, sum(moves[1 : steps + 1]), moves[steps]), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-10)


def test_the_last_squarings_are_left_out_where_columns_are_few():
    assert cheapest(256, size=256, columns=100) == 6  # the fastest of 4, ..., 8 when measured
    assert cheapest(256, size=10, columns=1000) == 7  # the seventh matrix twice, or the eighth once
    assert cheapest(1, size=256, columns=100) == 0


ROWS = jnp.asarray(DRAW.normal(size=(3, 4)))
QUADRATIC = {
    "linear": lambda w: jnp.sum(w),
    "power": lambda w: jnp.sum(w**2) * 2 / 3,
    "product": lambda w: jnp.sum(w * w[::-1]),
    "inner product": lambda w: jnp.vdot(w, w),
    "picked": lambda w: jnp.sum(w[jnp.array([0, 2])] ** 2) + w[1, 0] ** 2 + w[-1, 0],
    "masked": lambda w: jnp.sum(jnp.where(jnp.arange(4)[:, None] > 1, w, 0.0) ** 2),
    "moved": lambda w: jnp.sum((w - jnp.roll(w, 1, 0)) ** 2) + jnp.var(w) + jnp.trace(w.T @ w),
    "solved": lambda w: jnp.sum(jnp.linalg.solve(jnp.eye(4) + ROWS.T @ ROWS, w) ** 2),
    "in a scan": lambda w: jnp.sum(jax.lax.scan(lambda c, x: (c + x @ w, x @ w), jnp.zeros(2), ROWS)[1] ** 2),
    "checkpointed": jax.checkpoint(lambda w: jnp.sum((ROWS @ w) ** 2)),
    "branches": lambda w: jax.lax.cond(ROWS[0, 0] > 0, jnp.sum, lambda w: jnp.sum(w**2), w),
    "convolved": lambda w: jnp.sum(jnp.convolve(w[:, 0], ROWS[0]) ** 2),
}
NOT_QUADRATIC = {
    "integer_pow": lambda w: jnp.sum(w**4),
    "mul": lambda w: jnp.sum(w * w * w),
    "log": lambda w: -jnp.sum(jnp.log(1.0 + w)),
    "abs": lambda w: jnp.sum(jnp.abs(w)),
    "gt": lambda w: jnp.sum(jnp.where(w > 0, w, 0.1 * w) ** 2),
    "div": lambda w: jnp.sum(1.0 / w),
    "stop_gradient": lambda w: jnp.sum(w * jax.lax.stop_gradient(w)),
    "custom_jvp_call": lambda w: jnp.sum(jax.nn.relu(w)),
    "while": lambda w: jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] * 2.0), (0, w))[1].sum(),
    "convert_element_type": lambda w: jnp.sum(w.astype(int) * w),
    "sqrt": lambda w: jnp.linalg.norm(w) ** 2,
}


@pytest.mark.parametrize("objective", QUADRATIC.values(), ids=QUADRATIC.keys())
def test_what_is_quadratic_is_seen_to_be(objective):
    assert why_not_quadratic(objective, jnp.ones((4, 2))) is None


@pytest.mark.parametrize("name", NOT_QUADRATIC)
def test_what_is_not_quadratic_is_named(name):
    assert why_not_quadratic(NOT_QUADRATIC[name], jnp.ones((4, 2))) == name


def test_a_product_that_grows_in_a_scan_is_not_quadratic():
    grows = lambda w: jnp.sum(jax.lax.scan(lambda c, _: (c * w, None), w, length=3)[0])
    assert why_not_quadratic(grows, jnp.ones((4, 2))) == "mul"


def test_what_does_not_reach_the_value_does_not_count():
    assert why_not_quadratic(lambda w: (jnp.exp(w), jnp.sum(w**2))[1], jnp.ones((4, 2))) is None


SQUARE = jnp.asarray(DRAW.normal(size=(4, 4)))
COLUMNWISE = {
    "product": lambda v: SQUARE[:3, :3] @ v,
    "both sides": lambda v: (v.T @ SQUARE[:3, :3].T).T + 2.0 * v,
    "rows weighted": lambda v: SQUARE[:3, :1] * v,
    "broadcast weights": lambda v: jnp.broadcast_to(SQUARE[0, :3][:, None], (3, 4)) * v,
    "batched": lambda v: jax.vmap(lambda column: SQUARE[:3, :3] @ column, in_axes=1, out_axes=1)(v),
    "batched weights": lambda v: jnp.einsum("nc,nkc->kc", v, jnp.broadcast_to(SQUARE[:3, :3, None], (3, 3, 4))),
    "reshaped": lambda v: v.reshape(3, 1, 4).repeat(2, 1).reshape(2, 3, 4).sum(0),
    "cut": lambda v: jnp.concatenate([v[2:], jnp.zeros((2, 4))]) + jnp.pad(v[:1], ((1, 1), (0, 0))),
    "summed": lambda v: v + v.sum(0) + jnp.cumsum(v, 0) + v[::-1],
    "nothing": lambda v: jnp.zeros_like(v),
}
MIXED = {
    "columns weighted": lambda v: v * jnp.arange(1.0, 5.0),
    "weighted by position": lambda v: v * jax.lax.broadcasted_iota(float, (3, 4), 1),
    "batched weights": lambda v: jnp.einsum("nc,nkc->kc", v, SQUARE[None, :3] * jnp.ones((3, 3, 4))),
    "columns summed": lambda v: v + v.sum(1, keepdims=True),
    "columns mixed": lambda v: v @ SQUARE,
    "columns turned": lambda v: v[:, ::-1],
    "columns cut": lambda v: jnp.pad(v[:, :2], ((0, 0), (0, 2))),
    "columns stacked": lambda v: jnp.concatenate([v[:, 1:], v[:, :1]], 1),
    "entries weighted": lambda v: v * SQUARE[:3],
    "cumulative": lambda v: jnp.cumsum(v, 1),
    "reshaped": lambda v: v.reshape(4, 3).T,
    "unread": lambda v: jax.lax.scan(lambda c, x: (c, 2.0 * x), 0.0, v)[1],
}


def is_alike(linear, axis):
    """Whether a linear map of (3, 4) is F_0 (x) I along this axis, by its matrix."""
    along = lambda v: jnp.moveaxis(linear(jnp.moveaxis(v, -1, axis)), axis, -1)
    start = jnp.moveaxis(jnp.zeros((3, 4)), axis, -1)
    matrix = jax.jacobian(along)(start).transpose(1, 3, 0, 2)
    return np.allclose(matrix, jnp.einsum("ab,ij->abij", jnp.eye(len(matrix)), matrix[0, 0]))


@pytest.mark.parametrize("name", COLUMNWISE)
def test_maps_of_each_column_alike_are_seen_to_be(name):
    assert column_axis(COLUMNWISE[name], jnp.zeros((3, 4))) == -1
    assert is_alike(COLUMNWISE[name], -1)


@pytest.mark.parametrize("name", MIXED)
def test_maps_that_mix_columns_are_not_taken_for_others(name):
    axis = column_axis(MIXED[name], jnp.zeros((3, 4)))
    assert axis != -1
    assert is_alike(MIXED[name], -1) == (name == "unread")
    assert axis is None or is_alike(MIXED[name], axis)  # the rows, where they are alike


def test_of_two_possible_axes_the_longer_one_is_taken():
    assert column_axis(lambda v: 2.0 * v, jnp.zeros((4, 3))) == 0
    assert column_axis(lambda v: 2.0 * v, jnp.zeros((3, 4))) == -1
    assert column_axis(lambda v: 2.0 * v, jnp.zeros((4, 1))) == 0
    assert column_axis(lambda v: 2.0 * v, jnp.zeros(())) is None
    assert column_axis(lambda v: v, (jnp.zeros((4, 3)), jnp.zeros((5, 2)))) is None


def fails(problem, dynamics, match, data=DATA):
    with pytest.raises(ValueError, match=match):
        hx.hypergradient(problem, dynamics, Doubling(5))({"a": jnp.ones(3)}, data)


def test_refusals():
    plain = hx.GradientDescent(0.1)
    least_squares = vector_problem(lambda w, lam, d: jnp.sum((w - lam["a"]) ** 2))
    logits = lambda w: DATA["x"] @ w.reshape(4, 3)
    entropy = lambda w, lam, d: jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits(w), d["labels"]))
    fails(
        vector_problem(entropy, jnp.zeros(12)),
        plain,
        r"quadratic in w.*applies `\w+` to.*cross-entropy.*Reverse\(steps=5",
    )
    fails(vector_problem(lambda w, lam, d: jnp.sum((w - lam["a"]) ** 4)), plain, "applies `integer_pow`")
    fails(vector_problem(lambda w, lam, d: jnp.sum(optax.huber_loss(w, lam["a"]))), plain, "applies `abs`")
    fails(least_squares, hx.Optax(optax.adam(0.1)), "GradientDescent or HeavyBall.*Optax is not.*Reverse")
    fails(least_squares, hx.GradientDescent(lambda lam, t: 0.1 / t), r"step_size is a function of \(lam, t\)")
    fails(least_squares, hx.HeavyBall(0.1, lambda lam, t: 0.1 / t), r"momentum is a function of \(lam, t\)")
    batched = hx.Problem(least_squares.inner, least_squares.outer, least_squares.init, batch=lambda d, t: d)
    fails(batched, plain, r"mini-batches \(batch\).*Reverse")
    long = vector_problem(lambda w, lam, d: jnp.sum(w[1:] * w[:-1]) + lam["a"][0] * w[0], jnp.zeros(8193))
    fails(long, plain, "side 8193, over its limit of 8192.*alike: 1.*Reverse")
    with pytest.raises(ValueError, match="steps must be a whole number"):
        Doubling(-1)


def test_a_diagonal_over_the_limit_is_fine_where_all_entries_are_alike():
    wide = vector_problem(lambda w, lam, d: lam["a"][0] * jnp.sum(w**2), jnp.ones(10_000))
    h = hx.hypergradient(wide, hx.GradientDescent(0.1), Doubling(3))({"a": jnp.ones(1)})
    assert (int(h.info["doubling"]["size"]), int(h.info["doubling"]["columns"])) == (1, 10_000)
    np.testing.assert_allclose(h.state.w, 0.8**3, rtol=1e-12)


def test_unused_leaves_are_named_and_no_others():
    problem = vector_problem(lambda w, lam, d: jnp.sum((w - lam["a"]) ** 2))
    f = hx.hypergradient(problem, hx.HeavyBall(lambda lam: lam["c"]), Doubling(5))
    with pytest.warns(hx.UnusedLeafWarning, match=r"^lam\['b'\] does not reach"):
        f({"a": jnp.ones(3), "b": 1.0, "c": 0.1})
