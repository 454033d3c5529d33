"""The examples run at tiny size, print what they found, and stay short."""

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
TINY = {"ridge_per_feature": "40", "tune_training_loop": "2", "mixed_search": "2"}


def test_there_are_three_short_ones():
    found = {path.stem: len(path.read_text().splitlines()) for path in EXAMPLES.glob("*.py")}
    assert found.keys() == TINY.keys()
    assert max(found.values()) <= 60


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("ridge_per_feature", ["HypergradientRidge, one a feature    test error", "median alpha"]),
        ("tune_training_loop", ["completed 2 hyperiterations", "step size at the five knots", "test loss"]),
        ("mixed_search", ["trials: 2 complete", "log L2 coefficients"]),
    ],
)
def test_example(name, says, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, TINY[name]])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert all(words in printed for words in says)
    assert "nan" not in printed
