"""Every way to name what of a module's training is tuned."""

import jax
import jax.numpy as jnp
import optax
import pytest

import hyperax as hx
from torch_network import F64, ht, made, nn, to_torch, torch, training
from torch_problems import close


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
