"""Hyperparameters of a training loop written with Optax, learned by hypergradient."""

from hyperax.tuning.hyperparameters import Hyperparameter, log_scale, logit_scale, piecewise_schedule
from hyperax.tuning.training import Trained, Training
from hyperax.tuning.tune import Tuned, tune

__all__ = [
    "Hyperparameter",
    "Trained",
    "Training",
    "Tuned",
    "log_scale",
    "logit_scale",
    "piecewise_schedule",
    "tune",
]
