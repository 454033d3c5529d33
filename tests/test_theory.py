"""Section 3 of the paper: the page says what the record says, the record what a computation says, and that is right."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperax.experiments import theory

ROOT = Path(__file__).parent.parent
RECORD = json.loads((ROOT / "docs/figures/theory.json").read_text())


@pytest.fixture(scope="module")
def found():
    """Theorem 3.2 for few T, on a coarse grid with the corners of Lambda in it."""
    return theory.theorem((1, 8, 64), side=9)


def test_the_page_is_written_from_the_record():
    page = (ROOT / "docs/theory.md").read_text()
    assert theory.updated(page, RECORD) == page, "run the command that the page names"
    for name in theory.blocks(RECORD):
        assert f"<!-- {name} -->\n" in page
    changed = json.loads(json.dumps(RECORD))
    changed["theorem"]["rows"][0]["inf_error"] += 1.0
    assert theory.updated(page, changed) != page


def test_the_record_is_what_is_computed(found):
    recorded = {row["steps"]: row for row in RECORD["theorem"]["rows"]}
    for row in found["rows"]:
        for name in ("inf", "inf_error", "argmin_error"):
            assert row[name] == pytest.approx(recorded[row["steps"]][name], rel=1e-5, abs=1e-6), name
        np.testing.assert_allclose(row["argmin"], recorded[row["steps"]]["argmin"], atol=1e-5)
        # On a coarser grid a supremum can only be smaller.
        for name in ("sup_error", "sup_distance", "bound"):
            assert 0.5 * recorded[row["steps"]][name] < row[name] <= recorded[row["steps"]][name] * (1 + 1e-9)
    assert found["rate"] == pytest.approx(RECORD["theorem"]["rate"], rel=1e-9)


def test_theorem_3_2():
    rows = RECORD["theorem"]["rows"]
    for row in rows:
        assert row["sup_distance"] <= row["bound"] * (1 + 1e-9)
        # |inf f_T - inf f| <= sup |f_T - f|: what the proof rests on.
        assert abs(row["inf_error"]) <= row["sup_error"] + 1e-12
    late = rows[-4:]
    for name in ("sup_error", "sup_distance", "bound"):
        assert late[-1][name] < 0.01 * late[0][name]
    assert late[-1]["inf_error"] == pytest.approx(0.0, abs=1e-9)
    assert late[-1]["argmin_error"] < 1e-6
    assert rows[0]["argmin_error"] > 0.1


def test_the_rate_is_that_of_the_remark():
    sets = theory.small_sets()
    x = np.asarray(sets.x_train) * theory.LARGEST
    nu = np.linalg.eigvalsh(2 * x.T @ x / len(x) + 2 * theory.RHO * np.eye(4))[-1]
    mu = 2 * theory.RHO
    assert RECORD["theorem"]["rate"] == pytest.approx((nu - mu) / (nu + mu), rel=1e-9)
    assert RECORD["theorem"]["measured_rate"] == pytest.approx(RECORD["theorem"]["rate"], rel=1e-3)


def test_w_t_and_w_lam_against_plain_numpy():
    lam, sets = np.array([0.7, 1.9]), theory.small_sets()
    seen = theory.along(jnp.asarray(lam), sets, 5)
    H, x, y = np.diag(np.repeat(lam, 2)), np.asarray(sets.x_train), np.asarray(sets.y_train)
    z, n = x @ H, len(x)
    hessian = 2 * (z.T @ z / n + theory.RHO * np.eye(4))
    eigenvalues = np.linalg.eigvalsh(hessian)
    eta = 2 / (eigenvalues[-1] + 2 * theory.RHO)
    exact, w = np.linalg.solve(hessian, 2 * z.T @ y / n), np.zeros((4, 1))
    for t in range(5):
        w = w - eta * (hessian @ w - 2 * z.T @ y / n)
        error = np.asarray(sets.y_validation) - np.asarray(sets.x_validation) @ H @ w
        np.testing.assert_allclose(seen.values[t], np.mean(error**2), rtol=1e-10)
        np.testing.assert_allclose(seen.distances[t], np.linalg.norm(w - exact), rtol=1e-10)
    np.testing.assert_allclose(seen.start, np.linalg.norm(exact), rtol=1e-10)


def test_two_minimisers():
    two = RECORD["two_minimisers"]
    assert two == pytest.approx(theory.missed(), abs=1e-9)
    # lim f_T = (1 + lam)^2 on [1/2, 3/2] is smallest at 1/2; f = (1 - lam)^2 at 1.
    assert two["inf_f_T"] == pytest.approx(2.25, abs=1e-6)
    assert two["inf_f"] == 0
    assert (two["argmin_f_T"], two["argmin_f"]) == (0.5, 1.0)
    other_side = theory.two_minimisers(start=-0.2)
    assert other_side.outer(-1.0, 1.0, None) == 0
    lam = jnp.asarray(1.2)
    slope = jax.grad(lambda w: other_side.inner(w, lam, None))
    assert float(slope(lam)) == float(slope(-lam)) == 0.0


def test_figures(tmp_path):
    pytest.importorskip("matplotlib")
    drawn = theory.figures(RECORD)
    # Beside them lie the figures of the benchmarks, which their own page shows.
    shown = re.findall(r"\(figures/(.*)\.png\)", (ROOT / "docs/theory.md").read_text())
    assert sorted(drawn) == sorted(shown)
    assert all((ROOT / f"docs/figures/{name}.png").is_file() for name in drawn)
    lines = drawn["convergence"].axes[0].lines
    np.testing.assert_allclose(lines[1].get_ydata(), [row["sup_distance"] for row in RECORD["theorem"]["rows"]])
