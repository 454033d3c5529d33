"""The recipe data-cleaning-mnist, on small files in the layout of MNIST."""

import gzip

import numpy as np
import pytest

from hyperax.experiments.data_cleaning import DataCleaning
from hyperax.experiments.data_cleaning.measuring import draw, scores
from hyperax.experiments.mnist import load_mnist
from hyperax.experiments.study import format_table, resume, run

SMALL = DataCleaning(
    train=120, validation=60, test=40, budgets=(20, 60), headline_budget=60, draws=2, hyperiterations=8
)


def write_idx(path, array):
    header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Images of 5 x 5 pixels: two rows lit by the label, and noise."""
    folder = tmp_path_factory.mktemp("data") / "mnist"
    folder.mkdir()
    random = np.random.default_rng(0)
    patterns = random.integers(0, 200, (10, 5, 5))
    for images, labels, count in (
        ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", 200),
        ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte", 50),
    ):
        y = random.integers(0, 10, count).astype(np.uint8)
        write_idx(folder / f"{images}.gz", (patterns[y] + random.integers(0, 55, (count, 5, 5))).astype(np.uint8))
        write_idx(folder / f"{labels}.gz", y)
    return str(folder.parent)


def test_a_draw(data_dir):
    mnist = load_mnist(data_dir)
    drawn = draw(mnist, 3, 120, 60, 40, 0.5)
    assert drawn.x.shape == (120, 25)
    assert drawn.x_test.shape == (40, 25)
    assert drawn.wrong.sum() == 60
    assert drawn.given.min() >= 0
    assert drawn.given.max() <= 9
    rows = {bytes(row) for row in np.concatenate([drawn.x, drawn.x_val])}
    assert len(rows) == 180  # no example is in both
    labels = {bytes(np.float32(image.ravel()) / np.float32(255)): y for image, y in zip(*mnist.train, strict=True)}
    assert [labels[bytes(row)] for row in drawn.x] == drawn.true.tolist()
    again = draw(mnist, 3, 120, 60, 40, 0.5)
    np.testing.assert_array_equal(drawn.given, again.given)
    assert (draw(mnist, 4, 120, 60, 40, 0.5).given != drawn.given).any()


def test_scores():
    wrong, suspected = np.array([1, 1, 1, 0, 0], bool), np.array([1, 1, 0, 1, 0], bool)
    assert scores(wrong, suspected) == pytest.approx({"precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3})
    assert scores(wrong, np.zeros(5, bool))["f1"] == 0.0


@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "cleaning"
    return folder, run(SMALL, folder, data_dir=data_dir)


def test_the_summary(finished):
    folder, summary = finished
    assert summary["f1"] > 0.85
    assert len(summary["table"]["rows"]) == 5
    assert {len(row) for row in summary["table"]["rows"]} == {len(summary["table"]["columns"])}
    sizes = [row[1] for row in summary["table"]["rows"][:3]]
    assert sizes == ["180", "120", "60"]  # all + validation, right half + validation, validation
    assert summary["budget_of_least_validation_error"] in SMALL.budgets
    assert "cleaned, R = 60" in format_table(summary)
    report = (folder / "report.html").read_text("utf-8")
    assert all((folder / "figures" / f"{name}.png").exists() for name in ("budgets", "weights", "curves", "suspects"))
    assert "The most suspicious images" in report


def test_the_records(finished):
    folder, _ = finished
    part = np.load(folder / "arrays" / "draw-1.npz")
    for budget in SMALL.budgets:
        weights = part[f"weights_{budget}"]
        assert weights.shape == (120,)
        assert weights.sum() <= budget * 1.001
        given, true = part[f"labels_{budget}"]
        images = part[f"images_{budget}"]
        assert len(images) == len(given) == len(true) == 40
        assert images.shape[1:] == (5, 5)
    assert np.mean(given != true) > 0.9  # the most suspicious are labelled wrongly


def test_a_finished_run_is_resumed_at_once(finished, data_dir):
    folder, summary = finished
    again = resume(DataCleaning, folder, data_dir=data_dir)
    assert again["table"] == summary["table"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"train": 500}, "560 training and validation examples"),
        ({"test": 51}, "51 of the test set"),
        ({"wrong_share": 1.0}, "wrong_share"),
        ({"headline_budget": 3}, "headline_budget is 3"),
    ],
)
def test_sizes_that_the_files_do_not_have(settings, words, data_dir, tmp_path):
    changed = DataCleaning(**{"train": 120, "validation": 60, "test": 40, **settings})
    with pytest.raises(ValueError, match=words):
        run(changed, tmp_path / "run", data_dir=data_dir)
    assert not (tmp_path / "run").exists()


def test_without_mnist(tmp_path):
    with pytest.raises(ValueError, match="get the four files of MNIST"):
        run(SMALL, tmp_path / "run", data_dir=str(tmp_path))
