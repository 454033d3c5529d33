"""hyperax: bilevel programming in JAX; hyperparameter optimization and meta-learning as one problem."""

from hyperax.checks import UnusedLeafWarning
from hyperax.dynamics import Dynamics, GradientDescent, HeavyBall, Optax, State
from hyperax.methods import FirstOrder, Forward, Method, Reverse, Truncated, hypergradient
from hyperax.problem import Hypergradient, Problem
from hyperax.rollout import rollout
from hyperax.tasks import TASKS, mean_over_tasks

__version__ = "0.1.0"

__all__ = [
    "TASKS",
    "Dynamics",
    "FirstOrder",
    "Forward",
    "GradientDescent",
    "HeavyBall",
    "Hypergradient",
    "Method",
    "Optax",
    "Problem",
    "Reverse",
    "State",
    "Truncated",
    "UnusedLeafWarning",
    "hypergradient",
    "mean_over_tasks",
    "rollout",
]
