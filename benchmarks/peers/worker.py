"""A process that holds one side and obeys commands on stdin, so that runs of different sides can take turns.

    python -m benchmarks.peers.worker hyperax

Each command is a line of JSON, and so is each reply. {"rows": problem} lists the rows for a problem, {"objectives":
problem} returns L and E somewhere, {"make": row, "problem": name, "steps": T, "save": file} builds a row, calls it
twice and saves its gradient, {"time": k, "repeats": n} calls the row made under number k and returns the seconds,
{"drop": k} forgets it, {"versions": true} says what is installed.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from importlib import metadata
from typing import Any

import numpy as np

from benchmarks.peers.problems import PROBLEMS

THREADS = 2


def obey(side: Any, made: list, command: dict[str, Any]) -> Any:
    """The reply to one command."""
    if "versions" in command:
        return {name: metadata.version(name) for name in side.PACKAGES}
    if "rows" in command:
        return {name: row.quantity for name, row in side.ROWS.items() if command["rows"] in row.problems}
    if "objectives" in command:
        return side.objectives(PROBLEMS[command["objectives"]]())
    if "make" in command:
        numbers = PROBLEMS[command["problem"]](command["steps"])
        run = side.ROWS[command["make"]].make(numbers)
        (first, gradient), (second, _) = timed(run), timed(run)
        np.save(command["save"], np.asarray(side.to_numpy(gradient), np.float64))
        made.append(run)
        return {"number": len(made) - 1, "first": first, "second": second}
    if "time" in command:
        begin = time.perf_counter()
        for _ in range(command["repeats"]):
            made[command["time"]]()
        return {"seconds": (time.perf_counter() - begin) / command["repeats"]}
    made[command["drop"]] = None
    return {}


def timed(run: Any) -> tuple[float, Any]:
    begin = time.perf_counter()
    result = run()
    return time.perf_counter() - begin, result


def serve(side: str, obey: Callable[[Any, list, dict[str, Any]], Any], threads: int) -> None:
    """Obey commands on stdin with the module of a side, to the end of the input."""
    # Libraries may print: the replies get a channel of their own.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    warnings.simplefilter("ignore")  # of the peers, about what they import
    module = importlib.import_module(side)
    made: list = []
    for line in sys.stdin:
        try:
            reply = obey(module, made, json.loads(line))
        except Exception as error:  # what a peer cannot do is a result, not the end of the benchmark
            reply = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    serve(f"benchmarks.peers.{sys.argv[1]}_side", obey, THREADS)
