"""What a hypergradient costs beside the training it differentiates, and long runs within a memory.

    python -m benchmarks.costs [--rounds 9]

The problem is the linear representation of the ICML paper's Sec. 5.1: 300 x 256 data, H 256 x 256, 100 classes,
float32. Training is T steps, `prepare` and E under jit, the same loop that the methods differentiate; rows take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import hyperax as hx
from benchmarks.peers.hyperax_side import problem_of
from benchmarks.peers.problems import linear_representation
from benchmarks.timing import circumstances, in_turns, ratio, temporary_bytes
from hyperax.methods.doubling import Doubling

STEPS = (1, 4, 16, 64, 256)
LONG = 10_000
# Above 32 MB glibc gives memory back after every call, and gets it again page by page: at T = 256 some 14 000 page
# faults a call. With these settings of its allocator it keeps it. The short runs are measured with and without.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33)}
BUDGET = "64MB"  # of the 2.2 GB that 10 000 steps keep
LONG_METHODS = {
    "Reverse": hx.Reverse(LONG),
    f'Reverse(memory="{BUDGET}")': hx.Reverse(LONG, memory=BUDGET),
    'Reverse(segment="sqrt")': hx.Reverse(LONG, segment="sqrt"),
}
RECORD = Path(__file__).parent / "records" / "costs.json"


def program(method: hx.Method | None, steps: int) -> Any:
    """Compiled: (value, hypergradient) by a method, or the value alone, which is the training."""
    numbers = linear_representation()
    problem, dynamics = problem_of(numbers)
    function = hx.hypergradient(problem, dynamics, method or hx.Reverse(steps))
    arguments = jax.tree.map(jnp.asarray, (numbers.lam, {**numbers.data, "w": numbers.w}))

    @jax.jit
    def run(lam: jax.Array, data: dict) -> Any:
        if method is None:
            return function.value(lam, data, ())[0]
        h = function(lam, data)
        return h.value, h.grad

    return run.lower(*arguments).compile(), arguments


def short(rounds: int) -> list[dict[str, Any]]:
    """Training, Reverse and Doubling at each T."""
    table = []
    for steps in STEPS:
        methods = {"training": None, "Reverse": hx.Reverse(steps), "Doubling": Doubling(steps)}
        programs = {name: program(method, steps) for name, method in methods.items()}
        runs = {name: (lambda f=f, a=a: f(*a)) for name, (f, a) in programs.items()}
        seconds = in_turns(runs, rounds)
        row = {"steps": steps, "rounds": seconds}
        row["reverse_to_training"] = ratio(seconds, "Reverse", "training")
        row["doubling_to_reverse"] = ratio(seconds, "Doubling", "Reverse")
        row["temporary_bytes"] = {name: temporary_bytes(f) for name, (f, _) in programs.items()}
        exact, other = (np.asarray(runs[name]()[1]) for name in ("Reverse", "Doubling"))
        row["difference"] = float(np.linalg.norm(exact - other) / np.linalg.norm(exact))
        table.append(row)
        print(
            f"T = {steps:3d}   training {1000 * np.median(seconds['training']):8.2f} ms   Reverse / training "
            f"{row['reverse_to_training']:.2f}   Doubling / Reverse {row['doubling_to_reverse']:.3f}   "
            f"their gradients differ by {row['difference']:.0e}",
            flush=True,
        )
    return table


def long(rounds: int) -> list[dict[str, Any]]:
    """T = 10 000 with and without a bound on the memory; the peak of a fresh process each."""
    programs = {name: program(method, LONG) for name, method in LONG_METHODS.items()}
    runs = {name: (lambda f=f, a=a: f(*a)) for name, (f, a) in programs.items()}
    seconds = in_turns(runs, rounds)
    gradients = {name: np.asarray(run()[1]) for name, run in runs.items()}
    table = []
    for name, (compiled, _) in programs.items():
        difference = np.linalg.norm(gradients[name] - gradients["Reverse"]) / np.linalg.norm(gradients["Reverse"])
        row = {"method": name, "steps": LONG, "rounds": seconds[name], "temporary_bytes": temporary_bytes(compiled)}
        row |= {"time_to_reverse": ratio(seconds, name, "Reverse"), **resident(name)}
        row["difference"] = float(difference)
        table.append(row)
        print(
            f"T = {LONG}   {name:26s}{np.median(seconds[name]):7.2f} s ({row['time_to_reverse']:.2f} of Reverse)   "
            f"{row['temporary_bytes'] / 1e6:8.1f} MB temporary   {row['run_bytes'] / 1e6:8.1f} MB more resident",
            flush=True,
        )
    return table


def kept(rounds: int) -> list[dict[str, Any]]:
    """`short` in a process whose allocator keeps what it has."""
    words = [sys.executable, "-m", "benchmarks.costs", "--short", "--rounds", str(rounds)]
    result = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **KEEP_MEMORY})
    return json.loads(result.stdout.splitlines()[-1])


def alone(name: str) -> None:
    """In a process of its own: the most memory resident before the run, and what the run adds to it."""
    compiled, arguments = program(LONG_METHODS[name], LONG)
    before = peak_bytes()
    jax.block_until_ready(compiled(*arguments))
    print(json.dumps({"peak_bytes": peak_bytes(), "run_bytes": peak_bytes() - before}))


def peak_bytes() -> int:
    """The most memory that was resident in this process (Linux). The figure of `getrusage` begins at its parent's."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def resident(name: str) -> dict[str, int]:
    """`alone`, in a fresh process."""
    words = [sys.executable, "-m", "benchmarks.costs", "--alone", name]
    return json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--long-rounds", type=int, default=3)
    parser.add_argument("--alone", choices=LONG_METHODS)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--resident", action="store_true", help="measure resident memory again, into the record")
    parser.add_argument("--record", type=Path, default=RECORD)
    options = parser.parse_args()
    if options.alone:
        return alone(options.alone)
    if options.short:
        return print(json.dumps(short(options.rounds)))
    if options.resident:
        record = json.loads(options.record.read_text())
        for row in record["long"]:
            row |= resident(row["method"])
            print(f"{row['method']:26s}{row['run_bytes'] / 1e6:8.1f} MB more resident", flush=True)
        record["resident_commit"] = circumstances("")["commit"]
        options.record.write_text(json.dumps(record, indent=1) + "\n")
        return None
    record = {"problem": linear_representation.__doc__, **circumstances("python -m benchmarks.costs")}
    record |= {"short": short(options.rounds), "short_kept_memory": kept(options.rounds)}
    record["long"] = long(options.long_rounds) if options.long_rounds else []
    options.record.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
