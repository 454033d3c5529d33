"""The settings of `torch-mnist`, and what bounds their step sizes."""

from __future__ import annotations

START, CONSTANT, COSINE, TUNED = "start", "constant", "cosine", "tuned"
ENTRANTS = (START, CONSTANT, COSINE, TUNED)
LARGEST_STEP = 1.0
"""Keeps the search away from steps at which every run diverges."""
