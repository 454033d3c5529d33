"""When the outer loop stops: what callbacks see, validation with patience, and the ready-made rules.

A rule is a function of the record alone, so a resumed run decides as an uninterrupted one would.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from hyperax.problem import Lam


class DivergenceWarning(RuntimeWarning):
    """A run ended with a non-finite or exploding value, hypergradient or lam; the last good iterate was kept.

    >>> issubclass(DivergenceWarning, RuntimeWarning)
    True
    """


@dataclass(frozen=True)
class Progress:
    """What a callback of `minimize` sees, after a record was written.

    Fields:
        step: hyperiterations done; `steps`: hyperiterations asked for.
        value: mean of f_T over the hyperiterations since the record before.
        metrics: means of the metrics over the same hyperiterations.
        gradient_norm: norm of the hypergradient at the last of them, in the variables that the optimizer moves (under
            `Projected`, of lam - project(lam - grad)).
        score: the validation score, `None` if there was no evaluation at this step.
        history: all records so far, this one last; read it, do not change it.
        seconds: wall time since `minimize` was called; `rate`: hyperiterations per second.
        lam: a function returning a copy of the current lam; call it within the callback.

    >>> Progress(1, 10, 0.5, {}, 0.1, None, [], 1.0, 1.0, lambda: None).value
    0.5
    """

    step: int
    steps: int
    value: float
    metrics: dict[str, float]
    gradient_norm: float
    score: float | None
    history: Sequence[dict[str, Any]]
    seconds: float
    rate: float
    lam: Callable[[], Lam] = field(repr=False)


Callback = Callable[[Progress], str | None]
"""Called after each record; the string it returns, if any, ends the run and becomes `Solution.stopped`."""


@dataclass(frozen=True)
class Validation:
    """Score lam on held-out data now and then, keep the best, and stop when it no longer improves.

    Arguments:
        function: lam -> score, or (score, dict of numbers to record); lower is better. It runs outside compiled code.
        every: hyperiterations between evaluations (the last iterate is always evaluated).
        patience: evaluations without a lower score after which the run stops; `None` never stops it.

    Raises: ValueError if `every` or `patience` is below 1.
    Cost: one call of `function` and one copy of lam per evaluation.
    Reference: the early stopping on a validation set of Franceschi et al. 2018 (ICML), Sec. 5.
    Do not use the outer objective's own data here: f_T is recorded anyway.

    >>> Validation(lambda lam: 1.0, every=10, patience=3).patience
    3
    """

    function: Callable[[Lam], Any]
    every: int
    patience: int | None = None

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise ValueError(f"Validation's function is {self.function!r}; use a function lam -> score.")
        if self.every < 1 or (self.patience is not None and self.patience < 1):
            raise ValueError(
                f"Validation(every={self.every}, patience={self.patience}): both count from 1; patience=None is never."
            )

    def score(self, lam: Lam) -> tuple[float, dict[str, float]]:
        """The score of lam, and what else to record."""
        answer = self.function(lam)
        score, more = answer if isinstance(answer, tuple) else (answer, {})
        try:
            return float(score), {name: float(x) for name, x in more.items()}
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"Validation's function returned {answer!r}; return a number, or a pair (number, dict of numbers)."
            ) from error

    def impatient(self, history: Sequence[dict[str, Any]]) -> str | None:
        """Why to stop now, given all records; `None` to go on."""
        if self.patience is None:
            return None
        scores = [(record["score"], record["step"]) for record in history if "score" in record]
        comparable = [pair for pair in scores if pair[0] == pair[0]]  # nan is never the best
        best = min(comparable) if comparable else (None, 0)
        waited = sum(step > best[1] for _, step in scores)
        if waited < self.patience:
            return None
        return f"patience: no validation score below {best[0]} (step {best[1]}) in {waited} evaluations"


@dataclass(frozen=True)
class GradientTolerance:
    """Stop when the hypergradient is small: ||grad f_T|| <= tolerance.

    Arguments:
        tolerance: in the units of `Progress.gradient_norm`.

    Raises: ValueError if the tolerance is not positive.
    Cost: nothing.
    Do not use it with sampled tasks (the norm does not go to zero), nor with a method whose own error is larger
    (`Truncated`, `FirstOrder`).

    >>> rule = GradientTolerance(1e-3)
    >>> rule(Progress(7, 10, 0.5, {}, 1e-4, None, [], 1.0, 1.0, lambda: None))
    'gradient tolerance: norm 0.0001 <= 0.001 at step 7'
    """

    tolerance: float

    def __post_init__(self) -> None:
        if not self.tolerance > 0:
            raise ValueError(
                f"GradientTolerance({self.tolerance}) would never stop; use a positive number such as 1e-6."
            )

    def __call__(self, progress: Progress) -> str | None:
        """Why to stop, or `None`."""
        if progress.gradient_norm <= self.tolerance:
            return (
                f"gradient tolerance: norm {progress.gradient_norm:.6g} <= {self.tolerance:g} at step {progress.step}"
            )
        return None


@dataclass(frozen=True)
class Plateau:
    """Stop when f_T no longer goes down, comparing the last `patience` records with the `patience` before them:

        min(last) >= min(before) - min_delta

    Arguments:
        patience: a number of records (not of hyperiterations).
        min_delta: the least decrease that counts, in the units of f_T.

    Raises: ValueError if patience < 1 or min_delta < 0.
    Cost: O(patience) per record.
    Do not use it with few noisy tasks per hyperiteration unless `record_every` or `patience` average the noise away.

    >>> history = [{"value": v} for v in (3.0, 2.0, 2.0, 2.0)]
    >>> Plateau(2)(Progress(4, 10, 2.0, {}, 1.0, None, history, 1.0, 1.0, lambda: None))
    'plateau: 2.0 is the lowest value of the last 2 records and 2.0 of the 2 before'
    """

    patience: int
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        if self.patience < 1 or self.min_delta < 0:
            raise ValueError(
                f"Plateau needs patience >= 1 and min_delta >= 0, not {self.patience} and {self.min_delta}."
            )

    def __call__(self, progress: Progress) -> str | None:
        """Why to stop, or `None`."""
        values = [record["value"] for record in progress.history[-2 * self.patience :]]
        if len(values) < 2 * self.patience:
            return None
        before, last = min(values[: self.patience]), min(values[self.patience :])
        if last < before - self.min_delta:
            return None
        return (
            f"plateau: {last} is the lowest value of the last {self.patience} records and {before} of the "
            f"{self.patience} before"
        )
