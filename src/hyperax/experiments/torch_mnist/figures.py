"""What `torch-mnist` found: step sizes by step, weight decay by layer, f_T by hyperiteration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hyperax.experiments.figures import BLUE, GREEN, GREY, RED, legend, new_figure, style
from hyperax.experiments.study import Shown
from hyperax.experiments.torch_mnist.names import CONSTANT, COSINE, START, TUNED

_COLORS = {START: GREY, CONSTANT: BLUE, COSINE: GREEN, TUNED: RED}
Settings = Mapping[str, Mapping[str, Any]]


def step_sizes(knots: Sequence[float], steps: int) -> np.ndarray:
    """eta_t, t = 1, ..., T: linear between knots that are evenly spaced.

    >>> step_sizes([0.1, 0.3], 5).round(2).tolist()
    [0.1, 0.15, 0.2, 0.25, 0.3]
    """
    return np.interp(np.linspace(0, 1, steps), np.linspace(0, 1, len(knots)), knots)


def schedules_figure(settings: Settings, steps: int) -> Shown:
    """Step sizes of all settings by training step."""
    figure = new_figure(3.2)
    axes = figure.subplots()
    for name, setting in settings.items():
        values = step_sizes(setting["step_size"], steps)
        label = f"{name} (momentum {setting['momentum']:.2f})"
        axes.plot(np.arange(1, steps + 1), values, color=_COLORS[name], linewidth=1.8, label=label)
    style(axes, ylabel=r"step size $\eta_t$", xlabel="training step $t$")
    legend(axes, "best")
    words = "Step size by training step: the start, the best constant, the best cosine, and the tuned schedule."
    return Shown("schedules", figure, words, words)


def decays_figure(settings: Settings) -> Shown:
    """The tuned weight decay of each layer, and the one value of the others."""
    figure = new_figure(3.0)
    axes = figure.subplots()
    tuned = settings[TUNED]["weight_decay"]
    axes.plot(range(len(tuned)), list(tuned.values()), "o", color=_COLORS[TUNED], markersize=8, label=TUNED)
    for name, setting in settings.items():
        if name != TUNED and setting["weight_decay"] > 0:  # the axis is logarithmic
            dashes = {"linewidth": 1.4, "linestyle": (0, (4, 3))}
            axes.axhline(setting["weight_decay"], color=_COLORS[name], label=name, **dashes)
    axes.set_yscale("log")
    axes.set_xticks(range(len(tuned)), list(tuned))
    style(axes, ylabel="weight decay")
    legend(axes, "best")
    words = "Weight decay of each layer as tuned; dashed: the one value of all layers in the other settings."
    return Shown("weight-decays", figure, words, words)


def search_figure(values: Sequence[float], levels: Mapping[str, float]) -> Shown:
    """f_T by hyperiteration, beside the validation losses of all settings."""
    figure = new_figure(3.2)
    axes = figure.subplots()
    axes.plot(np.arange(1, len(values) + 1), values, color=_COLORS[TUNED], linewidth=1.2, label="search")
    for name, level in levels.items():
        axes.axhline(level, color=_COLORS[name], linewidth=1.4, linestyle=(0, (4, 3)), label=f"{name}, mean")
    style(axes, ylabel="validation loss $f_T$", xlabel="hyperiteration")
    legend(axes, "best")
    words = (
        "Validation loss by hyperiteration, each on new mini-batches; dashed: the mean of each setting over other "
        "initial weights and mini-batches."
    )
    return Shown("search", figure, words, words)
