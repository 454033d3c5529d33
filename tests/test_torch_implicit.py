"""`Implicit` and `EvolutionStrategy` on training steps in PyTorch, and the methods that are refused."""

import numpy as np
import pytest

import hyperax as hx
from torch_problems import DESCENT, F64, PROBLEM, as_state, ht, init, lam_of, loss, momentum, outer, torch

SOLVERS = [
    hx.ConjugateGradient(1e-14),
    hx.Neumann(600, 0.3),
    hx.FixedPoint(800),
    hx.Nystrom(5, 1e-11),
]


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_implicit_equals_the_implicit_function_theorem(solver):
    lam = {"decay": torch.tensor(-1.0, dtype=F64)}
    h = ht.hypergradient(DESCENT, hx.Implicit(400, solver))(lam)
    w, at = h.state, lam["decay"].clone().requires_grad_()
    hessian = torch.autograd.functional.hessian(lambda w: loss(w, lam), w)
    slope = torch.func.jacrev(lambda a: torch.func.grad(lambda w: loss(w, {"decay": a}))(w))(at.detach())
    expected = 1 - 2 * (w - 1) @ torch.linalg.solve(hessian, slope)
    assert abs(h.grad["decay"] - expected) < 1e-9
    assert h.info["residual"] < 1e-8
    assert h.info["inner_gradient"] < 1e-8


def test_implicit_warm_start_and_tolerance():
    lam = {"decay": torch.tensor(-1.0, dtype=F64)}
    f = ht.hypergradient(DESCENT, hx.Implicit(500, warm_start=True, tolerance=hx.ExponentialTolerance(1e-3, 0.1)))
    first = f(lam)
    second = f(lam, carry=first.carry)
    assert 0 < int(first.info["inner_steps"]) < 500
    assert int(second.info["inner_steps"]) < int(first.info["inner_steps"])
    assert int(second.carry.k) == 2
    exact = ht.hypergradient(DESCENT, hx.Implicit(400))(lam).grad["decay"]
    assert abs(second.grad["decay"] - exact) < 1e-3


def test_implicit_refuses_what_it_cannot_see():
    lam = lam_of()
    inner = {"inner": lambda state, lam, data: loss(state["w"], lam)}
    with pytest.raises(ValueError, match="inner"):
        ht.hypergradient(PROBLEM, hx.Implicit(5))(lam)
    solved = ht.Problem(
        as_state(momentum),
        lambda s, lam, d: (s.w**2).sum(),
        as_state(init),
        inner=lambda s, lam, d: loss(s.w, lam),
    )
    with pytest.raises(ValueError, match=r"lam\['momentum'\], lam\['start'\], lam\['step'\] can be felt"):
        ht.hypergradient(solved, hx.Implicit(5))(lam)
    batched = ht.Problem(momentum, outer, init, batch=lambda data, t: None, **inner)
    with pytest.raises(ValueError, match="mini-batches"):
        ht.hypergradient(batched, hx.Implicit(5))(lam)
    import lineax

    with pytest.raises(ValueError, match="traces its operator"):
        ht.hypergradient(DESCENT, hx.Implicit(5, lineax.LU()))({"decay": lam["decay"]})


def test_evolution_strategy_of_a_linear_function():
    slope = torch.tensor([1.0, -2.0, 0.5], dtype=F64)
    problem = ht.Problem(
        lambda t, w, lam, d: w + 0 * lam.sum(), lambda w, lam, d: (slope * lam).sum(), lambda lam, d: lam.sum()
    )
    f = ht.hypergradient(problem, hx.EvolutionStrategy(1, pairs=2000, sigma=0.1))
    h = f(torch.zeros(3, dtype=F64))
    np.testing.assert_allclose(h.grad, slope, atol=0.3)
    assert not torch.equal(f(torch.zeros(3, dtype=F64), carry=h.carry).grad, h.grad)


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        (hx.Reversible(3), "rounded away"),
        (hx.Doubling(3), "quadratic"),
        (hx.ClosedForm(lambda lam, d: lam), "formula"),
        (hx.FiniteDifference(3), "apart from the step"),
        ("reverse", "use hyperax.Reverse"),
    ],
)
def test_methods_that_cannot_work_are_refused(method, reason):
    with pytest.raises(ValueError, match=reason):
        ht.hypergradient(PROBLEM, method)
