"""The complete configuration of an effect-of-t run: every field is an option of the command line."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

_LEAST = {"classes": 2, "train_per_class": 1, "validation_per_class": 1, "test_per_class": 1, "draws": 1}
_LEAST |= {"hyperiterations": 1, "record_every": 1, "compared_hyperiterations": 1, "timed_calls": 1}
_POSITIVE = ("regularisation", "step_size", "learning_rate")


@dataclass(frozen=True)
class EffectOfTConfig:
    """Learn H for several T and exactly, from the same start, on the same draws of classes and images.

    Raises: `ValueError` for counts, rates or combinations that make no sense.
    Reference: Franceschi et al. 2018, Sec. 5.1 and Example 3.4. Published nowhere: rho, eta, outer step size,
    momentum and hyperiterations; the defaults were chosen on the validation classes, by stability and by how far f_T
    falls.
    Do not choose any field by a run with `split` "test": those classes are for one run, at the end.

    >>> EffectOfTConfig(step_counts=(1, 8)).step_counts
    (1, 8)
    """

    kind: ClassVar[str] = "effect-of-t"

    recipe: str = "effect-of-t"
    """Name of the recipe this configuration comes from."""
    title: str = "The effect of T: linear hyper-representation of Omniglot features"
    """What a report calls the run."""
    representation: str = "results/omniglot-5way-1shot"
    """Folder of a finished few-shot run, whose network gives the features and whose data set the images."""
    split: Literal["test", "validation"] = "test"
    """Classes to draw from, none of which the network was trained on. Settings are to be chosen on validation."""

    classes: int = 100
    """Classes of a draw; a rotated character is a class of its own."""
    train_per_class: int = 3
    """Images a class for the inner objective."""
    validation_per_class: int = 3
    """Images a class for the outer objective."""
    test_per_class: int = 14
    """Images a class for the test accuracy. The paper says 15, but a character of Omniglot has 20 drawings."""
    draws: int = 5
    """Independent draws of classes and images; every T sees the same ones."""

    step_counts: tuple[int, ...] = (1, 4, 16, 64, 256)
    """The T to compare, beside the exact solution."""
    regularisation: float = 1e-3
    """rho of the inner objective, whose squared errors are a mean over examples."""
    step_size: float = 2.0
    """eta, the inner step size."""
    learning_rate: float = 5.0
    """Step size of the gradient descent on H."""
    momentum: float = 0.9
    """Of the gradient descent on H."""
    hyperiterations: int = 1500
    """Steps on H."""
    record_every: int = 10
    """Hyperiterations a record, up to the tenth record; from there on five times as many."""
    compared_hyperiterations: int = 5
    """First hyperiterations that are done a second time by reverse mode, to see whether both methods agree."""
    timed_calls: int = 11
    """Calls that are timed for each T and method."""
    seed: int = 0
    """Of the draws."""

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        for name in _POSITIVE:
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive and finite")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum is {self.momentum}; it must be at least 0 and below 1")
        if self.split not in ("test", "validation"):
            raise ValueError(f"split is {self.split!r}; use 'test', or 'validation' to choose settings")
        counts = self.step_counts
        if not counts or min(counts) < 1 or sorted(set(counts)) != list(counts):
            raise ValueError(f"step_counts are {counts}; they must be at least 1, each once, in increasing order")

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON types."""
        return {"kind": self.kind} | dataclasses.asdict(self) | {"step_counts": list(self.step_counts)}


def config_from_json(config: dict[str, Any]) -> EffectOfTConfig:
    """The configuration that `to_json` wrote."""
    try:
        fields: dict[str, Any] = {
            name: tuple(x) if isinstance(x, list) else x for name, x in config.items() if name != "kind"
        }
        return EffectOfTConfig(**fields)
    except (AttributeError, TypeError) as error:
        raise ValueError(f"this is not the configuration of a run of effect-of-t of this version: {error}") from error
