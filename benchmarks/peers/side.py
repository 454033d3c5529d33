"""What a side (a library) gives to the worker: its rows, and what one of them computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.peers.problems import Numbers

Run = Callable[[], Any]
"""Computes the hypergradient once, to its end, and returns it (an array of the library, like lam)."""

ALL = ("ridge", "linear_representation", "logistic", "network")
CONVEX = ALL[:3]  # where lam is in the inner objective, and it has a unique minimiser
QUADRATIC = ALL[:2]


class Row(NamedTuple):
    """One way to a hypergradient.

    Fields:
        quantity: which gradient it is: "unrolled" (of f_T), "implicit" (the implicit formula at w_T) or "exact" (of f).
        problems: the names of the problems that it applies to.
        make: Numbers -> Run.
    """

    quantity: str
    problems: tuple[str, ...]
    make: Callable[[Numbers], Run]


# What every implicit row is told: the residual of its linear system, relative to the right side, and the limit.
CG_TOLERANCE = {"float64": 1e-10, "float32": 1e-5}
CG_STEPS = 200
