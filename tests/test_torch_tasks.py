"""The mean over tasks in PyTorch, and an outer loop by autograd."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hyperax as hx
from torch_problems import F64, PROBLEM, close, ht, in_jax, lam_of, torch

X = torch.tensor(np.random.default_rng(0).normal(size=(3, 8, 4)))
DATA = {"x": X, "y": X @ torch.linspace(-1, 1, 4, dtype=F64) + torch.arange(3, dtype=F64)[:, None]}
RULER = torch.linspace(0, 1, 8, dtype=F64)


def step(t, w, lam, task):
    loss = lambda w: ((task["x"] @ w - task["y"]) ** 2 * task.get("ruler", 1.0)).mean()
    return w - lam["rate"] * ht.inner_gradient(loss, w)


def outer(w, lam, task):
    return ((task["x"][4:] @ w - task["y"][4:]) ** 2).mean()


MAML = ht.Problem(step, outer, lambda lam, task: lam["w"])
LAM = {"rate": torch.tensor(0.1, dtype=F64), "w": torch.zeros(4, dtype=F64)}


def mean_by_hand(method, data=DATA):
    """(value, gradient) of tasks one by one."""
    f = ht.hypergradient(MAML, method)
    task = lambda j: jax.tree.map(lambda x: x[j], data)
    found = [f(LAM, task(j)) for j in range(3)]
    return sum(float(h.value) for h in found) / 3, [
        sum(parts) / 3 for parts in zip(*(jax.tree.leaves(h.grad) for h in found), strict=True)
    ]


@pytest.mark.parametrize("method", [hx.Reverse(3), hx.RealTime(3, every=3)], ids=str)
def test_the_mean_over_tasks(method):
    mean = ht.mean_over_tasks(ht.hypergradient(MAML, method))
    expected = mean_by_hand(method)
    close(h := mean(LAM, DATA), *expected)
    if isinstance(method, hx.Reverse):
        assert h.state.shape == (3, 4)
        assert float(mean.value(LAM, DATA)) == pytest.approx(expected[0], abs=1e-12)
    lam, data = ht.to_jax(LAM), ht.to_jax(DATA)
    close(mean(lam, data), *expected)
    close(compiled := jax.jit(mean)(lam, data), *expected)
    for found in (h, compiled):  # the carry of each task goes on
        assert [x.shape[0] for x in jax.tree.leaves(found.carry)] == [3] * len(jax.tree.leaves(found.carry))
    close(jax.jit(lambda lam: mean(lam, DATA))(lam), *expected)


def test_an_outer_objective_in_jax_and_shared_data():
    in_jax = ht.JaxObjective(lambda w, lam, task: jnp.mean((task["x"][4:] @ w - task["y"][4:]) ** 2))
    mean = ht.mean_over_tasks(ht.hypergradient(ht.Problem(step, in_jax, MAML.init), hx.Reverse(3)))
    data = DATA | {"ruler": hx.Shared(RULER)}
    expected = mean_by_hand(hx.Reverse(3), DATA | {"ruler": RULER.expand(3, 8)})
    close(mean(LAM, data), *expected)
    close(jax.jit(mean)(ht.to_jax(LAM), ht.to_jax(data)), *expected)


def test_maml_by_minimize_with_sampled_tasks():
    mean = ht.mean_over_tasks(ht.hypergradient(MAML, hx.Reverse(1)))
    found = hx.minimize(
        mean,
        ht.to_jax(LAM),
        data=ht.to_jax(DATA),
        sample=hx.sample_tasks(2),
        key=jax.random.key(0),
        optimizer=optax.adam(0.05),
        steps=40,
    )
    before, after = (float(mean.value(lam, DATA)) for lam in (LAM, ht.to_torch(found.lam)))
    assert after < 0.5 * before


def test_several_calls_in_one_program():
    """Also of objectives in JAX, whose inner runs wait for each other."""
    problem = ht.Problem(step, ht.JaxObjective(lambda w, lam, task: jnp.sum((w - 1) ** 2)), MAML.init)
    f = ht.hypergradient(problem, hx.Reverse(2))
    task = [ht.to_jax({name: x[j] for name, x in DATA.items()}) for j in (0, 1)]
    lam = ht.to_jax(LAM)
    together = jax.jit(lambda lam: f(lam, task[0]).grad["rate"] + f(lam, task[1]).grad["rate"])(lam)
    np.testing.assert_allclose(together, sum(float(f(lam, one).grad["rate"]) for one in task), rtol=1e-10)


@pytest.mark.parametrize(
    "data", [{"x": X, "y": DATA["y"][:2]}, {"x": X[:0]}, None, {"x": torch.ones(()), "y": torch.ones(2)}]
)
def test_tasks_that_disagree(data):
    with pytest.raises(ValueError, match="tasks on its leading axis"):
        ht.mean_over_tasks(ht.hypergradient(MAML, hx.Reverse(1)))(LAM, data)


def test_other_functions_are_refused():
    with pytest.raises(ValueError, match=r"hyperax\.torch\.mean_over_tasks"):
        hx.mean_over_tasks(ht.hypergradient(MAML, hx.Reverse(1)))
    with pytest.raises(ValueError, match=r"what hyperax\.torch\.hypergradient returns"):
        ht.mean_over_tasks(lambda lam: lam)
    with pytest.raises(ValueError, match=r"hyperax\.torch\.to_jax"):
        hx.minimize(ht.hypergradient(PROBLEM, hx.Reverse(1)), lam_of(), optimizer=optax.sgd(0.1), steps=1)


def test_an_outer_loop_by_autograd():
    f = ht.hypergradient(PROBLEM, hx.Reverse(4))
    lam = {name: torch.nn.Parameter(x) for name, x in lam_of().items()}
    loss = f.loss(lam)
    (3 * loss).backward()
    h = f(lam_of())
    assert loss.item() == float(h.value)
    for name, x in lam.items():
        torch.testing.assert_close(x.grad, 3 * h.grad[name], rtol=1e-12, atol=1e-12)
    adam = torch.optim.Adam(lam.values(), lr=0.02)
    for _ in range(5):
        adam.zero_grad()
        f.loss(lam).backward()
        adam.step()
    assert float(f.value(lam)) < loss.item()
    with pytest.raises(ValueError, match="requires a gradient"):
        f.loss(lam_of())
    with pytest.raises(ValueError, match="carry"):
        ht.hypergradient(PROBLEM, hx.RealTime(4, every=2)).loss(lam)
    with pytest.raises(RuntimeError, match="does not require grad"):
        torch.autograd.grad(
            torch.autograd.grad(f.loss(lam), lam["step"], create_graph=True)[0].sum(), lam["step"], allow_unused=True
        )


def test_jax_arrays_wherever_tensors_may_be():
    f = ht.hypergradient(PROBLEM, hx.Reverse(4))
    assert float(f.value(in_jax(lam_of()))) == float(f.value(lam_of()))
    along = [float(f.along(kind(lam_of()), kind(lam_of()))[1]) for kind in (in_jax, lambda lam: lam)]
    assert along[0] == along[1]


def test_programs_that_want_the_value_alone_leave_no_run_behind():
    problem = ht.Problem(step, ht.JaxObjective(lambda w, lam, task: jnp.sum((w - 1) ** 2)), MAML.init)
    f = ht.hypergradient(problem, hx.Reverse(2))
    task = ht.to_jax({name: x[0] for name, x in DATA.items()})
    value = jax.jit(lambda lam: f(lam, task).value)(ht.to_jax(LAM))
    assert float(value) == pytest.approx(float(f(LAM, jax.tree.map(lambda x: x[0], DATA)).value), abs=1e-12)
    assert not f.waiting._runs


def test_a_loss_of_tensors_and_numbers():
    rate = torch.tensor(0.1, dtype=F64, requires_grad=True)
    f = ht.hypergradient(ht.Problem(step, outer, lambda lam, task: torch.zeros(4, dtype=F64)), hx.Reverse(2))
    with pytest.warns(hx.UnusedLeafWarning, match="unused"):
        f.loss({"rate": rate, "unused": 0.5}, {name: x[0] for name, x in DATA.items()}).backward()
    assert rate.grad is not None
    assert rate.grad != 0


def test_the_mean_over_runs_of_a_module():
    x = torch.linspace(-1, 1, 12)[:, None]
    loss = lambda model, batch: (model(batch) - 1).square().mean()
    made = ht.from_module(
        torch.nn.Linear(1, 1), loss, tune={"step_size": 0.1}, data=x, validation=x, batch_size=4, steps=3
    )
    f = ht.hypergradient(made.problem, hx.Reverse(3))
    mean = ht.mean_over_tasks(f)
    each = [float(f(made.lam, run).value) for run in range(3)]
    assert len(set(each)) == 3
    assert float(mean(made.lam, jnp.arange(3)).value) == pytest.approx(sum(each) / 3, rel=1e-6)
    assert float(jax.jit(mean)(made.lam, jnp.arange(3)).value) == pytest.approx(sum(each) / 3, rel=1e-6)
    assert float(mean(ht.to_torch(made.lam), torch.arange(3)).value) == pytest.approx(sum(each) / 3, rel=1e-6)
