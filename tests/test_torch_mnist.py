"""torch-mnist on made-up digits: a fair comparison, a finished report, and what is refused, a missing PyTorch too."""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest

from hyperax.experiments import study
from hyperax.experiments.torch_mnist import TorchMnist
from hyperax.experiments.torch_mnist.figures import step_sizes
from test_schedules_mnist import write_digits

needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="PyTorch is not installed: the extra hyperax[torch]"
)
TINY = {
    "train_size": 24,
    "validation_size": 12,
    "channels": 2,
    "steps": 4,
    "batch_size": 6,
    "knots": 3,
    "step_sizes": (0.1, 0.3),
    "weight_decays": (0.0, 0.01),
    "start": (0.1, 0.8, 0.01),
    "repeats": 2,
    "hyperiterations": 2,
    "test_runs": 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("digits")
    write_digits(place)
    return place


@needs_torch
def test_a_tiny_run(folder, tmp_path):
    config, out = TorchMnist(**TINY), tmp_path / "run"
    summary = study.run(config, out, data_dir=str(folder))
    records = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    of = lambda part, stage: [r for r in records if (r["part"], r["stage"]) == (part, stage)]

    ends = {part: of(part, "end")[0] for part in config.parts()}
    for part in ("constant", "cosine"):
        points = of(part, "grid")
        found = [(p["step_size"], p["weight_decay"]) for p in points]
        assert found == [(0.1, 0.0), (0.1, 0.01), (0.3, 0.0), (0.3, 0.01)]
        best = min(points, key=lambda p: p["validation"])
        assert ends[part]["setting"]["step_size"][0] == best["step_size"]
        assert ends[part]["setting"]["weight_decay"] == best["weight_decay"]
        assert ends[part]["validation"] == best["validation"]
    # The start is a point of the constant grid, on the same runs: the comparison is on equal terms.
    assert ends["start"]["validation"] == of("constant", "grid")[1]["validation"]
    tuned = ends["tuned"]["setting"]
    assert list(tuned["weight_decay"]) == ["conv1", "conv2", "head", "norm1", "norm2"]
    assert tuned["step_size"] != [0.1] * 3
    assert len(set(tuned["weight_decay"].values())) > 1
    assert len(of("tuned", "hyperiteration")) == 2
    assert {record["run"] for part in config.parts() for record in of(part, "test")} == {0, 1}

    assert [row[0] for row in summary["table"]["rows"]] == list(config.parts())
    assert summary["stopped"] == "completed 4 parts"
    assert {path.name for path in (out / "figures").iterdir()} == {"schedules.png", "search.png", "weight-decays.png"}
    assert "Tuned minus start, run by run" in (out / "report.html").read_text()
    assert TorchMnist.from_json(json.loads((out / "config.json").read_text())) == config


@needs_torch
def test_a_run_is_that_of_plain_pytorch(folder):
    """The cosine setting: the network, momentum and step sizes by torch.optim, on the same mini-batches."""
    import torch

    from hyperax.experiments.torch_mnist import training

    config = TorchMnist(**TINY)
    runs = training.Runs(config, config.open(str(folder)).data)
    setting, _ = runs.search("cosine")
    h = setting["setting"]
    np.testing.assert_allclose(h["step_size"], h["step_size"][0] * 0.5 * (1 + np.cos(np.pi * np.arange(4) / 4)))
    number = training.mixed(0, training._TEST, 1)
    module = training.network(number, 2, 4)
    batches = training.ht.Batches(runs.data["training"], 6, seed=number)
    sgd = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.8, weight_decay=h["weight_decay"])
    for t in range(1, 5):
        sgd.param_groups[0]["lr"] = h["step_size"][t - 1]
        sgd.zero_grad()
        training.cross_entropy(module, batches(None, t)).backward()
        sgd.step()
    expected = training._measured(module.eval(), runs.data["test"])
    assert runs.test(h)[1]["loss"] == pytest.approx(expected["loss"], rel=1e-4)


def test_knots_are_joined_by_lines():
    np.testing.assert_allclose(step_sizes([0.1, 0.3, 0.1], 5), [0.1, 0.2, 0.3, 0.2, 0.1])
    np.testing.assert_allclose(step_sizes([0.1], 3), [0.1] * 3)
    np.testing.assert_allclose(step_sizes([0.3, 0.2, 0.1], 3), [0.3, 0.2, 0.1])


def test_listed_without_importing_pytorch():
    code = "import sys; from hyperax.cli import main; main(['list']); sys.exit('torch' in sys.modules)"
    listed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "torch-mnist" in listed.stdout


def test_without_pytorch_it_is_refused(monkeypatch, folder, tmp_path):
    for name in [name for name in sys.modules if name.split(".")[:2] == ["hyperax", "torch"]]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match=r'torch-mnist trains a network of PyTorch: .* pip install "hyperax\[torch\]"'):
        study.run(TorchMnist(), tmp_path / "run", data_dir=str(folder))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 30}, "batch_size is 30 and train_size 24"),
        ({"knots": 0}, "knots must be a whole number, at least 1"),
        ({"step_sizes": (1.5,)}, "step_sizes are"),
        ({"weight_decays": ()}, "weight_decays are"),
        ({"start": (0.1, 0.9)}, r"start is \(0\.1, 0\.9\); give a step size in \(0, 1\)"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"memory": "much"}, "memory is 'much'"),
    ],
)
def test_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        TorchMnist(**TINY | changes)


@needs_torch
def test_refused_for_the_data(folder):
    with pytest.raises(ValueError, match=r"train_size \+ validation_size = 42, and MNIST has 40"):
        TorchMnist(**TINY | {"train_size": 30}).open(str(folder))
