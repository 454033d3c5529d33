"""The kinds of study."""

from __future__ import annotations

from hyperax.experiments.multitask import MultitaskSchools
from hyperax.experiments.newsgroups import Newsgroups
from hyperax.experiments.ridge_table5 import RidgeTable5
from hyperax.experiments.study import Study

STUDIES: tuple[type[Study], ...] = (RidgeTable5, Newsgroups, MultitaskSchools)
"""Their classes; each, without arguments, is a recipe."""
