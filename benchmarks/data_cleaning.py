"""Data hyper-cleaning of MNIST: seconds of a hyperiteration beside higher, and our methods beside each other.

    python -m benchmarks.data_cleaning [--rounds 5] [--steps 100 500 2000] [--threads 2]

Needs MNIST (HYPERAX_DATA) and .venv-peers (`make bench-peers`). Three comparisons:

1. `hypergradients`: the gradient of f_T at the same T, by higher and by hyperax, 5000 + 5000 examples; the processes
   take turns, and what counts is the median over rounds of the ratio. Gradients must agree. On a machine that also
   does other work use `--threads 1`: PyTorch's threads wait for each other, and would look slower than they are.
2. `hyperiteration`: one of `clean`, what `DataCleaner` and the recipe do, on the same examples: it is another
   gradient (of the exact inner problem), which does not depend on T.
3. `methods`: 1000 + 1000 examples, half of the labels wrong, R = 500: F1 of the suspects and seconds of each method
   in the same outer loop. Which method is the default was decided here; test data are not read.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

import hyperax as hx
from benchmarks.peers.cleaning import SIDES
from benchmarks.timing import circumstances
from hyperax.constraints import Projected
from hyperax.estimators.cleaning import PROBLEM, clean, tables_of
from hyperax.experiments.data_cleaning.measuring import Draw, draw, scores
from hyperax.experiments.mnist import load_mnist
from hyperax.linear_solvers import ConjugateGradient
from hyperax.methods import Implicit, RealTime
from hyperax.simplex import CappedSimplex

ROOT = Path(__file__).parent.parent
RECORD = ROOT / "benchmarks" / "records" / "data-cleaning.json"
PYTHON = ROOT / ".venv-peers" / "bin" / "python"
TOLERANCE = 1e-2  # relative, 2-norm: T = 2000 steps in float32
LONG = 500  # from this T on a row gets one round only: minutes a call
METHODS: dict[str, hx.Method] = {
    "Implicit(20), warm": Implicit(20, ConjugateGradient(max_steps=10), warm_start=True),
    "Reverse(100)": hx.Reverse(100),
    "Truncated(100, 20)": hx.Truncated(100, 20),
    "RealTime(every=20), window 20": RealTime(None, every=20, window=20),
}


class Process:
    """A side at one T; its first call is made."""

    def __init__(self, name: str, steps: int, threads: int, problem: Path, gradient: Path):
        words = [str(PYTHON), "-m", "benchmarks.peers.cleaning", name, str(steps), str(problem), str(gradient)]
        paths = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
        environ = {**os.environ, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": str(threads)}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True, env=environ)
        self.first = self._reply()

    def again(self) -> dict[str, Any]:
        """Ask for one more call."""
        assert self.process.stdin is not None
        self.process.stdin.write("again\n")
        self.process.stdin.flush()
        return self._reply()

    def close(self) -> int:
        """End the process; its exit status."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.process.wait(60)

    def _reply(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"error": f"the process ended with status {self.process.wait()}"}


def compare(drawn: Draw, steps: int, total: int, rounds: int, threads: int) -> list[dict[str, Any]]:
    """The rows of all sides at one T."""
    n, eye = len(drawn.given), np.eye(10, dtype=np.float32)
    problem = {"x": drawn.x, "y": eye[drawn.given], "x_val": drawn.x_val, "y_val": eye[drawn.y_val]}
    problem |= {"lam": np.full(n, total / n, np.float32), "step_size": np.float32(0.1 * n / total)}
    rows, processes = [], {}
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder) / "problem.npz", **problem)
        reference = None
        for name in SIDES:
            file = Path(folder) / "gradient.npy"
            process = Process(name, steps, threads, Path(folder) / "problem.npz", file)
            row: dict[str, Any] = {"steps": steps, "row": name, "threads": threads}
            rows.append(row)
            if "error" in process.first:
                row["reason"] = process.first["error"]
                continue
            found = np.load(file)
            reference = found if reference is None else reference
            row["difference"] = float(np.linalg.norm(found - reference) / np.linalg.norm(reference))
            row |= {"first_call_seconds": process.first["seconds"], "rounds": []}
            if row["difference"] > TOLERANCE:
                sys.exit(f"{name}, T = {steps}: its gradient differs by {row['difference']:.1e}")
            processes[name] = process, row
    for k in range(1 if steps >= LONG else rounds):
        names = list(processes)
        for name in names[k % len(names) :] + names[: k % len(names)]:
            process, row = processes[name]
            reply = process.again()
            row["rounds"].append(float(f"{reply['seconds']:.4g}"))
            row["peak_memory_mb"] = reply["peak_memory_mb"]
    for process, row in processes.values():
        process.close()
        row["seconds"] = float(np.median(row["rounds"]))
        if "rounds" in rows[0]:
            row["higher_over_this"] = float(np.median(np.divide(rows[0]["rounds"], row["rounds"])))
        print(row, flush=True)
    return rows


def hyperiteration(drawn: Draw, total: int) -> dict[str, Any]:
    """Seconds of each hyperiteration of `clean` but the first ones, and F1 at the end."""
    found = clean(drawn.x, drawn.given, drawn.x_val, drawn.y_val, total=total, callbacks=lambda progress: None)
    seconds = np.diff([line["seconds"] for line in found.seconds])[2:]
    quality = scores(drawn.wrong, found.weights < 1e-3)
    row = {"seconds": float(np.median(seconds)), "hyperiterations": len(found.values), **quality}
    print(row, flush=True)
    return row


def method(name: str, drawn: Draw, total: int, l2: float = 0.01, hyperiterations: int = 30) -> dict[str, Any]:
    """F1 by hyperiteration and seconds of one method in the outer loop of `clean`."""
    data = tables_of(drawn.x, drawn.given, drawn.x_val, drawn.y_val, 10)
    n, records = len(drawn.given), []

    def record(progress: Any) -> None:
        quality = scores(drawn.wrong, np.asarray(progress.lam())[:n] < 1e-3)
        records.append((time.perf_counter(), progress.value / total, quality["f1"]))

    lam = np.zeros(len(data["x"]), np.float32)
    lam[:n] = total / n
    hx.minimize(
        hx.hypergradient(PROBLEM, hx.GradientDescent(1.0), METHODS[name]),
        jnp.asarray(lam),
        data=data | {"R": np.float32(total), "l2": np.float32(l2)},
        optimizer=optax.sgd(0.2, momentum=0.9),
        steps=hyperiterations,
        constraint=Projected(CappedSimplex(float(total))),
        callbacks=record,
    )
    times, values, f1 = map(np.array, zip(*records, strict=True))
    row = {"method": name, "seconds": float(np.median(np.diff(times))), "validation_error": float(values[-1])}
    row |= {"f1": float(f1[-1]), "curve": [round(float(x), 4) for x in f1]}
    print({key: x for key, x in row.items() if key != "curve"}, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, nargs="*", default=[100, 500, 2000])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--record", type=Path, default=RECORD)
    options = parser.parse_args()
    if not PYTHON.exists():
        sys.exit("no .venv-peers: run `make bench-peers`, which sets it up")
    record = circumstances("python -m benchmarks.data_cleaning")
    mnist = load_mnist()
    small, full = draw(mnist, 0, 1000, 1000, 0, 0.5), draw(mnist, 0, 5000, 5000, 0, 0.5)
    record["methods"] = [method(name, small, 500) for name in METHODS]
    record["hyperiteration"] = hyperiteration(full, 2500)
    record["hypergradients"] = []
    for steps in options.steps:
        record["hypergradients"] += compare(full, steps, 2500, options.rounds, options.threads)
        options.record.write_text(json.dumps(record, indent=1) + "\n")  # the long ones come last


if __name__ == "__main__":
    main()
