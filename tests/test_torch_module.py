"""Modules of PyTorch by `from_module`: against an independent loop, and every way to name what is tuned."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed: the extra hyperax[torch]")

import hyperax as hx  # noqa: E402
import hyperax.torch as ht  # noqa: E402
from hyperax.torch.crossing import to_torch  # noqa: E402

nn, functional = torch.nn, torch.nn.functional
torch.set_num_threads(1)
F64 = torch.float64
T = 4


class Net(nn.Module):
    """Convolution, batch and layer normalisation, attention."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1, bias=False)  # no bias whose gradient is rounding alone, as here
        self.norm = nn.BatchNorm2d(4)
        self.attention = nn.MultiheadAttention(4, 1, bias=False, batch_first=True, dropout=dropout)
        self.layer_norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = functional.relu(self.norm(self.conv(x))).flatten(2).mT
        x = self.layer_norm(x + self.attention(x, x, x, need_weights=False)[0])
        return self.head(x.mean(1))


def made(seed=0, dropout=0.0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net(dropout).double()


def draw(count, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 1, 3, 3, generator=generator, dtype=F64)
    return x, (x.sum((1, 2, 3)) > 0).long()


TRAIN, VALID = draw(12, 1), draw(6, 2)


def cross_entropy(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1])


TUNE = {
    "sgd": {"step_size": [0.3, 0.1]},
    "momentum": {"step_size": [0.3, 0.1], "momentum": 0.8},
    "adam": {"step_size": [0.03, 0.01], "beta1": 0.8},
    "adamw": {"step_size": [0.03, 0.01]},
    "rmsprop": {"step_size": [0.03, 0.01], "alpha": 0.9},
}


def training(optimizer="momentum", module=None, **options):
    module = made() if module is None else module
    tune = TUNE.get(optimizer, {}) | {"weight_decay": {"conv": 0.01, "*": 0.02}}
    options = {"tune": tune, "batch_size": 5, "steps": T, "buffers": "state"} | options
    loss = options.pop("loss", cross_entropy)
    return ht.from_module(module, loss, optimizer, data=TRAIN, validation=VALID, **options)


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


def close(h, value, gradient, tolerance=1e-10):
    assert abs(float(h.value) - value) < tolerance
    for a, b in zip(jax.tree.leaves(h.grad), gradient, strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tolerance, atol=tolerance)


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


def test_loss_terms_example_weights_and_what_a_loss_reads():
    """dL = a mean_i(v_i l_i) + b penalty: one step of gradient descent, by hand."""
    x = torch.arange(1.0, 5.0, dtype=F64)[:, None]
    module = nn.Linear(1, 1, bias=False).double()
    weight = module.weight.detach().clone()

    def loss(model, batch, lam):
        errors = (model(batch)[:, 0] - lam["target"]) ** 2
        return {"fit": errors, "size": (model(torch.ones(1, 1, dtype=F64)) ** 2).sum()}

    tune = {
        "loss_weights": {"size": hx.log_scale(0.1)},
        "example_weights": torch.linspace(0.5, 1.5, 4),
        "target": 2.0,
    }
    run = ht.from_module(
        module,
        loss,
        tune=tune,
        fixed={"step_size": 0.01},
        data=x,
        validation=x,
        batch_size=3,
        validation_loss=lambda model, x: (model(x) ** 2).mean(),
    )
    lam = to_torch(run.lam)
    index, batch = run.problem.batch(None, 1)
    assert torch.equal(x[index], batch)

    def by_hand(lam):
        slope = lam["example_weights"][index] * 2 * (weight * batch - lam["target"])[:, 0] * batch[:, 0]
        w = weight - 0.01 * (slope.mean() + lam["loss_weights"]["size"] * 2 * weight)
        return ((w * x) ** 2).mean()

    expected = torch.func.grad(by_hand)(lam)
    h = ht.hypergradient(run.problem, hx.Reverse(1))(lam)
    close(h, by_hand(lam).item(), jax.tree.leaves(expected))
    unused = [i for i in range(4) if i not in index.tolist()]
    assert all(h.grad["example_weights"][unused] == 0)
    assert run.constraint["loss_weights"]["size"] == hx.Logarithmic()
    for wrong, advice in (
        ({"loss_weights": {"none": 1.0}}, "loss_weights has none"),
        ({"example_weights": [1.0, 1.0]}, "one for each of the 4 examples"),
    ):
        with pytest.raises(ValueError, match=advice):
            ht.from_module(module, loss, tune=tune | wrong, fixed={"step_size": 0.01}, data=x, validation=x)
    with pytest.raises(ValueError, match="losses of single examples"):
        ht.from_module(
            module,
            lambda model, x: model(x).mean(),
            tune={"example_weights": torch.ones(4), "step_size": 0.1},
            data=x,
            validation=x,
        )


def test_initial_values_and_a_part_of_the_module():
    x = torch.linspace(-1, 1, 6, dtype=F64)[:, None]
    module = nn.Sequential(nn.Linear(1, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    square = lambda model, x: (model(x) - x).pow(2).mean()
    run = ht.from_module(
        module, square, tune={"parameters": "0.*", "init": ["2.weight"]}, fixed={"step_size": 0.1}, data=x, validation=x
    )
    assert sorted(run.lam["parameters"]) == ["0.bias", "0.weight"]
    assert list(run.lam["init"]) == ["2.weight"]
    lam = to_torch(run.lam)
    lam["init"]["2.weight"] = lam["init"]["2.weight"] + 1.0

    def by_hand(lam):
        features = torch.tanh(x @ lam["parameters"]["0.weight"].T + lam["parameters"]["0.bias"])
        error = lambda w, b: ((features @ w.T + b - x) ** 2).mean()
        w, b = lam["init"]["2.weight"], module[2].bias.detach()
        dw, db = torch.func.grad(error, (0, 1))(w, b)
        return error(w - 0.1 * dw, b - 0.1 * db)

    h = ht.hypergradient(run.problem, hx.Reverse(1))(lam)
    close(h, by_hand(lam).item(), jax.tree.leaves(torch.func.grad(by_hand)(lam)))
    trained = run.trained(lam, steps=3)
    assert torch.equal(trained[0].weight, lam["parameters"]["0.weight"])
    with pytest.raises(ValueError, match="all parameters are in lam"):
        ht.from_module(module, square, tune={"parameters": "*"}, fixed={"step_size": 0.1}, data=x, validation=x)


def test_implicit_on_a_module():
    x = torch.linspace(-1, 1, 8, dtype=F64)[:, None]
    module = nn.Linear(1, 1).double()
    square = lambda model, x: (model(x) - 2 * x).pow(2).mean()

    def loss(model, batch, lam):
        return square(model, batch) + lam["decay"] * sum((p**2).sum() for p in model.tensors.values())

    run = ht.from_module(
        module, loss, tune={"decay": 0.1}, fixed={"step_size": 0.3}, data=x, validation=x, validation_loss=square
    )
    implicit = ht.hypergradient(run.problem, hx.Implicit(200))(run.lam)
    unrolled = ht.hypergradient(run.problem, hx.Reverse(200, segment="sqrt"))(run.lam)
    close(implicit, float(unrolled.value), jax.tree.leaves(unrolled.grad), 1e-9)


def test_minimize_end_to_end():
    """Per-layer weight decay and a schedule of step sizes, on fresh mini-batches each hyperiteration."""
    module = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
    tune = {
        "step_size": hx.log_scale([0.01, 0.01, 0.01]),
        "weight_decay": ht.per_layer(module, hx.log_scale(1e-2)),
        "momentum": hx.logit_scale(0.5),
    }
    x = torch.randn(30, 2, generator=torch.Generator().manual_seed(0))
    y = x.prod(1, keepdim=True)
    run = ht.from_module(
        module,
        lambda model, batch: (model(batch[0]) - batch[1]).pow(2).mean(),
        "momentum",
        tune=tune,
        data=(x[:20], y[:20]),
        validation=(x[20:], y[20:]),
        batch_size=10,
        steps=6,
    )
    f = ht.hypergradient(run.problem, hx.Reverse(6, segment="sqrt"))
    solution = hx.minimize(
        f,
        run.lam,
        constraint=run.constraint,
        optimizer=optax.adam(0.2),
        steps=8,
        data=jnp.asarray(0),
        sample=lambda key, data: jax.random.randint(key, (), 0, 2**31 - 1),
        key=jax.random.key(0),
    )
    before, after = (float(f(lam).value) for lam in (run.lam, solution.lam))
    assert after < before
    assert solution.lam["weight_decay"].keys() == {"0", "2"}
    assert (solution.lam["step_size"] > 0).all()


def options(**new):
    return {"optimizer": "sgd", "tune": {"step_size": 0.1}} | new


@pytest.mark.parametrize(
    ("wrong", "advice"),
    [
        (options(optimizer="lbfgs"), "use one of sgd, momentum, adam, adamw, rmsprop"),
        (options(tune={"momentum": 0.9}), "sgd has no momentum"),
        (options(tune={"weight_decay": 0.1}), "sgd needs step_size"),
        (options(tune={}), "tune is to name what lam holds"),
        (options(fixed={"step_size": 0.1}), "both tuned and fixed"),
        (options(fixed={"weight": 0.1}), "sgd has no weight;"),
        (options(tune={"step_size": [0.1, 0.2]}), "over how many steps: steps=T"),
        (options(tune={"step_size": [[0.1]]}), r"has shape \[1, 1\]"),
        (options(tune={"step_size": {"cnv": 0.1}}), "no trainable parameter matches 'cnv'"),
        (options(tune={"step_size": {"conv": 0.1}}), r"no pattern of the step_size matches norm\.weight"),
        (options(tune={"step_size": 0.1, "init": "none.*"}), "no trainable parameter matches"),
        (options(tune={"step_size": "large"}), "is no value to tune"),
        (options(buffers="keep"), 'use "state" or "frozen"'),
        (options(seed=-1), "seed must be a whole number"),
        (options(batch_size=13), "cannot be drawn from 12 examples"),
        (options(loss=lambda model: 0), r"use a function \(model, batch\)"),
        (options(loss=lambda model, batch: model(batch[0])), "return a scalar, or one"),
    ],
)
def test_bad_requests_are_refused_with_advice(wrong, advice):
    with pytest.raises(ValueError, match=advice):
        training(**wrong) if "steps" in wrong else training(**{"steps": None, **wrong})


def test_no_trainable_parameter():
    module = made().requires_grad_(False)
    for request in (lambda: ht.per_layer(module, 0.1), lambda: training(module=module)):
        with pytest.raises(ValueError, match="no trainable parameter"):
            request()


# ------------------------------------------------------------------------------------------------------ mini-batches


def test_mini_batches_are_a_function_of_the_step():
    batches = ht.Batches({"x": torch.arange(7), "y": torch.arange(7) * 10}, 3, seed=5)
    seen = [batches(None, t) for t in (1, 2, 3, 4)]
    assert all(torch.equal(batches(None, t)["x"], seen[t - 1]["x"]) for t in (4, 1, 3, 2))
    assert all(torch.equal(b["y"], 10 * b["x"]) for b in seen)
    assert len({*seen[0]["x"].tolist(), *seen[1]["x"].tolist()}) == 6, "an epoch has no repetition"
    assert torch.equal(batches(0, 1)["x"], seen[0]["x"])
    assert not all(torch.equal(batches(1, t)["x"], seen[t - 1]["x"]) for t in (1, 2, 3, 4))
    uneven = ht.Batches(torch.arange(7), 3, drop_last=False)
    assert sorted(x for t in (1, 2, 3) for x in uneven(None, t).tolist()) == list(range(7))
    index, batch = ht.Batches(torch.arange(7) * 2, 3, with_index=True)(None, 1)
    assert torch.equal(batch, 2 * index)
    within = ht.Batches(torch.arange(7.0), 3)
    torch.func.grad(lambda x: x * within(None, 1).sum())(torch.tensor(1.0))
    assert torch.equal(within(None, 2), ht.Batches(torch.arange(7.0), 3)(None, 2)), "an epoch may begin in torch.func"


def test_data_sets_and_loaders():
    pairs = torch.utils.data.TensorDataset(torch.arange(6.0), torch.arange(6))
    loader = torch.utils.data.DataLoader(pairs, batch_size=4, shuffle=True)
    batches = ht.Batches(loader)
    sizes = [len(batches(None, t)[0]) for t in (1, 2, 3)]
    assert sizes == [4, 2, 4], "drop_last is the loader's"
    x, y = batches(None, 1)
    assert torch.equal(x.long(), y)
    whole = ht.Batches(pairs)(None, 1)
    assert torch.equal(whole[0], torch.arange(6.0))
    collated = torch.utils.data.DataLoader(pairs, batch_size=2, drop_last=True, collate_fn=lambda pairs: len(pairs))
    assert ht.Batches(collated)(None, 1) == 2

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(range(3))

    for data, size, advice in (
        (Stream(), 2, "no example number i"),
        (torch.utils.data.DataLoader(pairs, batch_size=None), None, "no batch_size"),
        ((torch.ones(3), torch.ones(4)), 2, "leading axes of data differ"),
        (torch.tensor(1.0), None, "data is a number"),
        (5, None, "no example number i"),
    ):
        with pytest.raises(ValueError, match=advice):
            ht.Batches(data, size)


def test_an_augmenting_data_set_is_replayed():
    class Noisy(torch.utils.data.Dataset):
        def __len__(self):
            return 6

        def __getitem__(self, i):
            return torch.tensor([float(i)]) + torch.rand(1)

    module = nn.Linear(1, 1)
    run = ht.from_module(
        module,
        lambda model, x: (model(x) - x).pow(2).mean(),
        tune={"step_size": 0.01},
        data=torch.utils.data.DataLoader(Noisy(), batch_size=3),
        validation=torch.ones(2, 1),
    )
    h, again = (ht.hypergradient(run.problem, hx.Reverse(4, segment=k))(run.lam) for k in (None, 2))
    close(again, float(h.value), jax.tree.leaves(h.grad), 1e-6)
