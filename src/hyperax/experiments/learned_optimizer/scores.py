"""Final losses as rows of a table: means with 95 % intervals, differences on the same problems."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hyperax.experiments.study import interval

NOT_MEASURED = "–"


@dataclass(frozen=True)
class Row:
    """One optimizer on the test problems of a setting.

    Fields:
        optimizer: its name; that of a baseline with the step size for the long horizon says so.
        finals: horizon -> the final losses, [problems].
        chosen: the record of its step size; `None` for a learned optimizer.
    """

    optimizer: str
    finals: Mapping[int, np.ndarray]
    chosen: Mapping[str, Any] | None = None

    @property
    def settings(self) -> str:
        """Step size and momentum."""
        if self.chosen is None:
            return "learned"
        momentum = self.chosen["momentum"]
        return f"{self.chosen['step_size']:.3g}" + ("" if momentum is None else f", momentum {momentum:g}")


def best_baseline(rows: Sequence[Row], horizon: int) -> Row:
    """The baseline whose mean final loss on the test problems is least: the hardest one to beat."""
    measured = [row for row in rows if row.chosen is not None and horizon in row.finals]
    return min(measured, key=lambda row: row.finals[horizon].mean())


def cells(rows: Sequence[Row], horizon: int) -> list[tuple[str, str]]:
    """For each row the mean final loss, and the difference to the best baseline, as text."""
    best = best_baseline(rows, horizon)
    found = []
    for row in rows:
        final = row.finals.get(horizon)
        if final is None:
            found.append((NOT_MEASURED, NOT_MEASURED))
        else:
            found.append((mean_text(final), "best" if row is best else paired_text(final, best.finals[horizon])))
    return found


def numbers(rows: Sequence[Row], horizon: int) -> list[dict[str, Any]]:
    """The same as numbers, in JSON types: `None` for what is not finite."""
    best = best_baseline(rows, horizon).finals[horizon]
    plain = lambda x: float(x) if math.isfinite(x) else None
    return [
        {
            "optimizer": row.optimizer,
            "horizon": horizon,
            "step_size": None if row.chosen is None else row.chosen["step_size"],
            "momentum": None if row.chosen is None else row.chosen["momentum"],
            **dict(zip(("loss", "ci95"), map(plain, _interval(row.finals[horizon])), strict=True)),
            **dict(
                zip(("minus_best", "minus_best_ci95"), map(plain, _difference(row.finals[horizon], best)), strict=True)
            ),
        }
        for row in rows
        if horizon in row.finals
    ]


def mean_text(losses: np.ndarray) -> str:
    """Mean and interval, or on how many problems the optimizer diverged.

    >>> mean_text(np.array([0.02, 0.03, 0.04]))
    '0.030 ± 0.025'
    >>> mean_text(np.array([0.02, np.inf]))
    'diverged on 1 of 2'
    """
    diverged = int((~np.isfinite(losses)).sum())
    return f"diverged on {diverged} of {len(losses)}" if diverged else pair_text(*_interval(losses))


def paired_text(losses: np.ndarray, others: np.ndarray) -> str:
    """The mean difference on the same problems and its interval, with a sign.

    >>> paired_text(np.array([1.0, 2.0]), np.array([2.0, 3.5]))
    '-1.2 ± 3.2'
    """
    mean, half = _difference(losses, others)
    return pair_text(mean, half, "+") if math.isfinite(mean) else NOT_MEASURED


def share_below(losses: np.ndarray, others: np.ndarray) -> str:
    """On how many problems the first ends lower.

    >>> share_below(np.array([1.0, 2.0]), np.array([2.0, 1.0]))
    '1 of 2'
    """
    return f"{int((losses < others).sum())} of {len(losses)}"


def pair_text(mean: float, half: float, sign: str = "") -> str:
    """A number and its half-width, to two digits of the latter.

    >>> pair_text(12.345, 0.678), pair_text(1.234e-9, 5.6e-10)
    ('12.35 ± 0.68', '1.23e-09 ± 5.6e-10')
    """
    if not (math.isfinite(half) and half > 0):
        return f"{mean:{sign}.3g}"
    digits = max(1 - math.floor(math.log10(half)), 0)
    return f"{mean:{sign}.{digits}f} ± {half:.{digits}f}" if digits <= 6 else f"{mean:{sign}.2e} ± {half:.1e}"


def _interval(losses: np.ndarray) -> tuple[float, float]:
    return interval(losses.tolist()) if np.isfinite(losses).all() else (math.inf, math.nan)


def _difference(losses: np.ndarray, others: np.ndarray) -> tuple[float, float]:
    both = np.isfinite(losses).all() and np.isfinite(others).all()
    return interval((losses - others).tolist()) if both else (math.nan, math.nan)
