"""Two sweeps of hyper-representation: the number of inner steps (ICML Figure 6), the size of the validation sets."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from hyperax.experiments.comparison.entrants import Entrant, Setting, held_out, support_only
from hyperax.experiments.comparison.figures import sweep_figure
from hyperax.experiments.comparison.roster import FIVE_ONE, variant
from hyperax.experiments.comparison.study import Comparison, tests_of
from hyperax.experiments.study import Part, Shown
from hyperax.rollout import check_steps


@dataclass(frozen=True)
class Sweep(Comparison):
    """Hyper-representation trained again and again with another value of one setting."""

    def all_settings(self) -> tuple[Setting, ...]:
        """5-way 1-shot."""
        return (FIVE_ONE,)

    @abstractmethod
    def points(self) -> Mapping[str, int]:
        """Name of the row -> value on the horizontal axis."""

    @property
    @abstractmethod
    def axis(self) -> str:
        """What is on the horizontal axis."""

    def figures(self, measured: Mapping[str, Part], summary: Mapping[str, Any]) -> list[Shown]:
        """Validation and test accuracy against the value, and the usual figures."""
        points = self.points()
        records = [record for record, _ in tests_of(measured)]
        stopped = {
            record["training"]: record["best"]
            for part in measured.values()
            for record in part.records
            if record["what"] == "training"
        }
        shown = [(points[r["entrant"]], r, stopped[r["training"]]) for r in records]
        return [sweep_figure(shown, self.axis), *super().figures(measured, summary)[1:]]


@dataclass(frozen=True)
class Figure6(Sweep):
    """Meta-validation of T: trained and validated with the same T, stopped when validation accuracy rises no more."""

    kind: ClassVar[str] = "figure6"
    source: ClassVar[str] = "Franceschi et al. 2018, Figure 6"
    reference: ClassVar[str] = "T = 5"
    recipe: str = "figure6"
    title: str = "Meta-validation of the number of inner steps (ICML 2018, Figure 6)"
    inner_steps: tuple[int, ...] = (1, 2, 3, 4, 5, 8, 12)
    """The values of T."""
    patience: int = 8
    """Evaluations without improvement after which a training stops."""
    validations: int = 40

    def __post_init__(self) -> None:
        if not self.inner_steps:
            raise ValueError("inner_steps is empty: give at least one T")
        for steps in self.inner_steps:
            check_steps(steps, "inner_steps", 1)
        check_steps(self.patience, "patience", 1)
        super().__post_init__()

    def points(self) -> Mapping[str, int]:
        """T."""
        return {f"T = {steps}": steps for steps in self.inner_steps}

    @property
    def axis(self) -> str:
        """The number of steps."""
        return "inner steps $T$, in training and test"

    def entrants(self) -> tuple[Entrant, ...]:
        """One for each T; the residual network on miniImageNet, as in the paper."""
        residual = self.dataset == "miniimagenet"
        rows = [
            variant(
                self.dataset,
                name,
                held_out(None, 15),
                steps=steps,
                network="rn" if residual else "auto",
                tasks=2 if residual else 4,
                patience=self.patience,
                step_size=0.04 if residual else None,
            )
            for name, steps in self.points().items()
        ]
        return tuple(replace(row, most_steps=None) for row in rows)


@dataclass(frozen=True)
class ValidationSize(Sweep):
    """Accuracy against the number of query images a class in meta-training (Bridge paper 2017, footnote 3).

    None at all is Bilevel-train: the query set is the support set. All have the same number of hyperiterations and of
    episodes, so more query images are also more images seen.
    """

    kind: ClassVar[str] = "validation-size"
    source: ClassVar[str] = "Bridge paper 2017, footnote 3"
    reference: ClassVar[str] = "15 queries"
    recipe: str = "validation-size"
    title: str = "The size of validation sets in meta-training (Bridge paper 2017, footnote 3)"
    sizes: tuple[int, ...] = (0, 1, 2, 5, 10, 15)
    """Query images a class in training."""

    def __post_init__(self) -> None:
        if not self.sizes:
            raise ValueError("sizes is empty: give at least one number of query images a class")
        for size in self.sizes:
            check_steps(size, "sizes")
        super().__post_init__()

    def points(self) -> Mapping[str, int]:
        """Query images a class."""
        return {f"{size} queries": size for size in self.sizes}

    @property
    def axis(self) -> str:
        """Their number."""
        return "query images a class in meta-training"

    def entrants(self) -> tuple[Entrant, ...]:
        """One for each size."""
        return tuple(
            variant(self.dataset, name, held_out(None, size) if size else support_only())
            for name, size in self.points().items()
        )
