"""The figures of a run, drawn from its folder alone: no data set, no JAX."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from hyperax.experiments.reading import Run, best_record, compared, read_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, RED, GREEN, GREY, INK = "#0072b2", "#d55e00", "#009e73", "#8a8f98", "#24292f"  # Okabe and Ito, and greys
_WIDTH, _DOTS_PER_INCH = 7.0, 140  # text stays legible when a page shrinks a figure to 700 pixels


def smoothing_window(count: int) -> int:
    """Records in the moving average of the training curves: a fortieth of them, odd; noise goes and shape stays.

    >>> smoothing_window(400)
    11
    """
    return 2 * (count // 80) + 1


def training_curves(records: list[dict[str, Any]]) -> Figure:
    """f_T, accuracy in training and validation, and the inner step size if it is learned, by hyperiteration.

    Arguments:
        records: {"step", "value", "metrics", maybe "score" and "validation"}, by step, at least one.

    Thin lines are the records, thick ones their centred mean over `smoothing_window`. f_T is on a logarithmic axis if
    it falls fivefold, accuracy on one logarithmic in the error 1 - accuracy if it passes 90 %.
    Reference: Franceschi et al. 2018, eq. 9 (f_T of a meta-learning problem).
    """
    from matplotlib.ticker import LogLocator, NullLocator

    step_sizes = _series(records, lambda record: {**record.get("validation", {}), **record["metrics"]}["step_size"])
    accuracies = _series(records, lambda record: 100 * record["metrics"]["accuracy"])
    validations = _series(records, lambda record: 100 * record["validation"]["accuracy"])
    intervals = _series(records, lambda record: 100 * (record["validation"].get("ci95") or 0.0))[1]
    heights = [2.1, 2.6] + [1.3] * (len(step_sizes[0]) > 0)
    figure = new_figure(sum(heights))
    panels = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]

    values = _series(records, lambda record: record["value"])
    _curve(panels[0], *values, BLUE, "training episodes")
    if values[1].size and 0 < 5 * values[1].min() < values[1].max():
        panels[0].set_yscale("log")
        panels[0].yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        panels[0].yaxis.set_major_formatter("{x:g}")
        panels[0].yaxis.set_minor_locator(NullLocator())
    style(panels[0], ylabel="outer objective $f_T$")

    _curve(panels[1], *accuracies, BLUE, "training episodes")
    if validations[0].size:
        panels[1].plot(*validations, color=RED, linewidth=1.8, marker="o", markersize=3, label="validation classes")
        low, high = validations[1] - intervals, np.minimum(validations[1] + intervals, 100)
        panels[1].fill_between(validations[0], low, high, color=RED, alpha=0.2, linewidth=0)
    best = best_record(records)
    if best is not None:
        for panel in panels:
            panel.axvline(best["step"], color=INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        top = 100 * best["validation"]["accuracy"] if "validation" in best else 100 * (1 - best["score"])
        label = f"best iterate: {top:.4g} % at {best['step']:,}"
        panels[1].plot(best["step"], top, "D", color=INK, markersize=5.5, markerfacecolor="white", label=label)
    _accuracy_axis(panels[1], np.concatenate([accuracies[1], validations[1]]))
    style(panels[1], ylabel="accuracy (%)")
    legend(panels[1], "lower right")
    if len(heights) == 3:
        _curve(panels[2], *step_sizes, GREEN, "")
        style(panels[2], ylabel=r"step size $\eta$")
    panels[-1].set_xlabel("hyperiteration", color=INK)
    panels[-1].xaxis.set_major_formatter("{x:,.0f}")
    return figure


def validation_of_steps(entries: list[dict[str, Any]], chosen: int | None, training: int | None) -> Figure:
    """Accuracy on validation classes by the number T of inner steps.

    Arguments:
        entries: {"steps": T, "accuracy": fraction, "ci95": half-width of a 95 % interval or None}.
        chosen: the T that testing uses.
        training: the T of f_T in training.

    Reference: Franceschi et al. 2018, Sec. 5.2, Figure 6.
    """
    from matplotlib.ticker import MaxNLocator

    entries = sorted(entries, key=lambda entry: entry["steps"])
    steps, accuracies, intervals = np.array(
        [(entry["steps"], 100 * entry["accuracy"], 100 * (entry.get("ci95") or 0.0)) for entry in entries]
    ).T
    figure = new_figure(3.0)
    axes = figure.subplots()
    axes.plot(steps, accuracies, color=RED, linewidth=1.4, alpha=0.6, zorder=2)
    axes.errorbar(steps, accuracies, intervals, fmt="o", color=RED, markersize=5, elinewidth=1.2, capsize=3, zorder=3)
    if training is not None:
        axes.axvline(training, color=GREY, linewidth=1.4, linestyle=(0, (4, 3)), label=f"T in training: {training}")
    for at in np.flatnonzero(steps == chosen):
        label = f"chosen T = {chosen}: {accuracies[at]:.4g} %"
        axes.plot(
            steps[at], accuracies[at], "o", color=INK, markersize=12, markerfacecolor="none", label=label, zorder=4
        )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    style(axes, ylabel="validation accuracy (%)", xlabel="inner steps $T$")
    legend(axes, "best")
    return figure


def comparison(rows: list[tuple[str, dict[str, Any]]], chance: float | None = None) -> Figure:
    """Accuracy on unseen classes: this run, the baselines, the paper.

    Arguments:
        rows: (name, {"accuracy": fraction, "ci95": half-width or None}), the one to stand out first; the name "paper"
            is drawn hatched, as it was not measured here.
        chance: accuracy of guessing, a fraction.

    Reference: Franceschi et al. 2018, Table 3.
    """
    figure = new_figure(0.75 + 0.45 * len(rows))
    axes = figure.subplots()
    for at, (name, score) in enumerate(rows):
        accuracy, interval = 100 * score["accuracy"], 100 * (score.get("ci95") or 0.0)
        face, hatch = (BLUE, None) if at == 0 else ("white", "////") if name == "paper" else ("#a9b4c0", None)
        axes.barh(
            at, accuracy, 0.62, color=face, hatch=hatch, edgecolor=GREY if hatch else face, linewidth=0.8, zorder=2
        )
        if interval:
            axes.errorbar(accuracy, at, xerr=interval, color=INK, elinewidth=1.2, capsize=3, zorder=3)
        text = f"{accuracy:.2f} ± {interval:.2f}" if interval else f"{accuracy:.4g}"
        axes.text(accuracy + interval + 1.5, at, text, va="center", color=INK, weight="bold" if at == 0 else "normal")
    if chance is not None:
        axes.axvline(
            100 * chance, color=INK, linewidth=1.0, linestyle=":", zorder=4, label=f"chance: {100 * chance:.3g}"
        )
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9, borderaxespad=0.1)
    axes.set_yticks(range(len(rows)), [textwrap.fill(name, 26).replace("$", r"\$") for name, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 125)
    axes.set_xticks(range(0, 101, 20))
    style(axes, xlabel="accuracy on unseen classes (%)", grid="x")
    axes.spines["left"].set_visible(False)
    axes.spines["bottom"].set_bounds(0, 100)
    axes.tick_params(axis="y", length=0)
    return figure


def nearest_and_farthest(pairs: dict[str, np.ndarray]) -> Figure:
    """The images of two classes that are nearest and farthest for h, with some components of their features between.

    Arguments:
        pairs: `near_images` uint8 [2, height, width, channels], `near_features` [2, features], `near_distance`, the
            same for `far`, `names` [2], and `component_index`, the components to draw.

    Reference: Franceschi et al. 2018, Figure 5; Bridge paper 2017, Figure 2.
    """
    index = np.sort(pairs["component_index"])
    figure = new_figure(4.3)
    grid = figure.subplots(2, 3, width_ratios=[1, 3.2, 1], squeeze=False)
    shown = np.stack([pairs[f"{which}_features"][:, index] for which in ("near", "far")])
    margin = 0.06 * (np.ptp(shown) or 1.0)
    for (left, middle, right), which, title, features in zip(
        grid, ("near", "far"), ("Nearest", "Farthest"), shown, strict=True
    ):
        for axes, image, color, name, x in zip(
            (left, right), pairs[f"{which}_images"], (BLUE, RED), pairs["names"], ("x", "x'"), strict=True
        ):
            _image(axes, image, color, f"${x}$: {_label(str(name))}")
        at = np.arange(len(index))
        for offset, values, color, x in zip((-0.2, 0.2), features, (BLUE, RED), ("$h(x)$", "$h(x')$"), strict=True):
            middle.bar(at + offset, values, 0.4, color=color, label=x, zorder=2)
        middle.set_ylim(min(shown.min() - margin, 0.0), shown.max() + margin)
        middle.set_title(
            rf"{title}: $\|h(x) - h(x')\|$ = {float(pairs[f'{which}_distance']):.3g}", fontsize=10, color=INK
        )
        style(middle, ylabel="feature")
        middle.set_xticks([])
    total = pairs["near_features"].shape[1]
    grid[1, 1].set_xlabel(f"{len(index)} of {total} components of $h$, drawn at random", color=INK, fontsize=9)
    grid[0, 1].legend(loc="upper right", frameon=False, fontsize=9, ncols=2)
    return figure


def save_figures(folder: str | Path) -> list[Path]:
    """Draw `figures/*.png` of a run folder: those that its files allow, in the order of the report.

    Raises: `ValueError` for a folder that is not a run folder, or a damaged file in it.
    """
    run = read_run(folder)
    return [save(figure, run.folder / "figures" / f"{name}.png") for name, figure in _drawn(run)]


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG, the same bytes for the same figure, and return its path."""
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=_DOTS_PER_INCH, metadata={"Software": None}, pil_kwargs={"optimize": True})
    return path


def _drawn(run: Run) -> Iterator[tuple[str, Figure]]:
    if run.records:
        yield "curves", training_curves(run.records)
    if run.summary:
        ways = (run.summary.get("protocol") or {}).get("ways")
        yield "comparison", comparison(compared(run.summary), 1 / ways if ways else None)
        if run.summary.get("steps_by_validation"):
            chosen, training = run.summary["test"].get("steps"), run.summary.get("steps_training")
            yield "steps", validation_of_steps(run.summary["steps_by_validation"], chosen, training)
    if run.pairs:
        yield "pairs", nearest_and_farthest(run.pairs)


def new_figure(height: float) -> Figure:
    """An empty figure as wide as a page, `height` inches high."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((_WIDTH, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def style(axes: Axes, xlabel: str = "", ylabel: str = "", grid: Any = "y") -> None:
    """The look of all axes."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=INK, labelsize=9, width=0.6, which="both")
    axes.grid(axis=grid, color="#e3e6ea", linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
    axes.set_xlabel(xlabel, color=INK)
    axes.set_ylabel(ylabel, color=INK)


def legend(axes: Axes, place: Literal["best", "lower right"]) -> None:
    """A legend, if anything has a label."""
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc=place, fontsize=9, framealpha=0.9, edgecolor="none", facecolor="white", labelcolor=INK)


def _series(records: list[dict[str, Any]], read: Callable[[dict[str, Any]], float]) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the records that have a finite one."""
    pairs = []
    for record in records:
        try:
            pairs.append((record["step"], float(read(record))))
        except (KeyError, TypeError):
            continue
    steps, values = np.array(pairs, float).reshape(-1, 2).T
    return steps[np.isfinite(values)], values[np.isfinite(values)]


def _curve(axes: Axes, steps: np.ndarray, values: np.ndarray, color: str, label: str) -> None:
    if not len(values):
        return
    half = smoothing_window(len(values)) // 2
    at, total = np.arange(len(values)), np.concatenate([[0.0], np.cumsum(values)])
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    if half:
        axes.plot(steps, values, color=color, linewidth=0.6, alpha=0.3)
    smooth = (total[high] - total[low]) / (high - low)
    axes.plot(steps, smooth, color=color, linewidth=1.8, marker="o" if len(values) < 3 else "", label=label)


def _label(name: str) -> str:
    """A class name of any length and characters, for the narrow space below an image."""
    name = name if len(name) <= 36 else f"{name[:17]}…{name[-18:]}"
    lines = textwrap.wrap(name.replace("/", "/ "), 20, initial_indent="   ")  # room for "x: "
    return "\n".join(lines).strip().replace("$", r"\$")


def _image(axes: Axes, image: np.ndarray, color: str, name: str) -> None:
    grey = image.shape[-1] == 1  # ink is bright in the data and dark on paper
    axes.imshow(image[..., 0] if grey else image, cmap="gray_r" if grey else None, vmin=0, vmax=255)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set(color=color, linewidth=2.0)
    axes.set_xlabel(name, color=INK, fontsize=8)


def _accuracy_axis(axes: Axes, values: np.ndarray) -> None:
    if not len(values) or values.max() <= 90:
        return
    finest = max(0.05, 0.5 * (100 - values.max()))  # keeps 100 % on the axis
    axes.set_yscale(
        "function",
        functions=(lambda y: -np.log(np.maximum(100 + finest - y, 1e-9)), lambda s: 100 + finest - np.exp(-s)),
    )
    axes.set_yticks([y for y in (0, 20, 40, 60, 70, 80, 85, 90, 95, 98, 99, 99.5, 100) if values.min() - 5 <= y])
    axes.set_ylim(max(values.min() - 3, 0), min(100, values.max() + finest))
    axes.yaxis.set_major_formatter("{x:g}")
