"""benchmarks.torch: the rows compute one gradient, and the tables say what a record holds."""

import copy
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))  # benchmarks is not installed
tables = importlib.import_module("benchmarks.torch_tables")

WAYS = ("training alone", "hyperax", "higher", "TorchOpt", "torch.func", "autograd", "a callback a step")
RECORD = {
    "command": "python -m benchmarks.torch",
    "machine": "a machine",
    "commit": "0123",
    "versions": {"torch": "2.13.0+cpu", "higher": "0.2.1", "torchopt": "0.7.3"},
    "rounds": 3,
    "threads": 1,
    "steps": [
        {"setting": "dense", "steps": T, "row": way, "seconds": 0.1 * T, "plain_step": 0.0004, "rounds": rounds}
        for T in (1, 2)
        for way, rounds in zip(WAYS, np.random.default_rng(0).uniform(1, 2, (7, 3)).tolist(), strict=True)
    ],
    "memory": [
        {"row": "hyperax", "steps": 9, "budget": "64MB", "added_bytes": 5e7, "peak_bytes": 6e8, "seconds": 12.3},
        {"row": "higher", "steps": 9, "budget": "64MB", "reason": "ended with status 1: MemoryError"},
    ],
}


def test_the_rows_compute_one_gradient():
    """Finite differences of f_T in float64, by the plain training."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: the extra hyperax[torch]")
    problems, rows = (importlib.import_module(f"benchmarks.torch.{name}") for name in ("problems", "rows"))
    setting, T = problems.SETTINGS["dense"](), 5
    found = {
        way: np.asarray(make(setting, T)())
        for way, make in rows.HYPERGRADIENTS.items()
        if way not in ("higher", "TorchOpt")  # in .venv-peers only
    }

    def f(lam):
        module = copy.deepcopy(setting.module).double()
        sgd = torch.optim.SGD(module.parameters(), lr=problems.STEP_SIZE, momentum=problems.MOMENTUM)
        cost = lambda batch: torch.nn.functional.cross_entropy(module(batch[0].double()), batch[1])
        for t in range(1, T + 1):
            sgd.zero_grad()
            setting.penalised(cost(setting.batches(None, t)), module.parameters(), lam).backward()
            sgd.step()
        return cost(setting.validation).item()

    lam, unit = setting.lam().double(), torch.eye(2, dtype=torch.float64)
    expected = [(f(lam + 1e-4 * v) - f(lam - 1e-4 * v)) / 2e-4 for v in unit]
    for way, gradient in found.items():
        np.testing.assert_allclose(gradient, expected, rtol=1e-3, err_msg=way)
    assert len(found) == 5


def test_the_time_table():
    text = tables.torch_steps(RECORD)
    head, _, *lines = text.split("\n\n")[0].splitlines()
    assert "| a callback a step | hyperax / fastest other |" in head
    assert len({line.count("|") for line in (head, *lines)}) == 1
    of = {row["row"]: np.asarray(row["rounds"]) for row in RECORD["steps"][:7]}
    fastest = np.min([of[way] for way in WAYS[2:6]], axis=0)
    assert lines[0].startswith("| dense | 0.4 | 1 | 100 |")
    assert lines[0].endswith(f"| {np.median(of['hyperax'] / fastest):.2f} |")
    assert "torch 2.13.0, higher 0.2.1" in text


def test_the_memory_table():
    lines = tables.torch_memory(json.loads(json.dumps(RECORD))).splitlines()
    assert lines[2] == '| `Reverse(9, memory="64MB")` | 9 | 50 | 600 | 12 |'
    assert lines[3] == "| higher | 9 | ended with status 1: MemoryError | |  |"
