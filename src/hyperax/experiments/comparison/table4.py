"""ICML Table 4: what separates hyper-representation from other ways to a representation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hyperax.experiments.comparison.entrants import Entrant, Setting, held_out, support_only
from hyperax.experiments.comparison.roster import (
    FIVE_ONE,
    OVERLAPPING,
    TABLE_4,
    classic,
    mini,
    multiclass_training,
    numbers,
    readout,
    variant,
)
from hyperax.experiments.comparison.study import Comparison
from hyperax.methods import FirstOrder


@dataclass(frozen=True)
class Table4(Comparison):
    """Pretrained, Bilevel-train, Approx, Approx-train, Classic-train and Hyper-representation, 5-way 1-shot.

    Episodes have as many classes in training as in the test, as in the paper: with 15 queries a class, or, where
    validation sets are not used, 16 support images a class, so that a 1-shot hyperiteration sees as many images.
    """

    kind: ClassVar[str] = "table4"
    source: ClassVar[str] = TABLE_4
    recipe: str = "table4"
    title: str = "Variants of representation learning (ICML 2018, Table 4)"

    def all_settings(self) -> tuple[Setting, ...]:
        """5-way 1-shot."""
        return (FIVE_ONE,)

    def entrants(self) -> tuple[Entrant, ...]:
        """In the paper's order."""
        data, split, whole = self.dataset, held_out(None, 15), support_only(16)
        published = lambda value: numbers(mini(value), TABLE_4, OVERLAPPING)
        multiclass = multiclass_training(data, "multiclass", 64)
        return (
            readout(data, multiclass, "linear", "Multiclass", published(43.02)),
            variant(data, "Bilevel-train", whole, published(29.63)),
            variant(data, "Approx", split, published(41.12), FirstOrder),
            variant(data, "Approx-train", whole, published(38.80), FirstOrder),
            classic(data, "Classic-train", whole, published(40.46), period=5),
            variant(data, "Hyper-representation", split, published(47.51)),
        )
