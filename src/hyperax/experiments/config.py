"""The complete configuration of a few-shot run: every field is an option of the command line."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import jax
import optax

from hyperax.fewshot.datasets import Glyphs, ImageFolder, MiniImageNet, Omniglot
from hyperax.fewshot.episodes import Episodes
from hyperax.fewshot.layers import Statistics
from hyperax.fewshot.learners.hyper_representation import HyperRepresentation

Dataset = Omniglot | MiniImageNet | ImageFolder | Glyphs

_DATASETS = {kind.__name__: kind for kind in (Omniglot, MiniImageNet, ImageFolder, Glyphs)}

_PURPOSES = ("initialisation", "training", "validation", "steps", "test", "pairs")

# Two episodes at least, because an interval needs two.
_LEAST = {"validation_episodes": 2, "test_episodes": 2}
_LEAST |= dict.fromkeys(("inner_steps", "most_inner_steps", "tasks", "hyperiterations", "dispatch"), 1)
_LEAST |= dict.fromkeys(("validate_every", "record_every", "checkpoint_every"), 1)


@dataclass(frozen=True)
class Published:
    """A number of a paper, to be shown beside ours.

    >>> Published(0.986, None, "Franceschi et al. 2018, Table 3").accuracy
    0.986
    """

    accuracy: float
    """A fraction."""
    ci95: float | None
    """Half-width of its 95 % interval, where the paper gives one."""
    source: str
    """Paper and table."""
    protocol: str = "support and query sets overlapping, as far as the public code shows"
    """What differs from ours."""


@dataclass(frozen=True)
class FewShotConfig:
    """Learn a hyper-representation on some classes, choose on others, report on a third part.

    Raises: `ValueError` for counts, rates or combinations that make no sense.
    Reference: Franceschi et al. 2018, Sec. 4 and 5.2, App. D.
    Do not use it where a recipe is near: `recipe(name, field=value)` starts from settings that were tried.

    >>> FewShotConfig("mine", "My run", Glyphs(), ways=3).episodes.ways
    3
    """

    recipe: str
    """Name of the recipe this configuration comes from."""
    title: str
    """What a report calls the run."""
    dataset: Dataset
    """The images and how their classes are split."""
    published: Published | None = None
    """The papers' number for this setting."""

    network: Literal["omniglot", "c4l", "rn", "auto"] = "auto"
    """The representation; auto: c4l for images of 64 pixels or more, else the Omniglot network."""
    statistics: Statistics = "set"
    """Whose statistics batch normalisation uses: each set's own (as in the papers), the support set's, those of the
    episode, or those of the whole mini-batch of episodes (of the episode at meta-validation and meta-test, where it
    comes alone)."""

    ways: int = 5
    """Classes of an episode, at meta-validation and meta-test."""
    shots: int = 1
    """Support images a class."""
    queries: int = 15
    """Query images a class."""
    overlap: bool = False
    """Draw support and query independently, as in the papers' code; results are labelled."""
    train_ways: int | None = None
    """Classes of a meta-training episode; None: as many as at meta-test."""
    train_queries: int | None = None
    """Query images a class of a meta-training episode; None: as many as at meta-test."""

    inner_steps: int = 5
    """T in meta-training."""
    most_inner_steps: int = 30
    """The largest T that is tried on the validation classes."""
    step_size: float = 0.1
    """Inner step size eta, or its initial value."""
    learn_step_size: bool = False
    """Make eta a hyperparameter."""
    test_step_size: float | None = None
    """Inner step size at meta-validation and meta-test, where episodes may have fewer classes than in training and so a
    smaller limit of stability; None: as in training. To be chosen on validation classes, like T."""

    tasks: int = 16
    """Episodes a hyperiteration."""
    parallel: int | None = None
    """Episodes mapped together, a divisor of `tasks`; None: one on a CPU, all on an accelerator."""
    hyperiterations: int = 10_000
    """Outer steps."""
    learning_rate: float = 1e-3
    """Adam's, at the beginning."""
    schedule: Literal["inverse-time", "constant", "cosine"] = "inverse-time"
    """inverse-time: rate / (1 + decay k), as in the papers. cosine: to zero at the last hyperiteration."""
    decay: float = 1e-5
    """Of the inverse-time schedule, per hyperiteration."""

    validate_every: int = 500
    """Hyperiterations between meta-validations; the best iterate is kept."""
    validation_episodes: int = 600
    """Episodes of a meta-validation, the same every time."""
    patience: int | None = 40
    """Meta-validations without improvement after which training stops."""
    test_episodes: int = 600
    """Episodes of the meta-test."""
    record_every: int = 50
    """Hyperiterations a record."""
    checkpoint_every: int = 500
    """Hyperiterations between checkpoints."""
    dispatch: int = 50
    """The most hyperiterations in one call of compiled code."""
    seed: int = 0
    """Of the initial weights and all episodes."""

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience is {self.patience}; it must be at least 1, or None never to stop early")
        for name in ("learning_rate", "step_size"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive and finite")
        if self.test_step_size is not None and not 0 < self.test_step_size < float("inf"):
            raise ValueError(f"test_step_size is {self.test_step_size}; it must be positive and finite, or None")
        if self.test_step_size is not None and self.learn_step_size:
            raise ValueError("test_step_size has no effect with learn_step_size: leave one of them out")
        if not 0 <= self.decay < float("inf"):
            raise ValueError(f"decay is {self.decay}; it must be at least 0")
        if self.train_ways == 0 or self.train_queries == 0:
            raise ValueError("train_ways and train_queries are at least 2 and 1, or None: as many as at meta-test")
        if self.parallel is not None and (self.parallel < 1 or self.tasks % self.parallel):
            raise ValueError(f"parallel is {self.parallel}; it must divide the {self.tasks} tasks of a hyperiteration")
        if self.statistics == "batch" and self.parallel not in (None, self.tasks):
            raise ValueError(
                "statistics of the whole mini-batch need all its episodes together: leave parallel at None"
            )
        for name in ("episodes", "training_episodes"):
            getattr(self, name)  # they check their own counts

    @property
    def episodes(self) -> Episodes:
        """Meta-validation and meta-test episodes."""
        return Episodes(self.ways, self.shots, self.queries, self.overlap)

    @property
    def training_episodes(self) -> Episodes:
        """Meta-training episodes."""
        return Episodes(self.train_ways or self.ways, self.shots, self.train_queries or self.queries, self.overlap)

    @property
    def training_learner(self) -> HyperRepresentation:
        """The learner of meta-training episodes."""
        ways = self.training_episodes.ways
        return HyperRepresentation(ways, self.statistics, self.step_size, self.learn_step_size)

    @property
    def test_learner(self) -> HyperRepresentation:
        """The same learner for meta-validation and meta-test episodes, each on its own."""
        # A new task comes alone: of the statistics of a mini-batch of episodes, those of its own episode are left.
        statistics = "episode" if self.statistics == "batch" else self.statistics
        step_size = self.step_size if self.test_step_size is None else self.test_step_size
        return dataclasses.replace(self.training_learner, ways=self.ways, statistics=statistics, step_size=step_size)

    def key(self, purpose: str) -> jax.Array:
        """The random key for one of the purposes of a run; each has its own, so that none depends on another's use."""
        return jax.random.fold_in(jax.random.key(self.seed), _PURPOSES.index(purpose))

    def optimizer(self) -> optax.GradientTransformation:
        """Adam with the schedule."""
        rate = {
            "inverse-time": lambda k: self.learning_rate / (1 + self.decay * k),
            "constant": self.learning_rate,
            "cosine": optax.cosine_decay_schedule(self.learning_rate, self.hyperiterations),
        }[self.schedule]
        return optax.adam(rate)

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON types; the data set's says its type."""
        config = dataclasses.asdict(self)
        return config | {"dataset": {"type": type(self.dataset).__name__} | config["dataset"]}


def config_from_json(config: dict[str, Any]) -> FewShotConfig:
    """The configuration that `to_json` wrote."""
    try:
        dataset = dict(config["dataset"])
        kind = _DATASETS[dataset.pop("type")]
        as_tuples: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in dataset.items()}
        published = config["published"] and Published(**config["published"])
        return FewShotConfig(**config | {"dataset": kind(**as_tuples), "published": published})
    except (KeyError, TypeError) as error:
        raise ValueError(f"this is not the configuration of a few-shot run of this version: {error}") from error
