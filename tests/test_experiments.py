"""Runs of the main job, in this process: what they write, what they depend on, what they refuse."""

import json
import shutil

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import tiny
from hyperax.experiments import few_shot, load, resume, run
from hyperax.experiments.config import config_from_json
from hyperax.fewshot.datasets import ImageFolder
from hyperax.fewshot.evaluation import accuracies_by_steps, interval
from hyperax.fewshot.networks import PerImage
from hyperax.stopping import DivergenceWarning

pytest.importorskip("PIL")
pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return tiny.write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    """A finished run with its report: its folder and summary."""
    out = tmp_path_factory.mktemp("finished") / "run"
    return out, run(tiny.config(images), out, make_network=tiny.Network)


@pytest.fixture
def quick(images, tmp_path, monkeypatch):
    """Run with some fields changed and without a report."""
    monkeypatch.setattr(few_shot, "write_report", lambda folder: None)

    def start(out="run", optimizer=None, make_network=tiny.Network, **changes):
        config = tiny.config(images, **changes)
        summary = run(config, tmp_path / out, make_network=make_network, optimizer=optimizer)
        return tmp_path / out, summary

    return start


def results(out, summary):
    """What has to be identical: records, lam, and the summary but for times."""
    files = [(out / name).read_bytes() for name in ("records.jsonl", "representation.eqx")]
    return [*files, {name: x for name, x in summary.items() if name != "timing"}]


def read_lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


class Counting(tiny.Network):
    """With a leaf that has no hypergradient."""

    count: jax.Array

    def __init__(self, image_shape, key):
        super().__init__(image_shape, key)
        self.count = jnp.zeros((), jnp.int32)


# What a run writes


def test_run_folder(finished, images):
    out, summary = finished
    names = {
        "config.json",
        "where.json",
        "records.jsonl",
        "timings.jsonl",
        "summary.json",
        "report.html",
        "representation.eqx",
    }
    assert {path.name for path in out.iterdir()} == names | {"pairs.npz", "checkpoints", "figures"}
    assert json.loads((out / "summary.json").read_text()) == summary
    assert config_from_json(json.loads((out / "config.json").read_text())) == tiny.config(images)
    assert [path.name for path in sorted((out / "checkpoints").iterdir())] == [
        "step-00000009.ckpt",
        "step-00000012.ckpt",
    ]
    assert all(path.suffix == ".png" for path in (out / "figures").iterdir())
    report = (out / "report.html").read_text()
    assert "data:image/png;base64," in report
    assert f"{100 * summary['test']['accuracy']:.2f}" in report


def test_records(finished):
    out, summary = finished
    records = read_lines(out / "records.jsonl")
    assert [record["step"] for record in records] == [2, 4, 6, 8, 10, 12]
    assert [record["step"] for record in records if "score" in record] == [4, 8, 12]
    assert summary["best"]["score"] == min(record["score"] for record in records if "score" in record)
    seconds = [line["seconds"] for line in read_lines(out / "timings.jsonl")]
    assert seconds == sorted(seconds)
    assert "seconds" not in (out / "records.jsonl").read_text()


def test_summary(finished):
    _, summary = finished
    assert set(summary["test"]) == {"accuracy", "ci95", "episodes", "steps"}
    assert summary["test"]["episodes"] == summary["validation"]["episodes"] == 8
    by_steps = [entry["accuracy"] for entry in summary["steps_by_validation"]]
    assert len(by_steps) == 3
    assert summary["test"]["steps"] == 1 + by_steps.index(max(by_steps))
    assert set(summary["baselines"]) == {"nearest neighbour on pixels", "untrained network"}
    assert summary["protocol"]["overlap"] is False
    assert summary["protocol"]["data"]["classes"] == {"train": 4, "validation": 3, "test": 3}
    assert summary["timing"]["hyperiterations_per_second"] > 0
    assert summary["timing"]["seconds"] > 0
    assert {"python", "jax", "equinox", "numpy"} <= set(summary["versions"])
    assert {"commit", "machine", "seed", "stopped", "paper"} <= set(summary)
    assert summary["network"] == {"type": "Network", "numbers": 12 * 12 * 6 + 6}


def test_a_loaded_run_gives_the_accuracy_of_its_summary(finished, images):
    out, summary = finished
    config = tiny.config(images)
    learner, lam = load(out, (12, 12, 1), tiny.Network)
    key = config.key("test")
    test, steps = config.dataset.load().test, summary["test"]["steps"]
    found = accuracies_by_steps(learner, lam, config.episodes, test, key, config.test_episodes, steps)
    assert interval(found[:, -1]) | {"steps": steps} == summary["test"]


def test_what_cannot_be_loaded(finished, tmp_path):
    out, _ = finished
    with pytest.raises(ValueError, match=r"does not hold this network .* image shape"):
        load(out, (10, 10, 1), tiny.Network)
    with pytest.raises(ValueError, match="not a run folder"):
        load(tmp_path, (12, 12, 1), tiny.Network)
    shutil.copy(out / "config.json", tmp_path)
    with pytest.raises(ValueError, match="has not finished: `hyperax resume`"):
        load(tmp_path, (12, 12, 1), tiny.Network)


# What a run depends on


def test_the_seed_decides(finished, quick):
    again, other = quick("again"), quick("other", seed=1)
    assert results(*again) == results(*finished)
    for here, there in zip(results(*other)[:2], results(*finished)[:2], strict=True):
        assert here != there


def test_step_size_learned_on_more_ways(quick):
    out, summary = quick(statistics="episode", learn_step_size=True, train_ways=3, train_queries=1, schedule="cosine")
    assert summary["step_size"] > 0
    steps = [record["validation"]["step_size"] for record in read_lines(out / "records.jsonl") if "score" in record]
    assert summary["step_size"] == steps[summary["best"]["step"] // 4 - 1]
    assert abs(steps[-1] - 0.05) > 1e-4
    protocol = summary["protocol"]
    assert (protocol["ways"], protocol["training_ways"], protocol["training_queries"]) == (2, 3, 1)
    learner, lam = load(out, (12, 12, 1), tiny.Network)
    assert (learner.ways, float(lam["step_size"])) == (2, summary["step_size"])


def test_patience_and_overlap(quick):
    # With all six images a class as queries there is no disjoint support, and the rate is too small to change a score.
    with pytest.raises(ValueError, match="has 6 images and an episode needs 7"):
        quick(queries=6)
    changes = {"statistics": "support", "schedule": "constant", "learning_rate": 1e-9}
    _, summary = quick(queries=6, overlap=True, patience=1, **changes)
    assert summary["stopped"].startswith("patience: no validation score below")
    assert (summary["hyperiterations"], summary["best"]["step"]) == (8, 4)
    assert summary["protocol"]["overlap"] is True
    assert summary["protocol"]["transductive"] is False


def test_statistics_of_the_mini_batch_in_training_and_of_the_episode_at_test(quick, finished):
    out, summary = quick(statistics="batch")
    assert (summary["protocol"]["statistics"], summary["protocol"]["training_statistics"]) == ("episode", "batch")
    # The same seed, so the same weights and episodes.
    first, with_sets = (read_lines(folder / "records.jsonl")[0]["value"] for folder in (out, finished[0]))
    assert first != with_sets


def test_own_network_and_optimizer(quick, images, tmp_path):
    network = lambda shape, key: PerImage(eqx.nn.Sequential([eqx.nn.Lambda(jnp.ravel), eqx.nn.Linear(144, 5, key=key)]))
    out, summary = quick(make_network=network, optimizer=optax.sgd(0.1))
    assert summary["network"]["type"] == "PerImage"
    assert (summary["protocol"]["statistics"], summary["protocol"]["transductive"]) == ("none", False)
    assert summary["optimizer"] == "given in Python"
    _, lam = load(out, (12, 12, 1), network)
    assert isinstance(lam["network"], PerImage)
    assert results(out, resume(out, make_network=network, optimizer=optax.sgd(0.1))) == results(out, summary)
    with pytest.raises(ValueError, match="belongs to another run: leaves"):
        resume(out, make_network=tiny.Network, optimizer=optax.sgd(0.1))
    with pytest.raises(ValueError, match="belongs to another run: leaves"):
        resume(out, make_network=network)


@pytest.mark.parametrize(
    ("make_network", "message"),
    [
        (
            lambda shape, key: PerImage(eqx.nn.Linear(7, 5, key=key)),
            "network PerImage does not map images of 12 x 12 x 1",
        ),
        (lambda shape, key: lambda images, moments: images, "returns .*; wrap a module of one image in PerImage"),
        (lambda shape, key: eqx.nn.Linear(144, 5, key=key), "does not map images of 12 x 12 x 1 to vectors"),
        (Counting, r"lam\['network'\]\.count has type int32; only floating-point numbers"),
    ],
)
def test_a_network_that_does_not_fit_is_refused_before_the_folder_is_made(quick, tmp_path, make_network, message):
    with pytest.raises(ValueError, match=message):
        quick(make_network=make_network)
    assert not (tmp_path / "run").exists()


def test_a_run_that_diverges_keeps_the_last_good_iterate(quick, images, tmp_path):
    optimizer = optax.sgd(lambda k: jnp.where(k < 5, 0.1, jnp.inf))
    with pytest.warns(DivergenceWarning, match="diverged at step 6"):
        out, summary = quick(optimizer=optimizer)
    assert summary["stopped"].startswith("diverged at step 6")
    assert "smaller outer learning rate" in summary["stopped"]
    assert (summary["hyperiterations"], summary["best"]["step"]) == (5, 4)
    _, lam = load(out, (12, 12, 1), tiny.Network)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(lam))
    assert summary["test"]["accuracy"] > 0
    with pytest.warns(DivergenceWarning, match="diverged at step 6"):
        assert results(out, resume(out, make_network=tiny.Network, optimizer=optimizer)) == results(out, summary)


# Where the images are


def test_a_resumed_run_finds_its_images_and_tells_nobody_where_they_are(images, tmp_path, monkeypatch):
    dataset = ImageFolder(size=tiny.SIDE, mode="L")
    config, out = tiny.config("", dataset=dataset), tmp_path / "run"
    monkeypatch.delenv("HYPERAX_DATA", raising=False)
    monkeypatch.chdir(images.parent)
    summary = run(config, out, data_dir=images.name, make_network=tiny.Network)
    assert json.loads((out / "where.json").read_text()) == {"data_dir": str(images)}
    assert config_from_json(json.loads((out / "config.json").read_text())) == config
    monkeypatch.chdir(tmp_path)
    moved = shutil.copytree(images, tmp_path / "moved", copy_function=shutil.copy2)
    assert results(out, resume(out, make_network=tiny.Network)) == results(out, summary)
    for name in ("summary.json", "report.html", "config.json"):
        assert str(images) not in (out / name).read_text()
    monkeypatch.setattr(few_shot, "_run", lambda config, folder, dataset, *_, **__: dataset.name)
    assert resume(out, data_dir=str(moved), make_network=tiny.Network) == "moved"
    (out / "where.json").write_text("{")
    with pytest.raises(ValueError, match=r"where\.json is damaged: remove it and give --data-dir"):
        resume(out, make_network=tiny.Network)
    (out / "where.json").unlink()
    with pytest.raises(ValueError, match="name your folder of class folders"):
        resume(out, make_network=tiny.Network)


# Checkpoints


def test_a_truncated_checkpoint_is_refused_and_the_one_before_it_goes_on(quick):
    out, summary = quick()
    before = results(out, summary)
    newest = out / "checkpoints" / "step-00000012.ckpt"
    newest.write_bytes(newest.read_bytes()[:-100])
    with pytest.raises(
        ValueError, match=r"is damaged .*resume .*run --checkpoint step-00000009\.ckpt` goes on from it"
    ):
        resume(out, make_network=tiny.Network)
    with pytest.raises(ValueError, match=r"no checkpoint 'step-00000005\.ckpt' .* there are step-00000009\.ckpt"):
        resume(out, make_network=tiny.Network, checkpoint="step-00000005.ckpt")
    for name in ("records.jsonl", "representation.eqx", "summary.json"):
        (out / name).unlink()
    good = str(out / "checkpoints" / "step-00000009.ckpt")
    assert results(out, resume(out, make_network=tiny.Network, checkpoint=good)) == before

    for file in (out / "checkpoints").iterdir():
        file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"it is empty.* remove the file and `hyperax resume .*run` starts"):
        resume(out, make_network=tiny.Network, checkpoint="step-00000009.ckpt")


def test_a_foreign_checkpoint_and_other_images_are_refused(quick, images, tmp_path):
    out, _ = quick("mine")
    other, _ = quick("other", seed=1)
    name = "checkpoints/step-00000012.ckpt"
    mine = (out / name).read_bytes()
    (out / name).write_bytes((other / name).read_bytes())
    with pytest.raises(ValueError, match=r"belongs to another run: identity\.config\.seed is 1 there and 0 here"):
        resume(out, make_network=tiny.Network)
    (out / name).write_bytes(b"something else")
    with pytest.raises(ValueError, match="is not a hyperax checkpoint"):
        resume(out, make_network=tiny.Network)
    (out / name).write_bytes(mine)
    changed = tiny.write_images(tmp_path / "changed", seed=1)
    text = (out / "config.json").read_text()
    (out / "config.json").write_text(text.replace(json.dumps(str(images)), json.dumps(str(changed))))
    with pytest.raises(ValueError, match="belongs to another run: identity"):
        resume(out, make_network=tiny.Network)
