"""Step-size and momentum schedules learned by hypergradient, against the best constant and the best cosine, on MNIST.

    min over h of E(w_T(h)),   m_t = mu_t m_{t-1} + grad L_t(w_{t-1}),   w_t = w_{t-1} - eta_t m_t,   t = 1, ..., T

eta_t and mu_t are piecewise linear through K knots each (learned), or eta_t = eta (constant), or
eta_t = eta (1 + cos(pi (t - 1) / T)) / 2 (cosine), with mu_t = mu.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from hyperax.experiments.figures import BLUE, GREEN, RED, legend, new_figure, style
from hyperax.experiments.mnist import Digits, load_mnist
from hyperax.experiments.schedules import CONSTANT, COSINE, LARGEST_STEP, LEARNED, Schedule, schedules
from hyperax.experiments.study import Opened, Part, Place, Shown, Study, plus_minus
from hyperax.rollout import check_steps

_COLORS = {CONSTANT: BLUE, COSINE: GREEN, LEARNED: RED}


@dataclass(frozen=True)
class SchedulesMnist(Study):
    """A network of one hidden layer, T steps of heavy ball on mini-batches of MNIST.

    The constant and the cosine schedule have two hyperparameters each, and take the best point of a fine grid, of
    which the best are compared once more over several runs: more training runs than the learned schedule's
    hyperiterations are worth. That one begins at a textbook constant and is learned by `hx.tune`. All of this is on
    validation digits. Then each trains from other initial weights on other mini-batches, for the test digits.
    """

    kind: ClassVar[str] = "schedules-mnist"
    recipe: str = "schedules-mnist"
    title: str = "MNIST: learned step-size and momentum schedules"
    train_size: int = 20_000
    validation_size: int = 5_000
    hidden: int = 50
    """Units of the hidden layer."""
    steps: int = 300
    """T."""
    batch_size: int = 100
    knots: int = 6
    """K, of each of the two schedules."""
    step_sizes: tuple[float, ...] = tuple(round(0.02 * 2 ** (i / 3), 4) for i in range(17))
    momenta: tuple[float, ...] = (0.0, 0.3, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.93, 0.96, 0.98)
    """The grid of the constant and the cosine schedule."""
    finalists: int = 10
    """Points of a grid that are compared once more, by the mean over other weights and mini-batches."""
    repeats: int = 20
    """Runs of each finalist, and for the validation loss that is shown of each schedule."""
    start: tuple[float, float] = (0.1, 0.9)
    """Step size and momentum that the learned schedule begins with."""
    hyperiterations: int = 60
    test_runs: int = 20

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.type == "int" and field.name != "seed":
                check_steps(getattr(self, field.name), field.name, 1)
        if self.batch_size > self.train_size:
            raise ValueError(f"batch_size is {self.batch_size} and train_size {self.train_size}: use a smaller batch")
        largest = f"of at most {LARGEST_STEP:g}"
        if not (self.step_sizes and all(0 < step_size <= LARGEST_STEP for step_size in self.step_sizes)):
            raise ValueError(f"step_sizes are {self.step_sizes}; give positive ones {largest}")
        if not (self.momenta and all(0 <= momentum < 1 for momentum in self.momenta)):
            raise ValueError(f"momenta are {self.momenta}; give some in [0, 1)")
        if not (len(self.start) == 2 and 0 < self.start[0] < LARGEST_STEP and 0 < self.start[1] < 1):
            raise ValueError(f"start is {self.start}; give a step size {largest} and a momentum in (0, 1)")

    def open(self, data_dir: str | None) -> Opened:
        """Training, validation and test digits as float32 in [0, 1]."""
        mnist = load_mnist(data_dir)
        needed = self.train_size + self.validation_size
        if needed > len(mnist.train.labels):
            raise ValueError(
                f"train_size + validation_size = {needed}, and MNIST has {len(mnist.train.labels)} training digits here"
            )
        order = np.random.default_rng(self.seed).permutation(len(mnist.train.labels))[:needed]
        sides = np.split(order, [self.train_size])
        of = lambda digits, index: _examples(Digits(digits.images[index], digits.labels[index]))
        data = {"training": of(mnist.train, sides[0]), "validation": of(mnist.train, sides[1])}
        sizes = {"training": self.train_size, "validation": self.validation_size, "test": len(mnist.test.labels)}
        return Opened(data | {"test": _examples(mnist.test)}, mnist.provenance | {"examples": sizes})

    def parts(self) -> Sequence[str]:
        """The three schedules."""
        return CONSTANT, COSINE, LEARNED

    def measure(self, part: str, data: Any, earlier: Mapping[str, Part], place: Place) -> Part:
        """The search for one schedule, and its test runs."""
        search, test = jax.random.split(jax.random.key(self.seed))
        schedule, begin = Schedule(self, part, data, search), time.perf_counter()
        found, records = schedule.learned() if part == LEARNED else schedule.grid()
        end = {"stage": "end", "seconds": round(time.perf_counter() - begin, 2), **found}
        place.say(f"  validation loss {end['validation']:.4f}")
        return Part([*records, end, *schedule.test(end["hyperparameters"], test)])

    def summarise(self, measured: Mapping[str, Part]) -> dict[str, Any]:
        """Losses and accuracies of the three schedules, and paired differences between them."""
        tested = {
            name: {what: [r[what] for r in part.records if r["stage"] == "test"] for what in ("loss", "accuracy")}
            for name, part in measured.items()
        }
        ends = {name: _end(part) for name, part in measured.items()}
        rows = [
            [
                name,
                f"{ends[name]['validation']:.4f}",
                plus_minus(runs["loss"], 4),
                plus_minus(runs["accuracy"], 2, scale=100),
                f"{ends[name]['seconds']:.0f}",
            ]
            for name, runs in tested.items()
        ]
        notes = [self._difference(tested, name) for name in (CONSTANT, COSINE)]
        constant, cosine = (ends[name]["hyperparameters"] for name in (CONSTANT, COSINE))
        notes += [
            f"Intervals of 95 % over {self.test_runs} pairs of initial weights and mini-batches, the same for every "
            f"schedule and none of them seen in a search; validation losses are means over {self.repeats} others.",
            f"The grids have {len(self.step_sizes) * len(self.momenta)} training runs each, and {self.repeats} more of "
            f"each of the {self.finalists} best points; chosen: constant step size {constant['step_size']:g} with "
            f"momentum {constant['momentum']:g}, cosine from {cosine['step_size']:g} with {cosine['momentum']:g}. The "
            f"learned schedule had {self.hyperiterations} hyperiterations from step size {self.start[0]:g} and "
            f"momentum {self.start[1]:g}, where the validation loss is {ends[LEARNED]['before']:.4f}.",
        ]
        return {
            "headline": {
                "number": plus_minus(tested[LEARNED]["accuracy"], 2, scale=100),
                "text": f"is the test accuracy in % after {self.steps} steps with the learned schedules.",
            },
            "table": {
                "columns": ["schedule", "validation loss", "test loss", "test accuracy (%)", "search (s)"],
                "rows": rows,
            },
            "notes": notes,
            "hyperparameters": {name: end["hyperparameters"] for name, end in ends.items()},
        }

    def _difference(self, tested: Mapping[str, Mapping[str, list[float]]], name: str) -> str:
        of = lambda what: np.subtract(tested[LEARNED][what], tested[name][what]).tolist()
        return (
            f"Learned minus {name}, run by run: {plus_minus(of('loss'), 4)} in test loss, "
            f"{plus_minus(of('accuracy'), 2, scale=100)} points of test accuracy."
        )

    def figures(self, measured: Mapping[str, Part], summary: Mapping[str, Any]) -> list[Shown]:
        """The schedules, and f_T as they were found."""
        figure = new_figure(5.0)
        panels = figure.subplots(2, 1, sharex=True)
        for name in self.parts():
            for panel, values in zip(panels, self._curves(name, _end(measured[name])["hyperparameters"]), strict=True):
                panel.plot(np.arange(1, self.steps + 1), values, color=_COLORS[name], linewidth=1.8, label=name)
        style(panels[0], ylabel=r"step size $\eta_t$")
        style(panels[1], ylabel=r"momentum $\mu_t$", xlabel="training step $t$")
        legend(panels[0], "best")
        search = new_figure(3.2)
        axes = search.subplots()
        values = [r["value"] for r in measured[LEARNED].records if r["stage"] == "hyperiteration"]
        axes.plot(np.arange(1, len(values) + 1), values, color=_COLORS[LEARNED], linewidth=1.2, label="search")
        for name in self.parts():
            level = _end(measured[name])["validation"]
            axes.axhline(level, color=_COLORS[name], linewidth=1.6, linestyle=(0, (4, 3)), label=f"{name}, found")
        style(axes, ylabel="validation loss $f_T$", xlabel="hyperiteration")
        legend(axes, "best")
        words = "Step size and momentum by training step: the best constant, the best cosine, and the learned ones."
        found = (
            "Validation loss by hyperiteration of the learned schedule, each on new mini-batches; dashed: what each "
            "search found, as a mean over other initial weights and mini-batches."
        )
        return [Shown("schedules", figure, words, words), Shown("search", search, found, found)]

    def _curves(self, name: str, h: Mapping[str, Any]) -> list[np.ndarray]:
        arrays = {key: jnp.asarray(value, jnp.float32) for key, value in h.items()}
        return [np.asarray(jax.vmap(s)(jnp.arange(self.steps))) for s in schedules(name, arrays, self.steps)]


def _examples(digits: Digits) -> dict[str, Array]:
    images = digits.images.reshape(len(digits.images), -1)
    return {"x": jnp.asarray(images, jnp.float32) / 255, "y": jnp.asarray(digits.labels, jnp.int32)}


def _end(part: Part) -> Mapping[str, Any]:
    return next(record for record in part.records if record["stage"] == "end")
