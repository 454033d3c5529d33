"""Comparisons of few-shot learners: the same episodes, paired differences, parts that go on where they stopped."""

import contextlib
import json
from dataclasses import dataclass
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from hyperax.experiments import comparison, joining, recipe, study
from hyperax.experiments.comparison import COMPARISONS, roster, training
from hyperax.experiments.comparison.entrants import Entrant, Setting, Training, held_out, support_only
from hyperax.experiments.comparison.study import Comparison
from hyperax.experiments.run_folder import RunFolder
from hyperax.fewshot.episodes import Episodes
from hyperax.fewshot.evaluation import accuracies_by_steps, paired_difference
from hyperax.fewshot.image_batches import ImageBatches
from hyperax.fewshot.image_classes import ImageClasses, MetaDataset
from hyperax.fewshot.learners.hyper_representation import HyperRepresentation
from hyperax.fewshot.learners.pretrained import Multiclass
from hyperax.fewshot.learners.prototypical import Prototypical
from hyperax.fewshot.networks import OmniglotNet

TWO = Setting(2, 1)
SMALL = {"budget": 0.5, "validations": 2, "validation_episodes": 6, "test_episodes": 8, "queries": 2}


@dataclass(frozen=True)
class Tiny(Comparison):
    kind: ClassVar[str] = "tiny-comparison"
    recipe: str = "tiny-comparison"
    title: str = "Tiny"

    def all_settings(self):
        return (TWO,)

    def entrants(self):
        pretrained = Training(
            "pretrained",
            Multiclass,
            lambda setting: ImageBatches(6),
            8,
            tasks=1,
            hypergradient=lambda learner, steps: learner.hypergradient(),
        )
        ours = Training("ours", HyperRepresentation, held_out(3, 1), 8, steps=2, tasks=2)
        numbers = roster.numbers({("omniglot", TWO): (90.0, 1.0)}, "A paper, Table 1")
        return (
            Entrant("Hyper-representation", ours, most_steps=3, published=numbers),
            Entrant("Prototypes", Training("prototypes", Prototypical, held_out(None, 1), 8, tasks=2), most_steps=1),
            roster.readout("glyphs", pretrained, "linear", "Linear"),
            roster.readout("glyphs", pretrained, "conv", "Nearest", nearest=True),
        )


def _classes(seed, count):
    random = np.random.default_rng(seed)
    draw = lambda most, images: random.integers(0, most, (images, tiny.SIDE, tiny.SIDE))
    return ImageClasses.from_lists({f"{seed}-{i}": draw(60, 1) + draw(190, 5) for i in range(count)})


class Noise:
    def load(self, data_dir=None):
        return MetaDataset("Noise", *(_classes(i, n) for i, n in enumerate((4, 3, 3))), {"name": "noise"})


@contextlib.contextmanager
def tiny_world():
    """Tiny classes for every data set, a linear network for every training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison.study, "_DATASETS", dict.fromkeys(("omniglot", "miniimagenet", "glyphs"), Noise))
        patch.setattr(training, "make_network", lambda name, shape, key, filters: tiny.Network(shape, key))
        yield


@pytest.fixture(scope="module", autouse=True)
def _everywhere():
    with tiny_world():
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, study.run(Tiny(**SMALL), folder)


def test_a_row_for_every_learner_with_protocol_and_paired_difference(finished):
    folder, summary = finished
    columns, rows = summary["table"]["columns"], summary["table"]["rows"]
    assert [row[1] for row in rows] == ["Hyper-representation", "Prototypes", "Linear", "Nearest"]
    row = dict(zip(columns, rows[0], strict=True))
    assert row["setting"] == "2-way 1-shot"
    assert row["published, %"] == "90.00 ± 1.00"
    assert row["best of hyperiterations"].endswith(" of 4")  # half of the full number
    assert row["trained on"] == "3-way 1-shot, 1 queries a class, T = 2"
    assert "transductive" in row["batch statistics"]
    assert row["minus Hyper-representation"] == "–"
    notes = " ".join(summary["notes"])
    assert all(word in notes for word in ("disjoint", "overlapping", "transductive", "A paper, Table 1", "50 %"))
    assert rows[1][6] == "–"  # no inner steps
    kept = dict(np.load(folder / "arrays" / "2way-1shot-ours.npz"))["Hyper-representation"]
    other = dict(np.load(folder / "arrays" / "2way-1shot-pretrained.npz"))["Nearest"]
    expected = paired_difference(other, kept)
    assert summary["differences"]["2way-1shot"]["Nearest"]["Hyper-representation"] == expected
    assert rows[3][3] == f"{100 * expected['difference']:+.2f} ± {100 * expected['ci95']:.2f}"
    assert {path.name for path in (folder / "figures").iterdir()} == {
        "accuracies.png",
        "differences-2way-1shot.png",
        "training.png",
    }
    assert (folder / "parts" / "2way-1shot-ours" / "lam.eqx").exists()


def test_the_test_episodes_are_the_same_for_all_learners():
    def sums(self, lam, episode, steps):
        """In place of accuracies: what identifies the episode, whatever the learner and its T."""
        return jnp.broadcast_to(episode.query.astype(float).sum(), (steps,))

    class Watching(HyperRepresentation):
        accuracies = sums

    class WatchingFormula(Prototypical):
        accuracies = sums

    config, classes = Tiny(**SMALL), _classes(9, 3)
    seen = []
    for kind, most_steps in ((Watching, 7), (WatchingFormula, 1), (Watching, None)):
        entrant = Entrant("watching", Training("watching", kind, held_out(2, 1), 1, steps=3), most_steps=most_steps)
        seen.append(training.Tested(config, TWO, entrant, kind(2)).accuracies({}, classes, "test", 5)[:, -1])
    np.testing.assert_array_equal(seen[0], seen[1])
    np.testing.assert_array_equal(seen[0], seen[2])
    assert len(np.unique(seen[0])) > 1


def test_a_part_that_was_killed_goes_on_from_its_checkpoint(finished, tmp_path, monkeypatch):
    whole, summary = finished
    folder, calls = tmp_path / "killed", []
    validate = training.Tested.validate

    def bomb(self, lam, classes):
        calls.append(self.entrant.name)
        if len(calls) == 4:  # in the second part, after its first checkpoint
            raise KeyboardInterrupt
        return validate(self, lam, classes)

    monkeypatch.setattr(training.Tested, "validate", bomb)
    with pytest.raises(KeyboardInterrupt):
        study.run(Tiny(**SMALL), folder)
    assert list((folder / "parts" / "2way-1shot-prototypes" / "checkpoints").iterdir())
    monkeypatch.setattr(training.Tested, "validate", validate)
    resumed = study.resume(Tiny, folder)
    assert resumed["table"] == summary["table"]
    without = lambda folder: [
        {name: x for name, x in json.loads(line).items() if name != "seconds"}
        for line in (folder / "records.jsonl").read_text().splitlines()
    ]
    assert without(folder) == without(whole)


def test_runs_of_different_learners_are_joined_to_one(finished, tmp_path):
    whole, summary = finished
    # Their parts, as two runs would have left them.
    names = {"a": ("prototypes", "pretrained"), "b": ("ours",)}
    for name, learners in names.items():
        config = Tiny(**SMALL, learners=learners)
        folder = RunFolder.create(tmp_path / name, config)
        folder.write_json("source.json", {"name": "noise"})
        for file in ("records.jsonl", "parts.jsonl"):
            kept = [line for line in RunFolder(whole).lines(file) if line["part"] in config.parts()]
            folder.replace_lines(file, kept)
        for part in config.parts():
            folder.write_arrays(part, RunFolder(whole).read_arrays(part))
    joined = joining.join(Tiny, tmp_path / "joined", [tmp_path / "a", tmp_path / "b"])
    assert joined["table"] == summary["table"]
    assert joined["differences"] == summary["differences"]
    with pytest.raises(ValueError, match="2way-1shot-ours, and so did"):
        joining.join(Tiny, tmp_path / "again", [tmp_path / "joined", tmp_path / "b"])
    wrong = [record | {"accuracy": 0.0} for record in RunFolder(tmp_path / "joined").lines("records.jsonl")]
    RunFolder(tmp_path / "joined").replace_lines("records.jsonl", wrong)
    replaced = joining.join(Tiny, tmp_path / "replaced", [tmp_path / "joined", tmp_path / "b"], replace=True)
    was = {row[1]: row for row in summary["table"]["rows"]}
    now = {row[1]: row for row in replaced["table"]["rows"]}
    assert [name for name in was if was[name] != now[name]] == [name for name in was if name != "Hyper-representation"]
    (tmp_path / "b" / "parts.jsonl").write_text("")
    with pytest.raises(ValueError, match="no finished part"):
        joining.join(Tiny, tmp_path / "again", [tmp_path / "a", tmp_path / "b"])
    lines = RunFolder(tmp_path / "a").lines("parts.jsonl")
    RunFolder(tmp_path / "a").replace_lines("parts.jsonl", lines[:1])  # interrupted after its first part
    assert len(joining.join(Tiny, tmp_path / "interim", [tmp_path / "a"])["table"]["rows"]) == 1
    with pytest.raises(ValueError, match="but for --learners"):
        Tiny.united([Tiny(**SMALL, learners=("ours",)), Tiny(**SMALL, seed=1)], ["2way-1shot-ours"])
    assert not (tmp_path / "again").exists()


def test_tasks_are_shared_over_a_mesh(finished, tmp_path, monkeypatch):
    whole, _ = finished
    meshes, mean = [], training.mean_over_tasks
    monkeypatch.setattr(training, "mean_over_tasks", lambda h, **more: meshes.append(more["mesh"]) or mean(h, **more))
    mesh = jax.sharding.Mesh(jax.devices()[:2], ("devices",))
    study.run(Tiny(**SMALL, learners=("ours",)), tmp_path / "run", mesh=mesh)
    name = "2way-1shot-ours.npz"
    ours, other = (np.load(folder / "arrays" / name)["Hyper-representation"] for folder in (tmp_path / "run", whole))
    np.testing.assert_allclose(ours, other)
    assert meshes == [mesh]


def _trainings():
    """Of every kind one: sweeps, 1x5 and 16x5, and the two pretrained networks differ in numbers only."""
    rows = [entrant for kind in COMPARISONS[:4] for entrant in kind(dataset="glyphs").entrants()]
    found = {entrant.training.name: entrant for entrant in rows}
    return [found[name] for name in found if "x5" not in name and name not in ("nn", "pretrained")]


@pytest.mark.parametrize("entrant", _trainings(), ids=lambda entrant: entrant.training.name)
def test_every_training_and_its_test_can_be_traced(entrant):
    """Shapes and types of f_T, and of an evaluation, of every learner of every table."""
    one, shape = entrant.training, (16, 16, 1)
    key, setting = jax.random.key(0), Setting(3, 1)
    classes = ImageClasses.from_lists({str(i): np.zeros((20, 16, 16)) for i in range(24)})
    sampler = one.sampler(setting)
    learner = one.learner(getattr(sampler, "ways", classes.num_classes))
    lam = eqx.filter_eval_shape(lambda: learner.lam(OmniglotNet(shape, key, filters=2), shape, key))
    h = one.hypergradient(learner, one.steps)
    f = lambda lam, task: h.value(lam, task, h.init(lam, task))[0]
    value = eqx.filter_eval_shape(f, lam, eqx.filter_eval_shape(sampler.sample, key, classes))
    assert value.shape == ()
    tested = entrant.learner(setting.ways)
    episode = eqx.filter_eval_shape(Episodes(3, 1, 2).sample, key, classes)
    found = eqx.filter_eval_shape(lambda lam, episode: tested.accuracies(entrant.view(lam), episode, 2), lam, episode)
    assert found.shape == (2,)


def test_devices_that_do_not_divide_the_tasks_are_refused():
    recipe("table4").check_devices(2)
    recipe("table4", tasks=9).check_devices(3)
    with pytest.raises(ValueError, match="--tasks 3"):
        recipe("table4").check_devices(3)


@pytest.mark.parametrize("dataset", ["omniglot", "miniimagenet", "glyphs"])
@pytest.mark.parametrize("kind", COMPARISONS)
def test_every_table_is_complete_on_every_data_set(kind, dataset):
    config = kind(dataset=dataset)
    parts, names = config.parts(), [entrant.name for entrant in config.entrants()]
    assert len(set(parts)) == len(parts)
    assert len(set(names)) == len(names)
    assert config.reference in names
    assert all(part == part.lower() and " " not in part for part in parts)
    for setting in config.chosen_settings():
        for entrant in config.entrants():
            assert entrant.learner(setting.ways).ways == setting.ways
            assert kind(dataset=dataset, budget=0.5).hyperiterations(entrant.training) in (500, 2000, 20_000, 30_000)
    assert kind.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize("kind", COMPARISONS)
def test_every_table_is_written_from_its_parts(kind):
    config, measured = kind(dataset="glyphs", budget=0.5), {}
    score = {"accuracy": 0.5, "ci95": 0.01}
    for part in config.parts():
        setting = next(setting for setting in config.chosen_settings() if part.startswith(f"{setting.name}-"))
        name = part.removeprefix(f"{setting.name}-")
        common = {"setting": setting.name, "training": name}
        tests = [
            {"what": "test", "entrant": entrant.name, **common, **score, "overlapping": score, "steps": 3}
            for entrant in config.chosen_entrants()
            if entrant.training.name == name
        ]
        training = {"what": "training", **common, "best": 7, "hyperiterations": 9, "stopped": "completed 9"}
        records = [training, *({**test, "statistics": "set"} for test in tests)]
        measured[part] = study.Part(records, {test["entrant"]: np.full(4, 0.5) for test in tests})
    table = config.summarise(measured)["table"]
    assert len(table["rows"]) == len(config.chosen_settings()) * len(config.chosen_entrants())
    assert all(len(row) == len(table["columns"]) for row in table["rows"])


def test_the_papers_numbers_are_in_their_tables():
    number = lambda kind, name, setting: next(
        100 * e.published["miniimagenet", setting].accuracy
        for e in kind(dataset="miniimagenet").entrants()
        if e.name == name
    )
    table3, table4, bridge1, bridge2, *_ = COMPARISONS
    found = {
        "RN": number(table3, "Hyper-representation", Setting(5, 1)),
        "MAML": number(table3, "MAML", Setting(5, 5)),
        "Approx": number(table4, "Approx", Setting(5, 1)),
        "fine-tuning": number(bridge1, "Fine-tuning", Setting(5, 5)),
        "Classic": number(bridge2, "Classic-train 1x5", Setting(5, 1)),
    }
    np.testing.assert_allclose(list(found.values()), [50.54, 63.11, 41.12, 49.76, 24.70])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"budget": 0.0}, "share of the full number"),
        ({"settings": ("5-way",)}, "write 5way-1shot"),
        ({"learners": ("nobody",)}, "it has hyper-representation, siamese-nets"),
        ({"dataset": "cifar"}, "use omniglot"),
        ({"test_episodes": 1}, "at least 2"),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(changes, words):
    with pytest.raises(ValueError, match=words):
        recipe("table3", **changes)


def test_classes_that_cannot_give_the_episodes_are_refused():
    with pytest.raises(ValueError, match="20-way"):
        recipe("table3", settings=("20way-1shot",)).open(None)


def test_support_only_episodes_have_the_support_set_as_query_set():
    episode = support_only(3)(TWO).sample(jax.random.key(0), _classes(1, 3))
    np.testing.assert_array_equal(episode.support, episode.query)
    assert episode.support.shape[0] == 6


def test_paired_differences_are_of_the_same_episodes():
    with pytest.raises(ValueError, match="same episodes"):
        paired_difference(np.zeros(3), np.zeros(4))


def test_accuracies_of_a_formula_do_not_depend_on_t():
    classes = _classes(2, 3)
    learner = Prototypical(2)
    lam = learner.lam(tiny.Network((tiny.SIDE, tiny.SIDE, 1), jax.random.key(0)))
    episodes = Tiny(**SMALL).episodes(TWO)
    found = accuracies_by_steps(learner, lam, episodes, classes, jax.random.key(1), 4, 3)
    np.testing.assert_array_equal(found[:, 0], found[:, 2])
