"""The tables of the Bridge paper (2017)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from hyperax.experiments.comparison.entrants import Entrant, Setting, held_out, support_only
from hyperax.experiments.comparison.roster import (
    AUTHORS,
    BRIDGE_1,
    BRIDGE_2,
    FIVE_FIVE,
    FIVE_ONE,
    OVERLAPPING,
    classic,
    fine_tuned,
    initialisations,
    learned_step_size,
    metric_learners,
    mini,
    mixed_designs,
    multiclass_training,
    numbers,
    readout,
    variant,
)
from hyperax.experiments.comparison.study import Comparison
from hyperax.methods import FirstOrder

_TABLE_1: dict[str, Any] = {
    "Fine-tuning": mini((28.86, 0.54), (49.76, 0.79)),
    "Nearest neighbour": mini((41.08, 0.70), (51.04, 0.65)),
    "Matching nets": mini((43.44, 0.77), (55.31, 0.73)),
    "MAML": mini((48.70, 1.75), (63.11, 0.92)),
    "Hyper-representation": mini((47.01, 1.35), (61.97, 0.76)),
}


def _table_1(name: str) -> Any:
    return numbers(_TABLE_1.get(name, {}), BRIDGE_1, OVERLAPPING if name == "Hyper-representation" else AUTHORS)


@dataclass(frozen=True)
class BridgeTable1(Comparison):
    """Fine-tuning, nearest neighbour, matching nets, MAML, hyper-representation with a learned step size, and the mixed
    designs that the paper announces (Sec. 5): representation and initialisation in depth and in width.
    """

    kind: ClassVar[str] = "bridge-table1"
    source: ClassVar[str] = BRIDGE_1
    recipe: str = "bridge-table1"
    title: str = "Few-shot learners (Bridge paper 2017, Table 1)"

    def all_settings(self) -> tuple[Setting, ...]:
        """5-way 1-shot and 5-shot."""
        return FIVE_ONE, FIVE_FIVE

    def entrants(self) -> tuple[Entrant, ...]:
        """In the paper's order, then the mixed designs."""
        pretrained = multiclass_training(self.dataset, "pretrained", 64)
        named = lambda rows, *names: tuple(row for row in rows if row.name in names)
        return (
            fine_tuned(self.dataset, pretrained, "Fine-tuning", _table_1("Fine-tuning")),
            readout(self.dataset, pretrained, "conv", "Nearest neighbour", _table_1("Nearest neighbour"), nearest=True),
            *named(metric_learners(self.dataset, _table_1), "Matching nets"),
            *named(initialisations(self.dataset, _table_1), "MAML"),
            learned_step_size(self.dataset, _table_1("Hyper-representation")),
            *mixed_designs(self.dataset, _table_1),
        )


@dataclass(frozen=True)
class BridgeTable2(Comparison):
    """Pretrained representations at three depths of two networks, and what meta-learning makes of training sets alone.

    1x5 and 16x5: training episodes of the 5 classes with 1 and 16 support images a class, without a validation set.
    """

    kind: ClassVar[str] = "bridge-table2"
    source: ClassVar[str] = BRIDGE_2
    recipe: str = "bridge-table2"
    title: str = "Variants of representation learning (Bridge paper 2017, Table 2)"

    def all_settings(self) -> tuple[Setting, ...]:
        """5-way 1-shot."""
        return (FIVE_ONE,)

    def entrants(self) -> tuple[Entrant, ...]:
        """The left column, then the right one, then what App. A says of Approx and Table 1 of the method itself."""
        data = self.dataset
        published = lambda value: numbers(mini(value), BRIDGE_2, OVERLAPPING)
        wide = multiclass_training(data, "nn", 64)
        narrow = multiclass_training(data, "multiclass", 32)
        rows = [
            readout(data, wide, "conv", "NN-conv", published(39.97)),
            readout(data, wide, "linear", "NN-linear", published(41.50)),
            readout(data, wide, "softmax", "NN-softmax", published(41.36)),
            readout(data, narrow, "conv", "Multiclass-conv", published(36.57)),
            readout(data, narrow, "linear", "Multiclass-linear", published(43.02)),
            readout(data, narrow, "softmax", "Multiclass-softmax", published(37.60)),
        ]
        for shots, values in ((1, (27.36, 24.74, 24.70)), (16, (29.63, 38.80, 40.46))):
            sets = support_only(shots)
            rows += [
                variant(data, f"Bilevel-train {shots}x5", sets, published(values[0])),
                variant(data, f"Approx-train {shots}x5", sets, published(values[1]), FirstOrder),
                classic(data, f"Classic-train {shots}x5", sets, published(values[2]), period=4),
            ]
        split = held_out(None, 15)
        reference = numbers(mini((47.01, 1.35)), BRIDGE_1, OVERLAPPING)
        return (
            *rows,
            variant(data, "Approx", split, published(41.12), FirstOrder),
            variant(data, "Hyper-representation", split, reference),
        )
