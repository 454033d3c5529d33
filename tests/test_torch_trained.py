"""Modules that come out of a training, and what makes a training this one."""

import jax
import numpy as np
import optax
import pytest

import hyperax as hx
from torch_network import T, ht, made, nn, to_torch, torch, training

X = torch.linspace(-1, 1, 12)[:, None]


def square(model, x):
    return (model(x) - 2 * x).pow(2).mean()


def line(**options):
    module = nn.Linear(1, 1)
    module.load_state_dict({"weight": torch.ones(1, 1), "bias": torch.zeros(1)})
    options = {"tune": {"step_size": hx.log_scale(0.1)}, "data": X, "validation": X, "steps": 3} | options
    return ht.from_module(options.pop("module", module), options.pop("loss", square), **options)


def test_steps_are_those_of_the_problem():
    run = training(steps=T)
    assert run.problem.steps == run.steps == T
    a, b = run.trained(run.lam), run.trained(run.lam, steps=T)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"trained\(lam, steps=T\)"):
        (bare := line(steps=None)).trained(bare.lam)
    with pytest.raises(ValueError, match="steps must be"):
        run.trained(run.lam, steps=-1)


def test_the_module_at_a_state():
    run = training()
    expected = run.trained(run.lam).state_dict()
    for lam in (run.lam, to_torch(run.lam)):
        h = ht.hypergradient(run.problem, hx.Reverse(T))(lam)
        found = run.module_at(h.state)
        assert all(torch.equal(x, expected[name]) for name, x in found.state_dict().items())
    for wrong, advice in ((h, "give its .state"), (None, "compiled run"), (h.state.w, "use h.state")):
        with pytest.raises(ValueError, match=advice):
            run.module_at(wrong)
    with pytest.raises(ValueError, match=r"conv\.weight.* not of this module"):
        line().module_at(h.state)


def test_the_module_that_real_time_leaves_behind():
    module = nn.Sequential(nn.Linear(1, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    options = {"tune": {"weight_decay": 0.01, "parameters": "0.*"}, "fixed": {"step_size": 0.1}, "buffers": "state"}
    run = line(module=module, **options)
    f = ht.hypergradient(run.problem, hx.RealTime(None, every=2, window=2))
    solution = hx.minimize(f, run.lam, optimizer=optax.sgd(0.0), steps=3)
    found, expected = run.module_at(solution.carry.state, solution.lam), run.trained(run.lam, steps=6)
    assert int(found[1].num_batches_tracked) == 6
    for name, x in found.state_dict().items():
        np.testing.assert_allclose(x, expected.state_dict()[name], atol=1e-6)
    with pytest.raises(ValueError, match=r"module_at\(state, lam\)"):
        run.module_at(solution.carry.state)


def test_identity():
    same, again = line().identity, line().identity
    assert same == again
    changes = (
        {"module": nn.Linear(1, 1)},
        {"module": nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1)), "buffers": "state"},
        {"optimizer": "momentum"},
        {"fixed": {"weight_decay": 0.1}},
        {"fixed": {"weight_decay": [0.1, 0.2]}},
        {"fixed": {"weight_decay": [0.1, 0.3]}},
        {"tune": {"step_size": 0.1}},
        {"tune": {"step_size": hx.log_scale(0.2)}},
        {"tune": {"step_size": hx.log_scale([0.1, 0.1])}},
        {"tune": {"step_size": hx.log_scale(0.1), "weight_decay": 0.1}},
        {"seed": 1},
        {"seed": None},
        {"batch_size": 3},
        {"data": X[:9]},
        {"steps": 4},
    )
    identities = [same, *(line(**change).identity for change in changes)]
    assert all(a != b for i, a in enumerate(identities) for b in identities[:i])
    buffers = nn.BatchNorm1d(1)
    one = line(module=buffers, buffers="state").identity
    buffers.running_mean += 1
    assert line(module=buffers, buffers="state").identity != one


def test_a_resume_with_another_network_is_refused(tmp_path):
    def search(run, steps):
        return hx.minimize(
            ht.hypergradient(run.problem, hx.Reverse(3)),
            run.lam,
            constraint=run.constraint,
            optimizer=optax.adam(0.1),
            steps=steps,
            checkpoint=hx.Checkpoint(tmp_path, every=1, identity=run.identity),
            resume="auto",
        )

    search(line(), 1)
    assert search(line(), 2).steps == 2
    with pytest.raises(ValueError, match=r"belongs to another run: identity\.module"):
        search(line(module=nn.Linear(1, 1)), 3)
    with pytest.raises(ValueError, match=r"identity\.optimizer is 'sgd' there and 'momentum' here"):
        search(line(optimizer="momentum"), 3)


def test_the_first_network_is_that_of_the_module():
    module = made()
    assert jax.tree.all(
        jax.tree.map(torch.equal, dict(training(module=module).module.state_dict()), dict(module.state_dict()))
    )
