"""The recipe `learned-loss`: learned ground losses beside cross-entropy, on clean tasks and on wrong labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import equinox as eqx
import numpy as np

from hyperax.experiments.comparison import training
from hyperax.experiments.comparison.entrants import DatasetName, Entrant, Setting
from hyperax.experiments.comparison.roster import FIVE_FIVE, FIVE_ONE
from hyperax.experiments.comparison.study import Comparison, signed
from hyperax.experiments.learned_loss.entrants import (
    CONDITIONS,
    CROSS_ENTROPY,
    NETWORK,
    REGULARISER,
    STEP_SIZE,
    rows,
)
from hyperax.experiments.learned_loss.figures import slope, slopes_figure
from hyperax.experiments.study import Part, Place, Shown
from hyperax.fewshot.episodes import Episodes
from hyperax.fewshot.evaluation import paired_difference
from hyperax.fewshot.image_classes import MetaDataset
from hyperax.fewshot.learners.learned_loss import LearnedLoss
from hyperax.fewshot.learners.losses import CrossEntropy
from hyperax.fewshot.noisy_episodes import NoisyEpisodes
from hyperax.rollout import check_steps

_SLOPE = "slope"


@dataclass(frozen=True)
class LearnedLosses(Comparison):
    """Ground losses of softmax regression, learned with its representation, on the same tasks and with the same T.

    1-shot tasks are clean. Where a class has several support images, a share of the support labels is flipped, in
    training, validation and test alike; query labels are always right.
    """

    kind: ClassVar[str] = "learned-loss"
    source: ClassVar[str] = "Bridge paper 2017, Sec. 3"
    reference: ClassVar[str] = CROSS_ENTROPY
    recipe: str = "learned-loss"
    title: str = "Learned ground losses (Bridge paper 2017, Sec. 3)"
    dataset: DatasetName = "glyphs"
    """glyphs, omniglot (1200 / 100 / 323 characters, with rotations) or miniimagenet."""
    queries: int = 10
    """Query images a class."""
    validations: int = 4
    validation_episodes: int = 100
    noise: float = 0.3
    """Share of the support labels that are flipped in settings of several shots; 0: all are clean."""
    inner_steps: int = 5
    """T, of all rows."""
    filters: int = 16
    """Of the network, 64 (Omniglot, Glyphs) or 32 in the papers."""

    def __post_init__(self) -> None:
        check_steps(self.inner_steps, "inner_steps", 1)
        check_steps(self.filters, "filters", 1)
        super().__post_init__()
        for setting in self.chosen_settings():
            self.episodes(setting)  # refuses a share that is none

    def all_settings(self) -> tuple[Setting, ...]:
        """5-way 1-shot, clean, and 5-way 5-shot with wrong labels."""
        return FIVE_ONE, FIVE_FIVE

    def entrants(self) -> tuple[Entrant, ...]:
        """Cross-entropy, the control, then the learned losses."""
        return rows(CONDITIONS[self.dataset], self.episodes, self.inner_steps, self.filters)

    def episodes(self, setting: Setting, overlap: bool = False) -> Episodes:
        """Those of training, validation and test."""
        return NoisyEpisodes(setting.ways, setting.shots, self.queries, overlap, share=self._share(setting))

    def _share(self, setting: Setting) -> float:
        """With one image a class a flipped label would leave the class without any."""
        return self.noise if setting.shots > 1 else 0.0

    def measure(self, part: str, data: MetaDataset, earlier: Mapping[str, Part], place: Place) -> Part:
        """A training and its tests; of a learned loss also its derivative, for a figure."""
        found = super().measure(part, data, earlier, place)
        name = next(record["training"] for record in found.records if record["what"] == "training")
        setting = next(setting for setting in self.chosen_settings() if part == f"{setting.name}-{name}")
        one = next(entrant.training for entrant in self.chosen_entrants() if entrant.training.name == name)
        learner = one.learner(setting.ways)
        if not (place.writes and isinstance(learner, LearnedLoss)):
            return found
        shape, key = data.train.image_shape, training.key_for(self.seed, "initialisation")
        network = training.make_network(one.network, shape, key, one.filters)
        lam = eqx.tree_deserialise_leaves(place.folder / "lam.eqx", learner.lam(network, shape, key))
        if isinstance(lam["loss"], CrossEntropy):  # beside a learned regulariser
            return found
        return Part(found.records, {**found.arrays, _SLOPE: slope(lam["loss"], setting.ways)})

    def headline(self, tests: list[tuple[dict[str, Any], np.ndarray]]) -> dict[str, str]:
        """The network loss minus cross-entropy in the last setting that has both, and what else is to be known."""
        for setting in reversed(self.chosen_settings()):
            of = {record["entrant"]: found for record, found in tests if record["setting"] == setting.name}
            if {NETWORK, CROSS_ENTROPY} <= set(of):
                minus = lambda a, b, of=of: signed(paired_difference(of[a], of[b]))
                control = f"; minus a learned step size {minus(NETWORK, STEP_SIZE)}" if STEP_SIZE in of else ""
                other = f"; learned regulariser {minus(REGULARISER, CROSS_ENTROPY)}" if REGULARISER in of else ""
                text = (
                    f"points of accuracy on unseen classes of {self.dataset} is the network loss minus cross-entropy, "
                    f"{self._words(setting)}, T = {self.inner_steps}, paired by episode{control}{other}."
                )
                return {"number": minus(NETWORK, CROSS_ENTROPY), "text": text}
        return super().headline(tests)

    def _words(self, setting: Setting) -> str:
        share = self._share(setting)
        return f"{setting.words}, {f'{100 * share:g} % of the support labels flipped' if share else 'clean labels'}"

    def summarise(self, measured: Mapping[str, Part]) -> dict[str, Any]:
        """The usual, and how each row compares with the control."""
        summary = super().summarise(measured)
        for setting in self.chosen_settings():
            table = summary["differences"].get(setting.name, {})
            compared = [f"{name} {signed(of[STEP_SIZE])}" for name, of in table.items() if STEP_SIZE in of]
            if compared:
                summary["notes"].append(f"{self._words(setting)}, minus a learned step size: {', '.join(compared)}.")
        return summary

    def notes(self) -> list[str]:
        """What has to be known to read the table."""
        kinds = "; ".join(self._words(setting) for setting in self.chosen_settings())
        return [
            f"{kinds}. Flipped labels are uniform over the other classes, in training, validation and test; query "
            "labels are right.",
            f"All rows have T = {self.inner_steps} in training and test but the one that says otherwise, the same "
            "episodes in training and in the test, the same network at the start, and ten times its rate for what is "
            "learned beside it.",
            "At w = 0 a loss that treats all classes alike has one derivative at the target and one at the others: the "
            "first step of every learned loss is one of cross-entropy with another step size. What a loss gains beyond "
            "the learned step size, it gains from the second step on; the regulariser weighs features from the first.",
            *super().notes(),
        ]

    def figures(self, measured: Mapping[str, Part], summary: Mapping[str, Any]) -> list[Shown]:
        """The usual, and the derivatives of the learned losses."""
        slopes: dict[str, dict[str, np.ndarray]] = {}
        for setting in self.chosen_settings():
            for entrant in self.chosen_entrants():
                part = measured.get(f"{setting.name}-{entrant.training.name}")
                if part is not None and _SLOPE in part.arrays:
                    slopes.setdefault(self._words(setting), {})[entrant.name] = part.arrays[_SLOPE]
        return [*super().figures(measured, summary), *([slopes_figure(slopes)] if slopes else [])]

    def published(self) -> str:
        """There is no number to stand beside."""
        return f"{self.source}, which names the pattern and measures none"
