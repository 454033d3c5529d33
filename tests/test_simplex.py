"""Sets that couple entries: projections against the optimality conditions and brute force, and their use."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hyperax.constraints import Projected
from hyperax.minimize import minimize
from hyperax.problem import Hypergradient
from hyperax.simplex import CappedSimplex, Simplex

DRAW = np.random.default_rng(0)
LENGTHS = (1, 6, 40)
# Points of every kind: spread, all alike (ties), inside, far away, on a border, and with whole numbers (more ties).
POINTS = {
    n: np.stack(
        [
            DRAW.normal(size=n),
            3 * DRAW.normal(size=n) + 1,
            np.full(n, 0.7),
            DRAW.dirichlet(np.ones(n)),
            1e6 + DRAW.normal(size=n),
            -50 - DRAW.random(n),
            *DRAW.integers(-1, 4, size=(4, n)).astype(float),
        ]
    )
    for n in LENGTHS
}
SETS = [Simplex(), CappedSimplex(0.3), CappedSimplex(2.5)]


def by_bisection(constraint, point):
    """The projection by 200 halvings of the interval around tau: the threshold formula, found another way."""
    total, high = (1.0, np.inf) if isinstance(constraint, Simplex) else (constraint.total, 1.0)
    if isinstance(constraint, CappedSimplex) and np.clip(point, 0, 1).sum() <= total:
        return np.clip(point, 0, 1)
    low_tau, high_tau = point.min() - total - 2, point.max()
    for _ in range(200):
        tau = (low_tau + high_tau) / 2
        low_tau, high_tau = (tau, high_tau) if np.clip(point - tau, 0, high).sum() > total else (low_tau, tau)
    return np.clip(point - tau, 0, high)


def corners(constraint, n):
    """Points of the set, extreme ones among them."""
    if isinstance(constraint, Simplex):
        return np.concatenate([np.eye(n), DRAW.dirichlet(np.ones(n), size=30)])
    points = [np.zeros(n)]
    for _ in range(60):
        point, left = np.zeros(n), constraint.total
        for i in DRAW.permutation(n):
            point[i] = min(1.0, left)
            left -= point[i]
        points.append(point * DRAW.choice([1.0, DRAW.random()]))
    return np.stack(points)


def projected_twice(constraint, points):
    """The projections, whether they are in the set, and their projections, in one compiled program."""

    def of(point):
        nearest = constraint.project(point)
        return nearest, constraint.closure(nearest).all(), constraint.project(nearest)

    return jax.tree.map(np.asarray, jax.jit(jax.vmap(of))(jnp.asarray(points)))


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("constraint", SETS, ids=str)
def test_projection_is_the_nearest_point(constraint, n):
    for point, nearest, inside, again in zip(POINTS[n], *projected_twice(constraint, POINTS[n]), strict=True):
        assert inside
        scale = max(1.0, np.abs(point).max())
        np.testing.assert_allclose(nearest, by_bisection(constraint, point), atol=1e-13 * scale)
        # <point - nearest, q - nearest> <= 0 for every q of the set: what characterises the nearest point.
        assert ((corners(constraint, n) - nearest) @ (point - nearest)).max() <= 1e-12 * scale**2 * n
        np.testing.assert_array_equal(again, nearest)


def test_known_points():
    capped = lambda total, points: projected_twice(CappedSimplex(total), np.array(points))[0]
    points = [[0.25, -2.0, 0.5], [5.0, 0.5, 0.0], [0.75, 0.75, 0.25]]  # the first does not use up the budget
    np.testing.assert_array_equal(capped(1.0, points), [[0.25, 0.0, 0.5], [1.0, 0.0, 0.0], [0.5, 0.5, 0.0]])
    np.testing.assert_array_equal(capped(9.0, [[5.0, -1.0, 0.5]]), [[1.0, 0.0, 0.5]])
    on_simplex = projected_twice(
        Projected(Simplex()), np.array([[[1.5, 0.5], [1.5, 0.0]], [[-3.0, -3.0], [-3.0, -3.0]]])
    )
    np.testing.assert_array_equal(on_simplex[0], [[[0.5, 0.0], [0.5, 0.0]], [[0.25, 0.25], [0.25, 0.25]]])


def test_far_away_from_the_set_in_float32():
    # lam and lam - 1 are the same float32 there, so breakpoints must be taken beside each other first.
    points = jnp.array([[1e9, 0.0, 0.0], [3e7, 3e7, 0.0], [-1e9, 1e9, 1e9]], jnp.float32)
    for total, expected in (
        (0.5, [[0.5, 0, 0], [0.25, 0.25, 0], [0, 0.25, 0.25]]),
        (1.0, [[1, 0, 0], [0.5, 0.5, 0], [0, 0.5, 0.5]]),
    ):
        nearest, inside, _ = projected_twice(CappedSimplex(total), points)
        np.testing.assert_array_equal(nearest, expected)
        assert inside.all()


@pytest.mark.parametrize(("constraint", "total"), [(Simplex(), 1.0), (CappedSimplex(25000.0), 25000.0)], ids=str)
def test_a_hundred_thousand_entries_in_float32(constraint, total):
    point = jnp.asarray(DRAW.normal(size=100_000) + 0.5, jnp.float32)
    ((nearest,), (inside,), (again,)) = projected_twice(constraint, point[None])
    assert nearest.dtype == jnp.float32
    assert abs(np.asarray(nearest, np.float64).sum() - total) <= 2e-6 * total
    np.testing.assert_allclose(nearest, by_bisection(constraint, np.asarray(point, np.float64)), atol=2e-6)
    np.testing.assert_array_equal(again, nearest)
    assert inside


class TestSoftmax:
    def test_inverse(self):
        lam = jnp.asarray(DRAW.dirichlet(np.ones(6)).reshape(2, 3))
        u = Simplex().inverse(lam)
        np.testing.assert_allclose(jnp.sum(u), 0.0, atol=1e-12)
        np.testing.assert_allclose(Simplex().forward(u), lam, rtol=1e-13)
        assert Simplex().interior(lam).all()

    def test_only_the_tangential_part_of_the_gradient_counts(self):
        u = jnp.array([0.3, -1.0, 0.2])
        pullback = jax.vjp(Simplex().forward, u)[1]
        gradient = jnp.array([1.0, 5.0, -2.0])
        (one,), (other,) = pullback(gradient), pullback(gradient + 100.0)
        np.testing.assert_allclose(one, other, atol=1e-12)
        np.testing.assert_allclose(jnp.sum(one), 0.0, atol=1e-12)
        lam = Simplex().forward(u)
        project = lambda gradient: Simplex().project(lam - 0.1 * gradient)
        np.testing.assert_allclose(project(gradient), project(gradient + 100.0), atol=1e-12)

    def test_huge_free_variables(self):
        for dtype in (jnp.float32, jnp.float64):
            lam = Simplex().forward(jnp.array([1e30, -1e30, 0.0], dtype))
            assert Simplex().interior(lam).all()
            assert np.isfinite(jnp.log(lam)).all()


def distance_to(target):
    def hypergradient(lam, data, carry):
        value, grad = jax.value_and_grad(lambda lam: 0.5 * jnp.sum((lam["weights"] - target) ** 2))(lam)
        return Hypergradient(value, grad, None, {}, carry)

    return hypergradient


@pytest.mark.parametrize(
    ("constraint", "start", "optimizer", "atol"),
    [
        (Projected(CappedSimplex(1.5)), [0.0, 0.0, 1.0], optax.sgd(0.5), 1e-12),
        (Projected(Simplex()), [0.0, 0.0, 1.0], optax.sgd(0.5), 1e-12),
        (Simplex(), [0.2, 0.2, 0.6], optax.adam(0.05), 2e-3),
    ],
    ids=["capped simplex", "simplex", "softmax"],
)
def test_minimize_ends_at_the_nearest_point(constraint, start, optimizer, atol):
    target = jnp.array([1.25, 0.75, -0.25]) if isinstance(constraint, Projected) else jnp.array([0.5, 0.4, 0.1])
    seen = []
    solution = minimize(
        distance_to(target),
        {"weights": jnp.array(start)},
        constraint={"weights": constraint},
        optimizer=optimizer,
        steps=400,
        callbacks=lambda progress: seen.append(progress.lam()),
    )
    np.testing.assert_allclose(solution.lam["weights"], constraint.project(target), atol=atol)
    assert all(constraint.closure(lam["weights"]).all() for lam in seen)
    # In the ambient space the gradient is not zero at the solution; what is recorded is the stationarity measure.
    assert solution.history[-1]["gradient_norm"] < 1e-3
    if isinstance(constraint, Projected):
        assert np.linalg.norm(solution.lam["weights"] - target) > 0.3


@pytest.mark.parametrize(
    ("start", "constraint", "message"),
    [
        ([0.5, 0.25], Simplex(), r"entries from 0.25 to 0.5 and sum 0.75, is not inside Simplex\(\); start strictly"),
        ([1.0, 0.0], Simplex(), r"is not inside Simplex\(\); .*Projected\(Simplex\(\)\)"),
        (
            [1.0, 1.0],
            Projected(CappedSimplex(1.5)),
            r"sum 2, is not inside .*CappedSimplex\(total=1.5\).project\(lam\)",
        ),
        ([0.1, 0.1], CappedSimplex(1.5), r"no bijection; keep lam in it by Projected\(CappedSimplex\(total=1.5\)\)"),
    ],
)
def test_bad_starts(start, constraint, message):
    with pytest.raises(ValueError, match=message):
        minimize(
            distance_to(jnp.zeros(2)),
            {"weights": jnp.array(start)},
            constraint={"weights": constraint},
            optimizer=optax.sgd(0.1),
            steps=1,
        )


def test_bad_totals():
    for total in (0.0, -1.0, float("inf"), float("nan"), "many", np.ones(3)):
        with pytest.raises(ValueError, match="the largest sum of the weights"):
            CappedSimplex(total)
    for function in (CappedSimplex(1.0).forward, CappedSimplex(1.0).inverse):
        with pytest.raises(ValueError, match=r"Projected\(CappedSimplex\(total=1.0\)\)"):
            function(jnp.zeros(2))
