"""What is compared: settings, how a learner is trained, and the rows of a table that come of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import jax
import optax
from jaxtyping import Array, Key

from hyperax.experiments.config import Published
from hyperax.fewshot.episodes import Episodes
from hyperax.fewshot.image_classes import ImageClasses
from hyperax.fewshot.learners.learner import Learner
from hyperax.methods import Method
from hyperax.methods.hypergradient import HypergradientFunction

DatasetName = Literal["omniglot", "miniimagenet", "glyphs"]


class Setting(NamedTuple):
    """N classes and K support images a class.

    >>> Setting(5, 1).name, Setting.named("20way-5shot")
    ('5way-1shot', Setting(ways=20, shots=5))
    """

    ways: int
    shots: int

    @property
    def name(self) -> str:
        """As in the names of recipes."""
        return f"{self.ways}way-{self.shots}shot"

    @property
    def words(self) -> str:
        """As people write it."""
        return f"{self.ways}-way {self.shots}-shot"

    @classmethod
    def named(cls, name: str) -> Setting:
        """The setting of this name; `ValueError` for what is none."""
        ways, separator, shots = name.removesuffix("shot").partition("way-")
        if not (separator and name.endswith("shot") and ways.isdigit() and shots.isdigit()):
            raise ValueError(f"{name!r} is no setting: write 5way-1shot, for 5 classes and 1 support image a class")
        return cls(int(ways), int(shots))


class Sampler(Protocol):
    """Draws what one task of a hyperiteration sees."""

    def check(self, classes: ImageClasses, where: str = ...) -> None:
        """Raise `ValueError` if these classes cannot give it."""
        ...

    def sample(self, key: Key[Array, ""], classes: ImageClasses) -> Any:
        """One task."""
        ...


def sample_many(sampler: Sampler, key: Key[Array, ""], classes: ImageClasses, count: int) -> Any:
    """`count` tasks on a leading axis."""
    return jax.vmap(lambda k: sampler.sample(k, classes))(jax.random.split(key, count))


def by(method: Callable[[Any, int], Method]) -> Callable[[Any, int], HypergradientFunction]:
    """The hypergradient of a learner by this method."""
    return lambda learner, steps: learner.hypergradient(method(learner, steps))


@dataclass(frozen=True)
class Training:
    """How a learner is trained.

    Fields:
        name: a file name.
        learner: classes of a task -> the learner, in training.
        sampler: setting -> what its tasks are drawn by.
        hyperiterations: of the full budget.
        steps: T in training.
        hypergradient: (learner, T) -> that of one task.
        tasks: of a hyperiteration.
        learning_rate: of the outer optimizer at the beginning; it falls to 0 along a cosine.
        optimizer: from that schedule to the outer optimizer.
        network, filters: which one, and its number of filters if not the usual.
        patience: validations without improvement after which training stops.
    """

    name: str
    learner: Callable[[int], Any]
    sampler: Callable[[Setting], Sampler]
    hyperiterations: int
    steps: int = 5
    hypergradient: Callable[[Any, int], HypergradientFunction] = by(lambda learner, steps: learner.method(steps))
    tasks: int = 4
    learning_rate: float = 1e-3
    optimizer: Callable[[optax.Schedule], optax.GradientTransformation] = optax.adam
    network: Literal["auto", "omniglot", "c4l", "rn"] = "auto"
    filters: int | None = None
    patience: int | None = None


@dataclass(frozen=True)
class Entrant:
    """A row of a table: a trained learner, as it is tested.

    Fields:
        name: in the table.
        training: where its lam comes from.
        tested: ways -> the learner of the test; by default the training's.
        view: what the test's lam is, of the trained one.
        most_steps: the largest T that is tried on validation classes; `None`: T is that of training.
        published: numbers of papers, by (data set, setting).
        note: what has to be known to read its number.
    """

    name: str
    training: Training
    tested: Callable[[int], Learner] | None = None
    view: Callable[[Any], Any] = lambda lam: lam
    most_steps: int | None = 10
    published: Mapping[tuple[str, Setting], Published] = field(default_factory=dict)
    note: str = ""

    def learner(self, ways: int) -> Learner:
        """The learner of the test."""
        return (self.tested or self.training.learner)(ways)


def held_out(train_ways: int | None, queries: int) -> Callable[[Setting], Episodes]:
    """Training episodes of so many classes (`None`: as many as in the test), with disjoint query sets."""
    return lambda setting: Episodes(train_ways or setting.ways, setting.shots, queries)


def support_only(shots: int | None = None) -> Callable[[Setting], Episodes]:
    """Training episodes whose query set is the support set, of so many images a class (`None`: as in the test)."""
    return lambda setting: Episodes(setting.ways, shots or setting.shots, 1, held_out=False)
