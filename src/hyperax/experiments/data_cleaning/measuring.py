"""One draw of examples and wrong labels; the models fitted on parts of it; how well the suspects are found."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import numpy as np

from hyperax.experiments.mnist import Mnist

PENALTIES = (0.01, 0.03, 0.1)
"""C of the final models: chosen on half of the validation set, for each model by itself."""


class Draw(NamedTuple):
    """Examples as [n, pixels] in [0, 1]; `given` are the labels seen in training, `true` the right ones."""

    x: np.ndarray
    given: np.ndarray
    true: np.ndarray
    x_val: np.ndarray
    y_val: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray

    @property
    def wrong(self) -> np.ndarray:
        """Mask of the training examples whose label was replaced."""
        return self.given != self.true


def draw(mnist: Mnist, seed: int, train: int, validation: int, test: int, wrong_share: float) -> Draw:
    """Training and validation examples, drawn without repetition; the first images of the test set."""
    random = np.random.default_rng(seed)
    chosen = random.permutation(len(mnist.train.labels))[: train + validation]
    pixels = mnist.train.images[0].size
    flat = lambda images: images.reshape(-1, pixels).astype(np.float32) / 255
    x, y = flat(mnist.train.images[chosen]), mnist.train.labels[chosen].astype(int)
    given = y[:train].copy()
    wrong = random.permutation(train)[: round(wrong_share * train)]
    given[wrong] = (given[wrong] + random.integers(1, 10, len(wrong))) % 10  # any of the nine others
    return Draw(
        x[:train],
        given,
        y[:train],
        x[train:],
        y[train:],
        flat(mnist.test.images[:test]),
        mnist.test.labels[:test].astype(int),
    )


def final_model(draw: Draw, kept: np.ndarray) -> dict[str, Any]:
    """Errors of a softmax regression on the kept training examples and the validation set.

    C is that with the least error on one half of the validation set, of models on the kept examples and the other half.
    """
    from sklearn.linear_model import LogisticRegression

    def fitted(C: float, count: int) -> Any:
        x, y = np.r_[draw.x[kept], draw.x_val[:count]], np.r_[draw.given[kept], draw.y_val[:count]]
        return LogisticRegression(C=C, tol=1e-3, max_iter=2000).fit(x, y)

    half = len(draw.y_val) // 2
    errors = [1 - fitted(C, half).score(draw.x_val[half:], draw.y_val[half:]) for C in PENALTIES]
    C = PENALTIES[int(np.argmin(errors))]
    accuracy = fitted(C, len(draw.y_val)).score(draw.x_test, draw.y_test)
    return {
        "examples": int(kept.sum()) + len(draw.y_val),
        "C": C,
        "validation_error": float(min(errors)),
        "test_accuracy": float(accuracy),
    }


def scores(wrong: np.ndarray, suspected: np.ndarray) -> dict[str, float]:
    """Precision, recall and F1 of a mask of suspects; 0 where nothing is suspected.

    >>> scores(np.array([True, True, False, False]), np.array([True, False, True, False]))["f1"]
    0.5
    """
    hits = int((wrong & suspected).sum())
    precision, recall = hits / max(int(suspected.sum()), 1), hits / int(wrong.sum())
    return {"precision": precision, "recall": recall, "f1": 2 * precision * recall / max(precision + recall, 1e-12)}


class Cleaned(NamedTuple):
    """What was learned at one R: the weights, the suspects in order, records of the curve and of the result."""

    weights: np.ndarray
    order: np.ndarray
    curve: list[dict[str, Any]]
    result: dict[str, Any]


def cleaned(draw: Draw, budget: int, threshold: float, **settings: Any) -> Cleaned:
    """The weights at one R, F1 after each hyperiteration, and the final model on the examples kept."""
    from hyperax.estimators.cleaning import clean, suspects

    curve: list[dict[str, Any]] = []

    def record(progress: Any) -> None:
        suspected = np.asarray(progress.lam())[: len(draw.given)] < threshold
        value = progress.value / budget  # what is minimised is R E
        curve.append({"curve": progress.step, "budget": budget, "value": value, **scores(draw.wrong, suspected)})

    begin = time.perf_counter()
    found = clean(draw.x, draw.given, draw.x_val, draw.y_val, total=budget, callbacks=record, **settings)
    took = time.perf_counter() - begin
    order = suspects(found.weights, found.harm, threshold)
    suspected = np.isin(np.arange(len(draw.given)), order)
    steps = np.diff([line["seconds"] for line in found.seconds]) / np.diff([line["step"] for line in found.seconds])
    result = {
        "budget": budget,
        "suspects": len(order),
        **scores(draw.wrong, suspected),
        "first_hundred": float(draw.wrong[order[:100]].mean()) if len(order) else 0.0,
        "seconds_per_hyperiteration": float(np.median(steps)) if len(steps) else took,
        "seconds": took,
        **final_model(draw, ~suspected),
    }
    return Cleaned(found.weights, order, curve, result)
