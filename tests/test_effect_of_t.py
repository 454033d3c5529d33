"""The recipe effect-of-t on a tiny network: what it computes, what it writes, how it goes on, what it refuses."""

import json
import re
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from hyperax import experiments
from hyperax.cli import main
from hyperax.experiments import environment, preparing, recipe
from hyperax.experiments.effect_of_t import (
    EffectOfTConfig,
    Sets,
    config_from_json,
    data,
    figures,
    linear_representation,
    report,
    runner,
)
from hyperax.experiments.run_folder import RunFolder
from hyperax.stopping import DivergenceWarning

pytest.importorskip("PIL")
pytest.importorskip("tyro")
pytest.importorskip("matplotlib")

FIELDS = {
    "classes": 3,
    "train_per_class": 2,
    "validation_per_class": 2,
    "test_per_class": 2,
    "draws": 2,
    "step_counts": (1, 4),
    "regularisation": 0.01,
    "step_size": 0.5,
    "learning_rate": 0.1,
    "hyperiterations": 30,
    "record_every": 2,
    "compared_hyperiterations": 2,
    "timed_calls": 1,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A finished few-shot run, of which only the parts that the recipe reads are there; its network is not trained."""
    folder = tmp_path_factory.mktemp("source")
    config = tiny.config(tiny.write_images(folder / "images"), network="omniglot")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(preparing._NETWORKS, "omniglot", tiny.Network)
        run = RunFolder.create(folder / "few-shot", config)
        shape = (tiny.SIDE, tiny.SIDE, 1)
        run.write_representation(config.test_learner.lam(preparing.build_network(config, shape, None)))
        yield run.path


@pytest.fixture(scope="module")
def settings(source):
    return recipe("effect-of-t", representation=str(source), **FIELDS)


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    """A run from the command line: its folder, and its summary as written."""
    out = tmp_path_factory.mktemp("finished") / "run"
    words = ["run", "effect-of-t", "--representation", settings.representation, "--out", str(out)]
    for name, x in FIELDS.items():
        words += [f"--{name.replace('_', '-')}", *map(str, x if isinstance(x, tuple) else [x])]
    assert main(words) == 0
    return out, json.loads((out / "summary.json").read_text())


def quick(monkeypatch):
    """Leave out what follows the curves."""
    times = {"Reverse": 0.3, "Doubling": 0.2}
    seconds = [{"steps": T, "method": name, "seconds": T * x} for T in (1, 4) for name, x in times.items()]
    seconds += [{"steps": "exact", "method": "ClosedForm", "seconds": 0.1}]
    monkeypatch.setattr(runner.Workbench, "disagreement", lambda *_: 0.0)
    monkeypatch.setattr(runner.Workbench, "seconds", lambda *_: seconds)


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def results(out, summary):
    """What has to be identical: records, and the summary but for times."""
    return (out / "records.jsonl").read_bytes(), {name: x for name, x in summary.items() if name != "timing"}


# What is computed


@pytest.fixture(scope="module")
def sets():
    random = np.random.default_rng(0)
    x = [jnp.asarray(random.normal(size=(6, 4))) for _ in range(3)]
    y = jnp.repeat(jnp.eye(3), 2, axis=0)
    return Sets(x[0], y, x[1], y, x[2], y)


def test_the_closed_form_of_example_3_4(sets):
    rho, H = 0.3, jnp.asarray(np.random.default_rng(1).normal(size=(4, 4)))
    problem, closed_form = linear_representation(rho)
    prepared = problem.prepare(H, sets)
    w = closed_form.solve(H, prepared)
    z, y = np.asarray(sets.x_train @ H), np.asarray(sets.y_train)
    # The paper's sums: rho there is n rho here.
    np.testing.assert_allclose(w, np.linalg.solve(z.T @ z + 6 * rho * np.eye(4), z.T @ y), rtol=1e-10)
    assert float(jnp.max(jnp.abs(jax.grad(lambda w: problem.inner(w, H, prepared))(w)))) < 1e-12
    expected = np.sum((np.asarray(sets.y_validation) - np.asarray(sets.x_validation @ H) @ np.asarray(w)) ** 2) / 6
    np.testing.assert_allclose(problem.outer(w, H, prepared), expected, rtol=1e-10)


def test_observations_against_plain_numpy(sets):
    bench = runner.Workbench(EffectOfTConfig(**FIELDS))
    H = jnp.eye(4) + 0.1
    seen = runner.observe(bench.hypergradients[4], bench.exact, H, sets)
    z, y, w = np.asarray(sets.x_train @ H), np.asarray(sets.y_train), np.zeros((4, 3))
    for _ in range(4):
        w = w - 0.5 * (2 * z.T @ (z @ w - y) / 6 + 2 * 0.01 * w)
    scores = np.asarray(sets.x_validation @ H) @ w
    np.testing.assert_allclose(seen["value"], np.sum((scores - np.asarray(sets.y_validation)) ** 2) / 6, rtol=1e-10)
    for part in ("train", "validation", "test"):
        guess = np.argmax(np.asarray(getattr(sets, f"x_{part}") @ H) @ w, 1)
        np.testing.assert_allclose(seen[part], np.mean(guess == np.argmax(y, 1)), rtol=1e-6)
    # Many steps give the exact solution.
    many = runner.Workbench(EffectOfTConfig(**FIELDS | {"step_counts": (4000,), "step_size": 0.1}))
    near = runner.observe(many.hypergradients[4000], many.exact, H, sets)
    np.testing.assert_allclose(near["value"], near["exact"], rtol=1e-8)
    assert bench.disagreement(4, sets) < 1e-10


def test_a_draw_is_disjoint_normalised_and_knows_no_labels(settings):
    source = data.open_source(settings, None)
    classes = source.dataset.test
    one, again, other = (data.draw_sets(settings, source.network, classes, draw) for draw in (0, 0, 1))
    np.testing.assert_array_equal(one.x_test, again.x_test)
    assert not np.array_equal(one.x_train, other.x_train)
    assert one.x_train.shape == one.x_validation.shape == one.x_test.shape == (6, 6)
    rows = np.concatenate([one.x_train, one.x_validation, one.x_test])
    assert len(np.unique(rows, axis=0)) == 18
    np.testing.assert_allclose(np.mean(one.x_train, 0), 0, atol=1e-6)
    np.testing.assert_allclose(np.mean(np.sum(np.asarray(one.x_train) ** 2, 1)), 1, rtol=1e-6)
    np.testing.assert_array_equal(one.y_test, np.repeat(np.eye(3), 2, axis=0))
    # A test image has the same features whatever the other test images are.
    fewer = data.draw_sets(replace(settings, test_per_class=1), source.network, classes, 0)
    np.testing.assert_allclose(fewer.x_test, one.x_test[::2], rtol=1e-5, atol=1e-6)


# What a run writes


def test_records(finished, settings):
    out, summary = finished
    records = lines(out / "records.jsonl")
    assert [(r["steps"], r["draw"]) for r in records if r["step"] == 0] == [
        (T, draw) for draw in (0, 1) for T in (1, 4, "exact")
    ]
    curve = [r for r in records if (r["steps"], r["draw"]) == (4, 1)]
    assert [r["step"] for r in curve] == [0, *range(2, 21, 2), 30]
    assert curve[-1]["value"] < curve[0]["value"]
    assert all(r["value"] == r["exact"] for r in records if r["steps"] == "exact")
    row = summary["curves"][1]
    ends = [r["test"] for r in records if r["steps"] == 4 and r["step"] == 30]
    assert row["final"]["test"] == report.statistics(ends)
    best = [max(r["test"] for r in records if (r["steps"], r["draw"]) == (4, draw)) for draw in (0, 1)]
    assert row["best"]["test"]["mean"] == np.mean(best)


def test_summary_and_report(finished, settings):
    out, summary = finished
    assert json.loads((out / "summary.json").read_text()) == summary
    assert config_from_json(json.loads((out / "config.json").read_text())) == settings
    assert summary["stopped"] == "completed 6 curves of 30 hyperiterations"
    assert max(x["relative"] for x in summary["disagreement"]) < 1e-4
    timed = [(row["steps"], row["method"]) for row in summary["timing"]["seconds_per_hypergradient"]]
    assert timed == [(1, "Reverse"), (1, "Doubling"), (4, "Reverse"), (4, "Doubling"), ("exact", "ClosedForm")]
    assert all(row["seconds"] > 0 for row in summary["timing"]["seconds_per_hypergradient"])
    assert summary["commit"] == environment.commit()
    assert sorted(path.stem for path in (out / "figures").iterdir()) == ["accuracy", "objective", "seconds"]
    page = (out / "report.html").read_text()
    for said in ("<td class=numeric>119</td>", "Tesla M40", "not all of them fit", "not transductive", "2 draws"):
        assert said in page, said
    assert page.count("data:image/png;base64,") == 3
    for leader in summary["leaders"].values():
        assert leader["test"]["mean"] == max(
            row["final" if leader is summary["leaders"]["final"] else "best"]["test"]["mean"]
            for row in summary["curves"]
        )


def test_the_table_for_a_terminal(finished):
    _, summary = finished
    head, names, *rows, last = experiments.format_table(summary, "run/report.html").splitlines()
    assert (head, last) == ("effect-of-t: means over 2 draws", "report: run/report.html")
    assert [row.split()[0] for row in rows] == ["1", "4", "exact"]
    assert f"{summary['curves'][1]['final']['value']['mean']:.4f}" in rows[1]
    assert len({len(row) for row in (names, *rows)}) == 1


def test_the_figures_show_the_records(finished):
    out, summary = finished
    records = lines(out / "records.jsonl")
    above, below = figures.objectives(records).axes
    mean = [np.mean([r["value"] for r in records if r["steps"] == 1 and r["step"] == step]) for step in (0, 2)]
    np.testing.assert_allclose(above.lines[0].get_ydata()[:2], mean)
    assert len(above.lines) == 3
    gap = [r["value"] - r["exact"] for r in records if r["steps"] == 1 and r["step"] == 0]
    np.testing.assert_allclose(below.lines[0].get_ydata()[0], np.mean(gap))
    (axes,) = figures.accuracies(records).axes
    np.testing.assert_allclose(np.max(axes.lines[0].get_ydata()), axes.lines[1].get_ydata()[0])
    (axes,) = figures.times(summary).axes
    assert axes.get_legend_handles_labels()[1] == ["Reverse", "Doubling", "exact (closed form)", "paper, scaled"]
    reverse, paper = axes.lines[0].get_ydata(), axes.lines[-1].get_ydata()
    np.testing.assert_allclose(paper, [reverse[0], reverse[0] * 119 / 60])


# The command line and how a run goes on


def test_a_killed_run_goes_on(finished, tmp_path, monkeypatch, capsys):
    out = shutil.copytree(finished[0], tmp_path / "run")
    # A kill in the fourth curve, in the middle of a line of its records.
    for name in ("summary.json", "report.html"):
        (out / name).unlink()
    done = (out / "curves.jsonl").read_text().splitlines(keepends=True)
    (out / "curves.jsonl").write_text("".join(done[:3]))
    (out / "records.jsonl").write_text((out / "records.jsonl").read_text()[:-40])
    assert main(["report", str(out)]) == 0
    assert "This run has not ended:</strong> 3 curves are finished" in (out / "report.html").read_text()
    capsys.readouterr()
    assert main(["resume", str(out)]) == 0
    told = capsys.readouterr()
    assert "effect-of-t: means over 2 draws" in told.out
    assert "curve 6 of 6: T = exact, draw 2 of 2" in told.err
    assert "curve 3 of 6" not in told.err
    assert results(out, json.loads((out / "summary.json").read_text())) == results(*finished)
    assert {line["session"] for line in lines(out / "timings.jsonl")} == {1, 2}

    monkeypatch.setattr(runner, "minimize", lambda *_, **__: pytest.fail("a finished curve was learned again"))
    quick(monkeypatch)
    assert experiments.resume(out)["curves"] == finished[1]["curves"]
    assert main(["resume", str(out), "--checkpoint", "step-00000001.ckpt"]) == 2
    assert "resume without --checkpoint" in capsys.readouterr().err


def test_list_and_kinds(capsys):
    assert main(["list"]) == 0
    assert re.search(r"^effect-of-t +The effect of T.* times in Franceschi .*Table 2", capsys.readouterr().out, re.M)
    assert experiments.kind_of(recipe("effect-of-t")).config is EffectOfTConfig
    with pytest.raises(ValueError, match="int is not a configuration: use recipe"):
        experiments.run(3, "nowhere")
    with pytest.raises(ValueError, match="knows no runs of kind 'tables', only few-shot, effect-of-t"):
        experiments.format_table({"kind": "tables"})


def test_a_run_that_diverges_says_which_curve(settings, tmp_path, monkeypatch):
    quick(monkeypatch)
    config = replace(settings, learning_rate=1e12, draws=1, step_counts=(4,))
    with pytest.warns(DivergenceWarning):
        summary = experiments.run(config, tmp_path / "run")
    assert summary["stopped"].startswith("diverged: T = 4: diverged at step")
    assert summary["curves"][0]["final"]["test"]["sd"] is None
    assert "diverged: T = 4" in (tmp_path / "run" / "report.html").read_text()


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"representation": "nowhere"}, r"hyperax run omniglot-5way-1shot --out DIR` and give --representation DIR"),
        ({"classes": 4}, "the test split has 3 classes: use --classes"),
        ({"test_per_class": 3}, r"has 6 images, and disjoint sets need 7 \(2 \+ 2 \+ 3\): use a smaller --test-per"),
    ],
)
def test_what_cannot_be_run_is_refused_before_the_folder_is_made(settings, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        experiments.run(replace(settings, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"draws": 0}, "draws is 0; it must be at least 1"),
        ({"step_size": 0.0}, "step_size is 0.0; it must be positive"),
        ({"regularisation": float("nan")}, "regularisation is nan"),
        ({"momentum": 1.0}, "momentum is 1.0; it must be at least 0 and below 1"),
        ({"step_counts": (4, 1)}, "in increasing order"),
        ({"step_counts": ()}, "step_counts are"),
        ({"split": "train"}, "split is 'train'; use 'test', or 'validation'"),
        ({"shots": 1}, "the recipe effect-of-t has no field shots"),
    ],
)
def test_configurations_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        recipe("effect-of-t", **changes)


def test_what_was_written_by_something_else(finished, settings, tmp_path):
    out, _ = finished
    for bad in ({"draws": "two"}, {"unknown": 1}, []):
        with pytest.raises(ValueError, match="not the configuration of a run of effect-of-t of this version"):
            config_from_json(bad)
    config = json.loads((out / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "source.json").write_text("{}")
    with pytest.raises(ValueError, match=r"are not those that .* began with"):
        experiments.resume(tmp_path)
    with pytest.raises(ValueError, match="not the configuration of a few-shot run"):
        experiments.load(tmp_path, (12, 12, 1))
    with pytest.raises(ValueError, match="holds no run of effect-of-t"):
        report.write_report(settings.representation)
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        experiments.write_report(tmp_path)
