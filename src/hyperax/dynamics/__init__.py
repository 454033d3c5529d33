"""Dynamics: how the inner problem is solved."""

from hyperax.dynamics.adam import Adam
from hyperax.dynamics.dynamics import Dynamics, Setting, State
from hyperax.dynamics.gradient_descent import GradientDescent
from hyperax.dynamics.heavy_ball import HeavyBall
from hyperax.dynamics.learned_optimizer import LearnedOptimizer
from hyperax.dynamics.newton import Newton
from hyperax.dynamics.optax_dynamics import Optax

__all__ = [
    "Adam",
    "Dynamics",
    "GradientDescent",
    "HeavyBall",
    "LearnedOptimizer",
    "Newton",
    "Optax",
    "Setting",
    "State",
]
