"""What `tune` refuses, said before anything is compiled or trained."""

from __future__ import annotations

import re
import warnings

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from hyperax.checks import UnusedLeafWarning, variables_of
from hyperax.methods.evolution_strategy import EvolutionStrategy
from hyperax.methods.hypergradient import HypergradientFunction, hypergradient
from hyperax.methods.method import Method
from hyperax.methods.real_time import RealTime
from hyperax.methods.reverse import Reverse
from hyperax.methods.truncated import Truncated
from hyperax.problem import Lam, W
from hyperax.tuning.hyperparameters import values_of
from hyperax.tuning.training import Training


def method_and_steps(steps: int | None, method: Method | None) -> tuple[Method, int]:
    """The method, and T."""
    if (steps is None) == (method is None):
        raise ValueError("give steps (T, by Reverse with checkpoints) or a method with its steps, such as Forward(T)")
    if method is None:
        assert steps is not None
        method = Reverse(steps, segment="sqrt")
    name = type(method).__name__
    if not isinstance(method, Method) or not method.needs_dynamics or method.differentiates == "f":
        raise ValueError(
            f"{name} follows no training run of T steps, so it sees neither step sizes nor schedules: use Reverse, "
            "Forward, RealTime or Truncated (or hx.minimize, for a problem solved to its minimum)"
        )
    steps = getattr(method, "steps", None)
    if not steps:
        raise ValueError(f"{name} has steps={steps!r}; tune needs the length of the training run, at least 1")
    return method, steps


def initial_values(hyperparameters: PyTree) -> Lam:
    """The values of the hyperparameters as arrays."""
    try:
        return variables_of(values_of(hyperparameters))
    except ValueError as error:
        raise _in_our_words(error) from None


def _in_our_words(error: Exception | Warning) -> ValueError:
    return ValueError(re.sub(r"\blam\b", "hyperparameters", str(error)))


def check_learnable(function: HypergradientFunction, h: Lam, model: Training) -> None:
    """Raise `ValueError` for what cannot be learned; reads traces, but for one update of the optimizer."""
    data, method, dynamics = model.data, function.method, model.dynamics
    checked = [function]
    if isinstance(method, RealTime):
        # Numbers that optax.inject_hyperparams keeps in its state stay those of the first step, however h moves.
        checked.append(hypergradient(model.problem, dynamics, Truncated(2, 1)))
    for number, candidate in enumerate(checked):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", UnusedLeafWarning)
                candidate.check(h, data)
        except UnusedLeafWarning as unused:
            advice = ""
            if number:
                advice = " (a run that goes on sees h in the losses and in `update` alone, not in the optimizer's init)"
            raise ValueError(f"{_in_our_words(unused)}{advice}") from None
    if not isinstance(method, EvolutionStrategy):
        _check_derivative(dynamics.transformation(h), model.problem.start(h, data))  # pyright: ignore


def _check_derivative(transformation: optax.GradientTransformation, w: W) -> None:
    """Raise unless an update has a derivative at a gradient with a zero entry, as a dead unit gives."""
    ones = jax.tree.map(jnp.ones_like, w)
    first, structure = jax.tree.flatten(ones)
    first[0] = first[0].at[(0,) * first[0].ndim].set(0.0)
    update = lambda gradient: transformation.update(gradient, transformation.init(w), w)[0]
    _, change = jax.jvp(update, (jax.tree.unflatten(structure, first),), (ones,))
    if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(change)):
        raise ValueError(
            "the optimizer has no derivative where an entry of the gradient is zero (a dead unit, an input that is "
            "always zero), and the hypergradient is NaN there; for Adam and its relatives give eps_root, for instance "
            "optax.adam(h['step_size'], eps_root=1e-8)"
        )
