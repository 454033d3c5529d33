"""ICML Table 3: hyper-representation beside its rivals, all trained and tested here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from hyperax.experiments.comparison.entrants import Entrant, Setting
from hyperax.experiments.comparison.roster import (
    AUTHORS,
    FIVE_FIVE,
    FIVE_ONE,
    OMNIGLOT_SETTINGS,
    OVERLAPPING,
    TABLE_3,
    hyper_representation,
    initialisations,
    metric_learners,
    mixed_designs,
    numbers,
    table_3,
)
from hyperax.experiments.comparison.study import Comparison
from hyperax.experiments.comparison.systems import systems

_PUBLISHED: dict[str, Any] = {
    "Siamese nets": table_3((97.3, 98.4, 88.2, 97.0)),
    "Matching nets": table_3((98.1, 98.9, 93.8, 98.5), ((43.44, 0.77), (55.31, 0.73))),
    "MAML": table_3((98.7, 99.9, 95.8, 98.9), ((48.70, 1.75), (63.11, 0.92))),
    "Prototypical nets": table_3((98.8, 99.7, 96.0, 98.9), ((49.42, 0.78), (68.20, 0.66))),
    "Hyper-representation": table_3((98.6, 99.5, 95.5, 98.4), ((50.54, 0.85), (64.53, 0.68))),
    "SNAIL": table_3((99.1, 99.8, 97.6, 99.4), ((55.71, 0.99), (68.88, 0.92))),
    "Memory module": table_3((98.4, 99.6, 95.0, 98.6)),
    "Meta-networks": table_3((98.9, None, 97.0, None), ((49.21, 0.96), None)),
    "Neural statistician": table_3((98.1, 99.5, 93.2, 98.1)),
    "Meta-LSTM": table_3((), ((43.56, 0.84), (60.60, 0.71))),
}


def _published(name: str) -> Any:
    protocol = OVERLAPPING if name == "Hyper-representation" else AUTHORS
    return numbers(_PUBLISHED.get(name, {}), TABLE_3, protocol)


@dataclass(frozen=True)
class Table3(Comparison):
    """Hyper-representation, metric learners, learners of an initialisation, mixed designs, and the other systems.

    All rows of the paper, and more. On Omniglot and Glyphs training episodes have 20
    classes and 5 queries, but for learners whose head is made for a number of classes.
    """

    kind: ClassVar[str] = "table3"
    source: ClassVar[str] = TABLE_3
    recipe: str = "table3"
    title: str = "Few-shot learners (ICML 2018, Table 3)"

    def all_settings(self) -> tuple[Setting, ...]:
        """Four on Omniglot and Glyphs, 1-shot and 5-shot on miniImageNet."""
        return (FIVE_ONE, FIVE_FIVE) if self.dataset == "miniimagenet" else OMNIGLOT_SETTINGS

    def entrants(self) -> tuple[Entrant, ...]:
        """Hyper-representation first, then its rivals by family."""
        return (
            hyper_representation(self.dataset, _published("Hyper-representation")),
            *metric_learners(self.dataset, _published),
            *initialisations(self.dataset, _published),
            *mixed_designs(self.dataset, _published),
            *systems(self.dataset, _published),
        )
