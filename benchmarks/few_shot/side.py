"""What a side (a library) of the few-shot benchmark gives to the worker: its rows, by the problem they apply to."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from benchmarks.few_shot.problems import Numbers

THREADS = int(os.environ.get("OMP_NUM_THREADS", "2"))  # of this process; run.py says how many

Run = Callable[[], Any]
"""One hyperiteration to its end, without the outer step: the hypergradient, as the library holds it."""


class Made(NamedTuple):
    """A row that is ready: what is timed, and how its result is turned into the vector of problems.py."""

    run: Run
    to_vector: Callable[[Any], np.ndarray]


class Row(NamedTuple):
    """One way to a hypergradient.

    Fields:
        problem: MAML or REPRESENTATION.
        make: Numbers -> Made.
        note: what a reader has to know of it.
        longest, most_tasks: the largest T and the most episodes that it is made for (time, not ability).
    """

    problem: str
    make: Callable[[Numbers], Made]
    note: str = ""
    longest: float = float("inf")
    most_tasks: float = float("inf")
