"""The network of `torch-mnist`, its training runs, and the search for each setting; needs PyTorch.

A setting is {"step_size": knots over the T steps, "momentum": a number, "weight_decay": a number, or one a layer}.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from torch import nn

import hyperax.torch as ht
from hyperax.experiments.torch_mnist.names import CONSTANT, COSINE, LARGEST_STEP, START
from hyperax.methods import Reverse
from hyperax.minimize import minimize
from hyperax.torch.seeds import mixed
from hyperax.tuning import log_scale, logit_scale

Setting = Mapping[str, Any]
Records = list[dict[str, Any]]
_SEARCH, _VALIDATION, _TEST = range(3)  # draw other initial weights and mini-batches


def network(seed: int, channels: int, side: int) -> nn.Sequential:
    """Two convolutions of stride 2 with batch normalisation, and a linear layer.

    Arguments:
        seed: of the initial weights.
        channels: of the first convolution.
        side: of the images, in pixels.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        convolution = lambda before, after: nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
        left = -(-side // 4)  # of the side, after two strides
        return nn.Sequential(
            OrderedDict(
                conv1=convolution(1, channels),
                norm1=nn.BatchNorm2d(channels),
                relu1=nn.ReLU(),
                conv2=convolution(channels, 2 * channels),
                norm2=nn.BatchNorm2d(2 * channels),
                relu2=nn.ReLU(),
                flatten=nn.Flatten(),
                head=nn.Linear(2 * channels * left**2, 10),
            )
        )


def cross_entropy(model: Any, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The mean over a batch of (images, labels)."""
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


class Runs:
    """The training runs of a study, each a function of a setting and a number that draws weights and mini-batches."""

    def __init__(self, config: Any, data: Mapping[str, tuple[np.ndarray, np.ndarray]]):
        self.config = config
        self.data = {name: (torch.tensor(x), torch.tensor(y, dtype=torch.long)) for name, (x, y) in data.items()}

    def search(self, name: str) -> tuple[dict[str, Any], Records]:
        """{"setting": what is found, ...}, and a record of each thing tried."""
        if name in (CONSTANT, COSINE):
            return self._grid(name)
        step_size, momentum, decay = self.config.start
        if name == START:
            return {"setting": _setting([step_size], momentum, decay)}, []
        return self._tuned()

    def validation(self, setting: Setting) -> float:
        """The mean validation loss over other initial weights and mini-batches."""
        runs = [self._train(setting, _VALIDATION, run) for run in range(self.config.repeats)]
        found = [_measured(module, self.data["validation"])["loss"] for module in runs]
        return float(np.mean(np.nan_to_num(found, nan=1e30, posinf=1e30)))

    def test(self, setting: Setting) -> Records:
        """Loss and accuracy on the test digits, from new weights and mini-batches each time."""
        return [
            {"stage": "test", "run": run, **_measured(self._train(setting, _TEST, run), self.data["test"])}
            for run in range(self.config.test_runs)
        ]

    def _grid(self, name: str) -> tuple[dict[str, Any], Records]:
        T, records, best = self.config.steps, [], None
        shape = np.ones(1) if name == CONSTANT else 0.5 * (1 + np.cos(np.pi * np.arange(T) / T))
        for step_size, decay in itertools.product(self.config.step_sizes, self.config.weight_decays):
            setting = _setting((step_size * shape).tolist(), self.config.start[1], decay)
            loss = self.validation(setting)
            records.append({"stage": "grid", "step_size": step_size, "weight_decay": decay, "validation": loss})
            if best is None or loss < best[0]:
                best = loss, setting
        assert best is not None
        return {"setting": best[1]}, records

    def _tuned(self) -> tuple[dict[str, Any], Records]:
        config, number = self.config, mixed(self.config.seed, _SEARCH)
        step_size, momentum, decay = config.start
        module = self._network(number)
        training = self._training(
            module,
            number,
            {
                "step_size": logit_scale([step_size] * config.knots, high=LARGEST_STEP),
                "momentum": logit_scale(momentum),
                "weight_decay": ht.per_layer(module, log_scale(decay)),
            },
        )
        rate = optax.cosine_decay_schedule(config.learning_rate, config.hyperiterations)
        solution = minimize(
            ht.hypergradient(training.problem, Reverse(config.steps, memory=config.memory)),
            training.lam,
            constraint=training.constraint,
            optimizer=optax.adam(rate),
            steps=config.hyperiterations,
            data=jnp.asarray(0),
            sample=lambda key, _: jax.random.randint(key, (), 0, 2**31 - 1),  # other mini-batches
            key=jax.random.key(config.seed),
            dispatch=1,
        )
        found = jax.tree.map(lambda x: np.asarray(x, float).tolist(), solution.lam)
        records = [{"stage": "hyperiteration", "step": r["step"], "value": r["value"]} for r in solution.history]
        return {"setting": found, "stopped": solution.stopped}, records

    def _train(self, setting: Setting, stage: int, run: int) -> nn.Module:
        """The trained network, in evaluation mode."""
        number = mixed(self.config.seed, stage, run)
        training = self._training(self._network(number), number, dict(setting))
        return training.trained(training.lam, steps=self.config.steps).eval()

    def _network(self, number: int) -> nn.Sequential:
        return network(number, self.config.channels, self.data["training"][0].shape[-1])

    def _training(self, module: nn.Module, number: int, tune: dict[str, Any]) -> ht.Training:
        return ht.from_module(
            module,
            cross_entropy,
            "momentum",
            tune=tune,
            data=self.data["training"],
            validation=self.data["validation"],
            batch_size=self.config.batch_size,
            steps=self.config.steps,
            buffers="state",
            seed=number,
        )


def _setting(step_size: list[float], momentum: float, decay: float) -> Setting:
    return {"step_size": step_size, "momentum": momentum, "weight_decay": decay}


def _measured(module: nn.Module, examples: tuple[torch.Tensor, torch.Tensor]) -> dict[str, float]:
    """Mean cross-entropy, and the share of digits that are right."""
    x, y = examples
    with torch.no_grad():
        logits = module(x)
    right = (logits.argmax(1) == y).double().mean()
    return {"loss": float(nn.functional.cross_entropy(logits, y)), "accuracy": float(right)}
