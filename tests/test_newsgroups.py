"""The newsgroups study on a handful of documents in scikit-learn's own file layout."""

import codecs
import json
import pickle

import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from sklearn.utils import Bunch

from hyperax.experiments import study
from hyperax.experiments.newsgroups.corpus import read_corpus
from hyperax.experiments.newsgroups.study import EACH, GRID, ONE, Newsgroups

GROUPS = ("rec.planets", "sci.spoons")


def documents(count, seed):
    random = np.random.default_rng(seed)
    target = np.arange(count) % 2
    common = [f"word{i}" for i in range(40)]
    text = lambda t: " ".join(
        [*random.choice(common, 12), *random.choice(["mars", "spoon"], 3, p=[1 - t, t] if t else [1, 0])]
    )
    numbers = random.permutation(count) + 100
    return Bunch(
        data=[text(0.8 * t) for t in target],
        target=target,
        filenames=np.array([f"{GROUPS[t]}/{number}" for t, number in zip(target, numbers, strict=True)]),
        target_names=list(GROUPS),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "20newsgroups"
    folder.mkdir()
    both = {"train": documents(60, 0), "test": documents(30, 1)}
    (folder / "20news-bydate_py3.pkz").write_bytes(codecs.encode(pickle.dumps(both), "zlib_codec"))
    return folder.parent


def test_the_study_from_data_to_report(folder, tmp_path):
    config = Newsgroups(folds=2, grid_size=3, start=1.0)
    summary = study.run(config, tmp_path / "run", data_dir=str(folder))
    rows = {row[0]: row for row in summary["table"]["rows"]}
    assert set(rows) == {ONE, EACH, GRID}
    assert int(rows[EACH][1]) == summary["source"]["words"] > 40
    loss = {name: summary["measured"][name]["validation_loss"] for name in rows}
    curve = json.loads((tmp_path / "run" / "records.jsonl").read_text().splitlines()[1])["curve"]
    assert curve[-1] == pytest.approx(loss[EACH], abs=1e-5)
    assert curve[-1] < curve[0]
    assert loss[ONE] == pytest.approx(loss[GRID], abs=0.1)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["kind"] == "newsgroups-l2"
    page = (tmp_path / "run" / "report.html").read_text()
    assert "regularisers tuned in" in page
    assert page.count("<img") == 2


def test_splits_are_by_time(folder):
    corpus, _ = read_corpus(str(folder), "validation")
    whole, _ = read_corpus(str(folder), "test")
    assert len(corpus.test.y) + len(corpus.train.y) == len(whole.train.y) == 60
    assert corpus.test.age.min() >= 0.8
    folds = Newsgroups(folds=3)._stretches(whole)
    for train, validation in folds:
        assert not set(train) & set(validation)
    ages = [whole.train.age[validation] for _, validation in folds]
    assert ages[0].max() < ages[1].min() < ages[1].max() < ages[2].min()


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"folds": 1}, "folds"), ({"start": 0.0}, "start"), ({"split": "train"}, "use 'test', or 'validation'")],
)
def test_bad_settings(changes, words):
    with pytest.raises(ValueError, match=words):
        Newsgroups(**changes)


def test_missing_and_damaged_files(tmp_path, folder):
    with pytest.raises(ValueError, match="there is no 20news"):
        Newsgroups().open(str(tmp_path))
    (tmp_path / "20news-bydate_py3.pkz").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be read"):
        Newsgroups().open(str(tmp_path))
    with pytest.raises(ValueError, match="use --folds"):
        Newsgroups(folds=40).open(str(folder))
