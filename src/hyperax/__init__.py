"""hyperax: bilevel programming in JAX; hyperparameter optimization and meta-learning as one problem.

    minimise  f_T(lam) = E(w_T(lam), lam)      w_0 = Phi_0(lam),   w_t = Phi_t(w_{t-1}, lam),  t = 1, ..., T

Problem, dynamics and method make a hypergradient; `mean_over_tasks` averages it; `minimize` follows it.
"""

from hyperax.batches import minibatch
from hyperax.certificate import Certificate, certify
from hyperax.checkpoint import Checkpoint
from hyperax.checks import UnusedLeafWarning
from hyperax.constraints import Box, Constraint, Logarithmic, Positive, Projected, UnitInterval
from hyperax.cross_validation import Fold, folds
from hyperax.domains import mean_over_domains
from hyperax.dynamics import Adam, Dynamics, GradientDescent, HeavyBall, LearnedOptimizer, Newton, Optax, State
from hyperax.explosion import ExplodingHypergradientWarning, GradientExplosion
from hyperax.learned_optimizers import MetaTraining
from hyperax.linear_solvers import ConjugateGradient, FixedPoint, Neumann, Nystrom
from hyperax.methods import (
    ClosedForm,
    Doubling,
    EvolutionStrategy,
    ExponentialTolerance,
    FiniteDifference,
    FirstOrder,
    Forward,
    Implicit,
    Method,
    PolynomialTolerance,
    RealTime,
    Reverse,
    Reversible,
    Truncated,
    hypergradient,
)
from hyperax.minimize import Solution, minimize
from hyperax.mixed_search import MixedSolution, TrialFailedWarning, mixed_search
from hyperax.problem import Hypergradient, Problem, Shared
from hyperax.rollout import rollout
from hyperax.simplex import CappedSimplex, Simplex
from hyperax.stopping import DivergenceWarning, GradientTolerance, Plateau, Progress, Validation
from hyperax.tasks import TASKS, mean_over_tasks, sample_tasks
from hyperax.tuning import (
    Hyperparameter,
    Trained,
    Training,
    Tuned,
    log_scale,
    logit_scale,
    piecewise_schedule,
    tune,
)

__version__ = "0.1.0"

__all__ = [
    "TASKS",
    "Adam",
    "Box",
    "CappedSimplex",
    "Certificate",
    "Checkpoint",
    "ClosedForm",
    "ConjugateGradient",
    "Constraint",
    "DivergenceWarning",
    "Doubling",
    "Dynamics",
    "EvolutionStrategy",
    "ExplodingHypergradientWarning",
    "ExponentialTolerance",
    "FiniteDifference",
    "FirstOrder",
    "FixedPoint",
    "Fold",
    "Forward",
    "GradientDescent",
    "GradientExplosion",
    "GradientTolerance",
    "HeavyBall",
    "Hypergradient",
    "Hyperparameter",
    "Implicit",
    "LearnedOptimizer",
    "Logarithmic",
    "MetaTraining",
    "Method",
    "MixedSolution",
    "Neumann",
    "Newton",
    "Nystrom",
    "Optax",
    "Plateau",
    "PolynomialTolerance",
    "Positive",
    "Problem",
    "Progress",
    "Projected",
    "RealTime",
    "Reverse",
    "Reversible",
    "Shared",
    "Simplex",
    "Solution",
    "State",
    "Trained",
    "Training",
    "TrialFailedWarning",
    "Truncated",
    "Tuned",
    "UnitInterval",
    "UnusedLeafWarning",
    "Validation",
    "certify",
    "folds",
    "hypergradient",
    "log_scale",
    "logit_scale",
    "mean_over_domains",
    "mean_over_tasks",
    "minibatch",
    "minimize",
    "mixed_search",
    "piecewise_schedule",
    "rollout",
    "sample_tasks",
    "tune",
]
