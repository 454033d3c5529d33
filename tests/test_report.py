"""Reports from synthetic run folders: what they say, what they refuse, and that they stand alone."""

import base64
import html
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from hyperax.experiments import figures, reading, report

CONFIG = {
    "recipe": "omniglot-5way-1shot",
    "title": "Omniglot, 5-way 1-shot",
    "seed": 3,
    "dataset": {"type": "Omniglot"},
}
PAPER = {
    "accuracy": 0.986,
    "ci95": None,
    "source": "Franceschi et al. 2018, Table 3",
    "protocol": "support and query sets overlapping, as far as the public code shows",
}


def make_records(count=400, every=20, final=0.985):
    random = np.random.default_rng(0)
    records = []
    for i in range(1, count + 1):
        error = (1 - final) + 0.5 * np.exp(-i / 40)
        record = {"step": 50 * i, "value": 3 * error * random.lognormal(0, 0.15), "gradient_norm": 0.1}
        record["metrics"] = {"accuracy": max(1 - error * random.lognormal(0, 0.15), 0.2)}
        if i % every == 0:
            accuracy = max(1 - error * random.lognormal(0.1, 0.05), 0.2)
            record |= {"score": 1 - accuracy, "validation": {"accuracy": accuracy, "ci95": 0.004, "steps": 7}}
        records.append(record)
    return records


def make_summary(**changes):
    summary = {
        "recipe": "omniglot-5way-1shot",
        "title": "Omniglot, 5-way 1-shot",
        "test": {"accuracy": 0.98123, "ci95": 0.00417, "episodes": 600, "steps": 7},
        "validation": {"accuracy": 0.9845, "ci95": 0.004, "episodes": 600},
        "steps_by_validation": [
            {"steps": t, "accuracy": 0.985 - 0.08 / t**1.5 - 2e-4 * t, "ci95": 0.004} for t in range(1, 21)
        ],
        "steps_training": 5,
        "baselines": {
            "nearest neighbour on pixels": {"accuracy": 0.4512, "ci95": 0.0091, "episodes": 600},
            "untrained network": {"accuracy": 0.7034, "ci95": 0.0083, "episodes": 600},
        },
        "paper": PAPER,
        "protocol": {
            "ways": 5,
            "shots": 1,
            "queries": 15,
            "overlap": False,
            "statistics": "set",
            "transductive": True,
            "split": "by Vinyals et al.",
            "data": {"dataset": "Omniglot", "classes": {"train": 4800, "test": 1692}, "image_shape": [28, 28, 1]},
        },
        "best": {"step": 19000, "score": 0.0155},
        "stopped": "completed 20000 hyperiterations",
        "hyperiterations": 20000,
        "seed": 3,
        "commit": "0123abc",
        "versions": {"jax": "0.7.1", "hyperax": "0.1.0"},
        "machine": "2 x CPU",
        "timing": {"seconds": 7321.4, "hyperiterations_per_second": 2.73},
    }
    return summary | changes


def make_pairs(channels=1, size=28, components=24):
    random = np.random.default_rng(1)
    y, x = np.mgrid[:size, :size] / size
    shapes = [(x - a) ** 2 + (y - b) ** 2 < 0.08 for a, b in ((0.4, 0.5), (0.5, 0.4), (0.3, 0.3), (0.7, 0.7))]
    images = np.stack(shapes)[..., None] * np.array([255, 140, 60][:channels], np.uint8)
    features = np.maximum(random.normal(size=(4, 256)), 0)
    features[1] = features[0] + random.normal(0, 0.15, 256)
    arrays = {
        "names": np.array(["Tibetan/character07", "Keble/character21 <90>"]),
        "component_index": random.permutation(256)[:components],
    }
    for i, which in enumerate(("near", "far")):
        pair = slice(2 * i, 2 * i + 2)
        arrays |= {f"{which}_images": images[pair].astype(np.uint8), f"{which}_features": features[pair]}
        arrays[f"{which}_distance"] = np.linalg.norm(features[2 * i] - features[2 * i + 1])
    return arrays


def write_run(folder, records=None, summary=None, pairs=None, config=CONFIG):
    folder.mkdir(exist_ok=True)
    records = make_records() if records is None else records
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    timings = [{"step": record["step"], "seconds": 0.4 * record["step"]} for record in records]
    (folder / "timings.jsonl").write_text("".join(json.dumps(timing) + "\n" for timing in timings))
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    if pairs is not None:
        np.savez(folder / "pairs.npz", **pairs)
    return folder


class Page:
    """A report as a reader gets it: its text, its images, and whatever it would load from elsewhere."""

    def __init__(self, path):
        self.source = path.read_text("utf-8")
        body = self.source[self.source.index("<body>") :]
        self.text = " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).split())
        self.sources = re.findall(r"""(?:src|href|srcset|action|data)\s*=\s*["']?([^"'>\s]+)""", self.source)
        self.images = [
            Image.open(io.BytesIO(base64.b64decode(x.removeprefix("data:image/png;base64,")))) for x in self.sources
        ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("runs") / "omniglot 1", summary=make_summary(), pairs=make_pairs())
    return Page(report.write_report(folder)), folder


def test_finished_run_says_what_was_measured_and_how(finished):
    page, _ = finished
    for words in (
        "Omniglot, 5-way 1-shot",
        "98.12 ± 0.42 %",
        "5-way 1-shot, mean over 600 episodes",
        "T = 7 inner steps",
        "Support and query images of an episode are disjoint (15 queries a class).",
        "each set by its own statistics",
        "Transductive: the prediction",
        "classes: 4,800 / 1,692 (train, test); image: 28 x 28 x 1",
        "45.12 ± 0.91 +53.00",
        "70.34 ± 0.83 +27.78",
        "98.6 −0.48",
        "Franceschi et al. 2018, Table 3",
        "This run is 0.48 points below that number. The protocols differ",
        "hyperax run omniglot-5way-1shot --seed 3",
        "hyperax report 'omniglot 1'",
        "commit 0123abc",
        "jax 0.7.1",
        "hyperiterations per second 2.73",
        "dataset.type Omniglot",
    ):
        assert words in page.text
    assert "not ended" not in page.text


def test_report_stands_alone(finished):
    page, folder = finished
    assert len(page.images) == 4
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    for forbidden in ("<script", "<link", "<iframe", "@import", "url(", "{notes}"):
        assert forbidden not in page.source
    assert str(folder.parent) not in page.source
    for image in page.images:
        assert image.width > 800
        assert 250 < image.height < 1200
        assert len(set(image.convert("L").resize((64, 64)).tobytes())) > 20  # something is drawn on it
    files = sorted((folder / "figures").iterdir())
    assert [file.name for file in files] == ["comparison.png", "curves.png", "pairs.png", "steps.png"]
    assert max(file.stat().st_size for file in files) < 150_000


def test_many_records_still_make_a_small_figure(tmp_path):
    records = make_records(2000)
    for record in records:
        record["metrics"]["step_size"] = 0.1 + 1e-6 * record["step"]
    (path,) = figures.save_figures(write_run(tmp_path, records))
    assert path.stat().st_size < 150_000


@pytest.mark.parametrize("overlap", [True, False])
def test_protocols_are_compared(tmp_path, overlap):
    summary = make_summary(protocol={**make_summary()["protocol"], "overlap": overlap, "statistics": "support"})
    summary["protocol"]["transductive"] = False
    text = Page(report.write_report(write_run(tmp_path, [], summary | {"steps_by_validation": []}))).text
    assert ("The protocols differ" in text) == (not overlap)
    assert ("images of an episode are overlapping" in text) == overlap
    assert ("overlapping in both protocols" in text) == overlap
    assert "by the statistics of the support set" in text
    assert "Not transductive" in text
    table = report.format_table(summary)
    assert f"support and query {'overlapping' if overlap else 'disjoint'}" in table


def test_a_network_without_batch_statistics(tmp_path):
    protocol = make_summary()["protocol"] | {"statistics": "none", "transductive": False}
    text = Page(report.write_report(write_run(tmp_path, [], make_summary(protocol=protocol)))).text
    assert "Batch normalisation: none; the network has no batch normalisation." in text
    assert "Not transductive" in text


@pytest.mark.parametrize(
    ("words", "overlap"), [("non-overlapping sets", False), ("Disjoint", False), ("overlapping", True), ("", None)]
)
def test_overlap_of_the_paper_is_read_from_its_protocol(tmp_path, words, overlap):
    summary = make_summary(paper={**PAPER, "protocol": words}, steps_by_validation=[])
    text = Page(report.write_report(write_run(tmp_path, [], summary))).text
    said = {False: "disjoint in both protocols", True: "The protocols differ", None: "is not recorded"}
    assert [key for key, phrase in said.items() if phrase in text] == [overlap]


def test_strings_are_escaped(tmp_path):
    attack = "<script>alert('&')</script>"
    summary = make_summary(title=attack, stopped=attack, commit=attack, machine=attack, versions={attack: attack})
    summary["baselines"] = {attack: summary["baselines"]["untrained network"]}
    summary["paper"] = {**PAPER, "source": attack, "protocol": attack}
    summary["protocol"] |= {"statistics": attack, "split": attack, "shots": attack}
    page = Page(report.write_report(write_run(tmp_path, [], summary, config={attack: attack, "recipe": attack})))
    assert "<script" not in page.source
    assert page.text.count(attack) > 8


def test_class_names_of_any_kind_are_drawn(tmp_path):
    pairs = make_pairs() | {"names": np.array(["$x_{", "a/" * 40 + "long name without spaces in it" * 3])}
    figure = figures.nearest_and_farthest(pairs)
    figure.savefig(tmp_path / "pairs.png")
    labels = [axes.get_xlabel() for axes in figure.axes]
    assert r"$x$: \$x_{" in labels
    assert max(len(label) for label in labels) < 60


def test_unfinished_run_is_reported_by_its_curves(tmp_path):
    records = make_records(30)
    folder = write_run(tmp_path / "run", records)
    with (folder / "records.jsonl").open("a") as file:
        file.write('{"step": 1550, "val')  # cut short
    page = Page(report.write_report(folder))
    best = reading.best_record(records)
    assert "This run has not ended" in page.text
    assert "Its last record is of hyperiteration 1,500." in page.text
    assert f"{100 * best['validation']['accuracy']:.2f} ± 0.40 % at hyperiteration 1,000" in page.text
    assert "hyperax resume run" in page.text
    assert len(page.images) == 1
    assert "Data" not in page.text


def test_training_on_other_episodes_is_said(tmp_path):
    page = Page(report.write_report(write_run(tmp_path, make_records(2), config={"ways": 5, "train_ways": 20})))
    assert "Training episodes are 20-way" in page.text


def test_learned_step_size_is_drawn_wherever_it_was_recorded():
    records = make_records(40)
    records[19]["validation"]["step_size"] = 0.1
    records[39]["validation"]["step_size"] = 0.2
    figure = figures.training_curves(records)
    np.testing.assert_allclose(figure.axes[2].lines[-1].get_xydata(), [[1000, 0.1], [2000, 0.2]])
    assert len(figures.training_curves(make_records(40)).axes) == 2


def test_what_is_missing_is_said(tmp_path):
    folder = write_run(tmp_path, [], make_summary(paper=None, baselines={}, steps_by_validation=[]))
    page = Page(report.write_report(folder))
    assert len(page.images) == 1
    assert "No curves" in page.text
    assert "No pair of images" in page.text
    assert "publish no number for this setting" in page.text


def test_run_that_has_only_a_configuration(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    page = Page(report.write_report(tmp_path))
    assert "has not ended" in page.text
    assert "No curves" in page.text
    assert page.images == []


def test_sessions_add_up_and_repeated_steps_are_read_once(tmp_path):
    records = make_records(4)
    folder = write_run(tmp_path, [*records, records[2] | {"value": 9.0}])
    timings = [{"step": k, "seconds": s, "session": i} for k, s, i in ((50, 3.0, 1), (100, 7.0, 1), (150, 20.5, 2))]
    (folder / "timings.jsonl").write_text("".join(json.dumps(timing) + "\n" for timing in timings))
    assert [(record["step"], record["value"] == 9.0) for record in reading.read_run(folder).records][2:] == [
        (150, True),
        (200, False),
    ]
    assert "seconds 27.5" in Page(report.write_report(folder)).text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "not a run folder"),
        ("config.json", b"[1]", "config.json is damaged: it is not a JSON object"),
        ("config.json", b"\xff\xfe", "config.json is damaged: it is not text"),
        ("records.jsonl", b'{"step": 1, "value": 2.0}\n{"step": 2,\n', "records.jsonl, line 2, is damaged"),
        ("records.jsonl", b'{"step": 1}\n', 'records.jsonl, line 1, is damaged: "value" is missing'),
        ("timings.jsonl", b'{"step": "a", "seconds": 1}\n', 'timings.jsonl, line 1, is damaged: "step"'),
        ("summary.json", b'{"title": "', "summary.json is damaged"),
        ("summary.json", b'{"title": ""}', 'summary.json is damaged: "test" is missing'),
        ("summary.json", b'{"test": {}}', 'summary.json is damaged: its "test" has no accuracy'),
        ("pairs.npz", b"PK", "pairs.npz is damaged"),
    ],
)
def test_damage_is_named(tmp_path, name, content, message):
    folder = write_run(tmp_path, make_records(2), make_summary(), make_pairs())
    reading.read_run(folder)
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        reading.read_run(folder)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=re.escape(message)):
        figures.save_figures(folder)


def test_missing_folder(tmp_path):
    with pytest.raises(ValueError, match="there is no folder"):
        report.write_report(tmp_path / "nowhere")


def test_terminal_table():
    lines = report.format_table(make_summary(), "runs/1/report.html").splitlines()
    assert lines[0] == "omniglot-5way-1shot: accuracy on unseen classes in %"
    assert lines[1].split("   ")[0].strip() == "this run"
    assert [
        line.index(number) for line, number in zip(lines[1:5], ("98.12", "45.12", "70.34", "98.6"), strict=True)
    ] == [lines[1].index("98.12")] * 4
    assert lines[-1] == "report: runs/1/report.html"
    assert "report:" not in report.format_table(make_summary())


def test_curves_mark_the_best_iterate_and_survive_what_is_not_a_number():
    records = make_records(200)
    records[10]["value"] = float("nan")
    records[19]["score"] = float("nan")
    figure = figures.training_curves(records)
    best = min((r for r in records if np.isfinite(r.get("score", np.nan))), key=lambda r: r["score"])
    marks = [line for line in figure.axes[1].lines if line.get_label().startswith("best iterate")]
    assert marks[0].get_xydata().tolist() == [[best["step"], 100 * best["validation"]["accuracy"]]]
    assert figure.axes[0].get_yscale() == "log"
    for axes in figure.axes:
        assert all(np.isfinite(line.get_ydata()).all() for line in axes.lines)
    smooth = figure.axes[0].lines[1].get_ydata()
    window = [r["value"] for i, r in enumerate(records) if i != 10][98:103]
    np.testing.assert_allclose(smooth[100], np.mean(window))
    negative = figures.training_curves(
        [{"step": 1, "value": -2.0, "metrics": {}}, {"step": 2, "value": 3.0, "metrics": {}}]
    )
    assert negative.axes[0].get_yscale() == "linear"


def test_ink_is_dark_on_paper_and_photographs_keep_their_colours():
    ink, photograph = (figures.nearest_and_farthest(make_pairs(channels)).axes[0].images[0] for channels in (1, 3))
    assert ink.to_rgba(np.array([255]))[0, :3].tolist() == [0, 0, 0]
    np.testing.assert_array_equal(photograph.get_array(), make_pairs(3)["near_images"][0])


def test_steps_and_comparison_show_the_numbers():
    entries = make_summary()["steps_by_validation"]
    axes = figures.validation_of_steps(entries[::-1], chosen=7, training=5).axes[0]
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [100 * entry["accuracy"] for entry in entries])
    labels = axes.get_legend_handles_labels()[1]
    assert labels == ["T in training: 5", f"chosen T = 7: {100 * entries[6]['accuracy']:.4g} %"]
    axes = figures.comparison(reading.compared(make_summary()), chance=0.2).axes[0]
    np.testing.assert_allclose([bar.get_width() for bar in axes.patches], [98.123, 45.12, 70.34, 98.6])
    assert [text.get_text() for text in axes.texts] == ["98.12 ± 0.42", "45.12 ± 0.91", "70.34 ± 0.83", "98.6"]
    assert [bool(bar.get_hatch()) for bar in axes.patches] == [False, False, False, True]
