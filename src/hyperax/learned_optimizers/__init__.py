"""Learned optimizers: update rules with parameters, and how they are trained."""

from hyperax.learned_optimizers.hierarchical import HierarchicalRule
from hyperax.learned_optimizers.lstm import LSTMRule
from hyperax.learned_optimizers.meta_lstm_rule import MetaLSTMRule
from hyperax.learned_optimizers.meta_training import MetaTraining
from hyperax.learned_optimizers.perceptron import PerceptronRule
from hyperax.learned_optimizers.step_sizes import StepSizeRule
from hyperax.learned_optimizers.update_rule import Inputs, UpdateRule

__all__ = [
    "HierarchicalRule",
    "Inputs",
    "LSTMRule",
    "MetaLSTMRule",
    "MetaTraining",
    "PerceptronRule",
    "StepSizeRule",
    "UpdateRule",
]
