"""The ground losses that are compared: one representation, one set of tasks, one number of steps for all of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import NamedTuple

import jax
import optax

from hyperax.experiments.comparison.entrants import Entrant, Sampler, Setting, Training
from hyperax.experiments.comparison.roster import file_name
from hyperax.fewshot.learners.hyper_representation import HyperRepresentation
from hyperax.fewshot.learners.learned_loss import LearnedLoss
from hyperax.fewshot.learners.learner import Learner
from hyperax.fewshot.learners.losses import NetworkLoss, ParametricCrossEntropy
from hyperax.fewshot.learners.regularisers import TowardsClassMeans

CROSS_ENTROPY, STEP_SIZE = "Cross-entropy", "Learned step size"
REGULARISER, NETWORK = "Learned regulariser", "Network loss"
MOST_STEPS = 30


class Conditions(NamedTuple):
    """What a data set asks of all entrants alike: hyperiterations of the full budget, and eta."""

    hyperiterations: int
    step_size: float


# eta on validation classes of Glyphs, 5-way 5-shot with wrong labels, T = 5, after 400 hyperiterations: cross-entropy
# had 59 % at 0.1 and 65 % at 0.4, where a learned step size went from 0.1, too. On miniImageNet nothing was tried.
CONDITIONS = {
    "glyphs": Conditions(1_000, 0.4),
    "omniglot": Conditions(4_000, 0.4),
    "miniimagenet": Conditions(20_000, 0.04),
}


def ground_losses(eta: float) -> dict[str, Callable[[int], Learner]]:
    """Name -> ways -> learner. The second is a control: what a loss gains by its scale, a step size gains too."""
    parametric = lambda key: ParametricCrossEntropy()
    corrected = lambda key: NetworkLoss(key, base=ParametricCrossEntropy())
    learned = lambda **parts: lambda ways: LearnedLoss(ways, step_size=eta, **parts)
    return {
        CROSS_ENTROPY: lambda ways: HyperRepresentation(ways, step_size=eta),
        STEP_SIZE: lambda ways: HyperRepresentation(ways, step_size=eta, learn_step_size=True),
        "Parametric loss": learned(loss=parametric),
        REGULARISER: learned(regulariser=TowardsClassMeans),
        NETWORK: learned(loss=NetworkLoss),
        "All together": learned(loss=corrected, regulariser=TowardsClassMeans, learn_step_size=True),
    }


def faster(schedule: optax.Schedule) -> optax.GradientTransformation:
    """Adam, with ten times the rate for all but the network: numbers that start at nothing and have far to go."""
    rates: dict[Hashable, optax.GradientTransformation] = {
        "network": optax.adam(schedule),
        "beside": optax.adam(lambda step: 10 * schedule(step)),
    }
    label = lambda name, part: jax.tree.map(lambda leaf: name if name in rates else "beside", part)
    return optax.multi_transform(rates, lambda lam: {name: label(name, part) for name, part in lam.items()})


def rows(
    conditions: Conditions, sampler: Callable[[Setting], Sampler], steps: int, filters: int
) -> tuple[Entrant, ...]:
    """A row for each ground loss at the same T, and cross-entropy once more with a T of its own in the test."""
    found = []
    for name, learner in ground_losses(conditions.step_size).items():
        training = Training(
            file_name(name),
            learner,
            sampler,
            conditions.hyperiterations,
            steps=steps,
            optimizer=faster,
            filters=filters,
        )
        found.append(Entrant(name, training, most_steps=None))
        if name == CROSS_ENTROPY:
            note = f"trained with the T of all rows, tested with the best T up to {MOST_STEPS} on validation classes."
            found.append(Entrant(f"{name}, best T", training, most_steps=MOST_STEPS, note=note))
    return tuple(found)
