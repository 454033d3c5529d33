"""The study of learned optimizers: its settings, its parts, the table, the notes, the figures."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hyperax.experiments.learned_optimizer import measuring, scores
from hyperax.experiments.learned_optimizer.figures import Curve, loss_curves, meta_training
from hyperax.experiments.learned_optimizer.inner_runs import LONGER
from hyperax.experiments.learned_optimizer.measuring import RULES, TIMES, Setting, tuned
from hyperax.experiments.learned_optimizer.problems import Family
from hyperax.experiments.learned_optimizer.scores import NOT_MEASURED, Row, best_baseline
from hyperax.experiments.study import Part, Place, Shown, Study
from hyperax.rollout import check_steps

_COUNTS = (
    "hyperiterations",
    "tasks",
    "window",
    "horizon",
    "shortest",
    "validations",
    "validation_problems",
    "lstm_units",
    "lstm_layers",
    "grid_each_side",
)


@dataclass(frozen=True)
class LearnedOptimizerStudy(Study):
    """Update rules meta-trained on random problems, beside four optimizers with their best constant step sizes.

        minimise over lam  E over problems of  mean over t of E(w_t),   w_t = w_{t-1} + u(grad L_t(w_{t-1}); lam)

    A subclass names the distributions of problems. The first setting is that of the meta-training; in the others the
    rules are used as they are, and the baselines are tuned again.
    Reference: Andrychowicz et al. 2016; Bridge paper 2017, Sec. 3 (first pattern).
    """

    rules: tuple[str, ...] = ("lstm",)
    """What is meta-trained: step-sizes, perceptron, lstm, hierarchical."""
    horizon: int = 100
    """T: inner steps of a run that is tested; the other length is ten times it."""
    window: int = 20
    """Inner steps of a hyperiteration, through which the hypergradient goes."""
    at_end: bool = False
    """Whether meta-training minimises E at the last step of each window alone, not its mean along the window."""
    shortest: int = 100
    """The fewest inner steps of a run in meta-training."""
    longest: int = 100
    """The most: lengths are drawn log-uniformly between them."""
    curriculum: int = 0
    """Hyperiterations over which the longest runs grow from the shortest; 0 for none."""
    first_order: bool = False
    """Whether gradients of L count as constants of the hypergradient, as in Andrychowicz et al. 2016."""
    hyperiterations: int = 1000
    tasks: int = 64
    """Problems a hyperiteration."""
    learning_rate: float = 3e-3
    """Of Adam on the rule's parameters, at first; it goes to zero as half a cosine."""
    clip: float = 1.0
    """The largest norm of a hypergradient that Adam sees."""
    validations: int = 20
    """How often a rule is scored on validation problems; the best iterate is kept."""
    validation_problems: int = 256
    """Problems of the training distribution, on which the step sizes of the baselines are chosen too."""
    lstm_units: int = 20
    """Of each layer of `LSTMRule`."""
    lstm_layers: int = 2
    lstm_p: float = 10.0
    """How many powers of e below one the LSTM tells gradients apart: p of `LSTMRule`."""
    lstm_output_scale: float = 0.1
    """Of `LSTMRule`, in units of w."""
    momenta: tuple[float, ...] = (0.9,)
    """Of heavy ball; its best one is chosen together with the step size."""
    grid_factor: float = 1.5
    """Between neighbouring step sizes of the grid."""
    grid_each_side: int = 6
    """Step sizes below and above the one that a grid begins with; it grows until its best one is inside. The grid for
    the long horizon begins with the best step size for the short one."""
    test_problems: int = 100
    curve_points: int = 50
    """Measurements of the loss up to the horizon."""

    def __post_init__(self) -> None:
        for name in _COUNTS:
            check_steps(getattr(self, name), name, 1)
        check_steps(self.curriculum, "curriculum")
        check_steps(self.longest, "longest", self.shortest)
        check_steps(self.test_problems, "test_problems", 2)  # or there is no interval
        unknown = [rule for rule in self.rules if rule not in RULES]
        if unknown or not self.rules or len(set(self.rules)) < len(self.rules):
            raise ValueError(f"rules are {self.rules}; give some of {', '.join(RULES)}, each once")
        for name in ("shortest", "longest"):
            if getattr(self, name) % self.window:
                raise ValueError(f"{name} is {getattr(self, name)}; use a multiple of window={self.window}")
        if self.curriculum and self.shortest == self.longest:
            raise ValueError(f"curriculum={self.curriculum} grows runs from shortest to longest: raise longest")
        if self.curve_points < 1 or self.curve_points % LONGER or self.horizon % self.curve_points:
            raise ValueError(
                f"curve_points is {self.curve_points}; use a multiple of {LONGER} that divides horizon={self.horizon}"
            )
        if not (self.momenta and all(0 <= mu < 1 for mu in self.momenta)):
            raise ValueError(f"momenta are {self.momenta}; give some in [0, 1)")
        if not 1 < self.grid_factor <= 3:
            raise ValueError(f"grid_factor is {self.grid_factor}; use one above 1, such as 1.5, and at most 3")
        for name in ("learning_rate", "clip", "lstm_p", "lstm_output_scale"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive and finite")

    @abc.abstractmethod
    def setting_names(self) -> Sequence[str]:
        """Their names, that of the meta-training first; parts of file names."""

    @abc.abstractmethod
    def setting(self, name: str, data: Any) -> Setting:
        """One of them."""

    @abc.abstractmethod
    def learning(self, data: Any) -> Family:
        """The distribution of problems for the meta-training."""

    @abc.abstractmethod
    def held_out(self, name: str) -> str:
        """What the test problems of a setting have that no training or tuning problem has."""

    @property
    def long(self) -> int:
        """The long horizon."""
        return LONGER * self.horizon

    def horizons_of(self, setting: Setting) -> tuple[int, ...]:
        """The lengths of the runs that are tested."""
        return (self.horizon, self.long) if setting.long else (self.horizon,)

    def parts(self) -> Sequence[str]:
        """The baselines' step sizes, the meta-training of each rule, the tests; then the other settings."""
        main, *others = self.setting_names()
        later = [part for name in others for part in (f"tune-{name}", f"test-{name}")]
        return [f"tune-{main}", *(f"train-{rule}" for rule in self.rules), f"test-{main}", *later]

    def measure(self, part: str, data: Any, earlier: Mapping[str, Part], place: Place) -> Part:
        """One of the three kinds."""
        what, _, name = part.partition("-")
        main = self.setting(self.setting_names()[0], data)
        learning, tuning = self.learning(data), earlier.get(f"tune-{main.name}", Part())
        if what == "train":
            return measuring.train(self, name, learning, main, tuning, place)
        setting = self.setting(name, data)
        if what == "tune":
            return measuring.tune(self, setting, place)
        momentum = tuned(tuning, self.horizon)["momentum"]
        rules = {
            rule: measuring.trained(measuring.new_rule(self, rule, learning, momentum), earlier[f"train-{rule}"])
            for rule in self.rules
        }
        fitting = measuring.fitting(rules, setting.test)
        return measuring.test(self, setting, fitting, earlier[f"tune-{name}"], place)

    def _rows(self, test: Part) -> list[Row]:
        """The optimizers on one setting: the learned ones, the baselines, those tuned for the long horizon."""
        at, rows = test.arrays[TIMES].tolist(), []
        for record in test.records:
            losses = test.arrays[record["optimizer"]].astype(float)
            asked = (self.long,) if record["tuned_for"] == self.long else (self.horizon, self.long)
            finals = {T: losses[:, at.index(T)] for T in asked if T in at}
            rows.append(Row(record["optimizer"], finals, None if record["baseline"] is None else record))
        return rows

    def summarise(self, measured: Mapping[str, Part]) -> dict[str, Any]:
        """The table of all settings, the headline of the first one."""
        table, results = [], {}
        for name in self.setting_names():
            rows = self._rows(measured[f"test-{name}"])
            horizons = [T for T in (self.horizon, self.long) if any(T in row.finals for row in rows)]
            results[name] = [number for T in horizons for number in scores.numbers(rows, T)]
            short = scores.cells(rows, self.horizon)
            long = scores.cells(rows, self.long) if self.long in horizons else [(NOT_MEASURED,) * 2] * len(rows)
            table += [[name, row.optimizer, row.settings, *a, *b] for row, a, b in zip(rows, short, long, strict=True)]
        trainings = [measured[f"train-{rule}"].records[0] for rule in self.rules]
        main, rule = self.setting_names()[0], self.rules[0]
        rows = self._rows(measured[f"test-{main}"])
        own, best = rows[0].finals[self.horizon], best_baseline(rows, self.horizon)
        summary: dict[str, Any] = {
            "headline": {
                "number": scores.mean_text(own),
                "text": f"is the mean loss of {rule} after {self.horizon} steps on {len(own)} held-out problems "
                f"({main}); the best baseline, {best.optimizer} with step size {best.settings}, ends at "
                f"{scores.mean_text(best.finals[self.horizon])}.",
            },
            "table": {
                "columns": [
                    "setting",
                    "optimizer",
                    "step size",
                    f"loss after {self.horizon} steps",
                    "minus best baseline",
                    f"loss after {self.long} steps",
                    "minus best baseline",
                ],
                "rows": table,
            },
            "notes": [*self._comparison(rows), *self._protocol(), *map(self._training, trainings)],
            "results": results,
        }
        diverged = [f"{record['rule']} {record['stopped']}" for record in trainings if "diverged" in record["stopped"]]
        return {"stopped": "; ".join(diverged), **summary} if diverged else summary

    def _comparison(self, rows: Sequence[Row]) -> list[str]:
        """Each rule against the best baseline of the first setting, at both horizons."""
        notes = []
        for row in rows[: len(self.rules)]:
            for T in (self.horizon, self.long):
                best, own = best_baseline(rows, T), row.finals[T]
                other = best.finals[T]
                notes.append(
                    f"After {T} steps {row.optimizer} ends at {scores.mean_text(own)}, the best baseline "
                    f"({best.optimizer}) at {scores.mean_text(other)}; difference "
                    f"{scores.paired_text(own, other)}, lower on {scores.share_below(own, other)} problems."
                )
        return notes

    def _protocol(self) -> list[str]:
        """What was done, in sentences."""
        held_out = "; ".join(f"{name}: {self.held_out(name)}" for name in self.setting_names())
        return [
            f"Held out: {held_out}. All optimizers run on the same {self.test_problems} test problems; intervals "
            "are 95 % intervals of means over them, and differences are paired. The best baseline of a column is that "
            "with the least mean on the test problems themselves.",
            f"Baselines: the constant step size with the least mean final loss on {self.validation_problems} "
            f"problems of the training distribution, in a geometric grid of factor {self.grid_factor:g} that grows "
            "until its best one lies inside; RMSProp with decay 0.9, Adam with 0.9 and 0.999, momentum one of "
            f"{', '.join(f'{mu:g}' for mu in self.momenta)}. This is done for {self.horizon} steps, and once more for "
            f"{self.long} (the rows that say so). Learned rules are not tuned to the long horizon, nor to any setting "
            "but the first.",
        ]

    def _training(self, record: Mapping[str, Any]) -> str:
        runs = f"{self.shortest}" if self.shortest == self.longest else f"{self.shortest} to {self.longest}"
        constants = "E at their last step; " if self.at_end else ""
        constants += "gradients of L count as constants of the hypergradient; " if self.first_order else ""
        return (
            f"{record['rule']}: {record['parameters']:,} parameters, {record['hyperiterations']} hyperiterations of "
            f"{self.tasks} problems and windows of {self.window} steps in runs of {runs} ({record['seconds']:.0f} s); "
            f"{constants}the iterate after {record['best']} is kept, with loss {record['score']:.4g} on the "
            f"problems that the baselines are tuned on. Norm of the hypergradient: {record['median_norm']:.2g} "
            f"in the median, {record['largest_norm']:.2g} at most, clipped at {self.clip:g}. {record['stopped']}."
        )

    def figures(self, measured: Mapping[str, Part], summary: Mapping[str, Any]) -> list[Shown]:
        """The loss curves of each setting, and the meta-training."""
        shown = [self._curves(name, measured[f"test-{name}"]) for name in self.setting_names()]
        main = self.setting_names()[0]
        records = {rule: measured[f"train-{rule}"].records[1:] for rule in self.rules}
        best = {rule: measured[f"train-{rule}"].records[0]["best"] for rule in self.rules}
        baselines = tuned(measured[f"tune-{main}"], self.horizon)
        name = min(baselines, key=lambda name: baselines[name]["loss"])
        objective = "the loss at the end of the windows" if self.at_end else "the mean loss along the windows"
        words = (
            f"Meta-training by hyperiteration: {objective}, and the mean loss after "
            f"{self.horizon} steps of the validation problems; diamond: the iterate that is kept; dashed: {name} with "
            "its best step size, on the same problems."
        )
        figure = meta_training(records, best, (name, baselines[name]["loss"]))
        return [*shown, Shown("meta-training", figure, "Meta-training loss and final loss by hyperiteration", words)]

    def _curves(self, name: str, test: Part) -> Shown:
        at = test.arrays[TIMES]
        more, short, long = at[-1] > self.horizon, [], []
        for record in test.records:
            called: str = record["optimizer"]
            baseline: str | None = record["baseline"]
            losses = test.arrays[called].astype(float)
            place = self.rules.index(called) if baseline is None else None
            if baseline is not None and record["tuned_for"] == self.long:
                long.append(Curve(baseline, baseline, losses))
                continue
            short.append(Curve(called, called, losses[:, : self.curve_points + 1], place))
            if more:
                long.append(Curve(called, called if baseline is None else "", losses, place, baseline is not None))
        words = f"Mean loss by inner step on the test problems of {name}, with 95 % intervals"
        sides = (
            f" Left: up to the training horizon of {self.horizon}, each baseline with its best step size for it. "
            "Right: ten times as long; lines are baselines tuned for that, dotted ones keep the step size of the left."
        )
        figure = loss_curves(at, short, long, self.horizon)
        return Shown(f"curves-{name}", figure, words, f"{words}.{sides if more else ''}")
