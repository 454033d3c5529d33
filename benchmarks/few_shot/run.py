"""MAML and the hyper-representation on Omniglot: hyperax beside the PyTorch libraries, checked equal, then timed.

    python -m benchmarks.few_shot.run [--rounds 5] [--threads 2]    # .venv-peers is what `make bench-peers` sets up

The setting is in problems.py. Each library runs in a process of its own, and the processes take turns: in each round
every row is timed once. What counts is the median over rounds of the ratio of two rows. Every gradient is compared with
torch.func's in float64 before anything is timed; hyperax's also in float64, which is the issue's test of MAML on the
real network. Images: Omniglot where HYPERAX_DATA has it, else Glyphs. On a machine that also does other work use
`--threads 1`: PyTorch's threads wait for each other, and would look several times slower than they are.
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

import jax
import numpy as np

from benchmarks import timing
from benchmarks.few_shot.pieces import pieces
from benchmarks.few_shot.problems import MAML, QUERIES, REPRESENTATION, SHOTS, SIDE, WAYS, load
from benchmarks.peers import run as peers
from hyperax.fewshot.datasets import Glyphs, Omniglot
from hyperax.fewshot.episodes import Episodes
from hyperax.fewshot.networks import OmniglotNet

RECORDS = Path(__file__).parent.parent / "records"
SIDES = ("hyperax", "torch", "torchopt", "higher", "metalearn")
SETTINGS = {MAML: [(8, 5), (32, 5)], REPRESENTATION: [(8, 1), (8, 5), (8, 20), (8, 80)]}
"""(tasks, T)."""
REFERENCE = {MAML: "torch.func, one by one", REPRESENTATION: "torch.func, one by one, features once"}
BASE = {MAML: "hyperax", REPRESENTATION: "hyperax, features once"}
# Relative, 2-norm. float32: rounding, carried through T steps of 0.4 and kinks of ReLU; float64: the issue's.
TOLERANCE = {"float32": 1e-2, "float64": 1e-8}
MOST_TASKS = 32
DOUBLE = (8, 5)  # (tasks, T) at which hyperax's float64 gradient is compared too: a program more to compile
EPISODE = ("support", "support_labels", "query", "query_labels")


class Side(peers.Side):
    """A process with one library, obeying the commands of benchmarks/few_shot/worker.py."""

    def __init__(self, name: str, threads: int, double: bool = False):
        paths = os.pathsep.join([str(peers.ROOT / "src"), str(peers.ROOT)])
        settings = {"PYTHONPATH": paths, "JAX_ENABLE_X64": str(int(double)), "JAX_PLATFORMS": "cpu"}
        settings |= {"OMP_NUM_THREADS": str(threads), "JAX_NUM_CPU_DEVICES": str(threads)}
        words = [str(peers.PYTHON), "-m", "benchmarks.few_shot.worker", name]
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 (as long as the process)
        pipe = subprocess.PIPE
        environ = {**os.environ, **settings}
        self.process = subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=self.log, text=True, env=environ)
        self.name, self.threads = name, threads


def export(file: Path, seed: int = 0) -> str:
    """Draw the episodes and the weights; returns the name of the data set."""
    try:
        dataset = Omniglot().load()
    except ValueError:
        dataset = Glyphs().load()
    for_episodes, for_network, for_head = jax.random.split(jax.random.key(seed), 3)
    drawn = Episodes(WAYS, SHOTS, QUERIES).sample_many(for_episodes, dataset.train, MOST_TASKS)
    network = OmniglotNet((SIDE, SIDE, 1), for_network)
    arrays = {name: np.asarray(getattr(drawn, name)) for name in EPISODE}
    # Black and white: a division by 255 is exact then in every type; its rounding would show in float64 gradients.
    arrays |= {name: np.where(arrays[name] > 127, np.uint8(255), np.uint8(0)) for name in ("support", "query")}
    arrays |= {f"convolution_{i}": np.asarray(layer.weight) for i, layer in enumerate(network.convolutions)}
    arrays |= {f"shift_{i}": np.asarray(layer.beta) for i, layer in enumerate(network.normalisations)}
    # Not zero, or the first step would leave the network as it is.
    head = jax.nn.initializers.glorot_uniform()(for_head, (WAYS, 256))
    np.savez(file, **arrays, head_weight=np.asarray(head), head_bias=np.zeros(WAYS, np.float32))
    return dataset.name


class Comparison:
    """All rows of one problem, in turns."""

    def __init__(self, problem: str, numbers: Path, sides: list[Side]):
        self.problem, self.numbers, self.sides = problem, numbers, sides
        self.gradient = numbers.parent / "gradient.npy"

    def make(
        self, side: Side, name: str, tasks: int, steps: int, double: bool = False
    ) -> tuple[dict[str, Any], np.ndarray | None]:
        """Build a row in its process; its first gradient, `None` where it cannot."""
        where = {"tasks": tasks, "steps": steps, "numbers": str(self.numbers), "save": str(self.gradient)}
        reply = side.ask(make=name, double=double, **where)
        return reply, None if "error" in reply else np.load(self.gradient)

    def reference(self, tasks: int, steps: int) -> tuple[np.ndarray, float | None]:
        """torch.func's gradient in float64, and how far hyperax's in float64 is from it."""
        torch_side = next(side for side in self.sides if side.name == "torch")
        reply, expected = self.make(torch_side, REFERENCE[self.problem], tasks, steps, double=True)
        if expected is None:
            raise RuntimeError(f"{REFERENCE[self.problem]}: {reply['error']}")
        torch_side.ask(drop=reply["number"])
        if (tasks, steps) != DOUBLE:
            return expected, None
        double = Side("hyperax", torch_side.threads, double=True)
        reply, found = self.make(double, BASE[self.problem], tasks, steps, double=True)
        double.close()
        if found is None:
            raise RuntimeError(f"{BASE[self.problem]} in float64: {reply['error']}")
        error = peers.relative_error(found, expected)
        if not error <= TOLERANCE["float64"]:
            raise RuntimeError(f"{self.problem}: hyperax in float64 differs from torch.func by {error:.1e}")
        return expected, error

    def rows(self, tasks: int, steps: int, rounds: int) -> list[dict[str, Any]]:
        """Every row at this number of episodes and of steps: checked, then timed."""
        reference, double_error = self.reference(tasks, steps)
        rows: list[dict[str, Any]] = []
        for side in self.sides:
            for name, note in side.ask(rows=self.problem, tasks=tasks, steps=steps).items():
                row = {"tasks": tasks, "steps": steps, "library": side.name, "row": name, "note": note}
                rows.append(row)
                reply, gradient = self.make(side, name, tasks, steps)
                if gradient is None:
                    row["reason"] = reply["error"]
                    continue
                row |= {"error": peers.relative_error(gradient, reference), "first_call_seconds": reply["first"]}
                row["peak_memory_mb"] = reply["peak_memory_mb"]
                if name == BASE[self.problem] and double_error is not None:
                    row["float64_error"] = double_error
                if not row["error"] <= TOLERANCE["float32"]:
                    row["reason"] = f"its gradient differs from the reference by {row['error']:.1e}"
                    side.ask(drop=reply["number"])
                    continue
                row |= {"number": reply["number"], "repeats": 1, "rounds": []}
        timed = [row for row in rows if "rounds" in row]
        peers.take_turns(timed, {side.name: side for side in self.sides}, rounds)
        base = next(row for row in timed if row["row"] == BASE[self.problem])
        for row in timed:
            row["times_hyperax"] = float(np.median(np.divide(row["rounds"], base["rounds"])))
        return rows


def show(problem: str, rows: list[dict[str, Any]]) -> None:
    print(f"{problem}, {rows[0]['tasks']} episodes, T = {rows[0]['steps']}", flush=True)
    for row in sorted(rows, key=lambda row: row.get("seconds", np.inf)):
        result = f"error {row['error']:.0e}  " if "error" in row else ""
        if "seconds" in row:
            result += f"{1000 * row['seconds']:7.0f} ms {row['times_hyperax']:6.2f} x {row['peak_memory_mb']:6d} MB"
        print(f"  {row['row']:46s}{result}{row.get('reason', '')}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--problems", nargs="*", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--records", type=Path, default=RECORDS)
    options = parser.parse_args()
    if not peers.PYTHON.exists():
        sys.exit("no .venv-peers: run `make bench-peers`, which sets it up")
    about = timing.circumstances("python -m benchmarks.few_shot.run")
    with tempfile.TemporaryDirectory() as folder:
        numbers = Path(folder) / "numbers.npz"
        data = export(numbers)
        sides = [Side(name, options.threads) for name in SIDES]
        try:
            versions: dict[str, str] = {}
            for side in sides:
                versions |= side.ask(versions=True)
            for problem in options.problems:
                comparison = Comparison(problem, numbers, sides)
                table = []
                for tasks, steps in SETTINGS[problem]:
                    rounds = options.rounds if tasks == DOUBLE[0] else max(2, options.rounds // 2)
                    rows = comparison.rows(tasks, steps, rounds)
                    show(problem, rows)
                    table += rows
                record = about | {"data": data, "rounds": options.rounds, "threads": options.threads, "table": table}
                record["versions"] = about["versions"] | versions
                if problem == MAML:
                    record["pieces"] = pieces(load(numbers, MAML, 1, SETTINGS[MAML][0][1]), options.rounds)
                (options.records / f"{problem}.json").write_text(json.dumps(record, indent=1) + "\n")
        finally:
            for side in sides:
                side.close()


if __name__ == "__main__":
    main()
