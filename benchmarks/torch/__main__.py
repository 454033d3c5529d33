"""Hypergradients of training steps in PyTorch beside higher, TorchOpt, torch.func, autograd: time, and memory.

    python -m benchmarks.torch [--rounds 9] [--steps 10 100] [--long 500 2000] [--memory 64MB]

Needs .venv-peers (`make bench-peers`), where it runs by itself. One thread. Two comparisons:

1. `steps`: the gradient of f_T in one weight decay a layer, SGD with momentum, networks from steps that are the
   overhead of PyTorch's operations to steps that are arithmetic. All rows take turns in one process; what counts is
   the median over rounds of the ratio within a round. Before it is timed, each gradient is compared with autograd's.
   The row `a callback a step` is the other way to build this: a JAX program that calls PyTorch at every step.
2. `memory`: long runs of a convolutional network, `Reverse` within a budget beside higher, which keeps the graph of
   all steps; each in a process of its own, whose peak is measured, under a limit of its address space.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent.parent
RECORD = ROOT / "benchmarks" / "records" / "torch.json"
PYTHON = ROOT / ".venv-peers" / "bin" / "python"
TOLERANCE = 1e-3  # relative, largest entry: 100 steps in float32


def steps(names: list[str], T: int, rounds: int) -> list[dict[str, Any]]:
    """One row for each setting and way, at one T."""
    from benchmarks.timing import in_turns, ratio
    from benchmarks.torch.problems import SETTINGS
    from benchmarks.torch.rows import HYPERGRADIENTS, OURS, PLAIN, plain

    table = []
    for name in names:
        setting = SETTINGS[name]()
        runs = {way: make(setting, T) for way, make in HYPERGRADIENTS.items()}
        found = {way: np.asarray(run()) for way, run in runs.items()}
        differences = {way: difference(x, found["autograd"]) for way, x in found.items()}
        wrong = [way for way, x in differences.items() if not x <= TOLERANCE]
        if wrong:
            sys.exit(f"{name}, T = {T}: the gradient of {', '.join(wrong)} is another one: {differences}")
        seconds = in_turns({PLAIN: plain(setting, T), **runs}, rounds)
        plain_step = float(np.median(seconds[PLAIN])) / T
        for way in seconds:
            row = {"setting": name, "steps": T, "row": way, "seconds": float(np.median(seconds[way]))}
            row |= {"plain_step": plain_step, "rounds": seconds[way], "ours_over_this": ratio(seconds, OURS, way)}
            table.append(row | ({"difference": differences[way]} if way in differences else {}))
            show = f"{1000 * row['seconds']:9.2f} ms   ours / this {row['ours_over_this']:.2f}"
            print(f"{name}, {1000 * plain_step:.2f} ms a step, T = {T}   {way:26s}{show}", flush=True)
    return table


def difference(x: np.ndarray, reference: np.ndarray) -> float:
    """The largest difference, relative to the largest entry."""
    return float(np.abs(x - reference).max() / np.abs(reference).max())


def memory(way: str, T: int, budget: str, limit: int) -> dict[str, Any]:
    """The row of a long run, in a process of its own that may have `limit` bytes of address space."""
    words = [sys.executable, "-m", "benchmarks.torch.alone", way, str(T), budget, str(limit)]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ)
    row: dict[str, Any] = {"row": way, "steps": T, "budget": budget, "limit": limit}
    lines = result.stdout.splitlines()
    if result.returncode or not lines:
        last = (result.stderr.strip().splitlines() or ["nothing said"])[-1]
        return row | {"reason": f"ended with status {result.returncode}: {last[:200]}"}
    return row | json.loads(lines[-1])


def memories(lengths: list[int], budget: str, limit: int) -> list[dict[str, Any]]:
    """`Reverse` within a budget and higher at each T, and how far their gradients differ."""
    table = []
    for T in lengths:
        ours, theirs = (memory(way, T, budget, limit) for way in ("hyperax", "higher"))
        if "gradient" in ours and "gradient" in theirs:
            theirs["difference"] = difference(np.asarray(theirs["gradient"]), np.asarray(ours["gradient"]))
            for what in ("added", "peak"):
                theirs[f"{what}_over_ours"] = theirs[f"{what}_bytes"] / ours[f"{what}_bytes"]
        table += [ours, theirs]
        for row in (ours, theirs):
            print({name: x for name, x in row.items() if name != "gradient"}, flush=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, nargs="*", default=[10, 100])
    parser.add_argument("--settings", nargs="*", help="by default all")
    parser.add_argument("--long", type=int, nargs="*", default=[500, 2000])
    parser.add_argument("--memory", default="64MB", help="of Reverse in the long runs")
    parser.add_argument("--limit", type=int, default=16, help="of the address space of a long run, in GiB")
    parser.add_argument("--record", type=Path, default=RECORD)
    options = parser.parse_args()
    if importlib.util.find_spec("higher") is None:
        if not PYTHON.exists() or Path(sys.executable) == PYTHON:
            sys.exit("no .venv-peers with higher and TorchOpt: run `make bench-peers`, which sets it up")
        paths = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
        environ = {**os.environ, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"}
        words = [str(PYTHON), "-m", "benchmarks.torch", *sys.argv[1:]]
        sys.exit(subprocess.run(words, cwd=ROOT, env=environ, check=False).returncode)
    from importlib import metadata

    import torch

    from benchmarks.timing import circumstances
    from benchmarks.torch.problems import SETTINGS

    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    record = circumstances("python -m benchmarks.torch") | {"threads": 1, "rounds": options.rounds}
    record["versions"] |= {name: metadata.version(name) for name in ("torch", "higher", "torchopt")}
    record["steps"] = [
        row for T in options.steps for row in steps(options.settings or list(SETTINGS), T, options.rounds)
    ]
    record["memory"] = memories(options.long, options.memory, options.limit * 2**30)
    options.record.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
