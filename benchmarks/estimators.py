"""The estimators beside `RidgeCV` and `LogisticRegressionCV`: outer cross-validation, bad data, useless features.

    python -m benchmarks.estimators [--seeds 10] [--only real pathological useless]

Outer 5-fold cross-validation, shuffled by each seed, columns standardised on the training part. A difference is paired:
the mean score of a seed minus that of scikit-learn's estimator on the same folds, with Student's 95 % interval over
seeds. Scores: R^2, or accuracy; `error` is the mean squared error in units of var(y), or the log loss. A first fit of
each shape compiles; `seconds` is the median of all fits, `first_seconds` the first.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from scipy import stats
from sklearn.base import is_classifier
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_wine
from sklearn.linear_model import LassoCV, LogisticRegressionCV, RidgeCV
from sklearn.metrics import log_loss
from sklearn.model_selection import KFold, StratifiedKFold, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from benchmarks.timing import circumstances
from hyperax.estimators import HypergradientLogisticRegression, HypergradientRidge

RECORD = Path(__file__).parent / "records" / "estimators.json"
FIGURE = Path(__file__).parent.parent / "docs" / "figures" / "useless-features.png"
DIGITS = 400  # images, drawn anew for each seed: all 1797 take minutes
TRAIN, TEST, USEFUL, NOISE = 200, 2000, 10, 2.0
USELESS = (0, 40, 90, 190, 490, 990)

Table = tuple[np.ndarray, np.ndarray]
Make = Callable[[np.random.Generator], Table]


def digits(rng: np.random.Generator) -> Table:
    x, y = load_digits(return_X_y=True)
    x, _, y, _ = train_test_split(x, y, train_size=DIGITS, stratify=y, random_state=int(rng.integers(2**31)))
    return x, y


REAL: dict[str, Make] = {
    "diabetes": lambda rng: load_diabetes(return_X_y=True),
    "breast cancer": lambda rng: load_breast_cancer(return_X_y=True),
    "wine": lambda rng: load_wine(return_X_y=True),
    f"digits ({DIGITS})": digits,
}


def linear(n: int, d: int, useful: int) -> Make:
    """Gaussian features, of which the first have coefficients of variance 1; noise of the signal's variance."""

    def make(rng: np.random.Generator) -> Table:
        x, w = rng.normal(size=(n, d)), np.zeros(d)
        w[:useful] = rng.normal(size=useful)
        return x, x @ w + max(np.linalg.norm(w), 1.0) * rng.normal(size=n)

    return make


def collinear(rng: np.random.Generator) -> Table:
    x, y = linear(100, 5, 5)(rng)
    return np.repeat(x, 6, 1) + 0.01 * rng.normal(size=(100, 30)), y


def constant(rng: np.random.Generator) -> Table:
    x, y = linear(100, 5, 5)(rng)
    return np.concatenate([x, np.full((100, 2), 3.0)], 1), y


def duplicated(rng: np.random.Generator) -> Table:
    x, y = linear(40, 8, 4)(rng)
    return np.repeat(x, 3, 0), np.repeat(y, 3)


def labelled(make: Make, share: float) -> Make:
    """The same with classes: whether y is above a quantile."""

    def classes(rng: np.random.Generator) -> Table:
        x, y = make(rng)
        return x, (y > np.quantile(y, 1 - share)).astype(int)

    return classes


PATHOLOGICAL: dict[str, Make] = {
    "noise only": linear(100, 20, 0),
    "all useful, d = n": linear(100, 80, 80),
    "n < d": linear(60, 120, 120),
    "collinear": collinear,
    "one feature": linear(100, 1, 1),
    "constant features": constant,
    "duplicated examples": duplicated,
    "noise only, classes": labelled(linear(100, 20, 0), 0.5),
    "all useful, d = n, classes": labelled(linear(100, 80, 80), 0.5),
    "collinear, classes": labelled(collinear, 0.5),
    "unbalanced, classes": labelled(linear(150, 8, 4), 0.08),
}


def estimators(classes: bool) -> dict[str, Any]:
    if classes:
        theirs = LogisticRegressionCV(Cs=10, cv=5, max_iter=2000)
        ours = HypergradientLogisticRegression
    else:
        theirs, ours = RidgeCV(np.logspace(-4, 5, 19)), HypergradientRidge
    return {"scikit-learn": theirs, "one": ours(), "per-feature": ours("per-feature")}


def fitted(model: Any, train: Table, test: Table) -> dict[str, float]:
    """Score, error and seconds of one fit."""
    pipeline = make_pipeline(StandardScaler(), model)
    begin = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn's changes to come
        pipeline.fit(*train)
    seconds = time.perf_counter() - begin
    x, y = test
    if is_classifier(model):
        error = log_loss(y, pipeline.predict_proba(x), labels=pipeline.classes_)
    else:
        error = np.mean((pipeline.predict(x) - y) ** 2) / np.var(train[1])
    return {"score": pipeline.score(x, y), "error": float(error), "seconds": seconds}


def outer_folds(name: str, make: Make, seeds: int) -> list[dict[str, Any]]:
    """A row for each estimator."""
    found: dict[str, list[list[dict[str, float]]]] = {}
    for seed in range(seeds):
        x, y = make(np.random.default_rng(seed))
        classes = y.dtype.kind in "iu"
        splitter = (StratifiedKFold if classes else KFold)(5, shuffle=True, random_state=seed)
        for estimator, model in estimators(classes).items():
            parts = [fitted(model, (x[a], y[a]), (x[b], y[b])) for a, b in splitter.split(x, y)]
            found.setdefault(estimator, []).append(parts)
    rows = []
    mean = lambda estimator, what: np.array([np.mean([p[what] for p in parts]) for parts in found[estimator]])
    for estimator, runs in found.items():
        seconds = [part["seconds"] for parts in runs for part in parts]
        row = {"data": name, "estimator": estimator, "seeds": seeds}
        row |= {"seconds": float(np.median(seconds)), "first_seconds": seconds[0]}
        for what in ("score", "error"):
            row[what] = float(np.mean(mean(estimator, what)))
            row[f"{what}_difference"] = interval(mean(estimator, what) - mean("scikit-learn", what))
        rows.append(row)
        low, middle, high = row["score_difference"]
        print(
            f"{name:28s}{estimator:14s}score {row['score']:.4f}  difference {middle:+.4f} [{low:+.4f}, {high:+.4f}]  "
            f"error {row['error']:.4f} ({row['error_difference'][1]:+.4f})  {row['seconds']:.3f} s",
            flush=True,
        )
    return rows


def interval(differences: np.ndarray) -> list[float]:
    """[low, mean, high], Student's 95 % interval."""
    mean, count = float(np.mean(differences)), len(differences)
    if count < 2:
        return [mean, mean, mean]
    half = float(stats.t.ppf(0.975, count - 1) * np.std(differences, ddof=1) / np.sqrt(count))
    return [mean - half, mean, mean + half]


def useless(seeds: int) -> list[dict[str, Any]]:
    """Test error by the number of useless features beside ten useful ones."""
    rows = []
    for more in USELESS:
        models = {
            "per-feature": HypergradientRidge("per-feature"),
            "one": HypergradientRidge(),
            "RidgeCV": RidgeCV(np.logspace(-4, 5, 19)),
            "LassoCV": LassoCV(max_iter=10_000),
        }
        found: dict[str, list[dict[str, float]]] = {name: [] for name in models}
        for seed in range(seeds):
            rng = np.random.default_rng(seed)
            w = np.concatenate([rng.normal(size=USEFUL), np.zeros(more)])
            x = rng.normal(size=(TRAIN + TEST, USEFUL + more))
            y = x @ w + NOISE * rng.normal(size=len(x))
            for name, model in models.items():
                error = fitted(model, (x[:TRAIN], y[:TRAIN]), (x[TRAIN:], y[TRAIN:]))
                error["error"] *= float(np.var(y[:TRAIN])) / NOISE**2
                found[name].append(error)
        for name, runs in found.items():
            errors = np.array([run["error"] for run in runs])
            row = {"useless": more, "estimator": name, "error": interval(errors)}
            row |= {"to_one": interval(errors - [run["error"] for run in found["one"]])}
            row |= {"seconds": float(np.median([run["seconds"] for run in runs]))}
            rows.append(row)
            print(f"{more:4d} useless  {name:12s}error {row['error'][1]:.3f} noise variances  {row['seconds']:.2f} s")
    return rows


def figure(record: dict[str, Any], file: Path) -> None:
    """useless-features.png: test error against the number of useless features, with 95 % intervals over seeds."""
    colours = {"per-feature": "#b3261e", "one": "#e08a84", "RidgeCV": "#8a94a0", "LassoCV": "#3b4754"}
    style = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9, "figure.dpi": 150}
    with plt.rc_context(style):
        drawn, panel = plt.subplots(figsize=(6.5, 3.8), layout="constrained")
        for name, colour in colours.items():
            mine = [row for row in record["useless"] if row["estimator"] == name]
            low, mean, high = np.array([row["error"] for row in mine]).T
            count = [row["useless"] for row in mine]
            panel.plot(count, mean, marker="o", ms=4, color=colour, label=name, ls="--" if "CV" in name else "-")
            panel.fill_between(count, low, high, color=colour, alpha=0.15, lw=0)
        panel.axhline(1.0, color="#bbbbbb", lw=0.8)
        panel.set_xscale("symlog", linthresh=40)
        panel.set_xticks(USELESS, [str(count) for count in USELESS])
        panel.set_xlabel(f"useless features, beside {USEFUL} useful ones ({TRAIN} examples)")
        panel.set_ylabel("test error, in variances of the noise")
        panel.legend(frameon=False)
        file.parent.mkdir(parents=True, exist_ok=True)
        drawn.savefig(file, metadata={"Software": None})
        plt.close(drawn)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--only", nargs="+", choices=("real", "pathological", "useless"))
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--figure", type=Path, default=FIGURE)
    options = parser.parse_args()
    parts = options.only or ("real", "pathological", "useless")
    record: dict[str, Any] = circumstances("python -m benchmarks.estimators")
    for part, table in (("real", REAL), ("pathological", PATHOLOGICAL)):
        if part in parts:
            record[part] = [row for name, make in table.items() for row in outer_folds(name, make, options.seeds)]
    if "useless" in parts:
        record["useless"] = useless(options.seeds)
        matplotlib.use("Agg")
        figure(record, options.figure)
    options.record.parent.mkdir(parents=True, exist_ok=True)
    options.record.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
