"""The code of docs/pytorch.md runs as it stands, with fewer steps and hyperiterations."""

import re
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed: the extra hyperax[torch]")

PAGE = Path(__file__).parent.parent / "docs" / "pytorch.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
FEWER = {r"\b60\b": "3", r"\] \* 5": "] * 3", r'"steps": 30': '"steps": 2'}
FEWER |= {r"range\(3\)": "range(1)", r"\b8, 3\b": "2, 3"}
FEWER |= {r"BatchNorm2d\(8\)": "BatchNorm2d(2)", r"\(512, 10\)": "(128, 10)"}


def fewer(code):
    for pattern, text in FEWER.items():
        code = re.sub(pattern, text, code)
    return code


def test_the_code_runs_in_its_order(capsys):
    names: dict = {}
    assert len(BLOCKS) == 6
    for block in BLOCKS:
        exec(fewer(block), names)  # the reader's own next step
    printed = capsys.readouterr().out
    assert "The gradient of f_T to" in printed
    assert sorted(names["solution"].lam) == ["momentum", "step_size", "weight_decay"]
    assert names["solution"].lam["weight_decay"].keys() == {"0", "1", "4"}
    assert names["h"].grad["decay"] != 0
    assert names["rate"] != torch.tensor(0.01).log(), "moved by torch.optim"
    maml, start, tasks = (names[name] for name in ("maml", "start", "tasks"))
    assert maml.value(names["found"].lam, tasks) < 0.5 * maml.value(start, tasks)


def test_tuning_takes_twenty_lines():
    _, tuning, *_ = BLOCKS
    assert len([line for line in tuning.splitlines() if line.strip()]) <= 20
