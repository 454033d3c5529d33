"""What a loss receives behaves like the module, with the tensors of now."""

import copy

import jax
import pytest

import hyperax as hx
from torch_network import F64, ht, nn, torch
from torch_problems import close


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)

    def forward(self, x):
        return torch.tanh(self.norm(self.linear(x)))

    def twice(self, x):
        return self.linear(self.linear(x))


class Net(nn.Module):
    """Blocks in a list, a tied layer, a method, properties."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.tail = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 1))
        self.tail[0].weight = self.blocks[0].linear.weight
        self.by_name = {"first": self.blocks[0], "all": (self.blocks[0], self.blocks[1])}
        self.bend = self.bent  # a bound method: of a lambda, a copy of the module would keep the module it was made in

    def bent(self, x):
        return torch.tanh(self.tail[0](x))

    def features(self, x):
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, x):
        return self.tail(self.features(x))

    @property
    def size(self):
        return self.tail[2].weight.square().sum()

    @property
    def last(self):
        return self.tail[-1]


def made():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Net().double()


X = torch.linspace(-1, 1, 18, dtype=F64).reshape(6, 3).sin()
WAYS = {
    "plain": lambda model, x: model(x),
    "method": lambda model, x: model.tail(model.features(x)),
    "submodules": lambda model, x: model.tail(model.blocks[1](model.blocks[0](x))),
    "iteration": lambda model, x: model.tail[2](model.tail[1](model.tail[0](through(list(model.blocks), x)))),
    "a slice": lambda model, x: model.last(model.tail[:2](through(model.blocks.children(), x))),
    "containers": lambda model, x: model.tail[2](model.bend(through(model.by_name["all"], x))),
    "names": lambda model, x: dict(model.named_modules())["tail"](model.get_submodule("blocks.1")(model.blocks[0](x))),
    "of a block": lambda model, x: model.tail(model.blocks[1].forward(model.by_name["first"](x))),
}


def through(blocks, x):
    for block in blocks:
        x = block(x)
    return x


def run_of(way, **options):
    loss = lambda model, x: (way(model, x) - x.sum(1, keepdim=True)).pow(2).mean()
    tune = {"step_size": 0.1, "init": "blocks.0.*"}
    return ht.from_module(made(), loss, tune=tune, data=X, validation=X[:3], buffers="state", **options)


@pytest.mark.parametrize("way", list(WAYS)[1:])
def test_every_way_through_the_module(way):
    """f_T, its gradient in initial weights, and running statistics of layers inside."""
    expected, found = (run_of(WAYS[name]) for name in ("plain", way))
    h, by_parts = (ht.hypergradient(run.problem, hx.Reverse(2))(run.lam) for run in (expected, found))
    close(by_parts, float(h.value), jax.tree.leaves(h.grad), 1e-12)
    for a, b in zip(jax.tree.leaves(by_parts.state), jax.tree.leaves(h.state), strict=True):
        assert abs(a - b).max() < 1e-12
    assert int(by_parts.state.auxiliary["buffers"]["blocks.1.norm.num_batches_tracked"]) == 2


def test_parts_in_forward_mode():
    tune = {"tune": {"step_size": 0.1}, "fixed": {"weight_decay": 0.01}}
    options = {"data": X, "validation": X[:3], "buffers": "state"} | tune
    loss = lambda model, x: (
        model.tail(model.features(x)).square().mean() + sum(p.square().sum() for p in penalty(model))
    )
    penalty = lambda model: [p for layer in model.modules() if isinstance(layer, nn.Linear) for p in layer.parameters()]
    problem = ht.from_module(made(), loss, **options).problem
    lam = {"step_size": torch.tensor([0.1, 0.2], dtype=F64).sum()}
    h = ht.hypergradient(problem, hx.Reverse(3))(lam)
    for chunk in (None, 1):
        close(ht.hypergradient(problem, hx.Forward(3, chunk=chunk))(lam), float(h.value), jax.tree.leaves(h.grad))


def test_tensors_are_those_of_now():
    module = made()
    tensors = {name: (2 * p.detach()).requires_grad_() for name, p in module.named_parameters()}
    model = ht.Model(module, tensors | {"blocks.0.norm.running_mean": torch.ones(3, dtype=F64)})
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in module.named_parameters()]
    assert all(p is tensors[name] for name, p in model.named_parameters())
    assert next(model.parameters()) is tensors["blocks.0.linear.weight"]
    assert len(list(model.blocks.parameters())) == 8
    assert model.tail[0].weight is tensors["blocks.0.linear.weight"], "tied"
    assert model.size.grad_fn is not None
    assert torch.equal(model.size, 4 * module.size)
    state = model.state_dict()
    assert list(state) == list(module.state_dict())
    assert state["tail.0.weight"] is tensors["blocks.0.linear.weight"]
    assert list(model.tail[2].state_dict(prefix="tail.2.")) == ["tail.2.weight", "tail.2.bias"]
    assert dict(model.named_buffers())["blocks.0.norm.running_mean"].sum() == 3
    assert len(list(model.buffers())) == 6
    assert torch.equal(model.blocks[0].twice(X), ht.Model(module, tensors).blocks[0].twice(X))
    assert model.training
    assert len(model.tail) == 3
    assert isinstance(model, Net)
    assert isinstance(model.tail[0], nn.Linear)
    assert "w" in ht.Model(nn.ParameterDict({"w": torch.ones(2)}), {"w": torch.zeros(2)})
    assert "Net" in repr(model)
    assert "Linear" in repr(model.tail[0])
    assert all(not p.equal(2 * q) or not q.any() for p, q in zip(module.parameters(), tensors.values(), strict=True))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda model: model.to("cpu"), r"to\(\)"),
        (lambda model: model.tail.load_state_dict({}), r"load_state_dict\(\)"),
        (lambda model: model.tail.zero_grad(), r"zero_grad\(\)"),
        (lambda model: setattr(model.tail, "weight", 1), "weight of"),
        (lambda model: model.eval(), "evaluation mode in training call its eval"),
        (copy.deepcopy, "cannot be copied"),
    ],
)
def test_what_would_change_the_module_is_refused(change, name):
    with pytest.raises(ValueError, match=name):
        change(ht.Model(made(), {}))


def test_attributes_that_there_are_not():
    model = ht.Model(made(), {})
    for use in (lambda: model.head, lambda: torch.func.functional_call(model, {"tail.2.bias": torch.zeros(1)}, (X,))):
        with pytest.raises(AttributeError):
            use()
    assert not hasattr(model.tail, "features")
    assert model.train() is model


def test_a_validation_loss_may_ask_for_evaluation_mode():
    way = lambda model, x: model(x)
    run = run_of(way, validation_loss=lambda model, x: model.eval()(x).square().mean())
    plain = run_of(way, validation_loss=lambda model, x: model(x).square().mean())
    value = lambda run: float(ht.hypergradient(run.problem, hx.Reverse(1))(run.lam).value)
    assert value(run) == value(plain)


def test_a_method_of_its_own_called_like_one_that_changes():
    class Typed(nn.Linear):
        def type(self):
            return self.weight.sum()

    found = ht.Model(Typed(2, 1), {"weight": torch.ones(1, 2)}).type()
    assert found == 2


def test_modules_in_dicts_are_the_model_s_own():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = nn.ModuleDict({"a": nn.Linear(3, 1), "b": nn.Linear(3, 1)})

    x = torch.eye(3)
    ways = (
        lambda m: sum(h(x).sum() for h in m.heads.values()),
        lambda m: sum(m.heads[name](x).sum() for name in m.heads),
        lambda m: sum(h(x).sum() for _, h in m.heads.items()),
    )
    module = Heads()
    values = []
    for way in ways:
        run = ht.from_module(
            module, lambda model, batch, way=way: (way(model) - 1) ** 2, tune={"step_size": 0.01}, data=x, validation=x
        )
        values.append(float(ht.hypergradient(run.problem, hx.Reverse(2))(run.lam).grad["step_size"]))
    assert values[0] != 0
    assert values == pytest.approx([values[0]] * 3, rel=1e-5)


class Listed(nn.Module):
    """A parameter that is used through a plain list, where PyTorch cannot put another in its place."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 1)
        self.plain = [self.first.weight]

    def forward(self, x):
        return self.first(x) + self.plain[0].sum()


def test_a_loss_that_is_no_number_at_the_start():
    with pytest.raises(ValueError, match=r"not a number at the first parameters.*nn.ParameterList"):
        ht.from_module(
            Listed(),
            lambda model, batch: model(batch).square().mean(),
            tune={"step_size": 0.1},
            data=torch.eye(3),
            validation=torch.eye(3),
        )
