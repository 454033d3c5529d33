"""Modules of PyTorch by `from_module`, against an independent loop."""

import jax
import numpy as np
import pytest

import hyperax as hx
from torch_network import F64, TUNE, VALID, T, cross_entropy, functional, ht, made, to_torch, torch, training
from torch_problems import close


def forward(w, statistics, x, train):
    """The network written out: (logits, statistics)."""
    h = functional.conv2d(x, w["conv.weight"], padding=1)
    mean, variance = statistics
    if train:
        m, v, n = h.mean((0, 2, 3)), h.var((0, 2, 3), unbiased=False), h.numel() / 4
        statistics = 0.9 * mean + 0.1 * m, 0.9 * variance + 0.1 * v * n / (n - 1)
        mean, variance = m, v
    shape = (1, 4, 1, 1)
    h = (h - mean.view(shape)) / (variance.view(shape) + 1e-5).sqrt()
    h = (h * w["norm.weight"].view(shape) + w["norm.bias"].view(shape)).relu().flatten(2).mT
    q, k, v = (h @ w["attention.in_proj_weight"].T).chunk(3, -1)
    a = torch.softmax(q @ k.mT / 2.0, -1) @ v
    h = h + a @ w["attention.out_proj.weight"].T
    centred = h - h.mean(-1, keepdim=True)
    h = centred / ((centred**2).mean(-1, keepdim=True) + 1e-5).sqrt() * w["layer_norm.weight"] + w["layer_norm.bias"]
    return h.mean(1) @ w["head.weight"].T + w["head.bias"], statistics


def reference(optimizer, lam, batches, first_order=False):
    """(f_T, its gradient) by autograd through the whole loop; the optimizers from their papers."""
    at = jax.tree.map(lambda x: x.clone().requires_grad_(), lam)
    w = {name: p.detach() for name, p in made().named_parameters()}
    statistics = torch.zeros(4, dtype=F64), torch.ones(4, dtype=F64)
    first = {name: torch.zeros_like(x) for name, x in w.items()}
    second = dict(first)
    for t in range(1, T + 1):
        x, y = batches(None, t)
        w = {name: p if p.requires_grad else p.requires_grad_() for name, p in w.items()}
        logits, statistics = forward(w, statistics, x, True)
        slopes = torch.autograd.grad(functional.cross_entropy(logits, y), list(w.values()), create_graph=True)
        slopes = [g.detach() for g in slopes] if first_order else slopes
        share = (t - 1) / (T - 1)
        eta = (1 - share) * at["step_size"][0] + share * at["step_size"][1]
        new = {}
        for (name, p), g in zip(w.items(), slopes, strict=True):
            decay = at["weight_decay"]["conv" if name.startswith("conv") else "*"]
            if optimizer != "adamw":
                g = g + decay * p
            if optimizer == "sgd":
                update = g
            elif optimizer == "momentum":
                update = first[name] = at["momentum"] * first[name] + g
            elif optimizer == "rmsprop":
                second[name] = at["alpha"] * second[name] + (1 - at["alpha"]) * g**2
                update = g / (second[name] + 1e-16).sqrt()
            else:
                b1, b2 = at.get("beta1", 0.9), 0.999
                first[name] = b1 * first[name] + (1 - b1) * g
                second[name] = b2 * second[name] + (1 - b2) * g**2
                update = first[name] / (1 - b1**t) / (second[name] / (1 - b2**t) + 1e-16).sqrt()
                if optimizer == "adamw":
                    update = update + decay * p
            new[name] = p - eta * update
        w = new
    value = functional.cross_entropy(forward(w, statistics, VALID[0], False)[0], VALID[1])
    return value.item(), torch.autograd.grad(value, jax.tree.leaves(at))


@pytest.mark.parametrize("optimizer", list(TUNE))
def test_every_optimizer_equals_autograd_through_the_whole_loop(optimizer):
    """Running statistics included: E is in evaluation mode, and depends on lam through them."""
    run = training(optimizer)
    lam = to_torch(run.lam)
    expected = reference(optimizer, lam, run.problem.batch)
    for method in (hx.Reverse(T), hx.Reverse(T, segment="sqrt")):
        close(ht.hypergradient(run.problem, method)(lam), *expected)


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
@pytest.mark.parametrize("method", [hx.Forward(T), hx.RealTime(T, every=T), hx.Truncated(T, T)], ids=str)
def test_every_method_on_the_network(optimizer, method):
    run = training(optimizer)
    lam = to_torch(run.lam)
    close(ht.hypergradient(run.problem, method)(lam), *reference(optimizer, lam, run.problem.batch))


def test_one_direction_at_a_time_on_the_network():
    tune = {"weight_decay": {"conv": 0.01, "*": 0.02}}
    run = training("sgd", tune=tune, fixed={"step_size": [0.3, 0.1]})
    expected = ht.hypergradient(run.problem, hx.Reverse(T))(run.lam)
    close(
        ht.hypergradient(run.problem, hx.Forward(T, chunk=1))(run.lam),
        float(expected.value),
        jax.tree.leaves(expected.grad),
    )


def test_first_order_keeps_step_sizes_and_running_statistics():
    run = training("momentum")
    lam = to_torch(run.lam)
    expected = reference("momentum", lam, run.problem.batch, first_order=True)
    close(ht.hypergradient(run.problem, hx.FirstOrder(T))(lam), *expected)


@pytest.mark.parametrize("optimizer", list(TUNE))
def test_plain_training_is_that_of_torch_optim(optimizer):
    """The values of T steps, with PyTorch's own module, buffers and optimizer; up to eps in another place."""
    run = training(optimizer)
    lam = to_torch(run.lam)
    module, batches = made(), run.problem.batch
    settings = {"sgd": {}, "momentum": {"momentum": 0.8}, "adam": {"betas": (0.8, 0.999)}}
    settings |= {"adamw": {"betas": (0.9, 0.999)}, "rmsprop": {"alpha": 0.9}}
    kinds = {"sgd": "SGD", "momentum": "SGD", "adam": "Adam", "adamw": "AdamW", "rmsprop": "RMSprop"}
    decayed = {name: 0.01 if name.startswith("conv") else 0.02 for name, _ in module.named_parameters()}
    groups = [{"params": [p], "weight_decay": decayed[name]} for name, p in module.named_parameters()]
    optim = getattr(torch.optim, kinds[optimizer])(groups, lr=0.1, **settings[optimizer])
    start, end = TUNE[optimizer]["step_size"]
    for t in range(1, T + 1):
        for group in optim.param_groups:
            group["lr"] = start + (end - start) * (t - 1) / (T - 1)
        optim.zero_grad()
        cross_entropy(module, batches(None, t)).backward()
        optim.step()
    trained = run.trained(lam, steps=T)
    for name, x in [*module.named_parameters(), *module.named_buffers()]:
        found = dict([*trained.named_parameters(), *trained.named_buffers()])[name]
        assert found.dtype == x.dtype
        np.testing.assert_allclose(found.detach(), x.detach(), rtol=0, atol=5e-4, err_msg=name)  # a step is 0.03
    module.eval()
    h = ht.hypergradient(run.problem, hx.Reverse(T))(lam)
    assert abs(cross_entropy(module, VALID) - h.value) < 1e-5


def test_the_given_module_stays_as_it_is():
    module = made()
    before = {name: x.clone() for name, x in module.state_dict().items()}
    ht.hypergradient((run := training(module=module)).problem, hx.Reverse(T))(run.lam)
    run.trained(run.lam, steps=2)
    assert all(torch.equal(x, before[name]) for name, x in module.state_dict().items())
    assert "forward" not in vars(module.norm)
