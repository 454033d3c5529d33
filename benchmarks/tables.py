"""Blocks of markdown from the records, for docs/tables.py: each function returns one block."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

RECORDS = Path(__file__).parent / "records"
NAMES = {
    "ridge": "ridge",
    "linear_representation": "linear representation",
    "logistic": "logistic regression",
    "network": "network, learned step sizes",
}
QUANTITIES = {
    "unrolled": "the gradient of f_T",
    "implicit": "the implicit formula at w_T",
    "exact": "the gradient of f",
}
BASE = {"unrolled": "Reverse", "implicit": "Implicit"}


def read(name: str) -> dict[str, Any]:
    return json.loads((RECORDS / f"{name}.json").read_text())


def median_ratio(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The median over rounds of one row's time in another's."""
    return float(np.median(np.asarray(one["rounds"]) / np.asarray(other["rounds"])))


def find(record: dict[str, Any], problem: str, row: str, steps: int | None = None) -> dict[str, Any]:
    """The row of a problem at T, by default the largest T."""
    rows = [found for found in record["table"] if found["problem"] == problem and found["row"] == row]
    return next(found for found in rows if found["steps"] == (steps or max(r["steps"] for r in rows)))


def peers() -> str:
    """Every library on every problem: milliseconds, and the ratio to our method for the same quantity."""
    record = read("peers")
    problems = list(record["problems"])
    steps = {problem: max(row["steps"] for row in record["table"] if row["problem"] == problem) for problem in problems}
    head = " | ".join(f"{NAMES[problem]}, T = {steps[problem]}" for problem in problems)
    lines = [f"| milliseconds (times ours) | {head} |", f"|---{'|---' * len(problems)}|"]
    for quantity, title in QUANTITIES.items():
        lines.append(f"| *{title}* |{' |' * len(problems)}")
        rows = [row for row in record["table"] if row["quantity"] == quantity]
        for name in dict.fromkeys(row["row"] for row in rows):
            library = next(row["library"] for row in rows if row["row"] == name)
            cells = [_peer_cell(record, rows, problem, name, steps[problem]) for problem in problems]
            lines.append(f"| {f'**hyperax** `{name}`' if library == 'hyperax' else name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"{_failures(record)} {_first_calls(record)}", "", _where(record)])


def _peer_cell(record: dict[str, Any], rows: list[dict[str, Any]], problem: str, name: str, steps: int) -> str:
    row = next((r for r in rows if (r["problem"], r["row"], r["steps"]) == (problem, name, steps)), None)
    if row is None:
        return ""
    if "seconds" not in row:
        return f"off by {100 * row['error']:.0f} %" if "error" in row else "fails"
    base = BASE.get(row["quantity"], name)
    if base == name:
        return _milliseconds(row["seconds"])
    times = median_ratio(row, find(record, problem, base, steps))
    return f"{_milliseconds(row['seconds'])} ({_short(times)})"


def _failures(record: dict[str, Any]) -> str:
    failed: dict[str, list[str]] = {}
    for row in record["table"]:
        if "seconds" not in row:
            error = f"off by {100 * row['error']:.0f} %" if "error" in row else row["reason"]
            failed.setdefault(row["row"], []).append(f"{NAMES[row['problem']]}: {error}")
    return " ".join(f"{name} is not timed ({'; '.join(reasons)})." for name, reasons in failed.items())


def _first_calls(record: dict[str, Any]) -> str:
    """What the rows that compile spend before the first result, from the quickest problem to the slowest."""
    seconds: dict[str, list[float]] = {}
    for row in record["table"]:
        if row["row"] in ("Reverse", "jaxopt unrolled", "torch.compile") and "seconds" in row:
            seconds.setdefault(row["row"], []).append(row["first_call_seconds"])
    spent = ", ".join(f"{name} {min(found):.1f} to {max(found):.1f} s" for name, found in seconds.items())
    return f"First calls, which compile, are not in the table: {spent}; the other PyTorch rows do not compile."


def _where(record: dict[str, Any]) -> str:
    versions = record["versions"]
    names = ("jax", "jaxopt", "torch", "higher", "torchopt", "betty-ml")
    commits = " and ".join(dict.fromkeys(record["commits"].values()))
    with_versions = ", ".join(f"{name} {versions[name].split('+')[0]}" for name in names if name in versions)
    return (
        f"Medians over {record['rounds']} rounds in which all rows take turns, {record['threads']} threads, "
        f"{record['machine']}, commit {commits}; {with_versions}. Before it is timed, each "
        "gradient is compared with one computed by PyTorch in float64."
    )


def peers_steps() -> str:
    """The linear representation against T."""
    record = read("peers")
    rows = [
        row for row in record["table"] if row["problem"] == "linear_representation" and row["quantity"] == "unrolled"
    ]
    every = sorted({row["steps"] for row in rows})
    lines = [f"| milliseconds, T = | {' | '.join(map(str, every))} |", f"|---{'|---' * len(every)}|"]
    for name in dict.fromkeys(row["row"] for row in rows):
        found = {row["steps"]: row["seconds"] for row in rows if row["row"] == name and "seconds" in row}
        cells = [_milliseconds(found[t]) if t in found else "" for t in every]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def costs() -> str:
    """Reverse beside training, Doubling beside Reverse, and long runs."""
    record = read("costs")
    table, median = record["short"], lambda row, name: float(np.median(row["rounds"][name]))
    kept = {row["steps"]: row["reverse_to_training"] for row in record["short_kept_memory"]}
    rows = {
        "T": lambda row: str(row["steps"]),
        "training alone, ms": lambda row: _milliseconds(median(row, "training")),
        "`Reverse`, of training": lambda row: f"{row['reverse_to_training']:.2f}",
        "`Reverse`, of training, freed memory kept¹": lambda row: f"{kept[row['steps']]:.2f}",
        "`Doubling`, of `Reverse`": lambda row: f"{row['doubling_to_reverse']:.2g}",
    }
    lines = [f"| {name} | {' | '.join(text(row) for row in table)} |" for name, text in rows.items()]
    lines.insert(1, f"|---{'|---' * len(table)}|")
    if record["long"]:
        lines += ["", f"| T = {record['long'][0]['steps']} | seconds | of `Reverse` | kept, MB |", "|---|---|---|---|"]
        for row in record["long"]:
            time = f"{float(np.median(row['rounds'])):.1f} | {row['time_to_reverse']:.2f}"
            lines.append(f"| `{row['method']}` | {time} | {row['temporary_bytes'] / 1e6:.0f} |")
    where = (
        f"Linear representation, {record['machine']}, commit {record['commit']}. ¹ With glibc's "
        "`MALLOC_MMAP_THRESHOLD_` and `MALLOC_TRIM_THRESHOLD_` raised, so that what a call frees is "
        "not asked for again page by page."
    )
    return "\n".join([*lines, "", where])


def methods() -> str:
    """Our methods against T: time, memory, errors."""
    record = read("methods")
    table = record["over_T"]
    every = sorted({row["steps"] for row in table})
    columns: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
        "ms": (f"T = {every[0]}, {every[len(every) // 2]}, {every[-1]}", lambda row: _milliseconds(row["seconds"])),
        "MB": ("the same T", lambda row: _short(row["temporary_bytes"] / 1e6)),
        "error to grad f_T": ("the same T", lambda row: _error(row["error_f_T"])),
        "error to grad f": ("the same T", lambda row: _error(row["error_f"])),
    }
    shown = (every[0], every[len(every) // 2], every[-1])
    head = " | ".join(f"{name} ({note})" for name, (note, _) in columns.items())
    lines = [f"| method | {head} |", f"|---{'|---' * len(columns)}|"]
    for name in dict.fromkeys(row["method"] for row in table):
        rows = {row["steps"]: row for row in table if row["method"] == name and "seconds" in row}
        cells = [", ".join(cell(rows[t]) if t in rows else "–" for t in shown) for _, cell in columns.values()]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    size = table[0]
    where = f"m = {size['m']}, d = {size['d']}, float64, {record['machine']}, commit {record['commit']}."
    return "\n".join([*lines, "", where])


def _milliseconds(seconds: float) -> str:
    return _short(1000 * seconds)


def _short(number: float) -> str:
    return f"{number:.0f}" if number >= 99.5 else f"{number:.2g}"


def _error(error: float) -> str:
    return "0" if error < 1e-13 else f"{error:.0e}"
