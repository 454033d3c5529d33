"""Blocks of markdown from the record of `benchmarks.torch`, for docs/tables.py."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.tables import read

OURS, PLAIN = "hyperax", "training alone"
RIVALS = ("higher", "TorchOpt", "torch.func", "autograd")


def torch_steps(record: dict[str, Any] | None = None) -> str:
    """Milliseconds of a hypergradient by setting, T and way; ours in the fastest of the others."""
    record = record or read("torch")
    rows = record["steps"]
    ways = list(dict.fromkeys(row["row"] for row in rows))
    lines = [
        f"| milliseconds | a step, plain | T | {' | '.join(ways)} | {OURS} / fastest other |",
        f"|---{'|---' * (len(ways) + 3)}|",
    ]
    for setting, T in dict.fromkeys((row["setting"], row["steps"]) for row in rows):
        of = {row["row"]: row for row in rows if (row["setting"], row["steps"]) == (setting, T)}
        fastest = np.min([of[way]["rounds"] for way in RIVALS], axis=0)  # in each round
        times = " | ".join(_milliseconds(of[way]["seconds"]) for way in ways)
        ratio = float(np.median(np.asarray(of[OURS]["rounds"]) / fastest))
        lines.append(f"| {setting} | {_milliseconds(of[OURS]['plain_step'])} | {T} | {times} | {ratio:.2f} |")
    note = (
        f"Medians over {record['rounds']} rounds in which all ways take turns, {record['threads']} thread, all steps "
        "kept; the last column is the median of the ratio to the fastest of the four others in the same round. "
        "Before it is timed, each gradient is compared with autograd's."
    )
    return "\n".join([*lines, "", f"{note} {_where(record)}"])


def torch_memory(record: dict[str, Any] | None = None) -> str:
    """Peak memory of long runs, ours within its budget beside higher."""
    record = record or read("torch")
    lines = ["| long runs | T | memory it adds, MB | of the process, MB | seconds |", "|---|---|---|---|---|"]
    for row in record["memory"]:
        name = f'`Reverse({row["steps"]}, memory="{row["budget"]}")`' if row["row"] == OURS else row["row"]
        if "reason" in row:
            cells = f"{row['reason']} | | "
        else:
            cells = f"{row['added_bytes'] / 1e6:.0f} | {row['peak_bytes'] / 1e6:.0f} | {row['seconds']:.0f}"
        lines.append(f"| {name} | {row['steps']} | {cells} |")
    note = "A convolutional network, mini-batches of 96 digits; each run in a process of its own, 1 thread."
    return "\n".join([*lines, "", f"{note} {_where(record)}"])


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.0f}" if seconds >= 0.0995 else f"{1000 * seconds:.2g}"


def _where(record: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {record['versions'][name].split('+')[0]}" for name in ("torch", "higher", "torchopt"))
    return f"`{record['command']}`, {record['machine']}, commit {record['commit']}; {versions}."
