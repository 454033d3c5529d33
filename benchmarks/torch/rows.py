"""Ways to the gradient of f_T in lam, each a function (setting, T) -> a function that computes it once.

SGD with momentum, all T steps kept; the update is that of each library, the loss and the mini-batches are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import torch
from torch import Tensor

import hyperax as hx
import hyperax.torch as ht
from benchmarks.torch.callbacks import callback_a_step
from benchmarks.torch.problems import MOMENTUM, STEP_SIZE, Setting

Run = Callable[[], Tensor | jax.Array]


def training_of(setting: Setting) -> ht.Training:
    """The problem for hyperax: the penalty reads lam, so it is a loss of (model, batch, lam)."""
    names = [name for name, _ in setting.module.named_parameters()]
    cost = lambda model, batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1])

    def loss(model: Any, batch: tuple[Tensor, Tensor], lam: dict[str, Tensor]) -> Tensor:
        return setting.penalised(cost(model, batch), (model.tensors[name] for name in names), lam["log_decay"])

    return ht.from_module(
        setting.module,
        loss,
        "momentum",
        tune={"log_decay": setting.lam()},
        fixed={"step_size": STEP_SIZE, "momentum": MOMENTUM},
        data=setting.data,
        validation=setting.validation,
        validation_loss=cost,
        batch_size=setting.size,
    )


def ours(setting: Setting, steps: int, method: hx.Method | None = None) -> Run:
    """`Reverse` on tensors."""
    f, lam = ht.hypergradient(training_of(setting).problem, method or hx.Reverse(steps)), setting.lam()
    return lambda: f({"log_decay": lam}).grad["log_decay"]


def ours_in_jax(setting: Setting, steps: int) -> Run:
    """The same inside a compiled program, as `minimize` calls it."""
    training = training_of(setting)
    f = jax.jit(ht.hypergradient(training.problem, hx.Reverse(steps)))
    lam = jax.tree.map(lambda x: x.astype(jnp.float32), training.lam)
    return lambda: f(lam).grad["log_decay"]


def autograd(setting: Setting, steps: int) -> Run:
    """A loop by hand, `create_graph=True`."""
    batches, lam = setting.batches, setting.lam().requires_grad_()

    def run() -> Tensor:
        w = {name: x.requires_grad_() for name, x in setting.start().items()}
        v = {name: torch.zeros_like(x) for name, x in w.items()}
        for t in range(1, steps + 1):
            value = setting.inner(w, lam, batches(None, t))
            w, v = setting.updated(w, v, torch.autograd.grad(value, list(w.values()), create_graph=True))
        return torch.autograd.grad(setting.outer(w, setting.validation), lam)[0]

    return run


def functional(setting: Setting, steps: int) -> Run:
    """torch.func.grad through a loop of torch.func.grad."""
    batches, lam = setting.batches, setting.lam()

    def f(lam: Tensor) -> Tensor:
        w = setting.start()
        v = {name: torch.zeros_like(x) for name, x in w.items()}
        for t in range(1, steps + 1):
            g = torch.func.grad(lambda w, batch: setting.inner(w, lam, batch))(w, batches(None, t))
            w, v = setting.updated(w, v, g.values())
        return setting.outer(w, setting.validation)

    return lambda: torch.func.grad(f)(lam)


def of_higher(setting: Setting, steps: int) -> Run:
    """innerloop_ctx over torch.optim.SGD."""
    import higher

    batches, lam = setting.batches, setting.lam().requires_grad_()
    sgd = torch.optim.SGD(setting.module.parameters(), lr=STEP_SIZE, momentum=MOMENTUM)
    cost = lambda model, batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1])

    def run() -> Tensor:
        with higher.innerloop_ctx(setting.module, sgd) as (patched, optimizer):
            for t in range(1, steps + 1):
                optimizer.step(setting.penalised(cost(patched, batches(None, t)), patched.parameters(), lam))
            return torch.autograd.grad(cost(patched, setting.validation), lam)[0]

    return run


def of_torchopt(setting: Setting, steps: int) -> Run:
    """The functional optimizer, not in place."""
    import torchopt

    batches, lam = setting.batches, setting.lam().requires_grad_()
    sgd = torchopt.sgd(lr=STEP_SIZE, momentum=MOMENTUM, moment_requires_grad=True)

    def run() -> Tensor:
        w = {name: x.requires_grad_() for name, x in setting.start().items()}
        state = sgd.init(w)
        for t in range(1, steps + 1):
            slopes = torch.autograd.grad(setting.inner(w, lam, batches(None, t)), list(w.values()), create_graph=True)
            updates, state = sgd.update(dict(zip(w, slopes, strict=True)), state, params=w, inplace=False)
            w = torchopt.apply_updates(w, updates, inplace=False)
        return torch.autograd.grad(setting.outer(w, setting.validation), lam)[0]

    return run


def plain(setting: Setting, steps: int) -> Run:
    """The training itself by torch.optim, without any hypergradient: what a step costs."""
    batches, lam = setting.batches, setting.lam()

    def run() -> Tensor:
        w = {name: x.clone().requires_grad_() for name, x in setting.start().items()}
        sgd = torch.optim.SGD(w.values(), lr=STEP_SIZE, momentum=MOMENTUM)
        for t in range(1, steps + 1):
            sgd.zero_grad()
            setting.inner(w, lam, batches(None, t)).backward()
            sgd.step()
        return next(iter(w.values()))

    return run


PLAIN, OURS, SKETCH = "training alone", "hyperax", "a callback a step"
HYPERGRADIENTS: dict[str, Callable[[Setting, int], Run]] = {
    OURS: ours,
    "hyperax in a JAX program": ours_in_jax,
    "higher": of_higher,
    "TorchOpt": of_torchopt,
    "torch.func": functional,
    "autograd": autograd,
    SKETCH: callback_a_step,
}
