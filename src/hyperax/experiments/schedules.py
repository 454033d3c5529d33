"""The three schedules of `schedules-mnist`: how each is searched for, and the network that is trained with it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key

from hyperax.tuning import Training, logit_scale, piecewise_schedule, tune
from hyperax.tuning.training import training

CONSTANT, COSINE, LEARNED = "constant", "cosine", "learned"
LARGEST_STEP = 1.0
"""Keeps the search away from steps at which every run diverges."""


class Schedule:
    """One schedule: its search, its test runs."""

    def __init__(self, config: Any, name: str, data: Any, key: Key[Array, ""]):
        self.config, self.name, self.data, self.key = config, name, data, key
        self.optimizer = lambda h: _heavy_ball(*schedules(name, h, config.steps))
        self.settings = {
            "data": data["training"],
            "validation_data": data["validation"],
            "steps": config.steps,
            "batch_size": config.batch_size,
            "key": key,
            "has_metrics": True,
        }

    def grid(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The best step size and momentum, on the mini-batches that `tune` evaluates with, and a record of each."""
        train, (key, _) = self._training(), jax.random.split(self.key)
        points = [
            {"step_size": step_size, "momentum": momentum}
            for step_size, momentum in itertools.product(self.config.step_sizes, self.config.momenta)
        ]
        losses = [train(point, key=key).validation for point in points]
        finite = [loss if np.isfinite(loss) else None for loss in losses]  # JSON has no infinity
        records = [{"stage": "grid", **p, "validation": loss} for p, loss in zip(points, finite, strict=True)]
        if not any(finite):
            raise ValueError("every run of the grid diverged: give smaller step_sizes")
        best = sorted((r for r in records if r["validation"] is not None), key=lambda r: r["validation"])
        # One run a point would choose what suits its mini-batches.
        finals = []
        for record in best[: self.config.finalists]:
            h = {name: record[name] for name in ("step_size", "momentum")}
            finals.append({"stage": "finalist", **h, "validation": self._validation(train, h)})
        chosen = min(finals, key=lambda record: record["validation"])
        h = {name: chosen[name] for name in ("step_size", "momentum")}
        return {"hyperparameters": h, "validation": chosen["validation"]}, [*records, *finals]

    def _validation(self, train: Training, h: Mapping[str, Any]) -> float:
        """The mean validation loss over other initial weights and mini-batches."""
        keys = jax.random.split(jax.random.fold_in(self.key, 1), self.config.repeats)
        runs = [train(h, key=key, params=self._initial(key)).validation for key in keys]
        return float(np.mean(np.nan_to_num(runs, nan=1e30, posinf=1e30)))

    def learned(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The schedules that `tune` finds, and a record of each hyperiteration."""
        step_size, momentum = (jnp.full(self.config.knots, value, jnp.float32) for value in self.config.start)
        tuned = tune(
            _training_loss,
            _loss_and_accuracy,
            self._initial(self.key),
            self.optimizer,
            {"step_size": logit_scale(step_size, high=LARGEST_STEP), "momentum": logit_scale(momentum)},
            hyperiterations=self.config.hyperiterations,
            dispatch=1,
            **self.settings,
        )
        values = [{"stage": "hyperiteration", "step": r["step"], "value": r["value"]} for r in tuned.history]
        found = {name: np.asarray(value).tolist() for name, value in tuned.hyperparameters.items()}
        loss = self._validation(tuned.train, tuned.hyperparameters)
        end = {"hyperparameters": found, "validation": loss, "stopped": tuned.stopped}
        return {**end, "before": tuned.before, "after": tuned.after}, values

    def test(self, h: Mapping[str, Any], key: Key[Array, ""]) -> list[dict[str, Any]]:
        """Loss and accuracy on the test digits, from new weights and mini-batches each time."""
        train, records = self._training(), []
        h = {name: jnp.asarray(value, jnp.float32) for name, value in h.items()}
        for run in range(self.config.test_runs):
            weights, batches = jax.random.split(jax.random.fold_in(key, run))
            w = train(h, key=batches, params=self._initial(weights)).params
            loss, metrics = _tested(w, self.data["test"])
            records.append({"stage": "test", "run": run, "loss": float(loss), "accuracy": float(metrics["accuracy"])})
        return records

    def _training(self) -> Training:
        shape = (self.config.knots,) if self.name == LEARNED else ()
        like = dict.fromkeys(("step_size", "momentum"), jnp.zeros(shape, jnp.float32))
        w = self._initial(self.key)
        return training(_training_loss, _loss_and_accuracy, w, self.optimizer, like, **self.settings)[0]

    def _initial(self, key: Key[Array, ""]) -> dict[str, Any]:
        return _network(key, self.data["training"]["x"].shape[1], self.config.hidden)


def schedules(name: str, h: Mapping[str, Array], steps: int) -> tuple[Callable, Callable]:
    """Eta_t and mu_t as functions of t - 1 = 0, ..., T - 1."""
    if name == LEARNED:
        return piecewise_schedule(h["step_size"], steps), piecewise_schedule(h["momentum"], steps)
    constant = lambda value: piecewise_schedule(jnp.reshape(value, (1,)), steps)
    rate = constant(h["step_size"])
    if name == CONSTANT:
        return rate, constant(h["momentum"])
    factor = lambda count: (0.5 * (1 + jnp.cos(jnp.pi * count / steps))).astype(jnp.float32)
    return lambda count: rate(count) * factor(count), constant(h["momentum"])


def _heavy_ball(step_size: Callable, momentum: Callable) -> optax.GradientTransformation:
    return optax.inject_hyperparams(optax.sgd)(learning_rate=step_size, momentum=momentum)


def _network(key: Key[Array, ""], pixels: int, hidden: int) -> dict[str, Any]:
    """He's initial weights, zero biases."""
    weights = lambda key, rows, columns: jax.random.normal(key, (rows, columns), jnp.float32) * (2 / rows) ** 0.5
    first, second = jax.random.split(key)
    zeros = lambda size: jnp.zeros(size, jnp.float32)
    return {
        "hidden": {"weight": weights(first, pixels, hidden), "bias": zeros(hidden)},
        "output": {"weight": weights(second, hidden, 10), "bias": zeros(10)},
    }


def _loss_and_accuracy(w: Any, d: Any) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Mean cross-entropy, and the share of digits that are right."""
    features = jax.nn.relu(d["x"] @ w["hidden"]["weight"] + w["hidden"]["bias"])
    scores = features @ w["output"]["weight"] + w["output"]["bias"]
    loss = optax.softmax_cross_entropy_with_integer_labels(scores, d["y"]).mean()
    return loss, {"accuracy": jnp.mean(jnp.argmax(scores, 1) == d["y"])}


_tested = jax.jit(_loss_and_accuracy)


def _training_loss(w: Any, d: Any, h: Any) -> Float[Array, ""]:
    return _loss_and_accuracy(w, d)[0]
