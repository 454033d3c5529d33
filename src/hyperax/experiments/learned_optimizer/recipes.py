"""The two recipes: random quadratics, and digits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from hyperax.experiments.learned_optimizer.measuring import STEP_SIZES, Setting
from hyperax.experiments.learned_optimizer.problems import (
    DataName,
    Family,
    Sides,
    classification,
    in_blocks,
    load_sides,
    quadratics,
)
from hyperax.experiments.learned_optimizer.study import LearnedOptimizerStudy
from hyperax.experiments.study import Opened
from hyperax.rollout import check_steps


@dataclass(frozen=True)
class LearnedOptimizerQuadratics(LearnedOptimizerStudy):
    """Random quadratics |A w - b|^2 of ten dimensions, and of others that the rules have not seen.

    Reference: Andrychowicz et al. 2016, Sec. 3.1 and Figure 4.

    >>> LearnedOptimizerQuadratics(transfer_dimensions=()).parts()
    ['tune-quadratics-10', 'train-lstm', 'test-quadratics-10']
    """

    kind: ClassVar[str] = "learned-optimizer-quadratics"
    recipe: str = "learned-optimizer-quadratics"
    title: str = "Learned optimizers on random quadratics"
    # The curvature of these problems is up to 80, and one step too long is amplified by those that follow: with exact
    # derivatives (and lstm_p = 10) hypergradients of norm 2500 came between others of norm 7.
    first_order: bool = True
    hyperiterations: int = 5000
    momenta: tuple[float, ...] = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
    lstm_p: float = 2.0
    """Gradients here are large, and their logarithms over 10 nearly all alike; of 1 and 2, the latter had the lower
    loss on problems of the training distribution after 900 hyperiterations."""
    dimensions: int = 10
    """n, of the meta-training."""
    transfer_dimensions: tuple[int, ...] = (20,)
    """n of the other settings."""
    start: float = 0.01
    """Standard deviation of w_0; 0 begins at the origin."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for n in (self.dimensions, *self.transfer_dimensions):
            check_steps(n, "dimensions", 1)
        if not 0 <= self.start < float("inf"):
            raise ValueError(f"start is {self.start}; it is a standard deviation, so use 0 or a positive number")
        if len(set(self.setting_names())) < 1 + len(self.transfer_dimensions):
            raise ValueError(
                f"dimensions is {self.dimensions} and transfer_dimensions {self.transfer_dimensions}; they must differ"
            )

    def open(self, data_dir: str | None) -> Opened:
        """No files."""
        return Opened(None, {"problems": "random quadratics, drawn from the seed"})

    def setting_names(self) -> Sequence[str]:
        """By their dimensions."""
        return [f"quadratics-{n}" for n in (self.dimensions, *self.transfer_dimensions)]

    def setting(self, name: str, data: Any) -> Setting:
        """New quadratics of the same distribution."""
        family = quadratics(int(name.removeprefix("quadratics-")), self.start)
        return Setting(name, family, family, long=True)

    def learning(self, data: Any) -> Family:
        """As in the first setting."""
        return quadratics(self.dimensions, self.start)

    def held_out(self, name: str) -> str:
        """The draws are new."""
        return f"new draws of A, b and w_0 with n = {name.removeprefix('quadratics-')}"


@dataclass(frozen=True)
class LearnedOptimizerMnist(LearnedOptimizerStudy):
    """Softmax regression on mini-batches of MNIST, or a network of one hidden layer; tested on other images too.

    A problem is a random start, an order of mini-batches, and the images that its loss is measured on. Meta-training
    and the step sizes of the baselines see the training images, test problems are made of the test images alone.
    Reference: Andrychowicz et al. 2016, Sec. 3.2 (`model` "network": 20 sigmoid units).

    >>> LearnedOptimizerMnist(data="digits").setting_names()
    ['softmax-digits', 'network-20-digits']
    """

    kind: ClassVar[str] = "learned-optimizer-mnist"
    recipe: str = "learned-optimizer-mnist"
    title: str = "Learned optimizers on MNIST"
    data: DataName = "mnist"
    """Or the digits of scikit-learn, which need no files."""
    model: Literal["softmax", "network"] = "softmax"
    hidden: int = 20
    """Units of the network."""
    batch_size: int = 128
    outer_images: int = 512
    """Images in E of a problem in meta-training."""
    measured_images: int = 500
    """Images that the loss of a problem is a mean over in tuning, validation and test."""
    block: int = 4
    """In meta-training the pixels of each square of so many times so many share their weights; 1: each has its own."""
    # Whole runs with exact derivatives: on the training images rules that were trained on windows of 20 steps, or with
    # the gradients of L as constants, came to the best Adam and not below. Most of the time is the LSTM's.
    window: int = 100
    hyperiterations: int = 400
    tasks: int = 8
    lstm_layers: int = 1
    lstm_p: float = 5.0
    lstm_output_scale: float = 0.03
    validation_problems: int = 8
    grid_each_side: int = 2
    validations: int = 8
    test_problems: int = 20
    transfer_hidden: tuple[int, ...] = (20,)
    """Units of networks on the same images that the rules are tested on as well."""
    transfer_data: tuple[DataName, ...] = ("digits",)
    """Other images that they are tested on as well, with the same model."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("hidden", "batch_size", "outer_images", "measured_images", "block"):
            check_steps(getattr(self, name), name, 1)
        for hidden in self.transfer_hidden:
            check_steps(hidden, "transfer_hidden", 1)
        if self.model not in ("softmax", "network"):
            raise ValueError(f"model is {self.model!r}; use 'softmax' or 'network'")
        for name in (self.data, *self.transfer_data):
            if name not in ("mnist", "digits"):
                raise ValueError(f"data is {name!r}; use 'mnist', or 'digits', which need no files")
        in_blocks(_PIXELS[self.data], self.block)
        if self.block > 1 and STEP_SIZES in self.rules:
            raise ValueError(f"{STEP_SIZES} belong to the coordinates that they are learned for: use block=1")

    def open(self, data_dir: str | None) -> Opened:
        """The images of all settings, on the device."""
        sides: dict[DataName, Sides] = {}
        for name in map(_images_of, self.setting_names()):
            if name not in sides:
                sides[name] = load_sides(name, data_dir)
        fewest = min(len(side.labels) for found in sides.values() for side in found[:2])
        for name in ("measured_images", "outer_images"):
            if getattr(self, name) > fewest:
                raise ValueError(f"{name} is {getattr(self, name)}; one side has {fewest} images: use at most so many")
        return Opened(sides, {name: found.provenance for name, found in sides.items()})

    def setting_names(self) -> Sequence[str]:
        """Model and images."""
        model = "softmax" if self.model == "softmax" else f"network-{self.hidden}"
        others = [f"network-{hidden}-{self.data}" for hidden in self.transfer_hidden]
        names = [f"{model}-{self.data}", *others, *(f"{model}-{data}" for data in self.transfer_data)]
        return list(dict.fromkeys(names))

    def setting(self, name: str, data: dict[DataName, Sides]) -> Setting:
        """Problems of training images for tuning, of test images for the test; ten times the horizon in the first."""
        sides = data[_images_of(name)]
        family = lambda images: classification(images, _hidden(name), self.batch_size, self.measured_images)
        return Setting(name, family(sides.training), family(sides.test), long=name == self.setting_names()[0])

    def learning(self, data: dict[DataName, Sides]) -> Family:
        """Problems of training images, measured on few of them, whose pixels share weights in blocks."""
        name = self.setting_names()[0]
        images = data[_images_of(name)].training
        return classification(images, _hidden(name), self.batch_size, self.outer_images, self.block)

    def held_out(self, name: str) -> str:
        """All images and starts."""
        images = "the test set of MNIST" if name.endswith("mnist") else "every other one of the digits of scikit-learn"
        return (
            f"{images}, for the mini-batches of {self.batch_size} and for the {self.measured_images} images that the "
            "loss of a problem is measured on; other random starts"
        )

    def _protocol(self) -> list[str]:
        if self.block == 1:
            return super()._protocol()
        return [
            *super()._protocol(),
            f"In meta-training each {self.block} x {self.block} pixels share their weights, which makes a problem "
            f"{self.block**2} times smaller; validation and test problems have a weight for every pixel.",
        ]


_PIXELS: dict[DataName, int] = {"mnist": 784, "digits": 64}


def _hidden(name: str) -> int:
    """Hidden units of the model in a setting's name."""
    parts = name.split("-")
    return 0 if parts[0] == "softmax" else int(parts[1])


def _images_of(name: str) -> DataName:
    """The data set in a setting's name."""
    return "mnist" if name.endswith("-mnist") else "digits"
