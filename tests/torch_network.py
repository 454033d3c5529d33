"""A network with convolution, normalisation and attention, and its training by `from_module`."""

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed: the extra hyperax[torch]")

import hyperax.torch as ht  # noqa: E402
from hyperax.torch.crossing import to_torch  # noqa: E402, F401

torch.set_num_threads(1)
nn, functional = torch.nn, torch.nn.functional
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
