"""The study: what is measured on each draw, the table, the notes, the figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from hyperax.experiments.data_cleaning import figures
from hyperax.experiments.data_cleaning.measuring import PENALTIES, cleaned, draw, final_model
from hyperax.experiments.mnist import load_mnist
from hyperax.experiments.study import Opened, Part, Place, Shown, Study, plus_minus

ALL, CLEAN, NONE = "all, wrong labels too", "right half (oracle)", "none: validation only"
SHOWN = 40


@dataclass(frozen=True)
class DataCleaning(Study):
    """Weights of 5000 MNIST examples, half of them labelled wrongly, learned with 5000 examples that are right.

    See `hyperax.estimators.cleaning.clean` for the equations. An example is a suspect if its weight is below
    `threshold`.

    Reference: Franceschi et al. 2017 (ICML), Sec. 5.1, with another method: implicit differentiation with warm starts
    in the place of 2000 steps in reverse, and projected gradient descent in the place of Adam.

    >>> DataCleaning().parts()
    ['draw-0', 'draw-1', 'draw-2']
    """

    kind: ClassVar[str] = "data-cleaning"

    recipe: str = "data-cleaning-mnist"
    title: str = "Data hyper-cleaning of MNIST: half of the labels are wrong"
    train: int = 5000
    """Examples whose labels may be wrong."""
    validation: int = 5000
    """Examples whose labels are right."""
    test: int = 10000
    """Of the test set, the first so many."""
    wrong_share: float = 0.5
    """Share of the training examples whose label is replaced by another one, uniformly."""
    budgets: tuple[int, ...] = (1000, 1500, 2000, 2500)
    """R, the largest sums of the weights."""
    headline_budget: int = 2500
    """The R of the headline and the figures: the number of right labels."""
    l2: float = 0.01
    """In units of the largest eigenvalue of the covariance of the pixels."""
    hyperiterations: int = 30
    """Steps on the weights."""
    step_size: float = 0.2
    """Of these steps; see `clean`."""
    threshold: float = 1e-3
    """Smaller weights make suspects."""
    draws: int = 3
    """Draws of examples and wrong labels."""

    def open(self, data_dir: str | None) -> Opened:
        """MNIST; `ValueError` if it is not there or too small."""
        mnist = load_mnist(data_dir)
        have, need = len(mnist.train.labels), self.train + self.validation
        if need > have or self.test > len(mnist.test.labels):
            raise ValueError(
                f"{need} training and validation examples and {self.test} of the test set are asked for; MNIST here "
                f"has {have} and {len(mnist.test.labels)}"
            )
        if not 0 < self.wrong_share < 1 or not self.budgets:
            raise ValueError(f"wrong_share is {self.wrong_share}, between 0 and 1; budgets are {self.budgets}, some R")
        if self.headline_budget not in self.budgets:
            raise ValueError(f"headline_budget is {self.headline_budget}; it must be one of budgets, {self.budgets}")
        return Opened(mnist, mnist.provenance)

    def parts(self) -> Sequence[str]:
        """One a draw."""
        return [f"draw-{i}" for i in range(self.draws)]

    def measure(self, part: str, data: Any, earlier: Mapping[str, Part], place: Place) -> Part:
        """The models without cleaning, then the weights and the cleaned model at each R."""
        number = int(part.removeprefix("draw-"))
        drawn = draw(data, self.seed + number, self.train, self.validation, self.test, self.wrong_share)
        masks = {ALL: np.ones_like(drawn.wrong), CLEAN: ~drawn.wrong, NONE: np.zeros_like(drawn.wrong)}
        records = [{"row": name, **final_model(drawn, mask)} for name, mask in masks.items()]
        arrays: dict[str, np.ndarray] = {"wrong": drawn.wrong}
        for budget in self.budgets:
            found = cleaned(
                drawn,
                budget,
                self.threshold,
                l2=self.l2,
                hyperiterations=self.hyperiterations,
                step_size=self.step_size,
            )
            place.say(f"  R = {budget}: F1 {found.result['f1']:.3f}, {found.result['suspects']} suspects")
            records += [{"row": "cleaned", **found.result}, *found.curve]
            first = found.order[:SHOWN]
            side = round(drawn.x.shape[1] ** 0.5)
            arrays |= {
                f"weights_{budget}": found.weights.astype(np.float32),
                f"images_{budget}": np.round(255 * drawn.x[first]).astype(np.uint8).reshape(-1, side, side),
                f"labels_{budget}": np.stack([drawn.given[first], drawn.true[first]]),
            }
        return Part(records, arrays)

    def summarise(self, measured: Mapping[str, Part]) -> dict[str, Any]:
        """Means over the draws."""
        rows = [(name, _rows(measured, name)) for name in (ALL, CLEAN, NONE)]
        by_budget = {R: _rows(measured, "cleaned", R) for R in self.budgets}
        best = self.headline_budget
        least = min(self.budgets, key=lambda R: _mean(by_budget[R], "validation_error"))
        f1, oracle = _mean(by_budget[best], "f1"), _mean(rows[1][1], "test_accuracy")
        accuracy = _mean(by_budget[best], "test_accuracy")
        table = [[*_common(name, own), *["–"] * 5] for name, own in rows]
        for R, own in by_budget.items():
            percent = [plus_minus([r[name] for r in own], 1, 100) for name in ("precision", "recall", "f1")]
            suspects = f"{_mean(own, 'suspects'):.0f}"
            table.append([*_common(f"cleaned, R = {R}", own), suspects, *percent, _seconds(own)])
        return {
            "headline": {
                "number": f"{100 * f1:.1f} %",
                "text": f"is the F1 of the suspects at R = {best}; without them test "
                f"accuracy is {100 * accuracy:.1f} %, with the right half {100 * oracle:.1f} %, with all labels "
                f"{100 * _mean(rows[0][1], 'test_accuracy'):.1f} %.",
            },
            "budget": best,
            "budget_of_least_validation_error": least,
            "f1": f1,
            "test_accuracy": accuracy,
            "oracle_test_accuracy": oracle,
            "seconds_per_hyperiteration": _mean(by_budget[best], "seconds_per_hyperiteration"),
            "table": {
                "columns": [
                    "training examples kept",
                    "examples, with validation",
                    "validation error (%)",
                    "test accuracy (%)",
                    "suspects",
                    "precision (%)",
                    "recall (%)",
                    "F1 (%)",
                    "s a hyperiteration",
                ],
                "rows": table,
            },
            "notes": self._notes(least, by_budget[least]),
        }

    def _notes(self, least: int, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        wrong, f1 = round(self.wrong_share * self.train), plus_minus([row["f1"] for row in rows], 1, 100)
        return [
            f"{self.train} training examples, {wrong} of them with another label drawn uniformly; {self.validation} "
            f"validation examples with right labels; the first {self.test} of the test set, used at the end only. "
            f"Means over {self.draws} draws of examples and wrong labels, with 95 % intervals.",
            "Every row is a softmax regression on the training examples it names, with their given labels, and the "
            f"whole validation set. Its C is one of {', '.join(map(str, PENALTIES))}: that with the least error on "
            "one half of the validation set of a model on the same training examples and the other half (the column "
            "'validation error'). For the cleaned rows this half was also seen by the weights.",
            f"Suspects are examples with a weight below {self.threshold:g}. Since weights are at most 1, about R or "
            "more examples are kept: for R below the number of right labels, right examples are suspects too, and "
            "precision falls.",
            f"The R of the headline and the figures, {self.headline_budget}, is fixed in the configuration. Validation "
            f"error is least at R = {least}, where F1 is {f1} %; it hardly tells the R apart, since the weights have "
            "seen it.",
            f"{self.hyperiterations} hyperiterations of projected gradient descent with momentum, each with 20 inner "
            "steps and 10 of conjugate gradients from where the last one ended (implicit differentiation); the paper "
            "takes 500 of projected Adam, each with 2000 inner steps in reverse. The inner problem has an L2 penalty "
            f"of {self.l2:g} times the largest eigenvalue of the covariance of the pixels, the default of "
            "DataCleaner. It was picked between 0.002 and 0.02 by F1 on draws of training images, the first draw here "
            "among them, where these values give 0.94 to 0.96; never on test images.",
        ]

    def figures(self, measured: Mapping[str, Part], summary: Mapping[str, Any]) -> list[Shown]:
        """By R, weights, curves, contact sheet; the last three of the first draw."""
        names = ("precision", "recall", "f1", "test_accuracy")
        rows = [
            {"budget": R} | {name: _mean(_rows(measured, "cleaned", R), name) for name in names} for R in self.budgets
        ]
        others = {name: _mean(_rows(measured, name), "test_accuracy") for name in (CLEAN, ALL, NONE)}
        part, R = measured["draw-0"], self.headline_budget
        given, true = part.arrays[f"labels_{R}"]
        right = int((given == true).sum())
        return [
            Shown(
                "budgets",
                figures.by_budget(rows, others),
                "Precision, recall, F1 and test accuracy by R",
                "Suspects found and test accuracy after retraining without them, by R; means over the draws. All "
                "models are also trained on the validation set.",
            ),
            Shown(
                "weights",
                figures.weights_of_both(part.arrays[f"weights_{R}"], part.arrays["wrong"]),
                "Histogram of the learned weights",
                f"The weights of right and wrong examples at R = {R}, first draw.",
            ),
            Shown(
                "curves",
                figures.by_hyperiteration([record for record in part.records if "curve" in record]),
                "Validation error and F1 by hyperiteration",
                "Validation error (mean cross-entropy) and F1 after each hyperiteration, first draw.",
            ),
            Shown(
                "suspects",
                figures.contact_sheet(part.arrays[f"images_{R}"], given, true),
                "The most suspicious images",
                f"The {len(given)} most suspicious images at R = {R}, first draw: given label, true label. "
                f"{len(given) - right} of them are indeed labelled wrongly; the others are in red.",
            ),
        ]


def _rows(measured: Mapping[str, Part], name: str, budget: int | None = None) -> list[Mapping[str, Any]]:
    """The results of one row of the table, one a draw."""
    records = [record for part in measured.values() for record in part.records]
    return [record for record in records if record.get("row") == name and record.get("budget") == budget]


def _mean(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    return float(np.mean([row[name] for row in rows]))


def _common(name: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    percent = [plus_minus([row[column] for row in rows], 2, 100) for column in ("validation_error", "test_accuracy")]
    return [name, f"{_mean(rows, 'examples'):.0f}", *percent]


def _seconds(rows: Sequence[Mapping[str, Any]]) -> str:
    return f"{np.median([row['seconds_per_hyperiteration'] for row in rows]):.2f}"
