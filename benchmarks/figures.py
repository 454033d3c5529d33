"""The figures of docs/, drawn from the records: python -m benchmarks.figures."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

RECORDS = Path(__file__).parent / "records"
FIGURES = Path(__file__).parent.parent / "docs" / "figures"
OURS, THEIRS = "#b3261e", "#8a94a0"
TITLES = {
    "ridge": "ridge, d = 30, T = {}",
    "linear_representation": "linear representation, T = {}",
    "logistic": "logistic regression, T = {}",
    "network": "network, learned step sizes, T = {}",
}
STYLE = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9, "figure.dpi": 150}
MARKERS = "osD^v<>Px*ph"
PLAIN = ("#1f77b4", "#2ca02c", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf")
COLOURS = plt.get_cmap("tab20").colors


def peers(record: dict[str, Any], folder: Path) -> None:
    """peers.png: every row of every problem at its own T; peers-steps.png: the linear representation against T."""
    timed = [row for row in record["table"] if "seconds" in row]
    last = {name: max(row["steps"] for row in timed if row["problem"] == name) for name in record["problems"]}
    with plt.rc_context(STYLE):
        height = 1.2 + max(sum(row["problem"] == name and row["steps"] == last[name] for row in timed) for name in last)
        figure, panels = plt.subplots(2, 2, figsize=(10, 0.38 * height), squeeze=False, layout="constrained")
        for panel, name in zip(panels.flat, last, strict=False):
            _bars(panel, [row for row in timed if row["problem"] == name and row["steps"] == last[name]])
            panel.set_title(TITLES[name].format(last[name]), loc="left", fontsize=9)
        figure.supxlabel("milliseconds for one hypergradient (logarithmic)", fontsize=9)
        _save(figure, folder / "peers.png")
        _against_steps([row for row in timed if row["problem"] == "linear_representation"], folder)


def _bars(panel: Any, rows: list[dict[str, Any]]) -> None:
    rows = sorted(rows, key=lambda row: (row["quantity"] != "unrolled", row["quantity"] != "implicit", row["seconds"]))
    place = np.arange(len(rows)) + 0.6 * np.cumsum([0] + [a["quantity"] != b["quantity"] for a, b in pairwise(rows)])
    times = [1000 * row["seconds"] for row in rows]
    panel.barh(place, times, color=[OURS if row["library"] == "hyperax" else THEIRS for row in rows], height=0.72)
    label = lambda row: row["row"] if row["library"] != "hyperax" else f"hyperax {row['row']}"
    panel.set_yticks(place, [label(row) for row in rows])
    panel.invert_yaxis()
    panel.set_xscale("log")
    panel.set_xlim(min(times) / 2, max(times) * 14)
    for y, time in zip(place, times, strict=True):
        panel.text(time * 1.1, y, f"{time:.0f}" if time >= 100 else f"{time:.2g}", va="center", fontsize=8)
    for quantity, name in (("unrolled", "gradient of f_T"), ("implicit", "implicit"), ("exact", "gradient of f")):
        mine = [y for y, row in zip(place, rows, strict=True) if row["quantity"] == quantity]
        if mine:
            panel.text(0.995, float(np.mean(mine)), name, transform=panel.get_yaxis_transform(), ha="right",
                       va="center", fontsize=8, color="#555555", rotation=90 if len(mine) > 2 else 0)  # fmt: skip


def _against_steps(rows: list[dict[str, Any]], folder: Path) -> None:
    figure, panel = plt.subplots(figsize=(8, 4), layout="constrained")
    names = sorted({row["row"] for row in rows if row["quantity"] == "unrolled"})
    for colour, name in zip(PLAIN, names, strict=False):
        mine = [row for row in rows if row["row"] == name]
        ours = mine[0]["library"] == "hyperax"
        style = {"color": OURS, "lw": 2.2, "ls": "--" if name == "Reverse" else "-"} if ours else {"color": colour}
        times = sorted((row["steps"], 1000 * row["seconds"]) for row in mine)
        panel.loglog(*zip(*times, strict=True), marker="o", ms=4, label=f"hyperax {name}" if ours else name, **style)
    panel.set_xlabel("T, inner steps")
    panel.set_ylabel("milliseconds")
    panel.set_title("linear representation (300 x 256, 100 classes, lam 256 x 256)", loc="left", fontsize=9)
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    _save(figure, folder / "peers-steps.png")


def methods(record: dict[str, Any], folder: Path) -> None:
    """methods-T.png: time, memory and both errors against T; methods-sizes.png: time against m and d."""
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
        kinds = {
            "seconds": ("milliseconds", 1e3),
            "temporary_bytes": ("temporary memory, MB", 1e-6),
            "error_f_T": ("relative error to the gradient of f_T", 1.0),
            "error_f": ("relative error to the gradient of f", 1.0),
        }
        for panel, (field, (label, unit)) in zip(panels.flat, kinds.items(), strict=True):
            _lines(panel, record["over_T"], "steps", field, unit)
            panel.set_xlabel("T, inner steps")
            panel.set_ylabel(label)
        figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
        _save(figure, folder / "methods-T.png")

        figure, panels = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
        for panel, (over, label) in zip(panels, {"m": "m, size of lam", "d": "d, size of w"}.items(), strict=True):
            _lines(panel, record[f"over_{over}"], over, "seconds", 1e3)
            panel.set_xlabel(label)
            panel.set_ylabel("milliseconds")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
        _save(figure, folder / "methods-sizes.png")


def _lines(panel: Any, table: list[dict[str, Any]], over: str, field: str, unit: float) -> None:
    lowest = 1e-16 if field.startswith("error") else 0.0
    for k, name in enumerate(dict.fromkeys(row["method"] for row in table)):
        mine = [(row[over], max(unit * row[field], lowest)) for row in table if row["method"] == name and field in row]
        style = {"marker": MARKERS[k % len(MARKERS)], "color": COLOURS[k], "ms": 4, "lw": 1.2}
        if mine:
            panel.loglog(*zip(*mine, strict=True), label=name, **style)


def _save(figure: Any, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Software": None})
    plt.close(figure)


def main() -> None:
    matplotlib.use("Agg")
    for draw in (peers, methods):
        file = RECORDS / f"{draw.__name__}.json"
        if file.exists():
            draw(json.loads(file.read_text()), FIGURES)


if __name__ == "__main__":
    main()
