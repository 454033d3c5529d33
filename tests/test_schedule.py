"""A reverse pass within a number of bytes: the schedule that is chosen, what it really takes, and the same gradient."""

import itertools
from functools import cache

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

import hyperax as hx
from hyperax.methods.hypergradient import compiled
from hyperax.methods.schedule import StepSize, cheapest, measure_step, parse_bytes
from hyperax.rollout import initial_state
from problems import assert_trees_close, case, regression_data


@pytest.mark.parametrize(
    ("text", "size"),
    [(1000, 1000), ("2GiB", 2 * 2**30), ("1.5 kB", 1500), ("500MB", 5 * 10**8), ("64", 64), ("3 Mib", 3 * 2**20)],
)
def test_bytes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["lots", "2 GiBs of it", 0, -1, 1.5, True, "2TTB"])
def test_what_is_no_number_of_bytes(text):
    with pytest.raises(ValueError, match="use a number of bytes"):
        hx.Reverse(3, memory=text)


def kept(steps, segments, sizes):
    """Bytes of a schedule, counted one state after the other."""
    if not segments or segments[0] >= steps:
        return steps * sizes.step if not segments else kept(steps, segments[1:], sizes)
    return -(-steps // segments[0]) * sizes.state + kept(segments[0], segments[1:], sizes)


@given(st.integers(1, 3000), st.integers(1, 50), st.integers(0, 400), st.floats(0.001, 1.2))
def test_the_schedule_fits_and_its_bytes_are_counted(steps, state, more, share):
    sizes = StepSize(state, state + more)
    budget = int(share * steps * sizes.step) + 1
    # Segments of segments of two keep about 2 log2(T) states and a step: so much is always enough.
    if budget < 3 * (steps.bit_length() + 1) * state + sizes.step:
        budget = 3 * (steps.bit_length() + 1) * state + sizes.step
    found = cheapest(steps, sizes, budget)
    assert found.bytes <= budget
    assert found.bytes == kept(steps, found.segments, sizes)
    assert list(found.segments) == sorted(set(found.segments), reverse=True)


def test_no_cheaper_schedule_fits():
    steps, sizes = 60, StepSize(3, 7)
    least = {
        levels: min(kept(steps, cut[::-1], sizes) for cut in itertools.combinations(range(1, steps), levels))
        for levels in (1, 2)
    }
    for budget in (steps * 7, steps * 7 - 1, least[1], least[1] - 1, least[2]):
        levels = len(cheapest(steps, sizes, budget).segments)
        assert levels == (0 if budget >= steps * 7 else 1 if budget >= least[1] else 2)
    assert cheapest(steps, sizes, least[1]).bytes == least[1]
    assert cheapest(steps, sizes, least[2]).bytes == least[2]


def test_a_step_is_measured_without_what_stays_the_same():
    """Of w -> w - 0.1 X^T (tanh(X w) ...) the trace keeps what depends on w, not X."""
    x = jnp.ones((50, 4))
    problem = hx.Problem(
        inner=lambda w, lam, d: lam * jnp.sum(jnp.cosh(d @ w)), outer=lambda w, lam, d: w[0], init=lambda lam, d: d[0]
    )
    dynamics, lam = hx.HeavyBall(0.1, 0.5), jnp.asarray(1.0)
    sizes = measure_step(problem, dynamics, initial_state(problem, dynamics, lam, x), lam, x)
    assert sizes.state == 2 * 4 * 8
    # Rows of X w, w and m: a few times 50 numbers, where X alone has 200.
    assert 50 * 8 <= sizes.step < 4 * 50 * 8


STEPS = 37


@cache
def reverse(**options):
    problem, phi, lam = case("all", "HeavyBall", False)
    return hx.hypergradient(problem, phi, hx.Reverse(STEPS, **options))(lam, regression_data())


@pytest.mark.parametrize(
    "options", [{"memory": 10**9}, {"memory": 4000}, {"memory": 1600}, {"segment": "sqrt"}], ids=str
)
def test_every_schedule_has_the_same_gradient(options):
    h = reverse(**options)
    assert_trees_close(h.grad, reverse().grad, 1e-9)
    assert_trees_close(h.state, reverse().state, 1e-12)
    schedule = h.info["schedule"]
    segments = schedule["segments"].tolist()
    assert int(schedule["extra_runs"]) == len(segments)
    if "memory" in options:
        assert float(schedule["bytes"]) <= options["memory"]
        assert len(segments) == {10**9: 0, 4000: 1, 1600: 2}[options["memory"]]
    else:
        assert segments == [6]


def test_tasks_have_a_schedule_each():
    problem, phi, lam = case("all", "HeavyBall", False)
    mean = hx.mean_over_tasks(hx.hypergradient(problem, phi, hx.Reverse(STEPS, memory=4000)))
    twice = jax.tree.map(lambda x: jnp.stack([x, x]), regression_data())
    h = mean(lam, twice)
    assert_trees_close(h.grad, reverse().grad, 1e-9)
    assert h.info["schedule"]["segments"].tolist() == [reverse(memory=4000).info["schedule"]["segments"].tolist()] * 2


def test_ten_thousand_steps_in_a_twentieth_of_the_memory():
    """What the compiled program takes, not what the schedule says."""
    x = jax.random.normal(jax.random.key(0), (20, 30))
    problem = hx.Problem(
        inner=lambda w, lam, d: jnp.sum(jnp.log1p(jnp.exp(d @ w))) + jnp.sum(jnp.exp(lam) * w**2),
        outer=lambda w, lam, d: jnp.sum((d @ w) ** 2),
        init=lambda lam, d: jnp.ones(30),
    )
    lam = jnp.zeros(30)

    def temporary(method):
        f = hx.hypergradient(problem, hx.GradientDescent(0.01), method)
        return compiled.lower(f, lam, x, None).compile().compiled.memory_analysis().temp_size_in_bytes

    whole, budget = temporary(hx.Reverse(10_000)), 2**18
    assert whole > 10_000 * 30 * 8
    assert temporary(hx.Reverse(10_000, memory=budget)) < min(whole / 20, 2 * budget)
    assert temporary(hx.Reverse(10_000, segment="sqrt")) < whole / 20


def test_what_it_refuses():
    with pytest.raises(ValueError, match="segment or memory, not both"):
        hx.Reverse(10, segment=3, memory="1GiB")
    with pytest.raises(ValueError, match='use a whole number, or "sqrt"'):
        hx.Reverse(10, segment="cube")
    problem, phi, lam = case("all", "HeavyBall", True)
    with pytest.raises(ValueError, match=r"37 steps needs .* bytes at least .* use Forward"):
        hx.hypergradient(problem, phi, hx.Reverse(STEPS, memory=100))(lam, regression_data())
