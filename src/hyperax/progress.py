"""How far a run is: a bar in a terminal (rich), quiet lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

_SECONDS_BETWEEN_LINES = 10.0


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class ProgressDisplay:
    """Shows step, hyperiterations per second, f_T, the validation score and the time left.

    Arguments:
        steps: hyperiterations of the whole run.
        step: those already done, before a resume.
        file: where to write; standard error by default. In a terminal a live bar; otherwise one line per validation and
            at most one per 10 s beside those.

    Raises: ValueError in a terminal without rich.
    Cost: nothing next to a dispatch.
    Do not use it inside other live displays of rich: write a callback there.

    >>> with ProgressDisplay(100, file=sys.stdout) as display:
    ...     display.update(50, value=0.25, score=0.5, seconds=10.0)
    step 50/100 | 5 it/s | f_T 0.25 | validation 0.5 | 0:10 left
    """

    def __init__(self, steps: int, step: int = 0, file: TextIO | None = None):
        self.steps = steps
        self.begin = step
        self.file = sys.stderr if file is None else file
        self._score: str | None = None
        self._last_line = time.monotonic()
        self._bar: Any = None
        if self.file.isatty():
            self._bar, self._task = _rich_bar(steps, step, self.file)

    def __enter__(self) -> ProgressDisplay:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(
        self,
        step: int,
        *,
        value: float,
        score: float | None,
        seconds: float,
        last: bool = False,
        validation: Mapping[str, float] | None = None,
    ) -> None:
        """Show the state after `step` hyperiterations, `seconds` after the start.

        `score` and what else the `validation` found are given only when they are new.
        """
        if score is not None:
            more = ", ".join(f"{name} {number:.4g}" for name, number in (validation or {}).items())
            self._score = f"{score:.6g}" + (f" ({more})" if more else "")
        text = self._text(step, value, seconds)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=text)
        elif last or score is not None or time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            print(f"step {step}/{self.steps} | {text}", file=self.file, flush=True)

    def _text(self, step: int, value: float, seconds: float) -> str:
        rate = (step - self.begin) / max(seconds, 1e-9)
        parts = [f"{rate:.3g} it/s", f"f_T {value:.6g}"]
        if self._score is not None:
            parts.append(f"validation {self._score}")
        if rate > 0:
            parts.append(f"{_duration((self.steps - step) / rate)} left")
        return " | ".join(parts)


def _rich_bar(steps: int, step: int, file: TextIO) -> tuple[Any, Any]:
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    except ImportError:
        raise ValueError(
            "progress=True needs rich in a terminal: pip install hyperax[progress], or use progress=False."
        ) from None
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
    bar = Progress(*columns, console=Console(file=file))
    return bar, bar.add_task("", total=steps, completed=step, text="compiling")
