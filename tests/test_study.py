"""The base class of studies, with a tiny one: run, kill, resume, damaged files, other data, report and table."""

import json
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest

from hyperax.experiments import study
from hyperax.experiments.figures import new_figure
from hyperax.experiments.study import Opened, Part, Shown, Study


class Killed(Exception):
    pass


killed_at: set[str] = set()
measured_parts: list[str] = []


@dataclass(frozen=True)
class Tiny(Study):
    kind: ClassVar[str] = "tiny"
    recipe: str = "tiny"
    title: str = "A tiny <study>"
    counts: tuple[int, ...] = (1, 2, 3)

    def open(self, data_dir):
        if data_dir == "nowhere":
            raise ValueError("no data in nowhere")
        return Opened(np.arange(4.0) + self.seed, {"name": "four numbers", "sum": 6 if data_dir is None else 7})

    def parts(self):
        return [f"part{count}" for count in self.counts]

    def measure(self, part, data, earlier, place):
        if part in killed_at:
            raise Killed(part)
        measured_parts.append(part)
        count = int(part.removeprefix("part"))
        before = sum(record["value"] for kept in earlier.values() for record in kept.records)
        arrays = {"all": data * count} if count != 2 else {}
        return Part([{"value": float(data[:count].sum() + before)}, {"value": 0.5}], arrays)

    def summarise(self, measured):
        values = [record["value"] for part in measured.values() for record in part.records]
        rows = [[name, f"{part.records[0]['value']:g}", f"{len(part.arrays)}"] for name, part in measured.items()]
        table = {"columns": ["part", "value", "arrays <n>"], "rows": rows}
        return {"headline": {"number": f"{sum(values):g}", "text": "in all."}, "table": table, "notes": ["a & b"]}

    def figures(self, measured, summary):
        figure = new_figure(1.0)
        figure.subplots().plot(measured["part3"].arrays["all"])
        return [Shown("line", figure, "a line", "<strong>A line</strong>")]


@pytest.fixture(autouse=True)
def _nothing_killed():
    killed_at.clear()
    measured_parts.clear()


def _contents(folder):
    """What a run says, without times and places."""
    summary = json.loads((folder / "summary.json").read_text())
    for name in ("timing", "machine", "commit", "versions"):
        del summary[name]
    return summary, (folder / "records.jsonl").read_text(), (folder / "figures" / "line.png").read_bytes()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    killed_at.clear()
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, study.run(Tiny(), folder)


def test_a_run_has_records_arrays_summary_figures_and_report(finished):
    folder, summary = finished
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    assert [record["part"] for record in records] == ["part1", "part1", "part2", "part2", "part3", "part3"]
    assert summary["headline"]["number"] == f"{sum(record['value'] for record in records):g}"
    assert sorted(path.name for path in (folder / "arrays").iterdir()) == ["part1.npz", "part3.npz"]
    assert [line["part"] for line in summary["timing"]["parts"]] == ["part1", "part2", "part3"]
    report = (folder / "report.html").read_text()
    for text in (
        "A tiny &lt;study&gt;",
        "arrays &lt;n&gt;",
        "a &amp; b",
        "<strong>A line</strong>",
        "hyperax run tiny",
    ):
        assert text in report


def test_the_table_has_aligned_columns(finished):
    folder, summary = finished
    lines = study.format_table(summary, folder / "report.html").splitlines()
    assert lines[0] == f"tiny: {summary['headline']['number']} in all."
    assert lines[1].split() == ["part", "value", "arrays", "<n>"]
    assert {line.index(cell) for line, cell in zip(lines[2:5], ("0", "1.5", "5"), strict=True)} == {
        lines[1].index("value")
    }
    assert lines[-1] == f"report: {folder / 'report.html'}"


def test_a_killed_run_resumes_with_its_finished_parts_and_ends_equal(finished, tmp_path, capsys):
    folder = tmp_path / "killed"
    killed_at.add("part2")
    with pytest.raises(Killed):
        study.run(Tiny(), folder)
    assert measured_parts == ["part1"]
    unfinished = study.write_report(Tiny, folder).read_text()
    assert "This run has not ended" in unfinished
    assert "1 parts are finished" in unfinished
    killed_at.clear()
    study.resume(Tiny, folder, progress=True)
    assert measured_parts == ["part1", "part2", "part3"]
    assert "part 2 of 3: part2" in capsys.readouterr().err
    assert _contents(folder) == _contents(finished[0])


def test_a_part_whose_line_a_kill_cut_in_two_is_measured_again(finished, tmp_path):
    folder = tmp_path / "cut"
    study.run(Tiny(), folder)
    lines = (folder / "parts.jsonl").read_text().splitlines()
    (folder / "parts.jsonl").write_text("\n".join([*lines[:2], lines[2][: len(lines[2]) // 2]]))
    (folder / "summary.json").unlink()
    measured_parts.clear()
    study.resume(Tiny, folder)
    assert measured_parts == ["part3"]
    assert _contents(folder) == _contents(finished[0])


def test_a_finished_run_measures_nothing_again(finished):
    before = _contents(finished[0])
    measured_parts.clear()
    study.resume(Tiny, finished[0])
    assert measured_parts == []
    assert _contents(finished[0]) == before


def test_other_data_and_folders_in_use_are_refused(finished, tmp_path):
    with pytest.raises(ValueError, match=r"the data are not those that .* began with"):
        study.resume(Tiny, finished[0], data_dir=str(tmp_path))
    with pytest.raises(ValueError, match="holds a run: `hyperax resume"):
        study.run(Tiny(), finished[0])
    with pytest.raises(ValueError, match="no data in nowhere"):
        study.run(Tiny(), tmp_path / "none", data_dir="nowhere")
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match="resume without --checkpoint"):
        study.resume(Tiny, finished[0], checkpoint="step-00000001.ckpt")
    with pytest.raises(ValueError, match="not a run folder"):
        study.write_report(Tiny, tmp_path / "none")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", "is damaged"),
        ("summary.json", "is damaged"),
        ("arrays/part1.npz", "is damaged"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, message):
    folder = tmp_path / "damaged"
    study.run(Tiny(), folder)
    (folder / name).write_bytes(b"{broken")
    with pytest.raises(ValueError, match=message) as error:
        study.write_report(Tiny, folder)
    assert folder.name in str(error.value)


@pytest.mark.parametrize("name", ["source.json", "arrays/part1.npz", "records.jsonl"])
def test_resume_names_a_damaged_file(tmp_path, name):
    folder = tmp_path / "damaged"
    killed_at.add("part2")
    with pytest.raises(Killed):
        study.run(Tiny(), folder)
    killed_at.clear()
    (folder / name).write_bytes(b"{broken")
    with pytest.raises(ValueError, match="is damaged") as error:
        study.resume(Tiny, folder)
    assert folder.name in str(error.value)


def test_configurations_survive_json(finished):
    config = Tiny(counts=(2, 3), seed=4)
    assert Tiny.from_json(json.loads(json.dumps(config.to_json()))) == config
    with pytest.raises(ValueError, match="not the configuration of a tiny"):
        Tiny.from_json({"kind": "tiny", "colour": "red"})
    with pytest.raises(ValueError, match="not the configuration of a tiny"):
        Tiny.from_json(["no dict"])


def test_another_seed_is_another_run(finished, tmp_path):
    summary = study.run(Tiny(seed=1), tmp_path / "other")
    assert summary["headline"] != finished[1]["headline"]
    assert summary["seed"] == 1


def test_intervals():
    assert study.interval([2.0])[0] == 2.0
    assert np.isnan(study.interval([2.0])[1])
    assert study.plus_minus([2.0], 1) == "2.0"
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(400):
        mean, half = study.interval(rng.normal(1.0, 2.0, 5).tolist())
        inside += abs(mean - 1.0) < half
    assert 0.92 < inside / 400 < 0.98
