"""A step-size schedule, momentum and a weight decay for each layer of a PyTorch network, tuned on MNIST.

    min over lam of E(w_T, lam),   g_t = grad L_t(w_{t-1}) + d_layer w_{t-1},   v_t = mu v_{t-1} + g_t,
                                   w_t = w_{t-1} - eta_t v_t,   t = 1, ..., T

eta_t is piecewise linear through K knots and d has a value for each layer (tuned); or eta_t = eta (constant), or
eta_t = eta (1 + cos(pi (t - 1) / T)) / 2 (cosine), with one d for all layers. PyTorch is imported where it is used.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from hyperax.experiments.mnist import load_mnist
from hyperax.experiments.study import Opened, Part, Place, Shown, Study, plus_minus
from hyperax.experiments.torch_mnist.figures import decays_figure, schedules_figure, search_figure
from hyperax.experiments.torch_mnist.names import CONSTANT, COSINE, ENTRANTS, LARGEST_STEP, START, TUNED
from hyperax.methods.schedule import parse_bytes
from hyperax.rollout import check_steps


@dataclass(frozen=True)
class TorchMnist(Study):
    """Two convolutions with batch normalisation and a linear layer, T steps of SGD with momentum on few digits.

    The start is a textbook setting, and that from which the hypergradients begin. The constant and the cosine step size
    take the best point of a grid over step size and weight decay, by the mean over several runs. All of this is on
    validation digits. Then each trains from other initial weights on other mini-batches, for the test digits.
    """

    kind: ClassVar[str] = "torch-mnist"
    recipe: str = "torch-mnist"
    title: str = "MNIST in PyTorch: step-size schedule and weight decay of each layer, tuned"
    train_size: int = 1000
    validation_size: int = 2000
    channels: int = 8
    """Of the first convolution; the second has twice as many."""
    steps: int = 150
    """T."""
    batch_size: int = 50
    knots: int = 5
    """K, of the schedule."""
    start: tuple[float, float, float] = (0.05, 0.9, 1e-3)
    """Step size, momentum and weight decay that the tuned setting begins with."""
    step_sizes: tuple[float, ...] = (0.0125, 0.025, 0.05, 0.1, 0.2)
    weight_decays: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 3e-2, 0.1)
    """The grid of the constant and the cosine step size; its momentum is that of the start."""
    repeats: int = 3
    """Runs of each point of the grid, and for the validation loss that is shown of each setting."""
    hyperiterations: int = 80
    learning_rate: float = 0.15
    """Of Adam on the hyperparameters, at first; it goes to zero as half a cosine."""
    memory: str = "1GB"
    """What the way back through the T steps may keep."""
    test_runs: int = 20

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.type == "int" and field.name != "seed":
                check_steps(getattr(self, field.name), field.name, 1)
        if self.batch_size > self.train_size:
            raise ValueError(f"batch_size is {self.batch_size} and train_size {self.train_size}: use a smaller batch")
        if not (self.step_sizes and all(0 < step_size < LARGEST_STEP for step_size in self.step_sizes)):
            raise ValueError(f"step_sizes are {self.step_sizes}; give positive ones below {LARGEST_STEP:g}")
        if not (self.weight_decays and all(0 <= decay < float("inf") for decay in self.weight_decays)):
            raise ValueError(f"weight_decays are {self.weight_decays}; give some that are at least 0")
        if len(self.start) != 3 or not (
            0 < self.start[0] < LARGEST_STEP and 0 < self.start[1] < 1 and self.start[2] > 0
        ):
            raise ValueError(
                f"start is {self.start}; give a step size in (0, {LARGEST_STEP:g}), a momentum in (0, 1) and a "
                "positive weight decay"
            )
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate is {self.learning_rate}; it must be positive and finite")
        parse_bytes(self.memory)

    def open(self, data_dir: str | None) -> Opened:
        """Training, validation and test digits as (float32 in [0, 1], integers)."""
        try:
            import hyperax.torch  # noqa: F401
        except ImportError as error:
            raise ValueError(f"{self.recipe} trains a network of PyTorch: {error}") from None
        mnist = load_mnist(data_dir)
        needed = self.train_size + self.validation_size
        if needed > len(mnist.train.labels):
            raise ValueError(
                f"train_size + validation_size = {needed}, and MNIST has {len(mnist.train.labels)} training digits here"
            )
        order = np.random.default_rng(self.seed).permutation(len(mnist.train.labels))[:needed]
        sides = np.split(order, [self.train_size])
        of = lambda digits, index: (digits.images[index].astype(np.float32)[:, None] / 255, digits.labels[index])
        data = {"training": of(mnist.train, sides[0]), "validation": of(mnist.train, sides[1])}
        sizes = {"training": self.train_size, "validation": self.validation_size, "test": len(mnist.test.labels)}
        return Opened(data | {"test": of(mnist.test, slice(None))}, mnist.provenance | {"examples": sizes})

    def parts(self) -> Sequence[str]:
        """The four settings."""
        return ENTRANTS

    def measure(self, part: str, data: Any, earlier: Mapping[str, Part], place: Place) -> Part:
        """The search for one setting, and its test runs."""
        from hyperax.experiments.torch_mnist.training import Runs

        runs, begin = Runs(self, data), time.perf_counter()
        found, records = runs.search(part)
        seconds = time.perf_counter() - begin
        end = {"stage": "end", "seconds": round(seconds, 2), **found, "validation": runs.validation(found["setting"])}
        place.say(f"  validation loss {end['validation']:.4f}")
        return Part([*records, end, *runs.test(found["setting"])])

    def summarise(self, measured: Mapping[str, Part]) -> dict[str, Any]:
        """Losses and accuracies of the four settings, and paired differences between them."""
        of = lambda part, what: [r[what] for r in part.records if r["stage"] == "test"]
        tested = {name: {what: of(part, what) for what in ("loss", "accuracy")} for name, part in measured.items()}
        ends = {name: end_of(part) for name, part in measured.items()}
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
        before = plus_minus(tested[START]["accuracy"], 2, scale=100)
        summary = {
            "headline": {
                "number": plus_minus(tested[TUNED]["accuracy"], 2, scale=100),
                "text": f"is the test accuracy in % after {self.steps} steps on {self.train_size} digits with the "
                f"tuned schedule and weight decays; with those of the start {before}.",
            },
            "table": {
                "columns": ["setting", "validation loss", "test loss", "test accuracy (%)", "search (s)"],
                "rows": rows,
            },
            "notes": [*(self._difference(tested, name) for name in ENTRANTS if name != TUNED), *self._notes(ends)],
            "settings": {name: end["setting"] for name, end in ends.items()},
        }
        if "diverged" in ends[TUNED]["stopped"]:
            summary = {"stopped": f"the search {ends[TUNED]['stopped']}"} | summary
        return summary

    def _difference(self, tested: Mapping[str, Mapping[str, list[float]]], name: str) -> str:
        of = lambda what: np.subtract(tested[TUNED][what], tested[name][what]).tolist()
        return (
            f"Tuned minus {name}, run by run: {plus_minus(of('loss'), 4)} in test loss, "
            f"{plus_minus(of('accuracy'), 2, scale=100)} points of test accuracy."
        )

    def _notes(self, ends: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """What was done, in sentences."""
        constant, cosine, tuned = (ends[name]["setting"] for name in (CONSTANT, COSINE, TUNED))
        decays = ", ".join(f"{name} {value:.2g}" for name, value in tuned["weight_decay"].items())
        points = len(self.step_sizes) * len(self.weight_decays)
        return [
            f"Intervals of 95 % over {self.test_runs} pairs of initial weights and mini-batches, the same for every "
            f"setting and none of them seen in a search; validation losses are means over {self.repeats} others, by "
            "which the points of the grids are chosen.",
            f"The grids have {points} points, {self.repeats} training runs each; chosen: constant step size "
            f"{constant['step_size'][0]:g} with weight decay {constant['weight_decay']:g}, cosine from "
            f"{cosine['step_size'][0]:g} with {cosine['weight_decay']:g}; momentum {self.start[1]:g}.",
            f"Tuned: {self.hyperiterations} hyperiterations of new mini-batches from one initial network, of f_T after "
            f"{self.steps} steps, batch statistics included, within {self.memory}. Found: momentum "
            f"{tuned['momentum']:.3g}; weight decay {decays}. {ends[TUNED]['stopped']}.",
        ]

    def figures(self, measured: Mapping[str, Part], summary: Mapping[str, Any]) -> list[Shown]:
        """The step sizes, the weight decays, and f_T as they were found."""
        ends = {name: end_of(part) for name, part in measured.items()}
        settings = {name: end["setting"] for name, end in ends.items()}
        values = [r["value"] for r in measured[TUNED].records if r["stage"] == "hyperiteration"]
        levels = {name: end["validation"] for name, end in ends.items()}
        return [schedules_figure(settings, self.steps), decays_figure(settings), search_figure(values, levels)]


def end_of(part: Part) -> Mapping[str, Any]:
    """The record of what a search found."""
    return next(record for record in part.records if record["stage"] == "end")
