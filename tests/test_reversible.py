"""Reversible: bit for bit back through the inner run, the gradient of Reverse, memory that hardly grows with T."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hyperax as hx
from hyperax.fixed_point import (
    LIMIT,
    as_factor,
    divide,
    fits,
    lowest_numerator,
    multiply,
    products_per_word,
    to_fixed,
    to_float,
    undo_rounds,
)
from hyperax.methods.hypergradient import compiled
from hyperax.methods.reversible import Reversible, _depends_on_lam
from problems import OPTIMISED, assert_trees_close, case, quadratic, regression_data

PRODUCTS, NUMBERS = 400, 8


@jax.jit
def once(C, i, mu):
    factor = as_factor(mu)
    product, pushed = multiply(C, i, factor)
    return product, pushed, divide(product, pushed, factor, undo_rounds(4))


@jax.jit
def there(C, words, mu, noise, J, fullest):
    """Products with noise added after each; `fullest` adds what makes every remainder 255. Also the noise added."""

    def step(carry, inputs):
        C, words = carry
        t, mu, noise = inputs
        C, word = multiply(C, words[t // J], as_factor(mu))
        noise = jnp.where(fullest, (255 - C) & 255, noise)
        return (C + noise, words.at[t // J].set(word)), noise

    return jax.lax.scan(step, (C, words), (jnp.arange(PRODUCTS), mu, noise))


@jax.jit
def back(C, words, mu, noise, J):
    def step(carry, inputs):
        C, words = carry
        t, mu, noise = inputs
        C, word = divide(C - noise, words[t // J], as_factor(mu), undo_rounds(4))
        return (C, words.at[t // J].set(word)), None

    return jax.lax.scan(step, (C, words), (jnp.arange(PRODUCTS), mu, noise), reverse=True)[0]


@given(
    st.lists(st.integers(1 - LIMIT, LIMIT - 1), min_size=4, max_size=4),
    st.floats(1 / 64, 1.0, exclude_max=True),
    st.integers(0, 2**55 - 1),
)
@settings(max_examples=200, deadline=None)
def test_a_product_is_undone_and_close(integers, mu, buffer):
    product, pushed, (C, i) = once(jnp.asarray(integers), jnp.full(4, buffer), jnp.asarray(mu))
    assert (C.tolist(), i.tolist()) == (integers, [buffer] * 4)
    assert np.all(np.asarray(pushed) >= 0)
    # d units, and a few roundings to double precision.
    bounds = [256 + 2.0**-51 * abs(X) for X in integers]
    assert all(abs(int(P) - mu * X) <= bound for P, X, bound in zip(product, integers, bounds, strict=True))


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.02, 0.1, 0.5, 0.9, 0.999]), st.booleans(), st.booleans())
@settings(max_examples=40, deadline=None)
def test_many_products_are_undone_across_words(seed, lowest, fullest, exact):
    J = products_per_word(lowest_numerator(lowest))
    draw = np.random.default_rng(seed)
    scale = 2.0 ** draw.integers(10, 54, NUMBERS)
    integers = lambda *shape: jnp.asarray((draw.normal(size=(*shape, NUMBERS)) * scale).astype(np.int64))
    mu = jnp.asarray(np.full(PRODUCTS, lowest) if fullest else draw.uniform(lowest, 1.0, PRODUCTS))
    mu = jnp.floor(256 * mu) / 256 if exact else mu
    start, words = integers(), jnp.zeros((PRODUCTS // 9 + 1, NUMBERS), jnp.int64)
    start = start | 255 if fullest else start
    (C, full), noise = there(start, words, mu, integers(PRODUCTS), J, fullest)
    assert np.all(np.asarray(full) >= 0)
    assert np.any(full)
    C_0, empty = back(C, full, mu, noise, J)
    np.testing.assert_array_equal(C_0, start)
    np.testing.assert_array_equal(empty, words)
    if exact:  # Then nothing is undone to the same: what is off by one does not come back, and `returned` is False.
        C_0, empty = back(C + 1, full, mu, noise, J)
        assert np.all(np.any(empty != words, axis=0) | (start != C_0))


@pytest.mark.parametrize("n", [4, 25, 128, 230, 255])
def test_a_word_is_full_but_not_too_full(n):
    i = 0
    for _ in range(products_per_word(n)):
        assert 256 * i + 255 < 2**63
        i = (256 * i + 255) // n
    assert 256 * i + 255 >= 2**63


def test_the_words_of_the_docstring():
    J = {mu: products_per_word(lowest_numerator(mu)) for mu in (1 / 64, 0.5, 0.9, 0.99)}
    assert J[1 / 64] == 10
    assert J[0.9] == 340


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_numbers_in_fixed_point(dtype):
    x = jnp.array([0.0, 1.0, -1.5, 2.0**-30, 100.25, -3e4], dtype)
    X = to_fixed(x, 46)
    np.testing.assert_array_equal(to_float(X, 46, dtype), x)
    assert np.all(fits(X))
    assert not np.any(fits(to_fixed(jnp.array([2.0**15, -(2.0**15), jnp.inf, jnp.nan], dtype), 46)))


def check_info(h, words=None):
    """Returned bit for bit, and nothing out of range."""
    assert np.all(h.info["returned"])
    assert not np.any(h.info["overflowed"])
    assert not np.any(h.info["momentum_out_of_range"])
    assert words is None or np.all(h.info["buffer_words"] == words)


# That it agrees with `Reverse` for every way into f_T is a row of `test_hypergradients.py`.


def test_printed_values_of_heavy_ball():
    v1, v2 = jnp.array([[1.0, -1.0, 1.0], [2.0, 10.0, 2.0]]), jnp.array([-1.0, 1.0, 0.2])
    problem = hx.Problem(
        inner=lambda w, lam, d: jnp.mean(w[0] ** 2) + jnp.sum(lam["weights"] * w[1] ** 2),
        outer=lambda w, lam, d: jnp.mean(w[0] * w[1]),
        init=lambda lam, d: (v1, v2),
    )
    dynamics = hx.HeavyBall(lambda lam: lam["step"], lambda lam: lam["momentum"])
    h = hx.hypergradient(problem, dynamics, Reversible(10))({"weights": jnp.ones(3), "step": 0.1, "momentum": 0.5})
    printed = {"weights": [-0.018393531, 0.055180617, 0.0036787055], "step": 0.5387225, "momentum": -0.076542258}
    for entry, value in printed.items():
        np.testing.assert_allclose(h.grad[entry], value, rtol=1e-6)  # printed by a float32 program
    check_info(h)


# Softmax regression on the features of a tanh layer, both trained, on mini-batches: products of matrices, sums in a
# certain order, exponentials; and whatever a compiler may fuse.
INPUTS, HIDDEN, CLASSES, EXAMPLES = 20, 16, 5, 64


def network(dtype):
    def init(lam, data):
        draw = np.random.default_rng(3)
        a, b = draw.normal(size=(INPUTS, HIDDEN)), draw.normal(size=(HIDDEN, CLASSES))
        return {"a": jnp.asarray(0.2 * a, dtype) * jnp.exp(lam["scale"]), "b": jnp.asarray(0.2 * b, dtype)}

    loss = lambda w, x, y: optax.softmax_cross_entropy_with_integer_labels(jnp.tanh(x @ w["a"]) @ w["b"], y)
    square = lambda w: sum(jnp.sum(leaf**2) for leaf in w.values())
    problem = hx.Problem(
        inner=lambda w, lam, d: jnp.mean(d["weights"] * loss(w, d["x"], d["y"])) + jnp.exp(lam["decay"]) * square(w),
        outer=lambda w, lam, d: jnp.mean(loss(w, d["x_outer"], d["y_outer"])),
        init=init,
        prepare=lambda lam, d: {**d, "weights": jax.nn.sigmoid(lam["weights"])},
        batch=lambda d, t: {k: jnp.roll(d[k], 7 * t, axis=0)[:32] for k in ("x", "y", "weights")},
    )
    lam = {"scale": 0.1, "decay": -3.0, "weights": np.linspace(-1, 1, EXAMPLES), "step": -1.5, "momentum": 2.2}
    return problem, jax.tree.map(lambda x: jnp.asarray(x, dtype), lam)


def examples(dtype, tasks):
    draw = np.random.default_rng(4)
    x = lambda: jnp.asarray(draw.normal(size=(tasks, EXAMPLES, INPUTS)), dtype)
    y = lambda: jnp.asarray(draw.integers(0, CLASSES, (tasks, EXAMPLES)))
    return {"x": x(), "y": y(), "x_outer": x(), "y_outer": y()}


def optimised(f):
    """Compiled as outside of the tests: fusion and vector instructions must not change a bit on the way back."""
    return jax.jit(f, compiler_options=OPTIMISED)


SCHEDULED = hx.HeavyBall(
    lambda lam, t: jnp.exp(lam["step"]) * (1 + 1 / t), lambda lam, t: jax.nn.sigmoid(lam["momentum"]) * (1 - 0.3 / t)
)


def test_a_network_on_mini_batches_in_the_mean_over_tasks():
    problem, lam = network(jnp.float64)
    data = examples(jnp.float64, 3)
    mean = lambda method: hx.mean_over_tasks(hx.hypergradient(problem, SCHEDULED, method))
    h = optimised(mean(Reversible(400, lowest_momentum=0.6)))(lam, data)
    expected = mean(hx.Reverse(400, segment="sqrt"))(lam, data)
    assert_trees_close(h.grad, expected.grad, 1e-9, atol=1e-12)  # some entries are small
    assert_trees_close(h.value, expected.value, 1e-10)
    assert_trees_close(h.state, expected.state, 1e-8)
    check_info(h, -(-400 // products_per_word(lowest_numerator(0.6))))
    assert h.info["returned"].shape == (3,)


def test_thousands_of_steps_in_single_precision():
    problem, lam = network(jnp.float32)
    dynamics = hx.HeavyBall(lambda lam: jnp.exp(lam["step"]), 0.9)
    lam = {k: v for k, v in lam.items() if k != "momentum"}
    data = jax.tree.map(lambda x: x[0], examples(jnp.float32, 1))
    h = optimised(hx.hypergradient(problem, dynamics, Reversible(3000)))(lam, data)
    check_info(h)
    assert h.info["buffer_words"] == 9
    assert all(leaf.dtype == jnp.float32 and np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((h.grad, h.state)))


def test_memory_hardly_grows_with_the_steps():
    lam, data = jnp.ones(3000), jnp.zeros(3000)

    def temporary(method):
        f = hx.hypergradient(quadratic(np.linspace(1.0, 2.0, 3000)), hx.HeavyBall(0.1, 0.9), method)
        return compiled.lower(f, lam, data, None).compile().compiled.memory_analysis().temp_size_in_bytes

    short, long = temporary(Reversible(200)), temporary(Reversible(2000))
    # 6 arrays of words in place of 1, of the size of lam; the states alone are 2000 arrays and more.
    words = 8 * lam.size * (-(-2000 // 340) - 1)
    newer = jax.__version_info__ >= (0, 11)  # whose compiler keeps one array more
    assert short < long <= short + (1.25 if newer else 1.1) * words
    assert long < (1.6 if newer else 1.5) * short
    assert long < 2000 * 8 * lam.size / 50


SETTINGS = {"w": jnp.array([1.0, 2.0]), "step": 0.1, "momentum": 0.75}
FROM_LAM = hx.HeavyBall(lambda lam: lam["step"], lambda lam: lam["momentum"])


@cache  # one compiled program for all values
def guarded():
    of_w = quadratic()
    inner = lambda w, lam, data: of_w.inner(w, lam["w"], data)
    problem = hx.Problem(inner, of_w.outer, lambda lam, data: jnp.zeros(2))
    return hx.hypergradient(problem, FROM_LAM, Reversible(100))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("overflowed", {"step": 5.0}),
        ("overflowed", {"w": jnp.array([1.0, 1e6])}),
        ("overflowed", {"w": jnp.array([1.0, jnp.nan])}),
        ("overflowed", {"step": jnp.inf}),
        ("momentum_out_of_range", {"momentum": 0.4}),
        ("momentum_out_of_range", {"momentum": 0.0}),
        ("momentum_out_of_range", {"momentum": 1.0}),
        ("momentum_out_of_range", {"momentum": jnp.nan}),
    ],
)
def test_what_does_not_fit_is_reported(name, change):
    h = guarded()({**SETTINGS, **change}, jnp.zeros(2))
    assert h.info[name]
    assert np.isnan(h.value)
    assert all(np.all(np.isnan(leaf)) for leaf in jax.tree.leaves(h.grad))


def test_what_fits_is_not_reported():
    h = guarded()(SETTINGS, jnp.zeros(2))
    check_info(h)
    assert np.all(np.isfinite(h.grad["w"]))
    assert_trees_close(guarded()({**SETTINGS, "momentum": 0.5}, jnp.zeros(2)).state.w, SETTINGS["w"], 1e-10)


def test_a_gradient_that_changes_on_the_way_back_is_reported():
    draw = np.random.default_rng(5)
    noise = lambda w: jax.pure_callback(lambda w: draw.normal(size=w.shape), jax.typeof(w), w)
    problem = hx.Problem(
        inner=lambda w, lam, d: jnp.sum(w * jax.lax.stop_gradient(noise(jax.lax.stop_gradient(w)))) + jnp.sum(lam * w),
        outer=lambda w, lam, d: jnp.sum(w**2),
        init=lambda lam, d: lam,
    )
    h = hx.hypergradient(problem, hx.HeavyBall(0.1), Reversible(5))(jnp.ones(2))
    assert not h.info["returned"]
    assert not h.info["overflowed"]
    assert np.all(np.isnan([h.value, *h.grad]))


def test_no_steps_leave_the_initial_point():
    problem, phi, lam = case("init", "HeavyBall", False)
    h = hx.hypergradient(problem, phi, Reversible(0))(lam, regression_data())
    prepared = problem.prepare(lam, regression_data())
    assert_trees_close(h.grad["init"], jax.grad(problem.outer)(lam["init"], lam, prepared), 1e-12)
    check_info(h, 0)


@pytest.mark.parametrize(
    ("dynamics", "message"),
    [
        (hx.GradientDescent(0.1), r"Reversible with GradientDescent: only HeavyBall .* Reverse\(steps, segment="),
        (hx.Optax(optax.adam(0.1)), r"Reversible with Optax: .* Reverse\(steps, memory="),
        (hx.HeavyBall(0.1, 0.0), r"momentum 0: below 1/64 .* Reverse\(steps, segment="),
        (hx.HeavyBall(0.1, 0.01), r"momentum 0\.01"),
        (hx.HeavyBall(0.1, {"a": 0.9, "b": 0}), r"momentum 0: "),
    ],
)
def test_refused_dynamics(dynamics, message):
    with pytest.raises(ValueError, match=message):
        hx.hypergradient(quadratic(), dynamics, Reversible(3)).check(jnp.ones(2), jnp.zeros(2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": -1}, "steps must be"),
        ({"steps": 1, "fraction_bits": 53}, "at most 52"),
        ({"steps": 1, "fraction_bits": 4}, "fraction_bits must be"),
        ({"steps": 1, "lowest_momentum": 0.0}, "at least 1/64"),
        ({"steps": 1, "lowest_momentum": 1.0}, "below 1"),
    ],
)
def test_refused_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Reversible(**arguments)


def test_64_bit_integers_are_needed():
    with jax.enable_x64(False), pytest.raises(ValueError, match=r'jax\.config\.update\("jax_enable_x64", True\)'):
        hx.hypergradient(quadratic(), hx.HeavyBall(0.1), Reversible(3))(jnp.ones(2), jnp.zeros(2))


def test_unused_leaves_are_named():
    of_w = quadratic()
    problem = hx.Problem(lambda w, lam, d: of_w.inner(w, lam["w"], d), of_w.outer, lambda lam, d: jnp.zeros(2))
    with pytest.warns(hx.UnusedLeafWarning, match=r"lam\['momentum'\], lam\['step'\] do not"):
        hx.hypergradient(problem, hx.HeavyBall(0.1), Reversible(3)).check(SETTINGS_AS_ARRAYS, jnp.zeros(2))


SETTINGS_AS_ARRAYS = jax.tree.map(jnp.asarray, SETTINGS)


def test_only_what_lam_reaches_is_differentiated():
    problem, _, lam = case("all", "HeavyBall", False)
    depends = _depends_on_lam(problem, lam, regression_data())
    assert depends == {"x": True, "y": False, "y_outer": False, "key": False, "chosen": False}


@jax.custom_jvp
def straight_through(x):
    return jnp.round(x)


@straight_through.defjvp
def _(primals, tangents):
    return jnp.round(primals[0]), tangents[0]


@pytest.mark.filterwarnings("ignore::hyperax.UnusedLeafWarning")  # the trace of rounding shows no derivative
def test_a_derivative_of_its_own_inside_prepare_is_not_lost():
    problem = hx.Problem(
        inner=lambda w, lam, d: jnp.sum((w - d) ** 2),
        outer=lambda w, lam, d: jnp.sum(w**2),
        init=lambda lam, d: jnp.zeros(2),
        prepare=lambda lam, d: 2.0 * straight_through(lam),
    )
    lam, dynamics = jnp.array([0.7, 2.2]), hx.HeavyBall(0.1, 0.5)
    ours, theirs = (hx.hypergradient(problem, dynamics, method(3))(lam).grad for method in (Reversible, hx.Reverse))
    assert np.min(np.abs(theirs)) > 0.1
    np.testing.assert_allclose(ours, theirs, rtol=1e-10)


class Nesterov(hx.HeavyBall):
    """Looks like heavy ball by its type, and steps otherwise."""


def test_a_subclass_that_may_step_otherwise_is_refused():
    with pytest.raises(ValueError, match="Reversible with Nesterov: only HeavyBall"):
        hx.hypergradient(quadratic(), Nesterov(0.1, 0.5), Reversible(3))(jnp.ones(2), jnp.zeros(2))
    with pytest.raises(ValueError, match="Nesterov is not one of them"):
        hx.hypergradient(quadratic(), Nesterov(0.1, 0.5), hx.Doubling(3))(jnp.ones(2), jnp.zeros(2))


def test_a_value_with_fewer_digits_than_lam_keeps_its_type():
    narrow = hx.Problem(
        inner=lambda w, lam, d: jnp.sum((w - lam.astype(w.dtype)) ** 2),
        outer=lambda w, lam, d: jnp.sum(w**2),
        init=lambda lam, d: jnp.zeros(2, jnp.float32),
    )
    h = hx.hypergradient(narrow, hx.HeavyBall(0.1, 0.5), Reversible(3))(jnp.ones(2))
    assert (h.value.dtype, h.grad.dtype) == (jnp.float32, jnp.float64)
