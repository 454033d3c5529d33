"""Equinox modules as lam and as w: arrays are variables, functions and plain numbers are not."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hyperax as hx

X = jax.random.normal(jax.random.key(1), (8, 3))
Y = jnp.sin(X.sum(1, keepdims=True))


class Leaky(eqx.Module):
    weight: jax.Array
    slope: float = 0.1
    training: bool = True

    def __call__(self, x):
        y = x @ self.weight
        return jnp.where(y > 0, y, self.slope * y)


def loss(w, lam, d):
    return jnp.mean((jax.vmap(w)(X) - Y) ** 2)


def network():
    return eqx.nn.MLP(3, 1, 4, 1, activation=jnp.tanh, key=jax.random.key(0), dtype=jnp.float64)


def test_maml_with_a_module_as_initialisation():
    problem = hx.Problem(inner=loss, outer=loss, init=lambda lam, d: lam)
    h = hx.hypergradient(problem, hx.GradientDescent(0.1), hx.Reverse(3))(network())

    def by_hand(arrays, fixed):
        value = lambda arrays: loss(eqx.combine(arrays, fixed), None, None)
        for _ in range(3):
            arrays = jax.tree.map(lambda w, g: w - 0.1 * g, arrays, jax.grad(value)(arrays))
        return value(arrays)

    expected = jax.grad(by_hand)(*eqx.partition(network(), eqx.is_array))
    for a, b in zip(jax.tree.leaves(h.grad), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-14)


def test_rollout_shows_the_whole_module():
    problem = hx.Problem(inner=loss, outer=loss, init=lambda lam, d: lam)
    state, seen = hx.rollout(problem, hx.GradientDescent(0.1), 4, network(), observe=lambda w: loss(w, None, None))
    assert seen.shape == (4,)
    assert seen[-1] < seen[0]
    assert loss(eqx.combine(state.w, network()), None, None) == pytest.approx(float(seen[-1]), rel=1e-12)


@pytest.mark.parametrize("place", ["lam", "w"])
def test_plain_numbers_of_a_module_stay(place):
    start = Leaky(0.3 * jnp.ones((3, 1)))
    if place == "lam":
        problem = hx.Problem(
            inner=lambda w, lam, d: jnp.mean((w - lam(X)) ** 2),
            outer=lambda w, lam, d: jnp.mean((w - Y) ** 2),
            init=lambda lam, d: jnp.zeros((8, 1)),
        )
    else:
        problem = hx.Problem(
            inner=lambda w, lam, d: jnp.mean((w(X) - Y) ** 2), outer=lambda w, lam, d: jnp.mean((w(X) - Y) ** 2),
            init=lambda lam, d: lam,
        )  # fmt: skip
    f = hx.hypergradient(problem, hx.GradientDescent(0.5), hx.Reverse(3))
    solution = hx.minimize(f, start, optimizer=optax.sgd(0.1), steps=3)
    assert (solution.lam.slope, solution.lam.training) == (0.1, True)
    assert not np.allclose(solution.lam.weight, start.weight)


def test_integer_arrays_in_a_module_are_refused():
    with pytest.raises(ValueError, match=r"lam\.weight has type int64.*eqx\.partition"):
        hx.minimize(lambda lam, data, carry: None, Leaky(jnp.ones((3, 1), int)), optimizer=optax.sgd(0.1), steps=1)


def test_phi_0_without_arrays():
    problem = hx.Problem(inner=lambda w, lam, d: lam, outer=lambda w, lam, d: lam, init=lambda lam, d: None)
    with pytest.raises(ValueError, match="no array"):
        hx.hypergradient(problem, hx.GradientDescent(0.1), hx.Reverse(1))(1.0)
