"""The kinds of study."""

from __future__ import annotations

from hyperax.experiments.study import Study

STUDIES: tuple[type[Study], ...] = ()
"""Their classes; each, without arguments, is a recipe."""
