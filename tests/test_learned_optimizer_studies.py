"""The recipes of learned optimizers: their problems, the search for step sizes, tiny runs, and what is refused."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperax.experiments import study
from hyperax.experiments.learned_optimizer import LearnedOptimizerMnist, LearnedOptimizerQuadratics, measuring
from hyperax.experiments.learned_optimizer.baselines import baselines, best_step_size, mean_final_losses
from hyperax.experiments.learned_optimizer.inner_runs import blocks, times
from hyperax.experiments.learned_optimizer.measuring import tuned
from hyperax.experiments.learned_optimizer.problems import Images, classification, quadratics
from hyperax.experiments.learned_optimizer.scores import Row, cells, mean_text, numbers
from hyperax.experiments.study import Part, Place

T, LONG = 10, 100
NAMES = ["SGD", "momentum", "RMSProp", "Adam"]
SMALL = {
    "horizon": T,
    "window": 5,
    "shortest": 5,
    "longest": 10,
    "hyperiterations": 3,
    "tasks": 2,
    "validations": 3,
    "validation_problems": 2,
    "grid_each_side": 3,
    "test_problems": 3,
    "curve_points": 10,
}
QUADRATICS = LearnedOptimizerQuadratics(**SMALL, momenta=(0.9,), dimensions=3, transfer_dimensions=())
DIGITS = LearnedOptimizerMnist(
    **SMALL | {"tasks": 1},
    data="digits",
    batch_size=16,
    outer_images=16,
    measured_images=40,
    transfer_hidden=(3,),
    momenta=(0.9,),
    rules=("step-sizes",),
    block=1,
)


# What is computed


def final_loss(name, eta, A, b, w):
    """The mean final loss of an optimizer in plain numpy, in float64."""
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t in range(1, T + 1):
        g = 2 * np.einsum("pij,pi->pj", A, np.einsum("pij,pj->pi", A, w) - b)
        if name == "SGD":
            u = g
        elif name == "momentum":
            u = m = 0.9 * m + g
        elif name == "RMSProp":
            v = 0.9 * v + 0.1 * g**2
            u = g / np.sqrt(v + 1e-8)
        else:
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            u = m / (1 - 0.9**t) / np.sqrt(v / (1 - 0.999**t))
        w = w - eta * u
    return np.mean(np.sum((np.einsum("pij,pj->pi", A, w) - b) ** 2, 1))


def test_the_best_step_sizes_against_plain_loops():
    family = quadratics(3, 0.5)
    tasks = family.tasks(jax.random.key(1), 4)
    A, b, w = (np.asarray(tasks["own"][name], float) for name in ("A", "b", "w"))
    for one in baselines((0.9,)):
        means = mean_final_losses(one, family.problem, tasks)
        best = best_step_size(means(T), one.near, 1.5, 3, one.name)
        grid = sorted(best.tried)
        at = grid.index(best.step_size)
        assert 0 < at < len(grid) - 1
        np.testing.assert_allclose(np.diff(np.log(grid)), np.log(1.5), rtol=1e-9)
        plain = [final_loss(one.name, eta, A, b, w) for eta in grid]
        assert grid[np.nanargmin(plain)] == best.step_size
        assert best.loss == best.tried[best.step_size] == pytest.approx(np.nanmin(plain), rel=1e-3)


def test_a_grid_grows_until_its_best_is_inside():
    valley = lambda low: lambda steps: np.where(np.asarray(steps) > 8 * low, np.inf, np.abs(np.log2(steps / low)))
    assert best_step_size(valley(2.0**-10), 1.0, 2.0, 1, "SGD").step_size == 2.0**-10  # all diverge at first
    assert best_step_size(valley(2.0**9), 1.0, 2.0, 2, "SGD").step_size == 2.0**9
    with pytest.raises(ValueError, match=r"the best step size of SGD is at an end of the grid, 1\.72e\+10"):
        best_step_size(lambda steps: 1 / np.asarray(steps), 1.0, 2.0, 1, "SGD")


def test_momentum_is_chosen_with_the_step_size():
    best = lambda mu, loss: {"what": "best", "optimizer": "momentum", "momentum": mu, "horizon": T, "loss": loss}
    tried = [{"what": "tried", "optimizer": "momentum", "momentum": 0.1, "horizon": T, "loss": 0.0}]
    part = Part([*tried, best(0.5, 2.0), best(0.9, 1.0), best(0.95, 3.0), best(0.99, 0.5) | {"horizon": LONG}])
    assert tuned(part, T)["momentum"]["momentum"] == 0.9
    assert tuned(part, LONG)["momentum"]["momentum"] == 0.99


def test_a_classification_problem_and_its_mini_batches():
    random = np.random.default_rng(0)
    images = Images(jnp.asarray(random.integers(0, 256, (30, 5)), jnp.uint8), jnp.asarray(random.integers(0, 10, 30)))
    family = classification(images, 4, 6, 12)
    one = jax.jit(family.draw)(jax.random.key(0), images)
    w, x, y = jax.tree.map(np.asarray, one["own"]["w"]), np.asarray(images.pixels) / 255, np.asarray(images.labels)

    def cross_entropy(x, y):
        units = 1 / (1 + np.exp(-(x @ w["hidden"]["weight"] + w["hidden"]["bias"])))
        z = units @ w["output"]["weight"] + w["output"]["bias"]
        return np.mean(np.log(np.exp(z).sum(1)) - z[np.arange(len(y)), y])

    index = np.asarray(one["own"]["measured"])
    assert len(set(index.tolist())) == 12
    outer, inner = (jax.jit(lambda w, d, E=E: E(w, None, d)) for E in (family.problem.outer, family.problem.inner))
    assert outer(one["own"]["w"], one) == pytest.approx(cross_entropy(x[index], y[index]), rel=1e-5)
    batch = jax.jit(lambda t: family.problem.batch(one, t))
    pixels, labels = map(np.asarray, batch(3))
    assert inner(one["own"]["w"], (pixels, labels)) == pytest.approx(cross_entropy(pixels, labels), rel=1e-5)
    np.testing.assert_array_equal(batch(3)[0], pixels)
    assert not np.array_equal(batch(4)[0], pixels)
    drawn = np.round(255 * np.asarray(pixels)).astype(np.uint8)
    assert {row.tobytes() for row in drawn} <= {row.tobytes() for row in np.asarray(images.pixels)}
    with pytest.raises(ValueError, match="measured_images is 31, and a side has 30 images"):
        classification(images, 0, 6, 31)


def test_pixels_of_a_block_share_a_weight_whose_gradient_is_that_of_each_in_the_mean():
    random = np.random.default_rng(1)
    images = Images(jnp.asarray(random.integers(0, 256, (9, 16)), jnp.uint8), jnp.asarray(random.integers(0, 10, 9)))
    single, shared = (classification(images, 0, 4, 9, block) for block in (1, 2))
    one = shared.draw(jax.random.key(0), images)
    w = one["own"]["w"]["output"]
    assert w["weight"].shape == (4, 10)
    block_of = np.arange(4)[:, None] // 2 * 2 + np.arange(4)[None] // 2  # of the pixel in this row and column
    full = {"output": {"weight": w["weight"][block_of.ravel()], "bias": w["bias"]}}
    of_single, of_shared = (
        jax.grad(lambda w, f=f: f.problem.inner(w, None, f.problem.batch(one, jnp.asarray(2))))(x)["output"]
        for f, x in ((single, full), (shared, {"output": w}))
    )
    means = [np.asarray(of_single["weight"])[block_of.ravel() == b].mean(0) for b in range(4)]
    np.testing.assert_allclose(of_shared["weight"], means, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(of_shared["bias"], of_single["bias"] / 4, rtol=1e-4, atol=1e-7)
    E = [f.problem.outer(x, None, one) for f, x in ((single, full), (shared, {"output": w}))]
    np.testing.assert_allclose(*E, rtol=1e-5)
    with pytest.raises(ValueError, match="block is 3; images of 16 pixels are not made of such squares: use 1"):
        classification(images, 0, 4, 9, 3)


@pytest.fixture(scope="module")
def digits():
    return DIGITS.open(None)


def test_the_sides_share_no_image(digits):
    setting = DIGITS.setting("softmax-digits", digits.data)
    sides = [{row.tobytes() for row in np.asarray(f.pool.pixels)} for f in (setting.tuning, setting.test)]
    assert not sides[0] & sides[1]
    assert min(map(len, sides)) > 800
    assert digits.provenance == {"digits": {"dataset": "digits of scikit-learn"}}
    assert DIGITS.learning(digits.data).pool.labels.shape == setting.tuning.pool.labels.shape


def test_what_a_row_says():
    finals = lambda *values: {T: np.array(values)}
    rows = [
        Row("lstm", finals(1.0, 2.0)),
        Row("SGD", finals(3.0, 5.0), {"step_size": 0.1, "momentum": None}),
        Row("Adam", finals(1.0, np.inf), {"step_size": 0.1, "momentum": None}),
        Row("Adam, tuned for 100", {LONG: np.array([1.0, 1.0])}, {"step_size": 0.01, "momentum": None}),
    ]
    texts = cells(rows, T)
    assert texts[0] == ("1.5 ± 6.4", "-2.5 ± 6.4")
    assert texts[1][1] == "best"
    assert texts[2] == ("diverged on 1 of 2", "–")
    assert texts[3] == ("–", "–")
    assert [(n["optimizer"], n["loss"], n["minus_best"]) for n in numbers(rows, T)] == [
        ("lstm", 1.5, -2.5),
        ("SGD", 4.0, 0.0),
        ("Adam", None, None),
    ]


# Runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, study.run(QUADRATICS, folder)


def records_of(folder):
    return [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]


def arrays_of(folder, part):
    with np.load(folder / "arrays" / f"{part}.npz") as arrays:
        return dict(arrays)


def test_a_tiny_run_on_quadratics(finished):
    folder, summary = finished
    assert QUADRATICS.parts() == ["tune-quadratics-3", "train-lstm", "test-quadratics-3"]
    again = [f"{name}, tuned for 100" for name in NAMES]
    rows = summary["table"]["rows"]
    assert [row[1] for row in rows] == ["lstm", *NAMES, *again]
    assert all(row[3] == "–" and row[5] != "–" for row in rows if row[1] in again)
    assert sum(row[4] == "best" for row in rows) == sum(row[6] == "best" for row in rows) == 1

    arrays = arrays_of(folder, "test-quadratics-3")
    assert arrays["times"].tolist() == [*range(11), *range(20, 101, 10)]
    assert arrays["lstm"].shape == (3, 20)
    own = quadratics(3, QUADRATICS.start).tasks(measuring.key_for(0, "test"), 3)["own"]
    A, b, w = (np.asarray(own[name], float) for name in ("A", "b", "w"))
    for row in rows[1:5]:  # from the table back to the loss, with nothing of the library between
        eta = next(r for r in records_of(folder) if r["what"] == "test" and r["optimizer"] == row[1])["step_size"]
        assert final_loss(row[1], eta, A, b, w) == pytest.approx(arrays[row[1]][:, 10].mean(), rel=1e-3)
        assert row[3] == mean_text(arrays[row[1]][:, 10])
    np.testing.assert_allclose(arrays["lstm"][:, 0], np.sum((np.einsum("pij,pj->pi", A, w) - b) ** 2, 1), rtol=1e-5)
    assert summary["headline"]["number"] == mean_text(arrays["lstm"][:, 10])
    assert {path.name for path in (folder / "figures").iterdir()} == {"curves-quadratics-3.png", "meta-training.png"}
    assert LearnedOptimizerQuadratics.from_json(json.loads((folder / "config.json").read_text())) == QUADRATICS


def test_a_killed_training_goes_on_as_if_it_had_not_been(finished, tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    def kill(progress):
        if progress.step == 2:
            raise Killed

    folder, place = finished[0], Place(lambda words: None, tmp_path / "train-lstm")
    earlier = {"tune-quadratics-3": Part([r for r in records_of(folder) if r["part"].startswith("tune")])}
    train = lambda: QUADRATICS.measure("train-lstm", None, earlier, place)
    with monkeypatch.context() as patch:
        patch.setattr(measuring, "GradientExplosion", lambda: kill)
        with pytest.raises(Killed):
            train()
    assert [path.name for path in (place.folder / "checkpoints").iterdir()] == ["step-00000001.ckpt"]
    again = train()
    whole = [{x: y for x, y in r.items() if x != "part"} for r in records_of(folder) if r["part"] == "train-lstm"]
    assert [dict(r) | {"seconds": 0} for r in again.records[:1]] == [whole[0] | {"seconds": 0}]
    assert [dict(r) for r in again.records[1:]] == whole[1:]
    kept = arrays_of(folder, "train-lstm")
    for name, x in again.arrays.items():
        np.testing.assert_array_equal(x, kept[name])


def test_all_parts_on_digits(digits, tmp_path, monkeypatch):
    one = baselines(DIGITS.momenta)[1:2]  # all of them run on quadratics
    monkeypatch.setattr(measuring, "baselines", lambda momenta: one)
    measured: dict[str, Part] = {}
    for part in DIGITS.parts():
        measured[part] = DIGITS.measure(part, digits.data, measured, Place(lambda words: None, tmp_path / part))
    summary = DIGITS.summarise(measured)
    rows = summary["table"]["rows"]
    assert [row[0] for row in rows] == ["softmax-digits"] * 3 + ["network-3-digits"]
    assert rows[3][1] == "momentum"  # learned step sizes are those of other coordinates
    assert rows[3][5] == "–"  # the long horizon is for the first setting alone
    assert len(summary["results"]["softmax-digits"]) == 5
    found = measured["test-softmax-digits"].arrays["momentum"]
    assert (found[:, 10] < found[:, 0]).all()
    assert "every other one of the digits" in summary["notes"][2]


def test_learned_step_sizes_begin_as_the_best_heavy_ball():
    best = {"step_size": 0.03, "momentum": 0.8}
    rule = measuring.new_rule(QUADRATICS, "step-sizes", QUADRATICS.learning(None), best)
    np.testing.assert_allclose(jnp.exp(rule.log_step), np.full(3, 0.03), rtol=1e-5)
    np.testing.assert_allclose(jax.nn.sigmoid(rule.momentum_logit), np.full(3, 0.8), rtol=1e-5)
    assert list(measuring.fitting({"step-sizes": rule}, quadratics(3, 0.0))) == ["step-sizes"]
    assert not measuring.fitting({"step-sizes": rule}, quadratics(4, 0.0))


def test_blocks_and_times():
    assert times(blocks(20, 10, long=True)).tolist() == [*range(0, 21, 2), *range(40, 201, 20)]
    assert times(blocks(20, 10, long=False)).tolist() == [*range(0, 21, 2)]


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        (LearnedOptimizerQuadratics, {"rules": ("lstm", "gru")}, "rules are .*give some of step-sizes, perceptron"),
        (LearnedOptimizerQuadratics, {"rules": ()}, "rules are"),
        (LearnedOptimizerQuadratics, {"window": 0}, "window must be a whole number, at least 1"),
        (LearnedOptimizerQuadratics, {"window": 30}, "shortest is 100; use a multiple of window=30"),
        (LearnedOptimizerQuadratics, {"longest": 80}, "longest must be a whole number, at least 100"),
        (LearnedOptimizerQuadratics, {"curriculum": 5}, "raise longest"),
        (LearnedOptimizerQuadratics, {"curve_points": 30}, "use a multiple of 10 that divides horizon=100"),
        (LearnedOptimizerQuadratics, {"momenta": (1.0,)}, "momenta are"),
        (LearnedOptimizerQuadratics, {"grid_factor": 1.0}, "grid_factor is 1.0"),
        (LearnedOptimizerQuadratics, {"learning_rate": 0.0}, "learning_rate is 0.0"),
        (LearnedOptimizerQuadratics, {"test_problems": 1}, "test_problems must be a whole number, at least 2"),
        (LearnedOptimizerQuadratics, {"transfer_dimensions": (10,)}, "they must differ"),
        (LearnedOptimizerQuadratics, {"start": -1.0}, "start is -1.0"),
        (LearnedOptimizerMnist, {"model": "cnn"}, "use 'softmax' or 'network'"),
        (LearnedOptimizerMnist, {"data": "cifar"}, "data is 'cifar'"),
        (LearnedOptimizerMnist, {"block": 5}, "images of 784 pixels are not made of such squares"),
        (LearnedOptimizerMnist, {"rules": ("step-sizes",)}, "belong to the coordinates .* use block=1"),
        (LearnedOptimizerMnist, {"transfer_hidden": (0,)}, "transfer_hidden must be a whole number"),
    ],
)
def test_refused(kind, changes, words):
    with pytest.raises(ValueError, match=words):
        kind(**changes)


def test_refused_for_the_data(tmp_path):
    with pytest.raises(ValueError, match="measured_images is 899; one side has 898 images"):
        dataclasses.replace(DIGITS, measured_images=899).open(None)
    with pytest.raises(ValueError, match="get the four files of MNIST"):
        dataclasses.replace(DIGITS, data="mnist").open(str(tmp_path))
