"""The figures of data hyper-cleaning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hyperax.experiments.figures import BLUE, GREEN, GREY, INK, RED, legend, new_figure, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLORS = (BLUE, GREEN, RED, INK)


def by_budget(rows: Sequence[Mapping[str, Any]], others: Mapping[str, float]) -> Figure:
    """Precision, recall and F1 of the suspects, and test accuracy, by R.

    Arguments:
        rows: {"budget", "precision", "recall", "f1", "test_accuracy"}, means over the draws.
        others: test accuracy of the models that were not cleaned, by name.
    """
    figure = new_figure(3.2)
    left, right = figure.subplots(1, 2)
    budgets = [row["budget"] for row in rows]
    for name, color in (("f1", BLUE), ("precision", GREEN), ("recall", RED)):
        label = "F1" if name == "f1" else name
        left.plot(budgets, [100 * row[name] for row in rows], color=color, marker="o", markersize=4, label=label)
    style(left, xlabel="largest sum of weights $R$", ylabel="suspects (%)")
    legend(left, "lower right")
    right.plot(budgets, [100 * r["test_accuracy"] for r in rows], color=BLUE, marker="o", markersize=4, label="cleaned")
    for (name, accuracy), line in zip(others.items(), ("-", "--", ":"), strict=True):
        right.axhline(100 * accuracy, color=GREY, linestyle=line, linewidth=1.4, label=name)
    style(right, xlabel="largest sum of weights $R$", ylabel="test accuracy (%)")
    legend(right, "best")
    for axes in (left, right):
        axes.set_xticks(budgets)
    return figure


def weights_of_both(weights: np.ndarray, wrong: np.ndarray) -> Figure:
    """Histogram of the weights of examples with right and with wrong labels."""
    figure = new_figure(2.8)
    axes = figure.subplots()
    both, colors = [weights[~wrong], weights[wrong]], [BLUE, RED]
    axes.hist(both, np.linspace(0, 1, 21).tolist(), color=colors, label=["right label", "wrong label"])
    axes.set_yscale("symlog", linthresh=10)
    style(axes, xlabel=r"weight $\lambda_i$", ylabel="examples")
    axes.legend(loc="upper center", fontsize=9, frameon=False)
    return figure


def by_hyperiteration(curve: Sequence[Mapping[str, Any]]) -> Figure:
    """E and F1 after each hyperiteration, one line an R."""
    figure = new_figure(4.2)
    top, bottom = figure.subplots(2, 1, sharex=True)
    for i, budget in enumerate(dict.fromkeys(record["budget"] for record in curve)):
        own = [record for record in curve if record["budget"] == budget]
        steps = [record["curve"] for record in own]
        look = {"color": _COLORS[i % len(_COLORS)], "linewidth": 1.6, "label": f"$R$ = {budget}"}
        top.plot(steps, [record["value"] for record in own], **look)
        bottom.plot(steps, [100 * record["f1"] for record in own], **look)
    style(top, ylabel="validation error $E$")
    style(bottom, xlabel="hyperiteration", ylabel="F1 of the suspects (%)")
    legend(bottom, "lower right")
    return figure


def contact_sheet(images: np.ndarray, given: np.ndarray, true: np.ndarray) -> Figure:
    """The first suspects, uint8 [count, height, width], with their given and true labels; red where they are equal."""
    columns = 10
    rows = -(-len(images) // columns) or 1
    figure = new_figure(0.95 * rows + 0.1)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid:
        axes.set_axis_off()
    for axes, image, label, right in zip(grid, images, given, true, strict=False):
        axes.imshow(image, cmap="gray_r", vmin=0, vmax=255)
        axes.set_title(f"{label}, is {right}", fontsize=8, color=RED if label == right else INK, pad=2)
    return figure
