"""20 Newsgroups: one L2 coefficient a word, tuned by hypergradient, against grid search for a single one.

f(lam) = mean over validation documents of - log p(y_i | x_i; w_lam)
w_lam = argmin over w of  - sum over training documents of log p(y_i | x_i; w) + sum_j exp(lam_j) |w_j|^2 / 2
lam: one log coefficient for each of more than 100 000 words
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import optax

from hyperax.experiments.figures import BLUE, GREY, INK, RED, legend, new_figure, style
from hyperax.experiments.newsgroups.corpus import Corpus, read_corpus
from hyperax.experiments.newsgroups.problem import HYPERGRADIENT, split_of, trained
from hyperax.experiments.study import Opened, Part, Place, Shown, Study
from hyperax.minimize import minimize
from hyperax.rollout import check_steps

ONE, EACH, GRID = "one coefficient", "one a word", "LogisticRegressionCV"
_COLORS = {ONE: BLUE, EACH: RED, GRID: INK}


@dataclass(frozen=True)
class Newsgroups(Study):
    """Softmax regression on all words, one L2 coefficient for each, beside one for all.

    The data set is split by date, and what is said changes with time. So the validation set of the hypergradient is the
    newest stretch of the training documents, and grid search validates on one stretch after the other.
    Do not choose any field by a run with `split` "test": use "validation", which trains and validates on the older
    documents of the training set and tests on its newest.
    """

    kind: ClassVar[str] = "newsgroups-l2"
    recipe: str = "newsgroups-l2"
    title: str = "20 Newsgroups: one regulariser a word"
    split: Literal["test", "validation"] = "test"
    """What is tested on: the test set, or the newest fifth of the training set, to choose settings."""
    folds: int = 5
    """Stretches of time: grid search has as many folds, the hypergradient validates on the newest."""
    grid_size: int = 10
    """Values of C that LogisticRegressionCV tries: its `Cs`."""
    start: float = 0.005
    """The coefficient of every word, where the search for one a word begins."""
    learning_rate: float = 0.1
    """Of Adam, on log coefficients of words. So many fit the validation documents when they go far: few steps, of one
    length for all words, are the guard."""
    hyperiterations: int = 4
    """Steps on the coefficients of words."""
    one_start: float = 1.0
    """Where the search for one coefficient begins."""
    one_learning_rate: float = 1.0
    """Of Adam, on the logarithm of the one coefficient."""
    one_hyperiterations: int = 8
    """Steps on the one coefficient."""

    def __post_init__(self) -> None:
        for name, least in (("folds", 2), ("grid_size", 2), ("hyperiterations", 1), ("one_hyperiterations", 1)):
            check_steps(getattr(self, name), name, least)
        for name in ("start", "learning_rate", "one_start", "one_learning_rate"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive and finite")
        if self.split not in ("test", "validation"):
            raise ValueError(f"split is {self.split!r}; use 'test', or 'validation' to choose settings")

    def open(self, data_dir: str | None) -> Opened:
        """The words of all documents; tf-idf is learned on the documents that are trained on."""
        corpus, digest = read_corpus(data_dir, self.split)
        n, d = corpus.train.x.shape
        if np.bincount(corpus.train.y).min() < self.folds:
            raise ValueError(f"a group has fewer documents than there are folds: use --folds, below {self.folds}")
        provenance = {
            "dataset": "20 Newsgroups, by date, with headers, footers and quotes",
            "sha256": digest,
            "documents": {"trained and validated": n, "tested": len(corpus.test.y)},
            "words": d,
            "entries": int(corpus.train.x.nnz),
        }
        return Opened(corpus, provenance)

    def parts(self) -> Sequence[str]:
        """Ours first: the memory that is noted is the most of the process so far."""
        return ONE, EACH, GRID

    def measure(self, part: str, data: Corpus, earlier: Mapping[str, Part], place: Place) -> Part:
        """Tune, train on all documents, test."""
        begin, used = time.perf_counter(), time.process_time()
        model, record, arrays = self._grid(data) if part == GRID else self._by_hypergradient(part, data, place)
        record |= {
            "seconds": round(time.perf_counter() - begin, 2),
            "processor_seconds": round(time.process_time() - used, 2),
        }
        log_p = model(data.test.x)
        chosen = np.argmax(log_p, 1)
        record |= {
            "test_accuracy": float(np.mean(chosen == data.test.y)),
            "test_loss": float(-np.mean(log_p[np.arange(len(chosen)), data.test.y])),
        }
        place.say(f"  {record['seconds']:.0f} s, validation loss {record['validation_loss']:.4f}")
        return Part([record], arrays | {"correct": chosen == data.test.y})

    def _by_hypergradient(self, part: str, data: Corpus, place: Place) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        one = part == ONE
        train, validation = self._stretches(data)[-1]
        start = np.log(self.one_start if one else self.start)
        lam = np.full(() if one else data.train.x.shape[1], start, np.float32)
        rate, steps = (
            (self.one_learning_rate, self.one_hyperiterations) if one else (self.learning_rate, self.hyperiterations)
        )
        solution = minimize(
            HYPERGRADIENT,
            lam,
            data=split_of(data.train, train, validation, start),
            # A short memory of squared gradients: they fall fast from one hyperiteration to the next.
            optimizer=optax.adam(rate, b2=0.99),
            steps=steps,
            dispatch=1,
            callbacks=lambda now: place.say(f"  hyperiteration {now.step}: validation loss {now.value:.4f}"),
        )
        if solution.stopped.startswith("diverged"):
            raise ValueError(f"the search for {part} {solution.stopped}: use a smaller learning rate")
        alpha = np.exp(np.asarray(solution.lam, float))
        model = trained(data.train, alpha)
        curve = [record["value"] for record in solution.history]
        record = {
            "coefficients": int(alpha.size),
            # Of the coefficients before the last step: those after it are never validated.
            "validation_loss": curve[-1],
            "hyperiterations": steps,
            "curve": [round(value, 6) for value in curve],
        }
        if one:
            return model, record | {"alpha": float(alpha)}, {}
        documents = np.diff(data.train.x.tocsc().indptr)
        return model, record, {"alpha": alpha.astype(np.float32), "documents": documents}

    def _grid(self, data: Corpus) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        from sklearn.linear_model import LogisticRegressionCV

        model = LogisticRegressionCV(
            Cs=self.grid_size,
            cv=self._stretches(data),
            scoring="neg_log_loss",
            use_legacy_attributes=False,  # pyright: ignore[reportArgumentType]
            l1_ratios=(0.0,),  # pyright: ignore[reportArgumentType]
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # 100 iterations are not always enough; that is its default
            model.fit(data.train.x, data.train.y)
        losses = -np.asarray(model.scores_).reshape(self.folds, -1)
        record = {
            "coefficients": 1,
            # On the documents that the hypergradient validates on, of the C that is best there.
            "validation_loss": float(losses[-1].min()),
            "validation_loss_of_folds": float(losses.mean(0).min()),
            "hyperiterations": self.grid_size * self.folds,
            "alpha": float(1 / np.ravel(model.C_)[0]),
        }
        return model.predict_log_proba, record, {}

    def _stretches(self, data: Corpus) -> list[tuple[np.ndarray, np.ndarray]]:
        fold = np.floor(data.train.age * self.folds).astype(int)
        return [(np.flatnonzero(fold != k), np.flatnonzero(fold == k)) for k in range(self.folds)]

    def summarise(self, measured: Mapping[str, Part]) -> dict[str, Any]:
        """The three rows, the time against grid search, and the paired difference in test accuracy."""
        of = {name: dict(part.records[0]) for name, part in measured.items()}
        rows = [
            [
                name,
                f"{x['coefficients']:,}",
                f"{x['seconds']:.0f}",
                f"{x['validation_loss']:.4f}",
                f"{x['test_loss']:.4f}",
                f"{100 * x['test_accuracy']:.2f}",
            ]
            for name, x in of.items()
        ]
        one, half = _difference(measured[EACH], measured[ONE])
        grid, grid_half = _difference(measured[EACH], measured[GRID])
        share = of[EACH]["seconds"] / of[GRID]["seconds"]
        processor = of[EACH]["processor_seconds"] / of[GRID]["processor_seconds"]
        held = "lower" if of[EACH]["validation_loss"] < of[GRID]["validation_loss"] else "NOT lower"
        notes = [
            f"One coefficient a word takes {share:.2f} of the time of LogisticRegressionCV ({self.grid_size} values of "
            f"C, {self.folds} folds, its own n_jobs=None) and {processor:.2f} of its processor time; its validation "
            f"loss is {held} than that of the best of these C on the same documents. Time includes compilation and the "
            "model trained on all documents at the end.",
            f"Test accuracy, one a word minus one for all: {one:+.2f} ± {half:.2f} points; minus LogisticRegressionCV: "
            f"{grid:+.2f} ± {grid_half:.2f} (95 % intervals of paired differences over test documents)."
            + ("" if one > half else " It does NOT clearly beat the single coefficient."),
            "The coefficients are fitted to the validation loss, more than 100 000 of them: that loss is too low to "
            "be an estimate. No setting was chosen by test documents.",
            f"A fold is a stretch of time ({self.folds} of them, by article numbers). The hypergradient validates on "
            "the newest. Start and number of hyperiterations of one a word were chosen by runs with --split "
            "validation.",
        ]
        return {
            "headline": {
                "number": f"{of[EACH]['coefficients']:,}",
                "text": f"regularisers tuned in {of[EACH]['seconds']:.0f} s, {share:.2f} of the time of grid search "
                f"for one; test accuracy {100 * of[EACH]['test_accuracy']:.1f} %, with one regulariser "
                f"{100 * of[ONE]['test_accuracy']:.1f} %.",
            },
            "table": {
                "columns": ["", "regularisers", "seconds", "validation loss", "test loss", "test accuracy (%)"],
                "rows": rows,
            },
            "notes": notes,
            "measured": {name: {k: v for k, v in x.items() if k != "curve"} for name, x in of.items()},
            "share_of_time": share,
            "share_of_processor_time": processor,
            "points_over_one": {"mean": one, "ci95": half},
        }

    def figures(self, measured: Mapping[str, Part], summary: Mapping[str, Any]) -> list[Shown]:
        """The validation loss on the way, and the coefficients of words."""
        grid = measured[GRID].records[0]
        figure = new_figure(3.2)
        axes = figure.subplots()
        for name in (ONE, EACH):
            curve = measured[name].records[0]["curve"]
            axes.plot(range(1, 1 + len(curve)), curve, "o-", color=_COLORS[name], markersize=3, label=name)
        label = f"{GRID}, best of {self.grid_size}"
        axes.axhline(grid["validation_loss"], color=INK, linewidth=1.2, linestyle=(0, (4, 3)), label=label)
        style(axes, xlabel="hyperiteration", ylabel="validation loss (nats)")
        legend(axes, "best")
        caption = (
            "<strong>Validation loss by hyperiteration</strong>, of the documents of the newest stretch. One "
            "coefficient begins at a strong value, one a word at a weak one."
        )
        curves = Shown("validation", figure, "Curves of the validation loss", caption)
        return [curves, self._of_words(measured[EACH].arrays)]

    def _of_words(self, arrays: Mapping[str, np.ndarray]) -> Shown:
        """What the validation documents say of words, by how many training documents have them."""
        times = np.log2(np.maximum(arrays["documents"], 1)).astype(int)
        bins = np.unique(times)
        moved = arrays["alpha"] / self.start
        share = lambda which: np.array([100 * np.mean(which[times == b]) for b in bins])
        figure = new_figure(3.4)
        axes = figure.subplots()
        below = np.zeros(len(bins))
        for name, which, color in (
            ("lowered", moved < 1 / 1.1, BLUE),
            ("within 10 %", (moved >= 1 / 1.1) & (moved <= 1.1), GREY),
            ("raised", moved > 1.1, RED),
        ):
            axes.bar(range(len(bins)), share(which), 0.8, bottom=below, color=color, label=name)
            below = below + share(which)
        names = ["1" if b == 0 else f"{2**b}-{2 ** (b + 1) - 1}" for b in bins]
        axes.set_xticks(range(len(bins)), names, rotation=45, ha="right", fontsize=8)
        axes.set_ylim(0, 118)
        style(axes, xlabel="training documents with the word", ylabel="share of words (%)")
        axes.legend(fontsize=9, ncols=3, frameon=False, loc="upper center")
        caption = (
            "<strong>Regularisers of words</strong> after the search, against where it began, by how many documents "
            "have the word."
        )
        return Shown("words", figure, "Shares of words with a lowered and with a raised regulariser", caption)


def _difference(a: Part, b: Part) -> tuple[float, float]:
    """Points of accuracy of a over b on the same documents, with the 95 % interval."""
    x = 100 * np.subtract(a.arrays["correct"], b.arrays["correct"], dtype=float)
    return float(x.mean()), float(1.96 * x.std(ddof=1) / np.sqrt(len(x)))
