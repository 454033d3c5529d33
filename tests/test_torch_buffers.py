"""Buffers and random numbers of modules of PyTorch."""

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
