"""hyperax: bilevel programming in JAX; hyperparameter optimization and meta-learning as one problem.

    minimise  f_T(lam) = E(w_T(lam), lam)      w_0 = Phi_0(lam),   w_t = Phi_t(w_{t-1}, lam),  t = 1, ..., T

Problem, dynamics and method make a hypergradient; `mean_over_tasks` averages it; `minimize` follows it.
"""

from hyperax.batches import minibatch
from hyperax.checkpoint import Checkpoint
from hyperax.checks import UnusedLeafWarning
from hyperax.constraints import Box, Constraint, Positive, Projected, UnitInterval
from hyperax.diagnostics import Diagnosis, diagnose
from hyperax.dynamics import Dynamics, GradientDescent, HeavyBall, Optax, State
from hyperax.methods import FirstOrder, Forward, Method, Reverse, Truncated, hypergradient
from hyperax.minimize import Solution, minimize
from hyperax.problem import Hypergradient, Problem
from hyperax.rollout import rollout
from hyperax.stopping import DivergenceWarning, GradientTolerance, Plateau, Progress, Validation
from hyperax.tasks import TASKS, mean_over_tasks

__version__ = "0.1.0"

__all__ = [
    "TASKS",
    "Box",
    "Checkpoint",
    "Constraint",
    "Diagnosis",
    "DivergenceWarning",
    "Dynamics",
    "FirstOrder",
    "Forward",
    "GradientDescent",
    "GradientTolerance",
    "HeavyBall",
    "Hypergradient",
    "Method",
    "Optax",
    "Plateau",
    "Positive",
    "Problem",
    "Progress",
    "Projected",
    "Reverse",
    "Solution",
    "State",
    "Truncated",
    "UnitInterval",
    "UnusedLeafWarning",
    "Validation",
    "diagnose",
    "hypergradient",
    "mean_over_tasks",
    "minibatch",
    "minimize",
    "rollout",
]
