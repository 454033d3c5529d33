"""Experiments: recipes, runs, reports. Needs `pip install hyperax[run]`."""

from hyperax.experiments.config import FewShotConfig, Published
from hyperax.experiments.few_shot import load, resume, run
from hyperax.experiments.recipes import recipe, recipes

__all__ = ["FewShotConfig", "Published", "load", "recipe", "recipes", "resume", "run"]
