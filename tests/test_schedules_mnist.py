"""schedules-mnist on made-up digits: a fair comparison, a finished report, and data that are refused."""

import gzip
import json

import numpy as np
import pytest

from hyperax.experiments import study
from hyperax.experiments.schedules_mnist import SchedulesMnist

SIDE = 4
TINY = {
    "train_size": 24,
    "validation_size": 12,
    "hidden": 3,
    "steps": 4,
    "batch_size": 6,
    "knots": 3,
    "step_sizes": (0.1, 0.3),
    "momenta": (0.0, 0.8),
    "start": (0.1, 0.8),
    "finalists": 2,
    "repeats": 2,
    "hyperiterations": 2,
    "test_runs": 2,
}


def write_digits(folder):
    """Forty training and sixteen test images in the files of MNIST; the label is where the ink is."""
    draw = np.random.default_rng(0)
    (folder / "mnist").mkdir()
    for name, count in (("train", 40), ("t10k", 16)):
        labels = np.arange(count, dtype=np.uint8) % 10
        images = draw.integers(0, 60, (count, SIDE, SIDE), np.uint8)
        images.reshape(count, -1)[np.arange(count), labels] = 255
        for what, array in (("images", images), ("labels", labels)):
            head = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
            path = folder / "mnist" / f"{name}-{what}-idx{array.ndim}-ubyte.gz"
            path.write_bytes(gzip.compress(head + array.tobytes()))


def test_a_tiny_run(tmp_path):
    write_digits(tmp_path)
    config = SchedulesMnist(**TINY)
    out = tmp_path / "run"
    summary = study.run(config, out, data_dir=str(tmp_path))
    records = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    of = lambda part, stage: [r for r in records if (r["part"], r["stage"]) == (part, stage)]

    ends = {part: of(part, "end")[0] for part in config.parts()}
    for part in ("constant", "cosine"):
        points = of(part, "grid")
        assert [(p["step_size"], p["momentum"]) for p in points] == [(0.1, 0.0), (0.1, 0.8), (0.3, 0.0), (0.3, 0.8)]
        finals, point = of(part, "finalist"), lambda record: (record["step_size"], record["momentum"])
        assert [point(f) for f in finals] == [point(p) for p in sorted(points, key=lambda p: p["validation"])[:2]]
        assert ends[part]["validation"] == min(f["validation"] for f in finals)
    # Knots that are all alike are a constant, on the same mini-batches as the grid: the comparison is on equal terms.
    assert ends["learned"]["before"] == pytest.approx(of("constant", "grid")[1]["validation"], rel=1e-5)
    assert ends["learned"]["after"] <= ends["learned"]["before"]
    assert np.shape(ends["learned"]["hyperparameters"]["step_size"]) == (3,)
    assert len(of("learned", "hyperiteration")) == 2

    tested = {part: [r["loss"] for r in of(part, "test")] for part in config.parts()}
    assert [len(losses) for losses in tested.values()] == [2, 2, 2]
    assert summary["table"]["rows"][1][2].startswith(f"{np.mean(tested['cosine']):.4f}")
    difference = np.mean(np.subtract(tested["learned"], tested["cosine"]))
    assert f"Learned minus cosine, run by run: {difference:.4f}" in summary["notes"][1]
    assert summary["source"]["examples"] == {"training": 24, "validation": 12, "test": 16}
    rates = config._curves("cosine", {"step_size": 0.4, "momentum": 0.5})[0]
    np.testing.assert_allclose(rates, 0.2 * (1 + np.cos(np.pi * np.arange(4) / 4)), rtol=1e-5)
    assert {path.name for path in (out / "figures").iterdir()} == {"schedules.png", "search.png"}
    assert "learned" in (out / "report.html").read_text()
    assert SchedulesMnist.from_json(config.to_json()) == config

    with pytest.raises(ValueError, match="train_size \\+ validation_size = 42, and MNIST has 40"):
        SchedulesMnist(**TINY | {"train_size": 30}).open(str(tmp_path))
    with pytest.raises(ValueError, match="knots must be a whole number, at least 1"):
        SchedulesMnist(knots=0)
    with pytest.raises(ValueError, match=r"start is \(0\.1, 1\.0\); give a step size of at most 1 and a momentum"):
        SchedulesMnist(start=(0.1, 1.0))
    with pytest.raises(ValueError, match="step_sizes are"):
        SchedulesMnist(step_sizes=())
