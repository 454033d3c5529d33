"""Every way to name what of a module's training is tuned."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hyperax as hx
from torch_network import F64, cross_entropy, ht, made, nn, to_torch, torch, training
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
        ({"target": [[1.0, None]]}, r'tune\["target"\] is no value'),
    ):
        with pytest.raises(ValueError, match=advice):
            ht.from_module(
                module,
                loss,
                tune=tune | wrong,
                fixed={"step_size": 0.01},
                data=x,
                validation=x,
                validation_loss=lambda model, x: (model(x) ** 2).mean(),
            )
    with pytest.raises(ValueError, match="validation_loss=lambda model, batch"):
        ht.from_module(module, loss, tune=tune, fixed={"step_size": 0.01}, data=x, validation=x)
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


X = torch.linspace(-1, 1, 24, dtype=F64).reshape(8, 3).sin() + torch.eye(8, 3, dtype=F64)


def squares(model, batch, lam=None):
    return (model(batch) - 2 * batch.sum(1, keepdim=True)).pow(2).mean()


def penalised(model, batch, lam):
    return squares(model, batch) + lam["penalty"] * sum((p**2).sum() for p in model.parameters())


@pytest.mark.parametrize(
    ("optimizer", "loss", "tune", "fixed"),
    [
        ("sgd", penalised, {"penalty": 0.1}, {"step_size": 0.3}),
        ("sgd", penalised, {"penalty": 0.1}, {"step_size": 0.3, "weight_decay": 0.05}),
        ("sgd", squares, {"weight_decay": 0.2}, {"step_size": 0.3}),
        ("momentum", squares, {"weight_decay": {"bias": 0.2, "weight": [0.1]}}, {"step_size": 0.2, "momentum": 0.5}),
        ("momentum", squares, {"weight_decay": {"weight": 0.1}}, {"step_size": 0.2, "momentum": 0.5}),
    ],
)
def test_weight_decay_is_part_of_the_training_loss(optimizer, loss, tune, fixed):
    """The implicit function theorem, of L + weight_decay / 2 |w|^2, against many unrolled steps."""
    module = nn.Linear(3, 1).double()
    module.load_state_dict({"weight": torch.ones(1, 3), "bias": torch.ones(1)})
    options = {"data": X, "validation": X[:3] + 0.3, "validation_loss": lambda model, batch: squares(model, batch)}
    run = ht.from_module(module, loss, optimizer, tune=tune, fixed=fixed, steps=200, **options)
    implicit = ht.hypergradient(run.problem, hx.Implicit(200))(run.lam)
    unrolled = ht.hypergradient(run.problem, hx.Reverse(200))(run.lam)
    assert implicit.info["inner_gradient"] < 1e-9
    for a, b in zip(jax.tree.leaves(implicit.grad), jax.tree.leaves(unrolled.grad), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
        assert (np.abs(a) > 1e-3).all()


def test_no_training_loss_of_decoupled_or_scheduled_decay():
    run = lambda optimizer, decay: ht.from_module(
        nn.Linear(3, 1).double(),
        lambda model, batch: squares(model, batch),
        optimizer,
        tune={"step_size": 0.1},
        fixed=decay,
        data=X,
        validation=X,
        steps=5,
    )
    for optimizer, decay, has_loss in (
        ("adamw", {}, False),
        ("adamw", {"weight_decay": {"weight": 0.0}}, True),
        ("adamw", {"weight_decay": 0}, True),
        ("adam", {"weight_decay": [0.1, 0.2]}, False),
        ("adam", {"weight_decay": {"weight": [0.1, 0.2], "bias": 0.1}}, False),
        ("adam", {"weight_decay": [0.1]}, True),
    ):
        problem = run(optimizer, decay).problem
        assert (problem.inner is not None) == has_loss
    with pytest.raises(ValueError, match="FixedPoint"):
        ht.hypergradient(run("adamw", {}).problem, hx.Implicit(5))({"step_size": torch.tensor(0.1)})


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


def reads_lam(**tune):
    loss = lambda model, batch, lam: cross_entropy(model, batch)
    return options(loss=loss, validation_loss=cross_entropy, tune={"step_size": 0.1} | tune)


@pytest.mark.parametrize(
    ("wrong", "advice"),
    [
        (options(optimizer="lbfgs"), "optimizer is 'lbfgs'; use one of sgd, momentum, adam, adamw, rmsprop"),
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
        (options(tune={"step_size": "large"}), r"tune\[.step_size.\] is no value: it is 'large'"),
        (options(optimizer="Adam"), 'optimizer is .Adam.; write "adam"'),
        (options(optimizer=torch.optim.RMSprop), 'write "rmsprop"'),
        (options(tune={"lr": 0.1}), r"sgd has no lr \(step_size, probably\)"),
        (options(tune={"step_size": 0.1, 3: 0.1}), "names are strings"),
        (options(optimizer="adam", tune={"step_size": 0.1, "betas": [0.9, 0.99]}), "beta1 and beta2, probably"),
        (options(fixed={"momentum": 0.9}), 'optimizer="momentum"'),
        (reads_lam(weight_decy=0.1), "weight_decay, probably"),
        (reads_lam(momentum=0.9), 'optimizer="momentum"'),
        (reads_lam(lr=0.1), "step_size, probably"),
        (options(tune=["step_size"]), "tune is .'step_size'.; it is a dict"),
        (options(fixed=0.1), "fixed is 0.1; it is a dict"),
        (options(tune={"step_size": None}), "it is None"),
        (options(tune={"step_size": True}), "it is True"),
        (options(tune={"step_size": float("nan")}), "use finite numbers"),
        (options(tune={"step_size": []}), "at least one number"),
        (options(tune={"step_size": 0.1, "weight_decay": {}}), "is empty"),
        (options(tune={"step_size": {"conv": {"weight": 0.1}, "*": 0.1}}), r'"conv".* is a dict; a layer has one'),
        (options(tune={"step_size": -0.1}), "step_size is at least 0"),
        (options(fixed={"weight_decay": {"conv": [0.1, -1.0]}}), r'fixed\["weight_decay"\]\["conv"\] has -1 in it'),
        (options(optimizer="momentum", fixed={"momentum": 1}), "a momentum is at least 0 and below 1"),
        (options(optimizer="adam", fixed={"beta2": hx.log_scale(1.5)}), "a beta2 is at least 0 and below 1"),
        (options(tune={"step_size": (0.1, hx.Logarithmic())}), r"hyperax\.Hyperparameter\(value, set\)"),
        (options(tune={"step_size": [hx.log_scale(0.1)] * 2}), "around the list"),
        (options(tune={"step_size": lambda t: 0.1}), "list of its knots"),
        (reads_lam(network=nn.Linear(99, 99)), r"is a module \(Linear\); of a second module.*named_parameters"),
        (reads_lam(table=torch.full((500,), torch.inf)), r"it is a tensor, torch.float32\[500\]; use finite"),
        (options(tune={"step_size": 0.1, "init": True}), r'tune\["init"\] is True; .*"\*" for all'),
        (options(tune={"step_size": [0.1] * 5}, steps=4), "at most one knot a step"),
        (options(steps=0), "steps must be a whole number"),
        (options(loss=nn.CrossEntropyLoss()), r"loss is a module \(CrossEntropyLoss\); use a function"),
        (options(validation_loss=lambda model: 0), "validation_loss is"),
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


def test_names_and_values_that_are_fine():
    """What a loss reads may be called like a setting a little, and be any array; zeros are values."""
    tune = {"class_weights": np.ones(2, np.float32), "beta": 1, "decay": torch.tensor(0.1, dtype=torch.bfloat16)}
    run = training(**reads_lam(**tune), fixed={"weight_decay": {"conv": 0, "*": 0.0}})
    assert run.lam["class_weights"].shape == (2,)
    assert {x.dtype for x in jax.tree.leaves(run.lam)} == {np.dtype("float64")}, "that of the module"
    training("momentum", tune={"step_size": 0.1}, fixed={"momentum": 0})


def test_lam_has_the_precision_of_the_module():
    x = torch.ones(4, 2)
    square = lambda model, x: model(x).pow(2).mean()
    one = lambda dtype: ht.from_module(
        nn.Linear(2, 1).to(dtype),
        square,
        tune={"step_size": hx.log_scale(0.1), "init": "*"},
        fixed={"weight_decay": 0.1},
        data=x.to(dtype),
        validation=x.to(dtype),
    )
    types = lambda run: {x.dtype for x in jax.tree.leaves(run.lam)}
    for dtype in (torch.float32, torch.bfloat16):
        run = one(dtype)
        assert types(run) == {np.dtype("float32")}
        assert ht.hypergradient(run.problem, hx.Reverse(1))(run.lam).state.w["weight"].dtype == jnp.dtype(
            str(dtype).removeprefix("torch.")
        )
    with jax.enable_x64(False), pytest.warns(UserWarning, match="jax_enable_x64"):
        assert types(one(F64)) == {np.dtype("float32")}
