"""Blocks of markdown from the records of the estimators and of data cleaning, for docs/tables.py."""

from __future__ import annotations

from typing import Any

from benchmarks.tables import read


def estimators() -> str:
    """Score of scikit-learn's estimators, and what ours gain on the same outer folds, with intervals."""
    record = read("estimators")
    lines = [
        "| data | scikit-learn | one coefficient, gain | error | one a feature, gain | error | seconds a fit |",
        "|---|---|---|---|---|---|---|",
    ]
    for part, title in (("real", "*bundled with scikit-learn*"), ("pathological", "*pathological*")):
        lines.append(f"| {title} |{' |' * 6}")
        for data in dict.fromkeys(row["data"] for row in record[part]):
            of = {row["estimator"]: row for row in record[part] if row["data"] == data}
            seconds = " / ".join(f"{row['seconds']:.2f}" for row in of.values())
            score = 100 * of["scikit-learn"]["score"]
            ours = " | ".join(
                f"{_gain(of[name])} | {_change(of[name], of['scikit-learn'])}" for name in ("one", "per-feature")
            )
            lines.append(f"| {data} | {score:.2f} | {ours} | {seconds} |".replace("-", "−"))
    seeds = record["real"][0]["seeds"]
    note = (
        f"R^2 or accuracy in %, outer 5-fold cross-validation with {seeds} seeds; a gain is paired over seeds with its "
        "95 % interval (folds of several seeds share examples, so that it is too narrow as a statement on other data). "
        "`error`: the mean squared error, or the log loss, against scikit-learn's. Seconds: medians of scikit-learn's, "
        "one coefficient, one a feature. scikit-learn: `RidgeCV` with 19 alphas, `LogisticRegressionCV` with 10 values "
        "of C."
    )
    return "\n".join([*lines, "", f"{note} {_command(record)}"])


def _gain(row: dict[str, Any]) -> str:
    low, middle, high = (100 * x for x in row["score_difference"])
    return f"{middle:+.2f} [{low:+.2f}, {high:+.2f}]"


def _change(row: dict[str, Any], theirs: dict[str, Any]) -> str:
    return f"{100 * (row['error'] / theirs['error'] - 1):+.1f} %"


def data_cleaning_peers() -> str:
    """Seconds of a hyperiteration of data cleaning beside higher, by T, and our methods beside each other."""
    record = read("data-cleaning")
    lines = ["| gradient of f_T | T | seconds | higher / this | peak memory, MB |", "|---|---|---|---|---|"]
    for row in record["hypergradients"]:
        if "seconds" not in row:
            lines.append(f"| {row['row']} | {row['steps']} | {row['reason']} | | |")
            continue
        ratio = f"{row['higher_over_this']:.2f}" if "higher_over_this" in row else ""
        lines.append(f"| {row['row']} | {row['steps']} | {row['seconds']:.2f} | {ratio} | {row['peak_memory_mb']} |")
    own = record["hyperiteration"]
    threads = record["hypergradients"][0]["threads"]
    note = (
        f"5000 + 5000 digits, float32, {threads} threads. What `DataCleaner` does instead, implicit differentiation "
        f"with warm starts, takes {own['seconds']:.2f} s a hyperiteration on the same examples, whatever T would be."
    )
    methods = ["| 1000 digits, 30 hyperiterations | seconds | F1 of the suspects |", "|---|---|---|"]
    methods += [f"| `{row['method']}` | {row['seconds']:.3f} | {row['f1']:.3f} |" for row in record["methods"]]
    return "\n".join([*lines, "", f"{note} {_command(record)}", "", *methods])


def _command(record: dict[str, Any]) -> str:
    return f"`{record['command']}`, {record['machine']}, commit {record['commit']}."
