"""The kinds of study."""

from __future__ import annotations

from hyperax.experiments.comparison import COMPARISONS
from hyperax.experiments.data_cleaning import DataCleaning
from hyperax.experiments.learned_loss import LearnedLosses
from hyperax.experiments.learned_optimizer import LearnedOptimizerMnist, LearnedOptimizerQuadratics
from hyperax.experiments.mixed_domains import MixedDomains
from hyperax.experiments.multitask import MultitaskSchools
from hyperax.experiments.newsgroups import Newsgroups
from hyperax.experiments.ridge_table5 import RidgeTable5
from hyperax.experiments.schedules_mnist import SchedulesMnist
from hyperax.experiments.study import Study
from hyperax.experiments.torch_mnist import TorchMnist

STUDIES: tuple[type[Study], ...] = (
    RidgeTable5,
    DataCleaning,
    Newsgroups,
    SchedulesMnist,
    MultitaskSchools,
    *COMPARISONS,
    LearnedOptimizerQuadratics,
    LearnedOptimizerMnist,
    LearnedLosses,
    MixedDomains,
    TorchMnist,
)
"""Their classes; each, without arguments, is a recipe."""
