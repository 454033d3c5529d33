"""hyperax beside higher, TorchOpt, Betty, PyTorch and jaxopt: the same hypergradients, checked equal, then timed.

    make bench-peers                 # sets up .venv-peers from its lock, then runs this module
    python -m benchmarks.peers.run [--rounds 9] [--problems ridge logistic]

Each library runs in a process of its own, and the processes take turns: in each round every row is timed once, so that
a machine whose speed drifts slows all of them alike. What counts is the median over rounds of the ratio of two rows.
A row whose gradient differs from the float64 reference by more than the tolerance is not timed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.problems import PROBLEMS, Numbers, inner, outer, somewhere
from benchmarks.peers.worker import THREADS
from hyperax.experiments import environment

ROOT = Path(__file__).parent.parent.parent
RECORD = ROOT / "benchmarks" / "records" / "peers.json"
PYTHON = ROOT / ".venv-peers" / "bin" / "python"
SIDES = ("hyperax", "jaxopt", "torch", "torchopt", "higher", "betty")
SWEEP = {"linear_representation": (1, 4, 16, 64, 256)}
REFERENCE = {"unrolled": "reference unrolled", "implicit": "reference implicit", "exact": "reference exact"}
# Largest relative error (2-norm) of a gradient, by type and quantity. float32: a residual of 1e-5 in the linear system
# and T = 256 steps of rounding; float64: a residual of 1e-10, amplified by a condition number of about 20.
TOLERANCE = {"float64": {"unrolled": 1e-10, "implicit": 1e-8, "exact": 1e-10}}
TOLERANCE["float32"] = {"unrolled": 1e-3, "implicit": 1e-3, "exact": 1e-3}
LONG_COMPILATION = ("torch.compile",)  # a minute for each T: at the problem's own T only
SLICE = 0.05  # seconds: rows that are faster are called several times in a turn


class Side:
    """A process with one library, obeying commands."""

    def __init__(self, name: str, double: bool):
        paths = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
        settings = {"PYTHONPATH": paths, "JAX_ENABLE_X64": str(int(double)), "JAX_PLATFORMS": "cpu"}
        settings["OMP_NUM_THREADS"] = str(THREADS)
        words = [str(PYTHON), "-m", "benchmarks.peers.worker", name]
        pipe = subprocess.PIPE
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 (as long as the process)
        environ = {**os.environ, **settings}
        self.process = subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=self.log, text=True, env=environ)
        self.name = name

    def ask(self, **command: Any) -> Any:
        """The reply to a command."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        reply = self.process.stdout.readline()
        if not reply:
            self.log.seek(0)
            raise RuntimeError(f"the process of {self.name} ended:\n{self.log.read().decode()[-2000:]}")
        return json.loads(reply)

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)
        self.log.close()


def check_objectives(side: Side, numbers: Numbers) -> None:
    """Stop unless L and E of a side are those of problems.py."""
    w = [leaf.astype(np.float64) for leaf in somewhere(numbers)]
    lam, data = numbers.lam.astype(np.float64), {name: x.astype(np.float64) for name, x in numbers.data.items()}
    expected = [objective(numbers.name, w, lam, data) for objective in (inner, outer)]
    found = side.ask(objectives=numbers.name)
    if isinstance(found, dict):
        raise RuntimeError(f"{side.name}, {numbers.name}: {found['error']}")
    np.testing.assert_allclose(found, expected, rtol=1e-5 if numbers.lam.dtype == np.float32 else 1e-12)


def relative_error(gradient: np.ndarray, reference: np.ndarray) -> float:
    return float(np.linalg.norm(gradient - reference) / np.linalg.norm(reference))


def compare(numbers: Numbers, sides: list[Side], rounds: int, folder: Path) -> list[dict[str, Any]]:
    """All rows of all sides on one problem at one T."""
    rows: list[dict[str, Any]] = []
    references: dict[str, np.ndarray] = {}
    common = {"problem": numbers.name, "steps": numbers.steps}
    own = numbers.steps == PROBLEMS[numbers.name]().steps  # the other T are for the gradient of f_T
    # PyTorch first: it has the references.
    for side in sorted(sides, key=lambda side: side.name != "torch"):
        offered = side.ask(rows=numbers.name)
        for name, quantity in sorted(offered.items(), key=lambda item: item[1] != "reference"):
            swept = (quantity == "unrolled" and name not in LONG_COMPILATION) or name == REFERENCE["unrolled"]
            if not own and not swept:
                continue
            file = folder / "gradient.npy"
            made = side.ask(make=name, **common, save=str(file))
            if quantity == "reference":
                if "error" in made:
                    raise RuntimeError(f"{name}: {made['error']}")
                references[name] = np.load(file)
                side.ask(drop=made["number"])
                continue
            row = {**common, "library": side.name, "row": name, "quantity": quantity}
            rows.append(row)
            if "error" in made:
                row["reason"] = made["error"]
                continue
            tolerance = TOLERANCE[str(numbers.lam.dtype)][quantity]
            row["error"], row["tolerance"] = relative_error(np.load(file), references[REFERENCE[quantity]]), tolerance
            row["first_call_seconds"] = made["first"]
            if not row["error"] <= tolerance:
                row["reason"] = f"its gradient differs from the reference by {row['error']:.1e}, over {tolerance:.0e}"
                side.ask(drop=made["number"])
                continue
            row |= {"number": made["number"], "repeats": max(1, int(SLICE / made["second"])), "rounds": []}
    take_turns([row for row in rows if "rounds" in row], {side.name: side for side in sides}, rounds)
    return rows


def take_turns(rows: list[dict[str, Any]], sides: dict[str, Side], rounds: int) -> None:
    """Time every row once a round; the round begins with another row each time."""
    for k in range(rounds):
        for row in rows[k % len(rows) :] + rows[: k % len(rows)]:
            reply = sides[row["library"]].ask(time=row["number"], repeats=row["repeats"])
            row["rounds"].append(float(f"{reply['seconds']:.4g}"))
    for row in rows:
        sides[row["library"]].ask(drop=row.pop("number"))
        row["seconds"] = float(np.median(row["rounds"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--problems", nargs="*", choices=PROBLEMS, default=list(PROBLEMS))
    parser.add_argument("--record", type=Path, default=RECORD)
    options = parser.parse_args()
    if not PYTHON.exists():
        sys.exit("no .venv-peers: run `make bench-peers`, which sets it up")
    load, table, versions, commits = os.getloadavg()[0], [], {}, {}
    if options.record.exists() and set(options.problems) != set(PROBLEMS):  # the other problems keep their rows
        old = json.loads(options.record.read_text())
        table = [row for row in old["table"] if row["problem"] not in options.problems]
        commits = {row["problem"]: old["commits"][row["problem"]] for row in table}
    for problem in options.problems:
        numbers = PROBLEMS[problem]()
        sides = [Side(name, double=numbers.lam.dtype == np.float64) for name in SIDES]
        try:
            for side in sides:
                check_objectives(side, numbers)
                versions |= side.ask(versions=True)
            for steps in SWEEP.get(problem, (numbers.steps,)):
                with tempfile.TemporaryDirectory() as folder:
                    rows = compare(PROBLEMS[problem](steps), sides, options.rounds, Path(folder))
                show(rows)
                table += rows
        finally:
            for side in sides:
                side.close()
        commits[problem] = environment.commit()
        table.sort(key=lambda row: list(PROBLEMS).index(row["problem"]))
        record = {
            "command": "make bench-peers",
            "rounds": options.rounds,
            "threads": THREADS,
            "problems": {name: PROBLEMS[name].__doc__ for name in dict.fromkeys(row["problem"] for row in table)},
            "table": table,
            "commits": commits,
            "versions": {**environment.versions(), **versions},
            "machine": environment.machine(),
            "load_before": load,
        }
        options.record.write_text(json.dumps(record, indent=1) + "\n")


def show(rows: list[dict[str, Any]]) -> None:
    print(f"{rows[0]['problem']}, T = {rows[0]['steps']}", flush=True)
    for row in sorted(rows, key=lambda row: (row["quantity"], row.get("seconds", np.inf))):
        result = f"{1000 * row['seconds']:10.2f} ms   error {row['error']:.0e}" if "seconds" in row else row["reason"]
        print(f"  {row['quantity']:10s}{row['row']:18s}{result}", flush=True)


if __name__ == "__main__":
    main()
