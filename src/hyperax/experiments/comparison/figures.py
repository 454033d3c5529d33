"""Figures of a comparison: accuracies with intervals, paired differences, validation accuracy during training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hyperax.experiments.comparison.entrants import Setting
from hyperax.experiments.config import Published
from hyperax.experiments.figures import BLUE, GREEN, GREY, INK, RED, legend, new_figure, style
from hyperax.experiments.study import Part, Shown

_COLORS = (BLUE, RED, GREEN, "#cc79a7", "#e69f00", "#56b4e9", INK, GREY)  # Okabe and Ito


def accuracies_figure(records: Sequence[Mapping[str, Any]], published: Mapping[tuple[str, str], Published]) -> Shown:
    """A panel a setting: accuracy of every learner, disjoint and overlapping, beside the published one."""
    settings = list(dict.fromkeys(record["setting"] for record in records))
    of = {setting: [r for r in records if r["setting"] == setting] for setting in settings}
    heights = [0.9 + 0.27 * len(rows) for rows in of.values()]
    figure = new_figure(sum(heights))
    panels = figure.subplots(len(settings), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, (setting, rows) in zip(panels, of.items(), strict=True):
        at = np.arange(len(rows))[::-1]
        for key, color, marker, label, shift in (
            (None, BLUE, "o", "disjoint", 0.0),
            ("overlapping", GREY, "o", "overlapping", -0.22),
        ):
            scores = [row if key is None else row[key] for row in rows]
            values, halves = ([100 * score[name] for score in scores] for name in ("accuracy", "ci95"))
            face = color if key is None else "white"
            panel.errorbar(
                values, at + shift, xerr=halves, fmt=marker, color=color, markersize=4.5, markerfacecolor=face,
                linewidth=1.2, label=label,
            )  # fmt: skip
        known = [(100 * number.accuracy, y) for row, y in zip(rows, at, strict=True)
                 if (number := published.get((setting, row["entrant"])))]  # fmt: skip
        if known:
            panel.plot(*zip(*known, strict=True), "x", color=RED, markersize=6, label="published")
        panel.set_yticks(at, [row["entrant"] for row in rows])
        panel.set_ylim(-0.7, len(rows) - 0.4)
        style(panel, ylabel="")
        panel.set_title(Setting.named(setting).words, loc="left", fontsize=9, color=INK)
    above = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "ncols": 3, "frameon": False}
    panels[0].legend(fontsize=8.5, labelcolor=INK, borderaxespad=0.1, **above)
    panels[-1].set_xlabel("accuracy on unseen classes (%)", color=INK)
    caption = (
        "<strong>Accuracy on unseen classes</strong>, with 95 % intervals over the same episodes. Support and query "
        "sets are disjoint (filled) or drawn independently (open); crosses are published numbers."
    )
    return Shown("accuracies", figure, "accuracy of every learner with its interval", caption)


def differences_figure(setting: Setting, table: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Shown:
    """Paired differences between every two learners of a setting, row minus column."""
    names = list(table)
    means = np.array([[100 * table[a][b]["difference"] if a != b else 0.0 for b in names] for a in names])
    halves = np.array([[100 * table[a][b]["ci95"] if a != b else 0.0 for b in names] for a in names])
    figure = new_figure(1.6 + 0.42 * len(names))
    panel = figure.subplots()
    largest = max(float(np.abs(means).max()), 1e-9)
    panel.imshow(means, cmap="RdBu", vmin=-largest, vmax=largest, aspect="auto")
    for i in range(len(names)):
        for j in range(len(names)):
            if i != j:
                told = abs(means[i, j]) > halves[i, j]
                dark = abs(means[i, j]) > 0.6 * largest
                panel.text(
                    j, i, f"{means[i, j]:+.1f}".replace("-0.0", "0.0"), ha="center", va="center", fontsize=7,
                    color="white" if dark else INK, fontweight="bold" if told else "normal",
                )  # fmt: skip
    panel.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=7.5)
    panel.set_yticks(range(len(names)), names, fontsize=7.5)
    panel.tick_params(length=0)
    caption = (
        f"<strong>{setting.words}: row minus column</strong>, points of accuracy, paired by episode; bold where the "
        "95 % interval excludes 0."
    )
    return Shown(f"differences-{setting.name}", figure, "paired differences between learners", caption)


def curves_figure(curves: Sequence[tuple[Setting, str, Part]]) -> Shown:
    """Accuracy on validation classes by hyperiteration, a panel a setting."""
    settings = list(dict.fromkeys(setting for setting, _, _ in curves))
    figure = new_figure(2.9 * len(settings))
    panels = figure.subplots(len(settings), 1, squeeze=False)[:, 0]
    for panel, setting in zip(panels, settings, strict=True):
        here = [(name, part) for at, name, part in curves if at == setting]
        for i, (name, part) in enumerate(here):
            points = [(r["step"], 100 * r["accuracy"]) for r in part.records if r["what"] == "validation"]
            if not points:  # it diverged before the first
                continue
            line = ("-", "--", ":")[i // len(_COLORS) % 3]
            label = name.removeprefix(f"{setting.name}-")
            panel.plot(
                *zip(*points, strict=True), line, marker="o", markersize=2.5, linewidth=1.3,
                color=_COLORS[i % len(_COLORS)], label=label,
            )  # fmt: skip
        style(panel, ylabel="validation accuracy (%)")
        panel.set_title(setting.words, loc="left", fontsize=9, color=INK)
        panel.legend(fontsize=6.5, frameon=False, ncols=2, loc="lower right")
    panels[-1].set_xlabel("hyperiteration", color=INK)
    caption = (
        "<strong>Accuracy on validation classes during training</strong>; the best iterate of each was tested. A "
        "learner's hyperiterations are not all of the same cost (see the seconds in records.jsonl)."
    )
    return Shown("training", figure, "validation accuracy by hyperiteration", caption)


def sweep_figure(points: Sequence[tuple[int, Mapping[str, Any], int]], axis: str) -> Shown:
    """Accuracy against the value of a setting, and the hyperiteration of the iterate that was kept.

    Arguments:
        points: (value, record of the test, hyperiteration).
        axis: what the values are.
    """
    points = sorted(points, key=lambda point: point[0])
    figure = new_figure(3.4)
    panel = figure.subplots()
    at = range(len(points))
    for key, color, label in (("validation", BLUE, "validation classes"), (None, RED, "test classes")):
        scores = [record if key is None else record[key] for _, record, _ in points]
        values, halves = ([100 * score[name] for score in scores] for name in ("accuracy", "ci95"))
        panel.errorbar(at, values, yerr=halves, marker="o", markersize=4.5, color=color, linewidth=1.4, label=label)
    style(panel, axis, "accuracy (%)")
    panel.set_xticks(at, [f"{value}\n({step:,})" for value, _, step in points], fontsize=8)
    legend(panel, "lower right")
    caption = (
        "<strong>Accuracy against the value</strong>, with 95 % intervals over episodes; in brackets the "
        "hyperiteration of the iterate that validation chose."
    )
    return Shown("sweep", figure, "accuracy against the value", caption)
