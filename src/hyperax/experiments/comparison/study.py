"""Comparisons of few-shot learners: the same classes, the same test episodes, one table and one figure."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np

from hyperax.experiments.comparison import training
from hyperax.experiments.comparison.entrants import DatasetName, Entrant, Setting, Training
from hyperax.experiments.comparison.figures import accuracies_figure, curves_figure, differences_figure
from hyperax.experiments.study import Opened, Part, Place, Shown, Study
from hyperax.fewshot.datasets import Glyphs, MiniImageNet, Omniglot
from hyperax.fewshot.episodes import Episodes
from hyperax.fewshot.evaluation import paired_difference
from hyperax.fewshot.image_classes import MetaDataset

_DATASETS = {"omniglot": Omniglot, "miniimagenet": MiniImageNet, "glyphs": Glyphs}
_STATISTICS = {
    "set": "each set's own (transductive)",
    "support": "the support set's (not transductive)",
    "episode": "the episode's (transductive)",
}


@dataclass(frozen=True)
class Comparison(Study):
    """Learners trained one after the other on the same classes and tested on the same episodes of other classes.

    Support and query sets are disjoint in training, validation and test; the trained learners are tested once more on
    overlapping sets, the papers' protocol, in a column that says so. The iterate and T are chosen on validation
    classes. Every part is one training in one setting, kept when it is finished; an interrupted one goes on from its
    checkpoint.
    """

    takes_mesh: ClassVar[bool] = True
    reference: ClassVar[str] = "Hyper-representation"
    """The entrant that the others are paired with."""

    dataset: DatasetName = "omniglot"
    """omniglot (1200 / 100 / 323 characters, with rotations), miniimagenet or glyphs."""
    budget: float = 1.0
    """Share of the full number of hyperiterations; the learning rate falls to 0 over what is left."""
    settings: tuple[str, ...] = ()
    """Such as 5way-1shot; none: all of the table's."""
    learners: tuple[str, ...] = ()
    """Names of trainings, such as hyper-representation (a wrong one lists them); none: all."""
    tasks: int | None = None
    """Episodes a hyperiteration; None: each learner's own number, 4 or 2. To be shared over more devices than that."""
    queries: int = 15
    """Query images a class, in validation and test."""
    validations: int = 8
    """Evaluations on validation classes during a training; the best iterate is kept."""
    validation_episodes: int = 200
    """Episodes of an evaluation on validation classes."""
    test_episodes: int = 600
    """Episodes of the test, the same for all learners."""

    def __post_init__(self) -> None:
        if self.dataset not in _DATASETS:
            raise ValueError(f"dataset is {self.dataset!r}; use {', '.join(_DATASETS)}")
        if not 0 < self.budget <= 1:
            raise ValueError(f"budget is {self.budget}; it is a share of the full number of hyperiterations, in (0, 1]")
        for name, least in (("queries", 1), ("validations", 1), ("validation_episodes", 2), ("test_episodes", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if self.tasks is not None and self.tasks < 1:
            raise ValueError(f"tasks is {self.tasks}; it must be at least 1, or None for each learner's own")
        self.chosen_settings()
        self.chosen_entrants()

    @abstractmethod
    def all_settings(self) -> tuple[Setting, ...]:
        """The table's settings, for its data set."""

    @abstractmethod
    def entrants(self) -> tuple[Entrant, ...]:
        """The rows of the table, for its data set; those with one training lie together."""

    def chosen_settings(self) -> tuple[Setting, ...]:
        """The settings of this run."""
        return tuple(map(Setting.named, self.settings)) or self.all_settings()

    def chosen_entrants(self) -> tuple[Entrant, ...]:
        """The rows of this run."""
        entrants = self.entrants()
        names = dict.fromkeys(entrant.training.name for entrant in entrants)
        unknown = [name for name in self.learners if name not in names]
        if unknown:
            raise ValueError(f"{self.recipe} has no learner {', '.join(unknown)}; it has {', '.join(names)}")
        return tuple(entrant for entrant in entrants if not self.learners or entrant.training.name in self.learners)

    def episodes(self, setting: Setting, overlap: bool = False) -> Episodes:
        """Those of validation and test."""
        return Episodes(setting.ways, setting.shots, self.queries, overlap)

    def hyperiterations(self, training: Training) -> int:
        """How many, of the full number."""
        return max(1, round(self.budget * training.hyperiterations))

    def tasks_of(self, training: Training) -> int:
        """Episodes a hyperiteration."""
        return self.tasks or training.tasks

    def check_devices(self, count: int) -> None:
        """Refused unless they divide the tasks of every learner."""
        for entrant in self.chosen_entrants():
            tasks = self.tasks_of(entrant.training)
            if tasks % count:
                raise ValueError(
                    f"the {tasks} tasks of a hyperiteration of {entrant.training.name} cannot be shared by {count} "
                    f"devices: use --tasks {count * max(1, round(tasks / count))}, or another --mesh"
                )

    def open(self, data_dir: str | None) -> Opened:
        """The three sets of classes; refused if they cannot give the episodes."""
        data = _DATASETS[self.dataset]().load(data_dir)
        for setting in self.chosen_settings():
            for entrant in self.chosen_entrants():
                entrant.training.sampler(setting).check(data.train, "the training set")
            test = self.episodes(setting)
            test.check(data.validation, "the validation set")
            test.check(data.test, "the test set")
        return Opened(data, data.provenance)

    @classmethod
    def united(cls, configs: Sequence[Self], parts: Sequence[str]) -> Self:
        """Runs that are the same but for their learners and settings, all learners in all settings."""
        alike = {replace(config, learners=(), settings=()) for config in configs}
        settings = dict.fromkeys(setting for config in configs for setting in config.chosen_settings())
        there = [setting.name for setting in settings if any(part.startswith(f"{setting.name}-") for part in parts)]
        names = dict.fromkeys(
            part.removeprefix(f"{name}-") for name in there for part in parts if part.startswith(name)
        )
        united = replace(configs[0], learners=tuple(names), settings=tuple(there))
        if len(alike) > 1:
            raise ValueError("only runs whose configurations are the same but for --learners and --settings are joined")
        missing = [part for part in united.parts() if part not in parts]
        if missing:
            raise ValueError(f"{missing[0]} is missing: join runs with the same learners in each setting")
        return united

    def parts(self) -> Sequence[str]:
        """One a training and setting."""
        names = dict.fromkeys(entrant.training.name for entrant in self.chosen_entrants())
        return [f"{setting.name}-{name}" for setting in self.chosen_settings() for name in names]

    def measure(self, part: str, data: MetaDataset, earlier: Mapping[str, Part], place: Place) -> Part:
        """Train once, test the entrants that share it."""
        for setting in self.chosen_settings():
            name = part.removeprefix(f"{setting.name}-")
            if name != part:
                entrants = [entrant for entrant in self.chosen_entrants() if entrant.training.name == name]
                return training.measure(self, setting, entrants, data, place)
        raise AssertionError(part)

    def summarise(self, measured: Mapping[str, Part]) -> dict[str, Any]:
        """Accuracies with intervals, and paired differences from the reference."""
        tests = list(tests_of(measured))
        columns = [
            "setting",
            "learner",
            "disjoint, %",
            f"minus {self.reference}",
            "overlapping, %",
            "published, %",
            "T",
            "best of hyperiterations",
            "trained on",
            "batch statistics",
        ]
        rows = [self._row(record, accuracies, measured) for record, accuracies in tests]
        diverged = [
            f"{record['training']} ({Setting.named(record['setting']).words})"
            for part in measured.values()
            for record in part.records
            if record["what"] == "training" and record["stopped"].startswith("diverged")
        ]
        stopped = {"stopped": f"diverged: {', '.join(diverged)}; the last good iterate was tested"} if diverged else {}
        return stopped | {
            "headline": self.headline(tests),
            "table": {"columns": columns, "rows": rows},
            "notes": self.notes(),
            "dataset": self.dataset,
            "budget": self.budget,
            "differences": self._differences(measured),
            "protocol": {"queries": self.queries, "overlap": "in its own column only", "transductive": "see the table"},
        }

    def headline(self, tests: list[tuple[dict[str, Any], np.ndarray]]) -> dict[str, str]:
        """The reference in the first setting, or the first row there is."""
        record = next((record for record, _ in tests if record["entrant"] == self.reference), tests[0][0])
        setting = Setting.named(record["setting"])
        text = (
            f"is the accuracy of {record['entrant']} on unseen classes of {self.dataset}, {setting.words}, at "
            f"{100 * self.budget:g} % of the full number of hyperiterations."
        )
        return {"number": f"{_percent(record)} %", "text": text}

    def notes(self) -> list[str]:
        """What has to be known to read the table."""
        return [
            f"Accuracy is the mean over {self.test_episodes} episodes of test classes, the same for all learners, with "
            f"its 95 % interval, 1.96 s / sqrt({self.test_episodes}); differences are paired by episode. The intervals "
            "are over episodes of one trained learner, not over trainings.",
            f"Support and query sets ({self.queries} images a class) are disjoint but in the column that says "
            "overlapping: there they are drawn independently, as in the public code of the hyper-representation "
            "papers. In training they are disjoint, or the query set is the support set where the table says so.",
            "Batch normalisation takes its statistics from the images at hand (no running averages). Each set's own: "
            "support and query each by itself, so that the prediction for a query image depends on the others "
            "(transductive).",
            f"The iterate ({self.validations} evaluations) was chosen on validation classes, of a training that serves "
            f"several rows by the first of them; {self._choice_of_steps()} This run had {100 * self.budget:g} % of the "
            "full number of hyperiterations.",
            *dict.fromkeys(f"{entrant.name}: {entrant.note}" for entrant in self.chosen_entrants() if entrant.note),
            *self._sources(),
        ]

    def _choice_of_steps(self) -> str:
        chosen = any(entrant.most_steps for entrant in self.chosen_entrants())
        return "so was T, where it matters." if chosen else "T is that of training."

    def _sources(self) -> list[str]:
        found = [
            self._published(entrant, setting)
            for entrant in self.chosen_entrants()
            for setting in self.chosen_settings()
        ]
        sources = dict.fromkeys(f"{number.source} ({number.protocol})" for number in found if number)
        return [f"Published numbers: {'; '.join(sources)}."] if sources else []

    def _published(self, entrant: Entrant, setting: Setting) -> Any:
        return entrant.published.get((self.dataset, setting))

    def _row(self, record: dict[str, Any], accuracies: np.ndarray, measured: Mapping[str, Part]) -> list[str]:
        setting = Setting.named(record["setting"])
        entrant = next(entrant for entrant in self.entrants() if entrant.name == record["entrant"])
        reference = _accuracies(measured, record["setting"], self.reference)
        trained = _training(measured, record)
        published = self._published(entrant, setting)
        difference = "–"
        if reference is not None and record["entrant"] != self.reference:
            difference = signed(paired_difference(accuracies, reference))
        return [
            setting.words,
            record["entrant"],
            _percent(record),
            difference,
            _percent(record["overlapping"]),
            _percent({"accuracy": published.accuracy, "ci95": published.ci95}) if published else "–",
            "–" if record["steps"] is None else str(record["steps"]),
            f"{trained['best']:,} of {self.hyperiterations(entrant.training):,}{_ended(trained)}",
            trained_on(entrant.training, setting, record["steps"] is not None),
            _STATISTICS[record["statistics"]],
        ]

    def _differences(self, measured: Mapping[str, Part]) -> dict[str, Any]:
        """Of each two learners in a setting: mean and half-width of the paired difference, row minus column."""
        found: dict[str, Any] = {}
        for setting in self.chosen_settings():
            of = {r["entrant"]: a for r, a in tests_of(measured) if r["setting"] == setting.name}
            found[setting.name] = {a: {b: paired_difference(of[a], of[b]) for b in of if b != a} for a in of}
        return found

    def figures(self, measured: Mapping[str, Part], summary: Mapping[str, Any]) -> list[Shown]:
        """Accuracies of all learners, their paired differences, and validation accuracy during training."""
        records = [record for record, _ in tests_of(measured)]
        published = {
            (setting.name, entrant.name): number
            for setting in self.chosen_settings()
            for entrant in self.chosen_entrants()
            if (number := self._published(entrant, setting))
        }
        curves = [
            (Setting.named(record["setting"]), name, part)
            for name, part in measured.items()
            for record in part.records
            if record["what"] == "training"
        ]
        return [
            accuracies_figure(records, published),
            *(
                differences_figure(Setting.named(name), table)
                for name, table in summary["differences"].items()
                if len(table) > 2
            ),
            curves_figure(curves),
        ]

    def published(self) -> str:
        """What the table stands beside."""
        return f"beside {self.source}"

    source: ClassVar[str] = "the papers' numbers"


def tests_of(measured: Mapping[str, Part]) -> Any:
    """(record, accuracies of the episodes) of every tested entrant."""
    for part in measured.values():
        for record in part.records:
            if record["what"] == "test":
                yield record, part.arrays[record["entrant"]]


def _accuracies(measured: Mapping[str, Part], setting: str, entrant: str) -> np.ndarray | None:
    return next((a for r, a in tests_of(measured) if (r["setting"], r["entrant"]) == (setting, entrant)), None)


def _training(measured: Mapping[str, Part], record: Mapping[str, Any]) -> Mapping[str, Any]:
    return next(
        r
        for part in measured.values()
        for r in part.records
        if r["what"] == "training" and (r["setting"], r["training"]) == (record["setting"], record["training"])
    )


def _ended(trained: Mapping[str, Any]) -> str:
    """How a training ended, where it did not do all its hyperiterations."""
    if trained["stopped"].startswith("completed"):
        return ""
    how = "diverged" if trained["stopped"].startswith("diverged") else "stopped"
    return f", {how} at {trained['hyperiterations']:,}"


def trained_on(training: Training, setting: Setting, adapts: bool) -> str:
    """The tasks of a training, in words, with T where it matters."""
    sampler = training.sampler(setting)
    if not isinstance(sampler, Episodes):
        return "images of all classes"
    queries = f"{sampler.queries} queries a class" if sampler.held_out else "query = support set"
    return f"{sampler.ways}-way {sampler.shots}-shot, {queries}" + (f", T = {training.steps}" if adapts else "")


def _percent(score: Mapping[str, Any]) -> str:
    half = "" if score["ci95"] is None else f" ± {100 * score['ci95']:.2f}"
    return f"{100 * score['accuracy']:.2f}{half}"


def signed(difference: Mapping[str, float]) -> str:
    """A paired difference in points, as tables have it."""
    return f"{100 * difference['difference']:+.2f} ± {100 * difference['ci95']:.2f}"
