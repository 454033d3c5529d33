"""The papers' tables of few-shot learners, regenerated: every learner on the same episodes."""

from hyperax.experiments.comparison.bridge import BridgeTable1, BridgeTable2
from hyperax.experiments.comparison.meta_lstm import MetaLSTM
from hyperax.experiments.comparison.study import Comparison
from hyperax.experiments.comparison.sweeps import Figure6, ValidationSize
from hyperax.experiments.comparison.table3 import Table3
from hyperax.experiments.comparison.table4 import Table4

COMPARISONS: tuple[type[Comparison], ...] = (
    Table3,
    Table4,
    BridgeTable1,
    BridgeTable2,
    Figure6,
    ValidationSize,
    MetaLSTM,
)
"""Their classes; each, without arguments, is a recipe."""

__all__ = ["COMPARISONS", "Comparison"]
