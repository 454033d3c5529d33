"""Sets: bijections that are inverses, projections that are nearest points, and both reaching the same optimum."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hyperax.constraints import Box, Positive, Projected, UnitInterval
from hyperax.minimize import minimize
from hyperax.problem import Hypergradient

SETS = [Positive(), Box(-2.0, 3.0), UnitInterval(), Box(np.array([-1.0, 0.0, 2.0]), np.array([0.0, 5.0, 2.5]))]
DTYPES = [jnp.float32, jnp.float64]


def bounds(constraint):
    if isinstance(constraint, Box):
        return np.asarray(constraint.low), np.asarray(constraint.high)
    return np.asarray(0.0), np.asarray(1.0 if isinstance(constraint, UnitInterval) else np.inf)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("constraint", SETS, ids=str)
class TestBijection:
    def test_forward_inverts_inverse(self, constraint, dtype):
        u = jnp.linspace(-6, 6, 3, dtype=dtype)
        lam = constraint.forward(u)
        assert lam.dtype == dtype
        assert constraint.interior(lam).all()
        np.testing.assert_allclose(constraint.inverse(lam), u, rtol=1e-3 if dtype == jnp.float32 else 1e-10, atol=1e-12)

    def test_huge_free_variables_stay_in_the_closed_set(self, constraint, dtype):
        u = jnp.asarray([-1e30, -800.0, -90.0, -40.0, 40.0, 90.0, 800.0, 1e30], dtype)[:, None] * jnp.ones(3, dtype)
        lam, pullback = jax.vjp(constraint.forward, u)
        assert constraint.closure(lam).all()
        assert np.isfinite(lam).all()
        assert np.isfinite(pullback(jnp.ones_like(lam))[0]).all()

    def test_derivative_survives_where_lam_is_rounded(self, constraint, dtype):
        # At u = 20 sigmoid(u) is 1 in float32; its derivative, exp(-20), is not 0.
        slope = jax.grad(lambda u: constraint.forward(u).sum())(jnp.full(3, -20.0, dtype))
        low, high = bounds(constraint)
        width = np.where(np.isfinite(high), high - low, 1.0)
        np.testing.assert_allclose(slope, np.broadcast_to(width, (3,)) * np.exp(-20.0), rtol=1e-5)
        if not isinstance(constraint, Positive):
            np.testing.assert_allclose(jax.grad(lambda u: constraint.forward(u).sum())(jnp.full(3, 20.0, dtype)), slope)

    def test_derivative_in_the_middle(self, constraint, dtype):
        u, step = jnp.asarray([-0.5, 0.0, 2.0], dtype), 1e-2
        slope = jax.grad(lambda u: constraint.forward(u).sum())(u)
        difference = (constraint.forward(u + step) - constraint.forward(u - step)) / (2 * step)
        np.testing.assert_allclose(slope, difference, rtol=1e-3)


@pytest.mark.parametrize("constraint", SETS, ids=str)
def test_projection_is_the_nearest_point(constraint):
    low, high = bounds(constraint)
    points = jnp.array([-7.0, 0.3, 9.0])
    np.testing.assert_array_equal(constraint.project(points), np.clip(points, low, high))
    np.testing.assert_array_equal(Projected(constraint).project(points), np.clip(points, low, high))
    assert constraint.closure(constraint.project(points)).all()


def distance_to(target):
    def hypergradient(lam, data, carry):
        f = lambda lam: sum(jnp.sum((a - b) ** 2) for a, b in zip(jax.tree.leaves(lam), target, strict=True))
        value, grad = jax.value_and_grad(f)(lam)
        return Hypergradient(value, grad, None, {}, carry)

    return hypergradient


@pytest.mark.parametrize(
    ("constraint", "dtype"), [(Positive(), jnp.float64), (Box(0.0, 1.0), jnp.float32), (UnitInterval(), jnp.float64)]
)
def test_both_ways_find_the_same_optimum_inside(constraint, dtype):
    lam = {"a": jnp.array([0.9, 0.1], dtype), "b": jnp.asarray(-3.0, dtype)}
    target = [jnp.array([0.2, 0.7], dtype), jnp.asarray(-1.0, dtype)]
    common = {"optimizer": optax.adam(0.05), "steps": 600}
    by_bijection = minimize(distance_to(target), lam, constraint={"a": constraint, "b": None}, **common)
    by_projection = minimize(distance_to(target), lam, constraint={"a": Projected(constraint), "b": None}, **common)
    for solution in (by_bijection, by_projection):
        assert solution.lam["a"].dtype == dtype
        np.testing.assert_allclose(solution.lam["a"], target[0], atol=2e-4)
        np.testing.assert_allclose(solution.lam["b"], target[1], atol=2e-4)


def test_both_ways_keep_the_bounds_when_the_optimum_is_outside():
    seen = []
    for constraint in (Box(0.0, 1.0), Projected(Box(0.0, 1.0))):
        solution = minimize(
            distance_to([jnp.array([-4.0, 6.0])]),
            jnp.array([0.5, 0.5]),
            constraint=constraint,
            optimizer=optax.sgd(0.1),
            steps=100,
            callbacks=lambda progress: seen.append(progress.lam()),
        )
        np.testing.assert_allclose(solution.lam, [0.0, 1.0], atol=0.05)
    assert all(Box(0.0, 1.0).closure(lam).all() for lam in seen)
    # On the border the hypergradient is not zero, its projected residual is.
    assert solution.history[-1]["gradient_norm"] == 0.0


def test_bijection_is_the_chain_rule():
    lam, rate = jnp.asarray(0.5), 0.1
    u = Positive().inverse(lam)
    expected = u - rate * jax.grad(lambda u: (Positive().forward(u) - 2.0) ** 2)(u)
    hypergradient = distance_to([jnp.asarray(2.0)])
    solution = minimize(hypergradient, lam, constraint=Positive(), optimizer=optax.sgd(rate), steps=1)
    np.testing.assert_allclose(solution.lam, Positive().forward(expected), rtol=1e-12)


class Network(eqx.Module):
    weight: jax.Array
    rate: jax.Array | float
    activation: object = jax.nn.relu


def test_prefix_for_a_module_with_functions():
    network = Network(jnp.array([1.0, -1.0]), jnp.asarray(0.5))
    prefix = Network(None, Positive(), None)
    hypergradient = lambda lam, data, carry: Hypergradient(
        *eqx.filter_value_and_grad(lambda lam: jnp.sum(lam.weight**2) + (lam.rate + 1) ** 2)(lam), None, {}, carry
    )
    solution = minimize(hypergradient, network, constraint=prefix, optimizer=optax.sgd(0.1), steps=50)
    assert solution.lam.activation is jax.nn.relu
    assert 0 < solution.lam.rate < 0.2
    np.testing.assert_allclose(solution.lam.weight, 0.0, atol=1e-4)


def test_a_set_for_what_is_no_hyperparameter():
    network = Network(jnp.array([1.0, -1.0]), 0.5)
    with pytest.raises(ValueError, match=r"constraint\.rate is Positive\(\), and lam has no hyperparameter there"):
        minimize(
            distance_to([]), network, constraint=Network(None, Positive(), None), optimizer=optax.sgd(0.1), steps=1
        )


@pytest.mark.parametrize(
    ("lam", "constraint", "message"),
    [
        (
            {"a": 1.0, "b": -1.0},
            Positive(),
            r"lam\['b'\] = -1.0 is not inside Positive\(\); start strictly .*Projected",
        ),
        ({"a": jnp.array([0.5, 1.0])}, UnitInterval(), r"lam\['a'\]\[1\] = 1.0 is not inside"),
        (0.0, Positive(), "lam = 0.0 is not inside"),
        (float("nan"), Positive(), "lam = nan"),
        (float("inf"), Positive(), "lam = inf"),
        (2.0, Projected(Box(0.0, 1.0)), r"start inside it, for instance at Box\(low=0.0, high=1.0\).project\(lam\)"),
        ({"a": 1.0}, {"b": Positive()}, "constraint does not fit lam"),
        ({"a": 1.0}, {"a": 3.0}, r"constraint\['a'\] is 3.0; use a set"),
        ([1.0, 2.0], (Positive(), None), "constraint does not fit lam"),
        (jnp.full(4, 0.5), Box(np.zeros(3), np.ones(3)), "does not broadcast"),
    ],
)
def test_bad_starts_and_prefixes(lam, constraint, message):
    with pytest.raises(ValueError, match=message):
        minimize(distance_to([]), lam, constraint=constraint, optimizer=optax.sgd(0.1), steps=1)


def test_bad_sets():
    with pytest.raises(ValueError, match=r"use Positive\(\)"):
        Box(0.0, float("inf"))
    with pytest.raises(ValueError, match="low < high"):
        Box(1.0, 1.0)
    with pytest.raises(ValueError, match="give it a set"):
        Projected(Projected(Positive()))


def test_projection_may_start_on_the_border():
    solution = minimize(
        distance_to([jnp.asarray(0.5)]), 1.0, constraint=Projected(UnitInterval()), optimizer=optax.sgd(0.5), steps=3
    )
    np.testing.assert_allclose(solution.lam, 0.5)
