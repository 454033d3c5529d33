"""Figures 3 and 4 of the paper, and the times, from records."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from hyperax.experiments.figures import BLUE, GREY, INK, RED, legend, new_figure, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXACT = "exact"
"""In place of T: the inner problem solved in closed form."""

PAPER = {
    "source": "Franceschi et al. 2018 (ICML), Table 2",
    "machine": "NVIDIA Tesla M40",
    "what": "execution time of a run; the number of hyperiterations is not published",
    "seconds": {"1": 60, "4": 119, "16": 356, "64": 1344, "256": 5532, EXACT: 320},
}
"""Its accuracies are published as curves only (Figure 4)."""


def objectives(records: list[dict[str, Any]]) -> Figure:
    """f_T along its own optimization, and what is left of it over f at the same H (Figure 3)."""
    figure = new_figure(5.2)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3.0, 2.0])
    for T, color, dashes in _looks(records):
        label = "exact: $f$" if T == EXACT else f"$T$ = {T}"
        _band(above, *_by_step(records, T, lambda r: r["value"]), color, dashes, label)
        if T != EXACT:
            _band(below, *_by_step(records, T, lambda r: r["value"] - r["exact"]), color, dashes, "")
    style(above, ylabel="outer objective")
    above.legend(fontsize=9, ncols=3, frameon=False, labelcolor=INK)
    below.axhline(0.0, color=GREY, linewidth=1.0)
    style(below, xlabel="hyperiteration", ylabel="$f_T(H) - f(H)$")
    below.xaxis.set_major_formatter("{x:,.0f}")
    return figure


def accuracies(records: list[dict[str, Any]]) -> Figure:
    """Test accuracy of w_T during the optimization of H (Figure 4)."""
    figure = new_figure(3.8)
    axes = figure.subplots()
    floor = 100.0
    for T, color, dashes in _looks(records):
        steps, mean, spread = _by_step(records, T, lambda r: 100 * r["test"])
        top = int(np.argmax(mean))
        label = f"{'exact' if T == EXACT else f'$T$ = {T}'}: {mean[top]:.1f} % at {steps[top]:,.0f}"
        _band(axes, steps, mean, spread, color, dashes, label)
        axes.plot(steps[top], mean[top], "o", color=color, markersize=6, markeredgecolor="white", zorder=5)
        floor = min(floor, float(np.min(mean[steps >= steps[-1] / 3])))
    # The first steps of T = 1 fall far below: the axis shows what the rest does.
    axes.set_ylim(floor - 3.0, None)
    style(axes, xlabel="hyperiteration", ylabel="test accuracy (%)")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    legend(axes, "lower right")
    return figure


def times(summary: dict[str, Any]) -> Figure:
    """Seconds of a hypergradient by T and method (Table 2)."""
    figure = new_figure(3.2)
    axes = figure.subplots()
    rows = summary["timing"]["seconds_per_hypergradient"]
    for method, color in (("Reverse", RED), ("Doubling", BLUE)):
        points = np.array([(row["steps"], 1e3 * row["seconds"]) for row in rows if row["method"] == method])
        axes.loglog(*points.T, "o-", color=color, linewidth=1.8, markersize=5, label=method)
    exact = next(1e3 * row["seconds"] for row in rows if row["steps"] == EXACT)
    axes.axhline(exact, color=INK, linewidth=1.4, linestyle=(0, (4, 3)), label="exact (closed form)")
    first = milliseconds(rows, "Reverse")
    shared = [T for T in first if str(T) in PAPER["seconds"]]
    if len(shared) > 1:
        scale = first[shared[0]] / PAPER["seconds"][str(shared[0])]
        paper = [scale * PAPER["seconds"][str(T)] for T in shared]
        axes.loglog(shared, paper, "s:", color=GREY, linewidth=1.2, markersize=4, label="paper, scaled")
    axes.set_xticks(list(first), [str(T) for T in first])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter("{x:g}")
    style(axes, xlabel="inner steps $T$", ylabel="ms a hypergradient")
    legend(axes, "best")
    return figure


def milliseconds(rows: list[dict[str, Any]], method: str) -> dict[Any, float]:
    """Of one hyperiteration, by T."""
    return {row["steps"]: 1e3 * row["seconds"] for row in rows if row["method"] == method}


def name_of(T: int | str) -> str:
    """What a curve is called."""
    return "the exact solution" if T == EXACT else f"T = {T}"


def _looks(records: list[dict[str, Any]]) -> list[tuple[int | str, Any, Any]]:
    """(T, color, dashes) of the curves that are there: darker for larger T, black dashes for the exact one."""
    from matplotlib import colormaps

    found = {record["steps"] for record in records}
    counts = sorted(T for T in found if T != EXACT)
    shades = colormaps["viridis_r"](np.linspace(0.12, 0.95, max(len(counts), 2)))
    looks: list[tuple[int | str, Any, Any]] = [(T, shades[i], "-") for i, T in enumerate(counts)]
    return looks + ([(EXACT, INK, (0, (4, 2)))] if EXACT in found else [])


def _by_step(records: list[dict[str, Any]], T: int | str, read: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps, mean over draws and standard deviation of one T's curves."""
    found: dict[int, list[float]] = {}
    for record in records:
        if record["steps"] == T:
            found.setdefault(record["step"], []).append(read(record))
    steps = np.array(sorted(found))
    values = [np.array(found[step]) for step in steps]
    return steps, np.array([x.mean() for x in values]), np.array([x.std(ddof=1) if len(x) > 1 else 0 for x in values])


def _band(axes: Any, steps: Any, mean: Any, spread: Any, color: Any, dashes: Any, label: str) -> None:
    axes.plot(steps, mean, color=color, linestyle=dashes, linewidth=1.8, label=label or None)
    if np.any(spread):
        axes.fill_between(steps, mean - spread, mean + spread, color=color, alpha=0.1, linewidth=0)
