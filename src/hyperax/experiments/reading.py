"""What a run folder holds, read without JAX and checked: what reports and figures are made from."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Run:
    """What a run folder holds.

    Fields:
        folder: where it is.
        config, summary: as written; `summary` is `None` until the run has ended.
        records: by step; of a step recorded twice, the later one.
        timings: in the order of the file.
        pairs: the arrays of `pairs.npz`, if it is there.
    """

    folder: Path
    config: dict[str, Any]
    records: list[dict[str, Any]]
    timings: list[dict[str, Any]]
    summary: dict[str, Any] | None
    pairs: dict[str, np.ndarray] | None


def read_run(folder: str | Path) -> Run:
    """The contents of a run folder; `ValueError` if it is none, naming the file and the line if one is damaged."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        found = f"{folder} is not a run folder (no config.json)" if folder.is_dir() else f"there is no folder {folder}"
        raise ValueError(f"{found}: give the folder that `hyperax run` wrote.")
    running = not (folder / "summary.json").is_file()
    config = _parsed(_text(folder / "config.json"), "config.json")
    summary = None if running else _parsed(_text(folder / "summary.json"), "summary.json", test=dict)
    if summary is not None and not isinstance(summary["test"].get("accuracy"), int | float):
        raise ValueError('summary.json is damaged: its "test" has no accuracy; run the recipe again.')
    records, timings = (
        _lines(folder / f"{n}.jsonl", k, running) for n, k in (("records", "value"), ("timings", "seconds"))
    )
    by_step = {record["step"]: record for record in records}
    records = [by_step[step] for step in sorted(by_step)]
    return Run(folder, config, records, timings, summary, _arrays(folder / "pairs.npz"))


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path.name} is damaged: it is not text; restore it or run the recipe again.") from None


def _parsed(text: str, where: str, **fields: Any) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} is damaged: {error}; restore it or run the recipe again.") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where} is damaged: it is not a JSON object; restore it or run the recipe again.")
    for name, kind in fields.items():
        if not isinstance(value.get(name), kind):
            raise ValueError(f'{where} is damaged: "{name}" is missing or of the wrong type; run the recipe again.')
    return value


def _lines(path: Path, key: str, running: bool) -> list[dict[str, Any]]:
    lines = _text(path).splitlines(keepends=True) if path.is_file() else []
    if running and lines and not lines[-1].endswith("\n"):
        lines.pop()  # being written, or cut short by the interruption
    number = {"step": int, key: int | float}
    return [_parsed(x, f"{path.name}, line {i},", **number) for i, x in enumerate(lines, 1) if x.strip()]


def _arrays(path: Path) -> dict[str, np.ndarray] | None:
    if not path.is_file():
        return None
    needed = [f"{pair}_{part}" for pair in ("near", "far") for part in ("images", "features", "distance")]
    try:
        with np.load(path) as arrays:
            return {name: arrays[name] for name in [*needed, "names", "component_index"]}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"pairs.npz is damaged: {error}; delete it to report without that figure.") from None


def best_record(records: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The record of the smallest validation score, `None` before the first validation."""
    scored = [record for record in records if np.isfinite(record.get("score", np.nan))]
    return min(scored, key=lambda record: record["score"], default=None)


def compared(summary: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Accuracies on unseen classes, measured or published: (name, {"accuracy", "ci95", ...}), this run first."""
    rows = [("this run", summary["test"]), *(summary.get("baselines") or {}).items()]
    return rows + ([("paper", summary["paper"])] if summary.get("paper") else [])
