"""The learners of the tables: how each is trained and tested on each data set, and the papers' numbers for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import optax

from hyperax.experiments.comparison.entrants import (
    DatasetName,
    Entrant,
    Sampler,
    Setting,
    Training,
    by,
    held_out,
)
from hyperax.experiments.config import Published
from hyperax.fewshot.episodes import Episodes
from hyperax.fewshot.image_batches import ImageBatches
from hyperax.fewshot.learners.classic import Joint
from hyperax.fewshot.learners.cosine import CosineClassifier
from hyperax.fewshot.learners.hyper_representation import HyperRepresentation
from hyperax.fewshot.learners.learner import Learner
from hyperax.fewshot.learners.maml import anil, imaml, in_depth, in_width, maml, meta_sgd
from hyperax.fewshot.learners.matching import Matching
from hyperax.fewshot.learners.nearest_neighbour import NearestNeighbour
from hyperax.fewshot.learners.pretrained import Layer, Multiclass, Readout, fine_tuning
from hyperax.fewshot.learners.prototypical import Prototypical
from hyperax.fewshot.learners.reptile import reptile
from hyperax.fewshot.learners.ridge import RidgeClassifier
from hyperax.fewshot.learners.siamese import Siamese
from hyperax.methods import Method, Reverse

FIVE_ONE, FIVE_FIVE, TWENTY_ONE, TWENTY_FIVE = (Setting(n, k) for n in (5, 20) for k in (1, 5))
OMNIGLOT_SETTINGS = (FIVE_ONE, FIVE_FIVE, TWENTY_ONE, TWENTY_FIVE)

TABLE_3 = "Franceschi et al. 2018, Table 3"
TABLE_4 = "Franceschi et al. 2018, Table 4"
BRIDGE_1 = "Bridge paper 2017, Table 1"
BRIDGE_2 = "Bridge paper 2017, Table 2"
OVERLAPPING = "the paper's own: support and query sets overlapping, as far as the public code shows"
AUTHORS = "others', as printed there; their protocols differ"


@dataclass(frozen=True)
class Conditions:
    """What a data set asks of all learners alike.

    Fields:
        hyperiterations: of the full budget.
        train_ways: classes of a training episode, where a learner does not fix them; `None`: as many as in the test.
        train_queries: query images a class of a training episode.
        tasks: episodes a hyperiteration.
        step_size: eta of softmax regression.
    """

    hyperiterations: int
    train_ways: int | None
    train_queries: int
    tasks: int
    step_size: float


# Omniglot, Glyphs: episodes of 20 classes with few queries teach more per image than those of 5 classes with 15 (the
# recipes omniglot-*). miniImageNet: ICML, App. D.
CONDITIONS: dict[str, Conditions] = {
    "omniglot": Conditions(40_000, 20, 5, 4, 0.1),
    "glyphs": Conditions(4_000, 20, 5, 4, 0.1),
    "miniimagenet": Conditions(60_000, None, 15, 4, 0.01),
}


def numbers(
    values: Mapping[tuple[str, Setting], tuple[float, float | None]], source: str, protocol: str = AUTHORS
) -> dict[tuple[str, Setting], Published]:
    """Published accuracies, in per cent, as an `Entrant` has them."""
    return {
        at: Published(value / 100, None if half is None else half / 100, source, protocol)
        for at, (value, half) in values.items()
    }


def table_3(
    omniglot: Sequence[float | None], mini: Sequence[tuple[float, float] | None] = ()
) -> dict[tuple[str, Setting], tuple[float, float | None]]:
    """A row of ICML Table 3: up to four numbers for Omniglot, up to two with intervals for miniImageNet."""
    on_omniglot = zip((("omniglot", setting) for setting in OMNIGLOT_SETTINGS), omniglot, strict=False)
    found: dict[tuple[str, Setting], tuple[float, float | None]] = {
        at: (value, None) for at, value in on_omniglot if value is not None
    }
    on_mini = zip((("miniimagenet", setting) for setting in (FIVE_ONE, FIVE_FIVE)), mini, strict=False)
    return found | {at: value for at, value in on_mini if value is not None}


def mini(one: float | tuple[float, float], five: tuple[float, float] | None = None) -> dict[Any, Any]:
    """Numbers for miniImageNet, 5-way 1-shot and 5-shot."""
    found = {("miniimagenet", FIVE_ONE): one if isinstance(one, tuple) else (one, None)}
    return found | ({("miniimagenet", FIVE_FIVE): five} if five else {})


def softmax_regression(step_size: float) -> Callable[[int], HyperRepresentation]:
    """The papers' ground learner."""
    return lambda ways: HyperRepresentation(ways, step_size=step_size)


def hyper_representation(dataset: DatasetName, published: Mapping[tuple[str, Setting], Published]) -> Entrant:
    """Hyper-representation as it does best here; on miniImageNet the residual network, as in ICML Table 3."""
    conditions = CONDITIONS[dataset]
    if dataset == "miniimagenet":
        training = Training(
            "hyper-representation", softmax_regression(0.04), held_out(None, 15), 60_000, tasks=2, network="rn"
        )
        note = "the residual network RN, eta = 0.04; the other learners have C4L."
        return Entrant("Hyper-representation", training, most_steps=30, published=published, note=note)
    training = Training(
        "hyper-representation",
        softmax_regression(conditions.step_size),
        held_out(conditions.train_ways, conditions.train_queries),
        conditions.hyperiterations,
        steps=10,
    )
    # 5 classes make the inner objective more curved at w = 0 than 20 do (p (1 - p), p = 1 / N): a smaller step.
    tested = lambda ways: HyperRepresentation(ways, step_size=0.02 if ways == 5 else conditions.step_size)
    return Entrant("Hyper-representation", training, tested, most_steps=30, published=published)


def trained(
    dataset: DatasetName,
    name: str,
    learner: Callable[[int], Learner],
    published: Mapping[tuple[str, Setting], Published] = {},
    *,
    sampler: Callable[[Setting], Sampler] | None = None,
    fixed_ways: bool = False,
    most_steps: int = 10,
    note: str = "",
    **changes: Any,
) -> Entrant:
    """Any other learner, on the training episodes of the data set, or on those of the test's ways (`fixed_ways`)."""
    conditions = CONDITIONS[dataset]
    ways = None if fixed_ways else conditions.train_ways
    given: dict[str, Any] = {"tasks": conditions.tasks, "hyperiterations": conditions.hyperiterations} | changes
    training = Training(file_name(name), learner, sampler or held_out(ways, conditions.train_queries), **given)
    return Entrant(name, training, most_steps=most_steps, published=published, note=note)


# On validation classes of Omniglot prototypical networks learned faster with an outer learning rate of 6e-3 than with
# 3e-3 or 1e-3.
_METRIC_RATE = {"omniglot": 6e-3, "glyphs": 6e-3, "miniimagenet": 1e-3}


def metric_learners(dataset: DatasetName, published: Callable[[str], Any]) -> tuple[Entrant, ...]:
    """Learners whose w is a formula of the support set."""
    row = lambda name, learner, **options: trained(
        dataset, name, learner, published(name), most_steps=1, learning_rate=_METRIC_RATE[dataset], **options
    )
    return (
        row("Siamese nets", Siamese, note="pairs of a query and a support image of an episode, images not distorted."),
        row("Matching nets", Matching, note="cosines are multiplied by 10, where the paper prints no factor."),
        row("Matching nets (FCE)", lambda ways: Matching(ways, full_context=True), note="as without FCE."),
        row("Prototypical nets", Prototypical),
        trained(dataset, "Ridge regression", RidgeClassifier, published("Ridge regression"), most_steps=1),
        trained(dataset, "Cosine classifier", CosineClassifier, published("Cosine classifier"), most_steps=30),
    )


# eta, T in training and the outer learning rate. With a head that starts at zero the network is adapted from the second
# step on, so T = 2 is the least. On validation classes of Omniglot 3e-3 was faster than 1e-3 for them.
_INITIALISATION = {"omniglot": (0.4, 2, 3e-3), "glyphs": (0.4, 2, 3e-3), "miniimagenet": (0.05, 5, 1e-3)}


def initialisations(dataset: DatasetName, published: Callable[[str], Any]) -> tuple[Entrant, ...]:
    """Learners of a start that is adapted by gradient descent."""
    eta, steps, rate = _INITIALISATION[dataset]
    row = lambda name, learner, steps=steps, learning_rate=rate, **options: trained(
        dataset, name, learner, published(name), steps=steps, learning_rate=learning_rate, **options
    )
    head_at_zero = "the head starts at zero in every episode, so the same start serves any number of classes."
    return (
        row("MAML", lambda ways: maml(ways, eta), note=head_at_zero),
        row("First-order MAML", lambda ways: maml(ways, eta, first_order=True), note=head_at_zero),
        row("ANIL", lambda ways: anil(ways, eta), fixed_ways=True),
        row("Meta-SGD", lambda ways: meta_sgd(ways, eta / 4), note=head_at_zero),
        row("iMAML", lambda ways: imaml(ways, step_size=eta / 4), steps=10, most_steps=20, note=head_at_zero),
        row(
            "Reptile",
            lambda ways: reptile(ways),
            fixed_ways=True,
            sampler=lambda setting: Episodes(setting.ways, max(10, setting.shots), 1, held_out=False),
            steps=8,
            most_steps=50,
            learning_rate=1.0,
            optimizer=optax.sgd,
            note="the inner optimizer is Adam without momentum, begun anew in each task; the outer step falls from 1.",
        ),
    )


def mixed_designs(dataset: DatasetName, published: Callable[[str], Any]) -> tuple[Entrant, ...]:
    """Representation and initialisation in one network (Bridge paper, Sec. 5)."""
    eta, steps, rate = _INITIALISATION[dataset]
    row = lambda name, learner: trained(dataset, name, learner, published(name), steps=steps, learning_rate=rate)
    return (
        row("In depth", lambda ways: in_depth(ways, 2, eta)),
        row("In width", lambda ways: in_width(ways, 0.5, eta)),
    )


def variant(
    dataset: DatasetName,
    name: str,
    sampler: Callable[[Setting], Sampler],
    published: Mapping[tuple[str, Setting], Published] = {},
    method: Callable[[int], Method] = Reverse,
    step_size: float | None = None,
    **changes: Any,
) -> Entrant:
    """Softmax regression on a representation that is learned by a method and from episodes of one's choice."""
    conditions = CONDITIONS[dataset]
    learner = softmax_regression(conditions.step_size if step_size is None else step_size)
    given: dict[str, Any] = {"tasks": conditions.tasks, "hyperiterations": conditions.hyperiterations} | changes
    training = Training(
        file_name(name), learner, sampler, hypergradient=by(lambda learner, steps: method(steps)), **given
    )
    return Entrant(name, training, most_steps=30, published=published)


def file_name(name: str) -> str:
    """The name of a part: small letters and hyphens."""
    return "-".join("".join(letter for letter in name.lower() if letter not in "(),=").split())


def classic(
    dataset: DatasetName, name: str, sets: Callable[[Setting], Sampler], published: Mapping[Any, Published], period: int
) -> Entrant:
    """Joint descent of lam and the classifiers, which need larger steps for that than in a run of their own."""
    eta = 3 * CONDITIONS[dataset].step_size
    row = variant(dataset, name, sets, published, lambda steps: Joint(period), step_size=eta, steps=period)
    return replace(row, note=f"eta = {eta:g} in the joint steps and in the test.")


def multiclass_training(dataset: DatasetName, file: str, filters: int | None) -> Training:
    """A network for all training classes at once."""
    return Training(
        file,
        Multiclass,
        lambda setting: ImageBatches(32),  # each of 4 tasks with statistics of its own
        CONDITIONS[dataset].hyperiterations,
        hypergradient=lambda learner, steps: learner.hypergradient(),
        filters=filters,
    )


# Tried on validation classes of Omniglot after 400 hyperiterations; the scales of the readouts differ by orders, and so
# do the step sizes of softmax regression on them. On miniImageNet nothing was tried: C4L's features as in the paper.
_FINE_TUNING_STEP_SIZE = {"omniglot": 0.1, "glyphs": 0.1, "miniimagenet": 0.01}
_READOUT_STEP_SIZES: dict[str, dict[str, float]] = {
    "conv": {"omniglot": 0.1, "glyphs": 0.1, "miniimagenet": 0.01},
    "linear": dict.fromkeys(CONDITIONS, 1e-3),
    "softmax": dict.fromkeys(CONDITIONS, 0.3),
}


def readout(
    dataset: DatasetName,
    training: Training,
    layer: Layer,
    name: str,
    published: Mapping[tuple[str, Setting], Published] = {},
    nearest: bool = False,
) -> Entrant:
    """A pretrained network read out at a layer, with softmax regression or the nearest neighbour on it."""
    eta = _READOUT_STEP_SIZES[layer][dataset]
    tested = (lambda ways: NearestNeighbour(ways)) if nearest else lambda ways: HyperRepresentation(ways, step_size=eta)
    view = lambda lam: {"network": Readout(lam["network"], lam["head"], layer)}
    return Entrant(name, training, tested, view, most_steps=1 if nearest else 30, published=published)


def fine_tuned(
    dataset: DatasetName, training: Training, name: str, published: Mapping[tuple[str, Setting], Published]
) -> Entrant:
    """All weights of a pretrained network, and a new head, trained on the support set."""
    tested = lambda ways: fine_tuning(ways, _FINE_TUNING_STEP_SIZE[dataset])
    view = lambda lam: {"network": lam["network"]}
    return Entrant(name, training, tested, view, most_steps=30, published=published)


def learned_step_size(dataset: DatasetName, published: Mapping[tuple[str, Setting], Published]) -> Entrant:
    """Hyper-representation as in the Bridge paper: the inner step size is a hyperparameter too."""
    conditions = CONDITIONS[dataset]
    learner = lambda ways: HyperRepresentation(ways, step_size=conditions.step_size, learn_step_size=True)
    sampler = held_out(None, 15)
    return trained(dataset, "Hyper-representation", learner, published, sampler=sampler, most_steps=30)
