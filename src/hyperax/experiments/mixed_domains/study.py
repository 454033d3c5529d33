"""The study: which meta-learners are trained on which domains, the table, the notes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from hyperax.experiments.comparison.study import signed
from hyperax.experiments.mixed_domains import figures, training
from hyperax.experiments.mixed_domains.data import DIGITS_SPLIT, DOMAINS, SPLITS, Splits, open_domains, split
from hyperax.experiments.study import Opened, Part, Place, Shown, Study
from hyperax.fewshot.episodes import Episodes
from hyperax.fewshot.evaluation import interval, nearest_neighbour_accuracies, paired_difference
from hyperax.fewshot.image_classes import ImageClasses
from hyperax.minimize import Solution
from hyperax.rollout import check_steps

TOGETHER: dict[str, tuple[training.Kind, str]] = {
    "own-stems": ("own stems", "all domains, own stems"),
    "stems-in-w": ("stems in w", "all domains, stems in w"),
    "one-stem": ("one stem", "all domains, one stem"),
}
"""The meta-learners of all domains, by part: their kind, and their row of the table."""
ALONE, PIXELS = "this domain alone", "nearest neighbour on pixels"
NEW_STEM, ALL_LAYERS, SCRATCH = "new stem, other layers kept", "all layers, from the others' start", "from scratch"


@dataclass(frozen=True)
class MixedDomains(Study):
    """One meta-learner for data sets with other image sizes and numbers of classes, against one for each alone.

        h_d = shared o stem_d,   f(lam) = mean over domains d of f_d(shared, stem_d),   lam = (shared, all stems)

    "own stems" has all of the network in lam, "stems in w" the shared layers and where the stems start, each task
    adapts its stem; "one stem" resizes all images to 28 x 28 and shares the first layer too. A new domain, held out, is
    given few hyperiterations: for a new stem alone, for all layers from where the other domains' end, and for all
    layers from scratch.

    Reference: Bridge paper 2017, end of Sec. 4, which announces such settings without results.

    >>> MixedDomains(draws=2).parts()[3:8]
    ['draw-0-alone-glyphs', 'draw-0-alone-digits', 'draw-0-new', 'draw-1-own-stems', 'draw-1-stems-in-w']
    """

    kind: ClassVar[str] = "mixed-domains"

    recipe: str = "mixed-domains"
    title: str = "Mixed domains: one meta-learner for tasks of different structure"
    domains: tuple[str, ...] = ("glyphs", "digits")
    """Of omniglot (20-way), glyphs (5-way), mnist (3-way) and digits (3-way, 8 x 8); at least two."""
    new: str = "digits"
    """The domain that is held out from a meta-training and given to it later."""
    shots: int = 1
    """Support images a class."""
    filters: int = 32
    """Of every layer."""
    inner_steps: int = 5
    """T."""
    step_size: float = 0.1
    """eta, of the ground classifier."""
    tasks: int = 2
    """Episodes of each domain a hyperiteration."""
    train_queries: int = 5
    """Query images a class, in training."""
    learning_rate: float = 2e-3
    """Of Adam; it falls to 0 along a cosine."""
    hyperiterations: int = 300
    """Of every meta-training."""
    new_hyperiterations: int = 30
    """On the new domain."""
    validations: int = 6
    """Evaluations on validation classes during a training; the best iterate is kept."""
    queries: int = 15
    """Query images a class, in validation and test."""
    validation_episodes: int = 100
    """Of each domain."""
    test_episodes: int = 200
    """Of each domain and draw, the same for all meta-learners."""
    draws: int = 3
    """Draws of the digits' classes, and with them of initial layers and episodes."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.domains if name not in DOMAINS]
        if unknown or len(set(self.domains)) != len(self.domains) or len(self.domains) < 2:
            raise ValueError(f"domains are {self.domains}; name two or more of {', '.join(DOMAINS)}, each once")
        if self.new not in self.domains:
            raise ValueError(f"new is {self.new!r}; it must be one of domains, {', '.join(self.domains)}")
        for name in ("shots", "filters", "inner_steps", "tasks", "train_queries", "queries", "draws"):
            check_steps(getattr(self, name), name, 1)
        for name in ("hyperiterations", "new_hyperiterations", "validations"):
            check_steps(getattr(self, name), name, 1)
        for name in ("validation_episodes", "test_episodes"):
            check_steps(getattr(self, name), name, 2)
        for name in ("step_size", "learning_rate"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive and finite")

    def training_episodes(self, domain: str) -> Episodes:
        """Of a domain, in training."""
        return Episodes(DOMAINS[domain].ways, self.shots, self.train_queries)

    def episodes(self, domain: str, classes: ImageClasses) -> Episodes:
        """Of a domain, in validation and test, where two of the digits have to do for validation."""
        return Episodes(min(DOMAINS[domain].ways, classes.num_classes), self.shots, self.queries)

    def open(self, data_dir: str | None) -> Opened:
        """The images of the domains; `ValueError` if they are not there or cannot give the episodes."""
        opened = open_domains(self.domains, data_dir)
        for domain, splits in split(opened.data, self.seed).items():
            self.training_episodes(domain).check(splits["train"], f"the training set of {domain}")
            for name in SPLITS[1:]:
                self.episodes(domain, splits[name]).check(splits[name], f"the {name} set of {domain}")
        return opened

    def parts(self) -> Sequence[str]:
        """For each draw: those of all domains, each domain alone, the others without the new one, the new one."""
        others = [] if len(self.domains) == 2 else [f"without-{self.new}"]
        names = [*TOGETHER, *(f"alone-{domain}" for domain in self.domains), *others, "new"]
        return [f"draw-{draw}-{name}" for draw in range(self.draws) for name in names]

    def measure(self, part: str, data: Any, earlier: Mapping[str, Part], place: Place) -> Part:
        """Train one meta-learner (of the new domain three) and test it."""
        number, name = part.removeprefix("draw-").split("-", 1)
        draw = int(number)
        classes = split(data, self.seed + draw)
        if name == "new":
            return self._new(draw, classes, earlier, place)
        if name in TOGETHER:
            kind, row = TOGETHER[name]
            return self._meta_trained(draw, training.start(self, draw, kind, classes), row, classes, place)
        seen = self._others(name)
        chosen = {domain: classes[domain] for domain in seen}
        meta = training.start(self, draw, "own stems", chosen)
        return self._meta_trained(draw, meta, ALONE if len(seen) == 1 else f"without {self.new}", chosen, place)

    def _others(self, name: str) -> tuple[str, ...]:
        """The domains of a part "alone-..." or "without-..."."""
        if name.startswith("alone-"):
            return (name.removeprefix("alone-"),)
        return tuple(domain for domain in self.domains if domain != self.new)

    def _meta_trained(
        self, draw: int, meta: training.Meta, row: str, classes: Mapping[str, Splits], place: Place
    ) -> Part:
        records, arrays = self._trained(draw, meta, row, classes, place, self.hyperiterations)
        if row == ALONE:  # a baseline without training, on the same episodes
            for domain, splits in classes.items():
                test = training.on_device(splits["test"])
                key = training.own_key(training.key_for(self, draw, "test"), domain)
                found = nearest_neighbour_accuracies(self.episodes(domain, test), test, key, self.test_episodes)
                arrays[f"{PIXELS}: {domain}"] = found
        return Part(records, arrays)

    def _new(self, draw: int, classes: Mapping[str, Splits], earlier: Mapping[str, Part], place: Place) -> Part:
        """The three ways to a domain that the others' meta-training has not seen."""
        chosen = {self.new: classes[self.new]}
        others = [domain for domain in self.domains if domain != self.new]
        source = f"draw-{draw}-alone-{others[0]}" if len(others) == 1 else f"draw-{draw}-without-{self.new}"
        shared = training.shared_layers(self, earlier[source].arrays)
        begins: dict[str, training.Meta] = {
            NEW_STEM: training.start(self, draw, "new stem", chosen, shared),
            ALL_LAYERS: training.start(self, draw, "own stems", chosen, shared),
            SCRATCH: training.start(self, draw, "own stems", chosen),
        }
        records, arrays = [], {}
        for row, meta in begins.items():
            more = self._trained(draw, meta, row, chosen, place, self.new_hyperiterations)
            records += more[0]
            arrays |= more[1]
        return Part(records, arrays)

    def _trained(
        self,
        draw: int,
        meta: training.Meta,
        row: str,
        classes: Mapping[str, Splits],
        place: Place,
        hyperiterations: int,
    ) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
        """The records of one training, and the accuracies of its test by "row: domain"."""
        begin = time.perf_counter()
        meta, solution = training.train(self, draw, meta, classes, place, row.replace(" ", "-"), hyperiterations)
        arrays = {
            f"{row}: {domain}": training.accuracies(self, draw, meta, domain, splits, "test")
            for domain, splits in classes.items()
        }
        for name, found in arrays.items():
            place.say(f"  draw {draw}, {name}: {100 * found.mean():.2f} %")
        if meta.kind == "own stems":
            arrays |= training.shared_arrays(meta)
        seconds = round(time.perf_counter() - begin, 1)
        return _records(draw, row, solution, seconds), arrays

    def summarise(self, measured: Mapping[str, Part]) -> dict[str, Any]:
        """Accuracies of all draws together, paired differences from the domain alone or from scratch."""
        scores = [self._score(domain, row, measured) for domain, row in self._rows(measured)]
        gains = [self._score(domain, TOGETHER["own-stems"][1], measured) for domain in self.domains]
        diverged = [
            f"{record['row']} (draw {record['draw']})"
            for record in _of(measured, "training")
            if record["stopped"].startswith("diverged")
        ]
        stopped = {"stopped": f"diverged: {', '.join(diverged)}; the last good iterate was tested"} if diverged else {}
        words = "; ".join(f"{gain['domain']}: {signed(gain['difference'])}" for gain in gains)
        mean = float(np.mean([gain["difference"]["difference"] for gain in gains]))
        return stopped | {
            "headline": {
                "number": f"{100 * mean:+.1f} points",
                "text": f"of accuracy on unseen classes is what one meta-learner for {' and '.join(self.domains)}, "
                f"with a stem for each, has over one for each alone ({words}).",
            },
            "scores": scores,
            "table": {
                "columns": ["tasks", "trained on", "accuracy, %", "difference", "from", "by draw"],
                "rows": [_cells(score) for score in scores],
            },
            "notes": [*self._notes(), *_below_pixels(scores)],
        }

    def _rows(self, measured: Mapping[str, Part]) -> Iterator[tuple[str, str]]:
        """(domain, row) in the order of the table."""
        for domain in self.domains:
            for row in (*(row for _, row in TOGETHER.values()), ALONE, PIXELS):
                yield domain, row
        for row in (NEW_STEM, ALL_LAYERS, SCRATCH):
            yield self.new, row

    def _score(self, domain: str, row: str, measured: Mapping[str, Part]) -> dict[str, Any]:
        of = lambda row: np.stack(
            [part.arrays[name] for part in measured.values() if (name := f"{row}: {domain}") in part.arrays]
        )
        reference = SCRATCH if row in (NEW_STEM, ALL_LAYERS) else ALONE
        found = of(row)
        score = {"domain": domain, "row": row, "ways": DOMAINS[domain].ways, "shots": self.shots}
        score |= interval(found.ravel()) | {"new": row in (NEW_STEM, ALL_LAYERS, SCRATCH)}
        if row in (reference, SCRATCH):
            return score
        against = of(reference)
        by_draw = [float(x) for x in (found - against).mean(axis=1)]
        difference = paired_difference(found.ravel(), against.ravel())
        return score | {"difference": difference, "reference": reference, "by_draw": by_draw}

    def _notes(self) -> list[str]:
        first, second = DIGITS_SPLIT
        digits = [name for name in self.domains if name in ("mnist", "digits")]
        of_digits = (
            f"The ten classes of {' and '.join(digits)} are split anew in each draw: {first} for training, {second} "
            f"for validation (2-way), {10 - first - second} for the test; MNIST and the 8 x 8 digits are split alike. "
            "With so few classes the draws differ more than the intervals say: they are in the last column."
        )
        return [
            f"Accuracy is the mean over {self.test_episodes} episodes of test classes a draw, the same for all rows, "
            "with its 95 % interval over episodes; differences are paired by episode. The intervals are over episodes "
            f"of these trainings. Draws ({self.draws}) have other initial layers and episodes.",
            *([of_digits] if digits else []),
            f"Every meta-training has {self.hyperiterations} hyperiterations with {self.tasks} episodes of each of its "
            "domains: a domain's episodes are the same for the meta-learner of all and for its own, and so is where "
            "its network starts. Validation classes choose the iterate, of several domains by their mean accuracy.",
            "All rows but one learn a representation that is fixed while a task is learned, with a softmax regression "
            f"of {self.inner_steps} steps on it; with stems in w these steps also move the stem, from a common start. "
            "With one stem all images are resized to 28 x 28; own stems see them as they are.",
            f"The new domain is {self.new}: the layers after the stem come from a meta-training without it, and "
            f"{self.new_hyperiterations} hyperiterations on its training classes follow.",
            "Batch normalisation takes each set's own statistics, so predictions for query images depend on the others "
            "(transductive).",
        ]

    def figures(self, measured: Mapping[str, Part], summary: Mapping[str, Any]) -> list[Shown]:
        """Accuracies by domain, validation accuracy during the meta-trainings, and on the new domain."""
        curves = _of(measured, "validation")
        of_new = [record for record in curves if record["row"] in (NEW_STEM, ALL_LAYERS, SCRATCH)]
        whole = [record for record in curves if record["row"] in (*(row for _, row in TOGETHER.values()), ALONE)]
        return [
            figures.accuracies(summary["scores"]),
            figures.curves("training", whole, "Accuracy on validation classes during meta-training", self.domains),
            figures.curves(
                "new",
                of_new,
                f"Accuracy on validation classes of {self.new}, which the others' training did not see",
                (self.new,),
            ),
        ]


def _records(draw: int, row: str, solution: Solution, seconds: float) -> list[dict[str, Any]]:
    common = {"draw": draw, "row": row}
    best = solution.best["step"] if solution.best else solution.steps
    ended = {"hyperiterations": solution.steps, "best": best, "stopped": solution.stopped, "seconds": seconds}
    curve = [
        {"what": "validation", **common, "step": record["step"], "accuracies": record["validation"]}
        for record in solution.history
        if "validation" in record
    ]
    return [{"what": "training", **common, **ended}, *curve]


def _of(measured: Mapping[str, Part], what: str) -> list[Mapping[str, Any]]:
    return [record for part in measured.values() for record in part.records if record["what"] == what]


def _below_pixels(scores: Sequence[Mapping[str, Any]]) -> list[str]:
    """What to say of domains where a meta-learner of that domain alone is worse than none."""
    below = [
        score["domain"]
        for score in scores
        if score["row"] == PIXELS and score["difference"]["difference"] > score["difference"]["ci95"]
    ]
    if not below:
        return []
    return [
        f"On {' and '.join(below)} a meta-learner of that domain alone is below nearest neighbour on pixels, which "
        "learns nothing: its training classes are too few for features that carry over to others."
    ]


def _cells(score: Mapping[str, Any]) -> list[str]:
    tasks = f"{score['domain']}, {score['ways']}-way {score['shots']}-shot" + (", new" if score["new"] else "")
    accuracy = f"{100 * score['accuracy']:.2f} ± {100 * score['ci95']:.2f}"
    if "difference" not in score:
        return [tasks, score["row"], accuracy, "–", "–", "–"]
    by_draw = ", ".join(f"{100 * x:+.1f}" for x in score["by_draw"])
    return [tasks, score["row"], accuracy, signed(score["difference"]), score["reference"], by_draw]
