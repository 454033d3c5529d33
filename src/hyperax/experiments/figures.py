"""The figures of a run, drawn from its folder alone: no data set, no JAX."""

from __future__ import annotations

import json
import textwrap
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_BLUE, _RED, _GREEN, _GREY, _INK = "#0072b2", "#d55e00", "#009e73", "#8a8f98", "#24292f"  # Okabe and Ito, and greys
_WIDTH, _DOTS_PER_INCH = 7.0, 160  # text stays legible when a page shrinks a figure to 700 pixels


@dataclass(frozen=True)
class Run:
    """What a run folder holds.

    Fields:
        folder: where it is.
        config, summary: as written; `summary` is `None` until the run has ended.
        records, timings: by step; of a step recorded twice, as after a resume, the later one.
        pairs: the arrays of `pairs.npz`, if it is there.
    """

    folder: Path
    config: dict[str, Any]
    records: list[dict[str, Any]]
    timings: list[dict[str, Any]]
    summary: dict[str, Any] | None
    pairs: dict[str, np.ndarray] | None


def read_run(folder: str | Path) -> Run:
    """The contents of a run folder; `ValueError` if it is none, or names the damaged file and line."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}: give the folder that `hyperax run` wrote.")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not a run folder, it has no config.json: give the one that `hyperax run` wrote.")
    config = _parsed((folder / "config.json").read_text("utf-8"), "config.json")
    summary = None
    if (folder / "summary.json").is_file():
        summary = _parsed((folder / "summary.json").read_text("utf-8"), "summary.json")
        if not isinstance((summary.get("test") or {}).get("accuracy"), int | float):
            raise ValueError("summary.json is damaged: it has no test accuracy; run `hyperax run` again to write it.")
    lines = [_lines(folder / name, key, summary is None) for name, key in (("records", "value"), ("timings", "seconds"))]
    return Run(folder, config, *lines, summary, _arrays(folder / "pairs.npz"))


def _parsed(text: str, where: str, *keys: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} is damaged: {error}; restore the file or run the recipe again.") from None
    missing = keys if not isinstance(value, dict) else [k for k in keys if not isinstance(value.get(k), int | float)]
    if missing or not isinstance(value, dict):
        lacking = f"a JSON object with numbers {' and '.join(missing)}" if missing else "a JSON object"
        raise ValueError(f"{where} is damaged: it is not {lacking}; restore the file or run the recipe again.")
    return value


def _lines(path: Path, key: str, running: bool) -> list[dict[str, Any]]:
    path = path.with_suffix(".jsonl")
    lines = path.read_text("utf-8").splitlines(keepends=True) if path.is_file() else []
    if running and lines and not lines[-1].endswith("\n"):
        lines.pop()  # being written, or cut short by the interruption
    named = [(f"{path.name}, line {i},", line) for i, line in enumerate(lines, 1) if line.strip()]
    by_step = {value["step"]: value for value in (_parsed(line, name, "step", key) for name, line in named)}
    return [by_step[step] for step in sorted(by_step)]


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
    scored = [record for record in records if np.isfinite(record.get("score") or np.nan) or record.get("score") == 0]
    return min(scored, key=lambda record: record["score"], default=None)


def compared(summary: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Everything that was measured on unseen classes or published: (name, {"accuracy", "ci95", ...}), this run first."""
    rows = [("this run", summary["test"]), *(summary.get("baselines") or {}).items()]
    return rows + ([("paper", summary["paper"])] if summary.get("paper") else [])


def smoothing_window(count: int) -> int:
    """Records in the moving average of the training curves: a fortieth of them, odd, so that noise goes and shape stays.

    >>> smoothing_window(400)
    11
    """
    return 2 * (count // 80) + 1


def training_curves(records: list[dict[str, Any]]) -> Figure:
    """f_T, accuracy in training and validation, and the inner step size if it is learned, by hyperiteration.

    Arguments:
        records: {"step", "value", "metrics", maybe "score" and "validation"}, by step, at least one.

    Thin lines are the records, thick ones their centred mean over `smoothing_window`. f_T is on a logarithmic axis if
    it is positive, accuracy on one logarithmic in the error 1 - accuracy if it passes 90 %.
    Reference: Franceschi et al. 2018, eq. 9 (f_T of a meta-learning problem).
    """
    step_sizes = _series(records, lambda record: record["metrics"]["step_size"])
    accuracies = _series(records, lambda record: 100 * record["metrics"]["accuracy"])
    validations = _series(records, lambda record: 100 * record["validation"]["accuracy"])
    intervals = _series(records, lambda record: 100 * (record["validation"].get("ci95") or 0.0))[1]
    heights = [2.1, 2.6] + [1.3] * (len(step_sizes[0]) > 0)
    figure = _figure(sum(heights))
    panels = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]

    values = _series(records, lambda record: record["value"])
    _curve(panels[0], *values, _BLUE, "training episodes")
    if values[1].size and values[1].min() > 0:
        panels[0].set_yscale("log")
        _plain_log_ticks(panels[0], values[1])
    _style(panels[0], ylabel="outer objective $f_T$")

    _curve(panels[1], *accuracies, _BLUE, "training episodes")
    if validations[0].size:
        panels[1].plot(*validations, color=_RED, linewidth=1.8, marker="o", markersize=3, label="validation classes")
        low, high = validations[1] - intervals, np.minimum(validations[1] + intervals, 100)
        panels[1].fill_between(validations[0], low, high, color=_RED, alpha=0.2, linewidth=0)
    best = best_record(records)
    if best is not None:
        for panel in panels:
            panel.axvline(best["step"], color=_INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        top = 100 * best["validation"]["accuracy"] if "validation" in best else 100 * (1 - best["score"])
        label = f"best iterate: {top:.4g} % at {best['step']:,}"
        panels[1].plot(best["step"], top, "D", color=_INK, markersize=5.5, markerfacecolor="white", label=label)
    _accuracy_axis(panels[1], np.concatenate([accuracies[1], validations[1]]))
    _style(panels[1], ylabel="accuracy (%)")
    panels[1].legend(loc="lower right", frameon=False, fontsize=9)
    if len(heights) == 3:
        _curve(panels[2], *step_sizes, _GREEN, "")
        _style(panels[2], ylabel=r"step size $\eta$")
    panels[-1].set_xlabel("hyperiteration", color=_INK)
    panels[-1].xaxis.set_major_formatter("{x:,.0f}")
    return figure


def validation_of_steps(entries: list[dict[str, Any]], chosen: int | None, training: int | None) -> Figure:
    """Accuracy on validation classes by the number T of inner steps.

    Arguments:
        entries: {"steps": T, "accuracy": fraction, "ci95": half-width of a 95 % interval or None}.
        chosen: the T that testing uses; `training`: the T of f_T in training.

    Reference: Franceschi et al. 2018, Sec. 5.2, Figure 6.
    """
    entries = sorted(entries, key=lambda entry: entry["steps"])
    steps, accuracies, intervals = np.array(
        [(entry["steps"], 100 * entry["accuracy"], 100 * (entry.get("ci95") or 0.0)) for entry in entries]
    ).T
    figure = _figure(3.0)
    axes = figure.subplots()
    axes.plot(steps, accuracies, color=_RED, linewidth=1.4, alpha=0.6, zorder=2)
    axes.errorbar(steps, accuracies, intervals, fmt="o", color=_RED, markersize=5, elinewidth=1.2, capsize=3, zorder=3)
    if training is not None:
        axes.axvline(training, color=_GREY, linewidth=1.4, linestyle=(0, (4, 3)), label=f"T in training: {training}")
    for at in np.flatnonzero(steps == chosen):
        label = f"chosen T = {chosen}: {accuracies[at]:.4g} %"
        axes.plot(steps[at], accuracies[at], "o", color=_INK, markersize=12, markerfacecolor="none", label=label, zorder=4)
    axes.xaxis.get_major_locator().set_params(integer=True)
    _style(axes, ylabel="validation accuracy (%)", xlabel="inner steps $T$")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="best", frameon=False, fontsize=9)
    return figure


def comparison(rows: list[tuple[str, dict[str, Any]]], chance: float | None = None) -> Figure:
    """Accuracy on unseen classes: this run, the baselines, the paper.

    Arguments:
        rows: (name, {"accuracy": fraction, "ci95": half-width or None}), the one to stand out first; the name "paper"
            is drawn hatched, as it was not measured here.
        chance: accuracy of guessing, a fraction.

    Reference: Franceschi et al. 2018, Table 3.
    """
    figure = _figure(0.75 + 0.45 * len(rows))
    axes = figure.subplots()
    for at, (name, score) in enumerate(rows):
        accuracy, interval = 100 * score["accuracy"], 100 * (score.get("ci95") or 0.0)
        face, hatch = (_BLUE, None) if at == 0 else ("white", "////") if name == "paper" else ("#a9b4c0", None)
        axes.barh(at, accuracy, 0.62, color=face, hatch=hatch, edgecolor=_GREY if hatch else face, linewidth=0.8, zorder=2)
        if interval:
            axes.errorbar(accuracy, at, xerr=interval, color=_INK, elinewidth=1.2, capsize=3, zorder=3)
        text = f"{accuracy:.2f} ± {interval:.2f}" if interval else f"{accuracy:.4g}"
        axes.text(accuracy + interval + 1.5, at, text, va="center", color=_INK, weight="bold" if at == 0 else "normal")
    if chance is not None:
        axes.axvline(100 * chance, color=_INK, linewidth=1.0, linestyle=":", zorder=4, label=f"chance: {100 * chance:.3g}")
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9, borderaxespad=0.1)
    axes.set_yticks(range(len(rows)), [textwrap.fill(name, 26) for name, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 118)
    axes.set_xticks(range(0, 101, 20))
    _style(axes, xlabel="accuracy on unseen classes (%)", grid="x")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return figure


