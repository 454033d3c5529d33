"""Buffers and random numbers of modules of PyTorch."""

import copy

import jax
import pytest

import hyperax as hx
from torch_network import F64, T, ht, made, nn, to_torch, torch, training
from torch_problems import close


def test_frozen_buffers():
    run = training(buffers="frozen")
    h = ht.hypergradient(run.problem, hx.Reverse(T))(run.lam)
    assert "buffers" not in h.state.auxiliary
    again = ht.hypergradient(run.problem, hx.Reverse(T, segment=2))(run.lam)
    close(again, float(h.value), jax.tree.leaves(h.grad))
    trained = run.trained(run.lam, steps=T)
    assert torch.equal(trained.norm.running_mean, made().norm.running_mean)


def test_changing_buffers_ask_what_to_do():
    with pytest.raises(ValueError, match=r'norm\.running_mean.*buffers="state".*buffers="frozen"'):
        training(buffers=None)
    instance = nn.Sequential(nn.InstanceNorm1d(3, track_running_stats=True), nn.Flatten(), nn.Linear(6, 1))
    data = torch.randn(4, 3, 2)
    square = lambda model, x: (model(x) ** 2).mean()
    with pytest.raises(ValueError, match="InstanceNorm1d keeps running statistics"):
        ht.from_module(instance, square, tune={"step_size": 0.1}, data=data, validation=data, buffers="state")
    run = ht.from_module(instance, square, tune={"step_size": 0.1}, data=data, validation=data, buffers="frozen")
    assert ht.hypergradient(run.problem, hx.Reverse(2))(run.lam).grad["step_size"] != 0


def test_a_layer_in_evaluation_mode_stays_in_it():
    """Batch normalisation of a module in training mode: by running statistics, without a word about buffers."""
    module = made()
    module.norm.running_mean += 0.5
    module.norm.eval()
    run = training(module=module, buffers=None)
    h = ht.hypergradient(run.problem, hx.Reverse(T))(run.lam)
    frozen = training(module=module.train(), buffers="frozen")
    again = ht.hypergradient(frozen.problem, hx.Reverse(T))(frozen.lam)
    close(h, float(again.value), jax.tree.leaves(again.grad))
    assert not run.trained(run.lam).norm.training
    with pytest.raises(ValueError, match="changes the buffers"):
        training(module=module.eval(), buffers=None)
    data = torch.randn(4, 3, 2)
    square = lambda model, x: (model(x) ** 2).mean()
    for still in (nn.InstanceNorm1d(3, track_running_stats=True), nn.BatchNorm1d(3)):  # the former could not be state
        mixed = nn.Sequential(nn.Sequential(still.eval(), nn.BatchNorm1d(3), nn.Flatten()), nn.Linear(6, 1))
        kept = ht.from_module(mixed, square, tune={"step_size": 0.1}, data=data, validation=data, buffers="state")
    state = ht.hypergradient(kept.problem, hx.Reverse(2))(kept.lam).state
    assert {name.rpartition(".")[0] for name in state.auxiliary["buffers"]} == {"0.1"}


class Counting(nn.Module):
    """Buffers of a user: one assigned, differentiably; one overwritten in place."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0, dtype=F64))
        self.register_buffer("mean", torch.tensor(0.0, dtype=F64))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x):
        if self.training:
            self.mean = 0.5 * self.mean + 0.5 * self.scale * x.mean()
            self.calls += 1
        return self.scale * x + self.mean


def test_buffers_of_a_user_are_part_of_the_state():
    data = torch.ones(3, dtype=F64)
    run = ht.from_module(
        Counting(),
        lambda model, x: (model(x) ** 2).mean(),
        tune={"step_size": 0.1},
        data=data,
        validation=data,
        buffers="state",
    )
    lam = to_torch(run.lam)
    h = ht.hypergradient(run.problem, hx.Reverse(2))(lam)
    eta = lam["step_size"].clone().requires_grad_()
    scale, mean = torch.tensor(2.0, dtype=F64, requires_grad=True), torch.tensor(0.0, dtype=F64)
    for _ in range(2):
        new = 0.5 * mean + 0.5 * scale
        g = torch.autograd.grad((scale + new) ** 2, scale, create_graph=True)[0]
        scale, mean = scale - eta * g, new
    value = (scale + mean) ** 2
    assert int(h.state.auxiliary["buffers"]["calls"]) == 2
    close(h, value.item(), torch.autograd.grad(value, eta))


def test_dropout_is_the_same_in_every_replay():
    run = training(module=made(dropout=0.5))
    whole = ht.hypergradient(run.problem, hx.Reverse(T))(run.lam)
    state = torch.get_rng_state()
    torch.rand(7)
    for method in (hx.Reverse(T, segment=1), hx.Forward(T)):
        h = ht.hypergradient(run.problem, method)(run.lam)
        close(h, float(whole.value), jax.tree.leaves(whole.grad))
    torch.set_rng_state(state)
    ht.hypergradient(run.problem, hx.Reverse(T))(run.lam)
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers go on as if nothing had been drawn"
    other = ht.hypergradient(run.problem, hx.Reverse(T))(run.lam, 1)
    assert float(other.value) != float(whole.value), "another run has other masks and mini-batches"
    unseeded = training(module=made(dropout=0.5), seed=None)
    with pytest.raises(ValueError, match="Set seed=0"):
        ht.hypergradient(unseeded.problem, hx.Reverse(T))(unseeded.lam)


class Late(nn.Module):
    """A mean that begins at the third call."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1)
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("mean", torch.zeros(1))
        self.register_buffer("unit", torch.ones(1))

    def forward(self, x):
        y = self.linear(x)
        if self.training:
            self.calls = self.calls + 1
            if self.calls >= 3:
                self.mean = 0.5 * self.mean + 0.5 * y.mean(0).detach()
        return y * self.unit - self.mean


def squares(model, batch):
    return (model(batch) - 1).square().mean()


def constant_inputs(**changes):
    return {"data": torch.ones(6, 3), "validation": torch.ones(4, 3), "tune": {"step_size": 0.1}, "steps": 6} | changes


def test_buffers_that_move_later_than_in_the_first_trial():
    """They are part of the state too: calls agree, also where a first batch leaves statistics as they were."""
    late = ht.from_module(Late(), squares, buffers="state", **constant_inputs())
    quiet = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
    nn.init.zeros_(quiet[0].weight)
    nn.init.zeros_(quiet[0].bias)
    still = ht.from_module(
        quiet, squares, buffers="state", **constant_inputs(data=torch.eye(3).repeat(2, 1), validation=torch.eye(3))
    )
    for run in (late, still):
        f = ht.hypergradient(run.problem, hx.Reverse(6))
        first, second = f(run.lam), f(run.lam)
        assert float(first.value) == float(second.value)
        assert float(first.grad["step_size"]) == float(second.grad["step_size"])
    plain = copy.deepcopy(late.module)
    sgd = torch.optim.SGD(plain.parameters(), lr=0.1)
    for _ in range(6):
        sgd.zero_grad()
        squares(plain, torch.ones(6, 3)).backward()
        sgd.step()
    torch.testing.assert_close(late.trained(late.lam).mean, plain.mean)


class Around(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x).relu()


class Recomputing(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.head = nn.Linear(3, 3), nn.Linear(3, 1)

    def forward(self, x):
        hidden = torch.utils.checkpoint.checkpoint(lambda x: torch.tanh(self.linear(x)), x, use_reentrant=False)
        return self.head(hidden)


class Sudden(Late):
    """A buffer of a layer of its own, changed in a later call alone."""

    def __init__(self):
        super().__init__()
        self.inside = nn.Module()
        self.inside.register_buffer("late", torch.zeros(1))

    def forward(self, x):
        y = super().forward(x)
        if self.calls == 4:
            self.inside.late = self.inside.late + 1
        return y


@pytest.mark.filterwarnings("ignore:.*autocast:FutureWarning")  # older PyTorch, of its own checkpoint
def test_modules_that_would_be_computed_wrongly_are_refused():
    with pytest.raises(ValueError, match="Around keeps running statistics in a way of its own"):
        ht.from_module(nn.Sequential(nn.Linear(3, 2), Around(2)), squares, buffers="state", **constant_inputs())
    with pytest.raises(ValueError, match=r"recomputes in its backward pass \(torch.utils.checkpoint\)"):
        ht.from_module(Recomputing(), squares, **constant_inputs())
    sudden = ht.from_module(Sudden(), squares, buffers="state", **constant_inputs())
    with pytest.raises(ValueError, match="changes a buffer that its first trial left alone"):
        ht.hypergradient(sudden.problem, hx.Reverse(6))(sudden.lam)
    net = nn.Linear(3, 1)
    with pytest.raises(ValueError, match="depends on no parameter that is trained"):
        ht.from_module(net, lambda model, batch: model(batch).detach().mean(), **constant_inputs())


def test_a_lam_of_another_structure():
    run = ht.from_module(nn.Linear(3, 1), squares, "momentum", **constant_inputs())
    f = ht.hypergradient(run.problem, hx.Reverse(6))
    with pytest.raises(ValueError, match="leave none out"):
        f({"step_sizes": torch.tensor(0.1)})


def test_what_a_user_changes_afterwards_is_their_own():
    run = ht.from_module(nn.Linear(3, 1), squares, **constant_inputs(steps=None))
    f, none = (ht.hypergradient(run.problem, hx.Reverse(steps)) for steps in (6, 0))
    before = float(f.value(run.lam))
    with torch.no_grad():
        run.module.weight.zero_()
        none.inner(ht.to_torch(run.lam), None).start(ht.to_torch(run.lam)).w["weight"].zero_()
    assert float(f.value(run.lam)) == before


def test_implicit_refuses_what_the_hessian_cannot_see():
    noisy = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    dropout = ht.from_module(noisy, squares, tune={"step_size": 0.1}, data=torch.eye(3), validation=torch.eye(3))
    with pytest.raises(ValueError, match="draws random numbers"):
        ht.hypergradient(dropout.problem, hx.Implicit(5, hx.ConjugateGradient()))(dropout.lam)
    norm = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
    tune = {"weight_decay": 0.1}
    statistics = ht.from_module(
        norm, squares, buffers="state", **constant_inputs(data=torch.eye(3), tune=tune, fixed={"step_size": 0.1})
    )
    with pytest.raises(ValueError, match="auxiliary variables of the state"):
        ht.hypergradient(statistics.problem, hx.Implicit(6, hx.ConjugateGradient()))(statistics.lam)
