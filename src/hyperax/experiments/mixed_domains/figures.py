"""The figures of mixed domains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hyperax.experiments.figures import BLUE, GREEN, GREY, INK, RED, legend, new_figure, style
from hyperax.experiments.study import Shown

_COLORS = (BLUE, GREEN, RED, INK)


def accuracies(scores: Sequence[Mapping[str, Any]]) -> Shown:
    """A panel for the tasks of each domain, and one for the new domain: accuracy of every meta-learner.

    Arguments:
        scores: {"domain", "ways", "shots", "new", "row", "accuracy", "ci95"}.
    """
    panels: dict[str, list[Mapping[str, Any]]] = {}
    for score in scores:
        where = f"{score['domain']}, {score['ways']}-way {score['shots']}-shot"
        panels.setdefault(where + (", as a new domain" if score["new"] else ""), []).append(score)
    heights = [0.95 + 0.27 * len(rows) for rows in panels.values()]
    figure = new_figure(sum(heights))
    drawn = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (title, rows) in zip(drawn, panels.items(), strict=True):
        at = np.arange(len(rows))[::-1]
        for y, row in zip(at, rows, strict=True):
            color = BLUE if "difference" in row and not row["row"].startswith("nearest") else GREY
            axes.errorbar(
                100 * row["accuracy"], y, xerr=100 * row["ci95"], fmt="o", color=color, markersize=4.5, linewidth=1.2
            )
        axes.set_yticks(at, [row["row"] for row in rows])
        axes.set_ylim(-0.7, len(rows) - 0.4)
        style(axes, ylabel="")
        axes.set_title(title, loc="left", fontsize=9, color=INK)
    drawn[-1].set_xlabel("accuracy on unseen classes (%)", color=INK)
    caption = (
        "<strong>Accuracy on unseen classes</strong>, all draws, with 95 % intervals over episodes; grey: what the "
        "others are compared with, and the pixels. The axes differ."
    )
    return Shown("accuracies", figure, "accuracy of every meta-learner on each domain", caption)


def curves(name: str, records: Sequence[Mapping[str, Any]], title: str, domains: Sequence[str]) -> Shown:
    """Validation accuracy by hyperiteration, a panel a domain; every draw thin, their mean thick.

    Arguments:
        name: of the figure.
        records: {"row", "draw", "step", "accuracies": {domain: fraction}}.
        title: the first sentence of the caption.
        domains: those of the panels.
    """
    figure = new_figure(2.8 * len(domains))
    panels = figure.subplots(len(domains), 1, squeeze=False)[:, 0]
    rows = list(dict.fromkeys(record["row"] for record in records))
    for axes, domain in zip(panels, domains, strict=True):
        for row, color in zip(rows, _COLORS, strict=False):
            own = [record for record in records if record["row"] == row and domain in record["accuracies"]]
            draws = sorted({record["draw"] for record in own})
            lines = [[(r["step"], 100 * r["accuracies"][domain]) for r in own if r["draw"] == draw] for draw in draws]
            for line in lines if len(lines) > 1 else []:
                axes.plot(*zip(*line, strict=True), color=color, linewidth=0.7, alpha=0.35)
            steps = sorted({step for line in lines for step, _ in line})
            means = [np.mean([y for line in lines for step, y in line if step == at]) for at in steps]
            axes.plot(steps, means, color=color, marker="o", markersize=3, linewidth=1.8, label=row)
        style(axes, ylabel="validation accuracy (%)")
        axes.set_title(domain, loc="left", fontsize=9, color=INK)
    legend(panels[0], "best")
    panels[-1].set_xlabel("hyperiteration", color=INK)
    return Shown(name, figure, title, f"<strong>{title}</strong>: each draw thin, their mean thick.")
