"""A process that holds one side and obeys commands on stdin, as benchmarks/peers/worker.py does.

    python -m benchmarks.few_shot.worker hyperax

Each command is a line of JSON, and so is each reply. {"rows": problem, "tasks", "steps"} lists the rows, {"make":
row, "tasks", "steps", "numbers": file, "double", "save": file} builds a row, calls it and saves its gradient, {"time":
k, "repeats": n} calls the row made under number k, {"drop": k} forgets it, {"versions": true} says what is installed.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.few_shot.problems import load
from benchmarks.few_shot.side import THREADS
from benchmarks.peers.cleaning import peak_memory_mb
from benchmarks.peers.worker import serve, timed


def obey(side: Any, made: list, command: dict[str, Any]) -> Any:
    """The reply to one command."""
    if "versions" in command:
        return {name: metadata.version(name) for name in side.PACKAGES}
    if "rows" in command:
        rows = {name: row for name, row in side.ROWS.items() if row.problem == command["rows"]}
        fits = lambda row: command["steps"] <= row.longest and command["tasks"] <= row.most_tasks
        return {name: row.note for name, row in rows.items() if fits(row)}
    if "make" in command:
        row = side.ROWS[command["make"]]
        numbers = load(command["numbers"], row.problem, command["tasks"], command["steps"], command["double"])
        forget_peak()
        ready = row.make(numbers)
        first, gradient = timed(ready.run)
        np.save(command["save"], ready.to_vector(gradient))
        made.append(ready.run)
        return {"number": len(made) - 1, "first": first, "peak_memory_mb": peak_memory_mb()}
    if "time" in command:
        begin = time.perf_counter()
        for _ in range(command["repeats"]):
            made[command["time"]]()
        return {"seconds": (time.perf_counter() - begin) / command["repeats"]}
    made[command["drop"]] = None
    gc.collect()
    return {}


def forget_peak() -> None:
    """Let the most memory held be counted from now on, without what earlier rows have freed (Linux)."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    serve(f"benchmarks.few_shot.{sys.argv[1]}_side", obey, THREADS)
