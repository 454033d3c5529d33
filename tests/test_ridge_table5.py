"""Table 5 on few draws: the hypergradient of every draw is its own, errors fall with T, the run and its report."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperax.dynamics import GradientDescent
from hyperax.experiments import study
from hyperax.experiments.ridge_table5 import Draws, EachDraw, RidgeTable5, errors, ridge
from hyperax.methods import Doubling, Reverse
from hyperax.methods.hypergradient import hypergradient


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "ridge"
    config = RidgeTable5(draws=6, step_counts=(10, 150), hyperiterations=120, record_every=40)
    return folder, study.run(config, folder)


def test_the_hypergradient_of_a_draw_is_that_of_the_draw_alone():
    x, y = RidgeTable5(draws=2).open(None).data
    problem, _ = ridge()
    draws = Draws(jnp.asarray(x), jnp.asarray(y))
    lam = jax.random.normal(jax.random.key(0), (2, 30))
    both = EachDraw(hypergradient(problem, GradientDescent(7.5e-4), Doubling(7)))(lam, draws)
    alone = hypergradient(problem, GradientDescent(7.5e-4), Reverse(7))
    for j in range(2):
        h = alone(lam[j], jax.tree.map(lambda a, j=j: a[j], draws))
        np.testing.assert_allclose(both.grad[j], h.grad, rtol=1e-9)
        np.testing.assert_allclose(both.info["f_T"][j], h.value, rtol=1e-10)
    np.testing.assert_allclose(both.value, both.info["f_T"].mean())


def test_validation_and_test_errors_fall_with_T(finished):
    records = [json.loads(line) for line in (finished[0] / "records.jsonl").read_text().splitlines()]
    for name in ("validation", "test"):
        median = {
            part: np.array([r[name]["median_ape"] for r in records if r["part"] == part])
            for part in ("T10", "T150", "exact")
        }
        assert (median["T10"] > 4 * median["T150"]).all()
        assert abs(median["T150"].mean() - median["exact"].mean()) < 0.1 * median["T10"].mean()


def test_both_hypergradients_agree_and_all_draws_have_a_record(finished):
    records = [json.loads(line) for line in (finished[0] / "records.jsonl").read_text().splitlines()]
    assert len(records) == 3 * 6
    assert max(r.get("reverse_disagrees_by", 0) for r in records) < 1e-9


def test_table_and_report_have_the_papers_numbers_and_a_verdict(finished):
    folder, summary = finished
    table = summary["table"]
    assert [row[0] for row in table["rows"]] == ["10", "150", "exact"]
    assert [row[-2:] for row in table["rows"]] == [["11.35", "43.49"], ["", ""], ["0.37", "0.57"]]
    assert all(len(row) == len(table["columns"]) for row in table["rows"])
    assert any("test examples falls from T = 10 to T = 150" in note for note in summary["notes"])
    report = (folder / "report.html").read_text()
    assert report.count("<figure>") == 2
    assert "chosen on the draws of seed 1" in report


def test_draws_differ_between_seeds_and_not_between_runs():
    first, again, other = (RidgeTable5(draws=2, seed=seed).open(None) for seed in (0, 0, 1))
    assert first.provenance == again.provenance
    assert first.provenance["sha256"] != other.provenance["sha256"]


def test_percentage_errors_are_of_the_target():
    found = errors(np.array([[90.0, 0.02]]), np.array([[100.0, 0.01]]))
    assert found["mape"].round(6).tolist() == [55.0]
    np.testing.assert_allclose(found["rmse"], np.sqrt((100 + 1e-4) / 2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step_size": 1e-3}, "lets gradient descent diverge"),
        ({"largest": 9.0}, "lets gradient descent diverge"),
        ({"step_counts": (50, 10)}, "in increasing order"),
        ({"draws": 1}, "draws is 1"),
        ({"noise": -1.0}, "noise is -1.0"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
    ],
)
def test_what_cannot_be_measured_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        RidgeTable5(**changes).open(None)
