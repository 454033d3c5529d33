"""The recipe `mixed-domains`, on noise in the place of the glyphs."""

import contextlib
import json
from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hyperax as hx
import tiny
from hyperax.experiments import study
from hyperax.experiments.mixed_domains import MixedDomains, data, training
from hyperax.experiments.mixed_domains.study import ALL_LAYERS, ALONE, NEW_STEM, PIXELS, SCRATCH
from hyperax.fewshot import layers
from hyperax.fewshot.domains import (
    DomainEpisodes,
    DomainNet,
    DomainNets,
)
from hyperax.fewshot.image_classes import ImageClasses
from problems import assert_trees_close

REAL_DIGITS = data.DOMAINS["digits"]
FIELDS: dict[str, Any] = {
    "filters": 2,
    "inner_steps": 1,
    "tasks": 1,
    "train_queries": 1,
    "hyperiterations": 2,
    "new_hyperiterations": 2,
    "validations": 2,
    "queries": 1,
    "validation_episodes": 3,
    "test_episodes": 3,
    "draws": 1,
}


def noisy(ways, side):
    """A domain of noise; of each split the same names, so that one compiled program serves all."""
    random = np.random.default_rng(side)
    images = lambda: random.integers(0, 256, (3, side, side))
    splits = {name: ImageClasses.from_lists({str(i): images() for i in range(ways)}) for name in data.SPLITS}
    return data.Domain(ways, lambda data_dir: (splits, {"name": "noise"}))


def shrink(hypergradient, lam, *, data, sample, key, steps, validation, **settings):
    """In the place of `minimize`, which would be compiled for every kind of lam."""
    assert set(jax.eval_shape(sample, key, data)) == set(data) == set(hypergradient.hypergradients)
    history = []
    for step in range(1, steps + 1):
        lam = jax.tree.map(lambda x: 0.9 * x if eqx.is_inexact_array(x) else x, lam)
        score, accuracies = validation.score(lam)
        history.append({"step": step, "score": score, "validation": accuracies})
    best = {"step": steps, "score": 0.0}
    return hx.Solution(lam, lam, None, best, history, [], f"completed {steps} hyperiterations", steps, ())


def noise_and_lam(learner, lam, episodes, classes, key, count, steps):
    """In the place of accuracies: what tells the episodes, by their key, plus what tells lam."""
    level = sum(float(jnp.sum(jnp.abs(leaf))) for leaf in jax.tree.leaves(eqx.filter(lam, eqx.is_inexact_array)))
    return np.asarray(jax.random.uniform(key, (count, 1))) + level


@contextlib.contextmanager
def noisy_world():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(data.DOMAINS, "glyphs", noisy(3, 9))
        patch.setitem(data.DOMAINS, "digits", noisy(2, 6))
        patch.setattr(layers, "convolve", tiny.middle)
        yield patch


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with noisy_world() as patch:
        patch.setattr(training, "minimize", shrink)
        patch.setattr(training, "accuracies_by_steps", noise_and_lam)
        config = MixedDomains(**FIELDS)
        yield config, folder, study.run(config, folder)


@pytest.mark.parametrize("kind", ["own stems", "stems in w", "one stem", "new stem"])
def test_every_kind_of_meta_learner_has_a_hypergradient(kind):
    with noisy_world():
        config = MixedDomains(**FIELDS)
        classes = data.split(config.open(None).data, 0)
        if kind == "new stem":
            del classes["glyphs"]
        shared = DomainNets({"any": (28, 28, 1)}, jax.random.key(0), filters=2).shared
        meta = training.start(config, 0, kind, classes, shared if kind == "new stem" else None)
        sample = DomainEpisodes({domain: config.training_episodes(domain) for domain in classes}, 1)
        train = {domain: splits["train"] for domain, splits in classes.items()}
        f = training._hypergradient(config, kind, tuple(classes), meta.view)
        carry = dict.fromkeys(classes, ())
        h = eqx.filter_eval_shape(
            lambda lam, key: f.evaluate(lam, sample(key, train), carry), meta.lam, jax.random.key(0)
        )
        variables = eqx.filter(meta.lam, eqx.is_inexact_array)
        assert jax.tree.map(jnp.shape, h.grad) == jax.tree.map(jnp.shape, variables)
        assert {f"{domain}/accuracy" for domain in classes} <= set(h.info["metrics"])
        for domain in classes:
            seen, task = (
                meta.view(meta.lam, domain),
                jax.tree.map(lambda x: x[0], sample(jax.random.key(0), train)[domain]),
            )
            of_steps = training._learner(kind, config.training_episodes(domain).ways, 1, 0.1).accuracies
            assert eqx.filter_eval_shape(of_steps, seen, task, 3).shape == (3,)
        if kind == "stems in w":
            w = h.state["digits"].w["network"]
            assert len(jax.tree.leaves(w.stem)) == 2
            assert not jax.tree.leaves(w.shared)


def test_a_row_for_every_meta_learner_and_the_new_domain(finished):
    config, folder, summary = finished
    rows = [(row[0], row[1]) for row in summary["table"]["rows"]]
    together = ["all domains, own stems", "all domains, stems in w", "all domains, one stem"]
    of_domain = [*together, ALONE, PIXELS]
    assert rows == [
        *(("glyphs, 3-way 1-shot", row) for row in of_domain),
        *(("digits, 2-way 1-shot", row) for row in of_domain),
        *(("digits, 2-way 1-shot, new", row) for row in (NEW_STEM, ALL_LAYERS, SCRATCH)),
    ]
    own = dict(np.load(folder / "arrays" / "draw-0-own-stems.npz"))["all domains, own stems: digits"]
    alone = dict(np.load(folder / "arrays" / "draw-0-alone-digits.npz"))[f"{ALONE}: digits"]
    assert own.shape == (3,)
    assert np.ptp(own) > 0 == pytest.approx(np.ptp(own - alone))  # the same episodes
    for score in summary["scores"]:
        if score["domain"] == "digits" and score["row"] == together[2]:
            one = dict(np.load(folder / "arrays" / "draw-0-one-stem.npz"))["all domains, one stem: digits"]
            assert score["difference"]["difference"] == pytest.approx(np.mean(one - alone))
            assert score["by_draw"] == pytest.approx([np.mean(one - alone)])
            assert abs(np.mean(one - alone)) > 0.1
    assert {path.name for path in (folder / "figures").iterdir()} == {"accuracies.png", "training.png", "new.png"}
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    curve = [r for r in records if r["what"] == "validation" and r["row"] == together[0]]
    assert [(r["step"], sorted(r["accuracies"])) for r in curve] == [
        (1, ["digits", "glyphs"]),
        (2, ["digits", "glyphs"]),
    ]
    assert MixedDomains.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_the_new_domain_keeps_the_layers_of_the_others(finished):
    _, folder, _ = finished
    others, found = (dict(np.load(folder / "arrays" / f"draw-0-{part}.npz")) for part in ("alone-glyphs", "new"))
    names = [name for name in others if name.startswith("shared-")]
    assert len(names) == 6
    config = MixedDomains(**FIELDS)
    digits = {"digits": data.split(config.open(None).data, 0)["digits"]}
    shared = training.shared_layers(config, others)
    assert_trees_close(jax.tree.leaves(shared), [others[f"shared-{i}"] for i in range(6)], rtol=0)
    begin = training.start(config, 0, "new stem", digits, shared)
    seen = begin.view(begin.lam, "digits")["network"]
    assert isinstance(seen, DomainNet)
    assert set(begin.lam) == {"stem"}
    assert_trees_close(seen.shared, shared, rtol=0)
    assert found[f"{NEW_STEM}: digits"].shape == (3,)


def test_a_resumed_run_ends_equal(finished, tmp_path, monkeypatch):
    config, _, summary = finished
    calls = []

    def interrupted(*arguments):
        calls.append(arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MixedDomains, "_new", interrupted)
        with pytest.raises(KeyboardInterrupt):
            study.run(config, tmp_path / "run")
    assert len(calls) == 1
    resumed = study.resume(MixedDomains, tmp_path / "run")
    assert resumed["scores"] == summary["scores"]


def test_digits_are_split_alike_wherever_they_are_from():
    ten = REAL_DIGITS.load(None)[0]
    assert isinstance(ten, ImageClasses)
    assert (ten.num_classes, ten.image_shape, set(ten.count.tolist())) == (10, (8, 8, 1), {174})
    first, second = (data.split({"digits": ten, "mnist": ten}, seed) for seed in (0, 1))
    for name in data.SPLITS:
        np.testing.assert_array_equal(first["digits"][name].images, first["mnist"][name].images)
    assert [first["digits"][name].num_classes for name in data.SPLITS] == [5, 2, 3]
    rows = {name: {image.tobytes() for image in np.asarray(c.images)} for name, c in first["digits"].items()}
    assert not rows["train"] & rows["test"]
    assert not rows["validation"] & rows["test"]
    assert not np.array_equal(first["digits"]["test"].images, second["digits"]["test"].images)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"domains": ("glyphs",)}, "name two or more of omniglot, glyphs, mnist, digits"),
        ({"domains": ("glyphs", "faces")}, "each once"),
        ({"new": "mnist"}, "new is 'mnist'; it must be one of domains"),
        ({"tasks": 0}, "tasks must be a whole number, at least 1"),
        ({"test_episodes": 1}, "test_episodes must be a whole number, at least 2"),
        ({"step_size": 0.0}, "step_size is 0.0"),
    ],
)
def test_configurations_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(MixedDomains(), **changes)


def test_data_that_cannot_give_the_episodes():
    with noisy_world(), pytest.raises(ValueError, match="the training set of glyphs has 3 images"):
        MixedDomains(train_queries=3).open(None)
