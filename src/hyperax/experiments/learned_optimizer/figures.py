"""The figures of a learned optimizer: loss curves beside the baselines', and its meta-training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hyperax.experiments.figures import BLUE, GREEN, GREY, INK, RED, legend, new_figure, smoothing_window, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ORANGE, _PURPLE, _SKY = "#e69f00", "#cc79a7", "#56b4e9"
_BASELINES = {"SGD": GREY, "momentum": BLUE, "RMSProp": GREEN, "Adam": _ORANGE}
_LEARNED = (RED, INK, _PURPLE, _SKY)


_EARLY = 0.05
"""Share of the steps of a panel that its limits do not count."""


@dataclass(frozen=True)
class Curve:
    """The losses of one optimizer on the test problems, [problems, times].

    Fields:
        optimizer: its name, of which the colour depends.
        label: in the legend.
        learned: drawn strongly, with its place among the learned ones.
        dotted: one of two curves of the same optimizer, the lesser one.
    """

    optimizer: str
    label: str
    losses: np.ndarray
    learned: int | None = None
    dotted: bool = False


def loss_curves(times: np.ndarray, short: Sequence[Curve], long: Sequence[Curve], horizon: int) -> Figure:
    """Mean loss by inner step, with its 95 % interval over problems: up to the horizon, and up to the last time.

    Arguments:
        times: of the measurements; those of a short curve are the first ones.
        short: curves up to the horizon.
        long: curves up to the last time; none leaves the second panel out.
        horizon: T of the training.
    """
    figure = new_figure(3.6)
    panels = np.ravel(figure.subplots(1, 2 if long else 1))
    for axes, curves in zip(panels, (short, long), strict=False):
        for curve in curves:
            _draw(axes, times, curve)
        style(axes, xlabel="inner step $t$")
        _limits(axes, times[times <= horizon] if axes is panels[0] else times, curves)
    panels[0].set_xlim(0, horizon)
    panels[0].set_ylabel("mean loss", color=INK)
    legend(panels[0], "best")
    if long:
        panels[1].axvline(horizon, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        panels[1].set_xlim(0, times[-1])
        legend(panels[1], "best")
    return figure


def _draw(axes: Axes, times: np.ndarray, curve: Curve) -> None:
    color = _BASELINES.get(curve.optimizer, INK) if curve.learned is None else _LEARNED[curve.learned % len(_LEARNED)]
    losses = np.where(np.isfinite(curve.losses), curve.losses, np.nan)
    at, mean = times[: losses.shape[1]], losses.mean(0)
    if curve.dotted:
        axes.plot(at, mean, color=color, linewidth=1.2, linestyle=":", label=curve.label)
        return
    axes.plot(at, mean, color=color, linewidth=1.5 if curve.learned is None else 2.4, label=curve.label, zorder=3)
    if len(losses) > 1:
        half = 1.96 * losses.std(0, ddof=1) / len(losses) ** 0.5
        axes.fill_between(at, mean - half, mean + half, color=color, alpha=0.18, linewidth=0)


def _limits(axes: Axes, times: np.ndarray, curves: Sequence[Curve]) -> None:
    """Limits by the means after the first steps: the fall from the start, and bands that reach below zero, would
    leave no room for the differences at the end.
    """
    later = [curve.losses[:, _EARLY * times[-1] <= times[: curve.losses.shape[1]]].mean(0) for curve in curves]
    means = np.concatenate(later)
    means = means[np.isfinite(means) & (means > 0)]
    if means.size:
        begin = max(curve.losses[:, 0].mean() for curve in curves)
        low, high = means.min(), min(means.max(), 10 * begin)
        margin = (high / low) ** 0.05
        _logarithmic(axes, np.array([low, high]))
        axes.set_ylim(low / margin, high * margin)


def _logarithmic(axes: Axes, values: np.ndarray) -> None:
    """A logarithmic axis with plain numbers at 1, 2 and 5 where these values span less than two decades."""
    from matplotlib.ticker import LogLocator, NullLocator

    axes.set_yscale("log")
    if values.min() > 0 and values.max() < 100 * values.min():
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if values.max() > 5 * values.min() else "all"))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())


def meta_training(
    records: Mapping[str, Sequence[Mapping[str, Any]]], best: Mapping[str, int], baseline: tuple[str, float]
) -> Figure:
    """The meta-training loss by hyperiteration, and the mean final loss on validation problems.

    Arguments:
        records: rule -> {"step", "value", maybe "score"}, by step.
        best: rule -> the hyperiteration that was kept.
        baseline: name and mean final loss of the best baseline on the validation problems.
    """
    figure = new_figure(4.6)
    top, bottom = figure.subplots(2, 1, sharex=True)
    for place, (rule, own) in enumerate(records.items()):
        color = _LEARNED[place % len(_LEARNED)]
        steps, values = np.array([(r["step"], r["value"]) for r in own if r["value"] is not None]).T
        if len(values) > 40:
            top.plot(steps, values, color=color, linewidth=0.6, alpha=0.3)
        top.plot(steps, _smooth(values), color=color, linewidth=1.8, label=rule)
        scored = [(r["step"], r["score"]) for r in own if r.get("score") is not None]
        at, scores = np.array(scored).T
        bottom.plot(at, scores, color=color, linewidth=1.8, marker="o", markersize=3, label=rule)
        kept = scores[list(at).index(best[rule])]
        bottom.plot(best[rule], kept, "D", color=color, markersize=6, markerfacecolor="white", zorder=4)
    name, level = baseline
    bottom.axhline(level, color=INK, linewidth=1.2, linestyle=(0, (4, 3)), label=f"{name}, best baseline")
    for axes, words in ((top, "meta-training loss"), (bottom, "final loss")):
        style(axes, ylabel=words)
        drawn = np.concatenate([np.asarray(line.get_ydata(), float) for line in axes.get_lines()])
        _logarithmic(axes, drawn)
    bottom.set_xlabel("hyperiteration", color=INK)
    legend(bottom, "best")
    return figure


def _smooth(values: np.ndarray) -> np.ndarray:
    half = smoothing_window(len(values)) // 2
    at, total = np.arange(len(values)), np.concatenate([[0.0], np.cumsum(values)])
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)
