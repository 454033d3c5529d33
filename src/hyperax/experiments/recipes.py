"""The recipes: each name is a complete configuration, with the published number it answers to."""

from __future__ import annotations

import difflib
from dataclasses import replace
from typing import Any, TypeAlias

from hyperax.experiments.config import FewShotConfig, Published
from hyperax.experiments.effect_of_t import EffectOfTConfig
from hyperax.experiments.studies import STUDIES
from hyperax.experiments.study import Study
from hyperax.fewshot.datasets import Glyphs, ImageFolder, MiniImageNet, Omniglot

Config: TypeAlias = FewShotConfig | EffectOfTConfig | Study
"""A complete configuration, of any kind of experiment."""

_TABLE_3 = "Franceschi et al. 2018, Table 3"
_TABLE_4 = "Franceschi et al. 2018, Table 4"
_WORKSHOP = "Franceschi et al. 2017 (A Bridge Between ...), Table 1"

# Accuracy, half-width of the 95 % interval, source.
_OMNIGLOT = {
    (5, 1): Published(0.986, None, _TABLE_3),
    (5, 5): Published(0.995, None, _TABLE_3),
    (20, 1): Published(0.955, None, _TABLE_3),
    (20, 5): Published(0.984, None, _TABLE_3),
}
_MINIIMAGENET = {
    ("c4l", 1): Published(0.4751, None, _TABLE_4),
    ("c4l", 5): Published(0.6197, 0.0076, _WORKSHOP),
    ("rn", 1): Published(0.5054, 0.0085, _TABLE_3),
    ("rn", 5): Published(0.6453, 0.0068, _TABLE_3),
}


def _glyphs() -> FewShotConfig:
    # A few minutes on two cores: small episodes, and scripts of the test never seen.
    return FewShotConfig(
        recipe="glyphs-5way-1shot",
        title="Glyphs, 5-way 1-shot: characters of scripts never seen in training",
        dataset=Glyphs(),
        network="omniglot",
        train_ways=20,
        train_queries=5,
        inner_steps=10,
        test_step_size=0.02,
        tasks=4,
        schedule="cosine",
        hyperiterations=300,
        validate_every=100,
        validation_episodes=200,
        checkpoint_every=100,
        record_every=10,
    )


def _omniglot(ways: int, shots: int) -> FewShotConfig:
    # At most an hour on two cores. Episodes of 20 classes with few queries teach more per image than the papers' of 5
    # classes with 15; the learning rate goes to zero because the run is short. (A learned step size climbs to the
    # stability limit 2 / nu of the inner problem, where the hypergradient explodes: it stays fixed.)
    return FewShotConfig(
        recipe=f"omniglot-{ways}way-{shots}shot",
        title=f"Omniglot, {ways}-way {shots}-shot",
        dataset=Omniglot(),
        published=_OMNIGLOT[ways, shots],
        network="omniglot",
        ways=ways,
        shots=shots,
        train_ways=20,
        train_queries=5,
        inner_steps=10,
        # 5 classes make the inner objective more curved at w = 0 than 20 do (p (1 - p) with p = 1 / N).
        test_step_size=0.02 if ways == 5 else None,
        tasks=4 if shots == 1 else 2,
        schedule="cosine",
        hyperiterations=6_000 if shots == 1 else 5_000,
    )


def _omniglot_papers(ways: int, shots: int) -> FewShotConfig:
    # App. D: 32 episodes for 5-way and 16 for 20-way, step size 0.1, Adam 1e-3 with decay 1e-5.
    return FewShotConfig(
        recipe=f"omniglot-{ways}way-{shots}shot-papers",
        title=f"Omniglot, {ways}-way {shots}-shot, the papers' hyperparameters",
        dataset=Omniglot(),
        published=_OMNIGLOT[ways, shots],
        network="omniglot",
        ways=ways,
        shots=shots,
        tasks=32 if ways == 5 else 16,
        step_size=0.1,
        hyperiterations=100_000,
        validate_every=1000,
        checkpoint_every=1000,
    )


def _miniimagenet(network: str, shots: int) -> FewShotConfig:
    name = {"c4l": "C4L", "rn": "RN"}[network]
    return FewShotConfig(
        recipe=f"miniimagenet-{network}-{shots}shot",
        title=f"miniImageNet, {name}, 5-way {shots}-shot",
        dataset=MiniImageNet(),
        published=_MINIIMAGENET[network, shots],
        network=network,  # pyright: ignore[reportArgumentType]
        shots=shots,
        # App. D: 4 episodes (C4L, 1-shot) or 2; step size 0.01 for C4L and 0.04 for RN.
        tasks=4 if (network, shots) == ("c4l", 1) else 2,
        step_size=0.01 if network == "c4l" else 0.04,
        inner_steps=5,
        hyperiterations=100_000,
        validate_every=1000,
        checkpoint_every=1000,
    )


def _folder() -> FewShotConfig:
    return FewShotConfig(
        recipe="folder-5way-1shot",
        title="Your images, 5-way 1-shot",
        dataset=ImageFolder(),
        queries=10,
        tasks=4,
        step_size=0.05,
        hyperiterations=5_000,
        validate_every=250,
        checkpoint_every=250,
    )


def recipes() -> dict[str, Config]:
    """All recipes by name.

    Returns: complete configurations, in the order of `hyperax list`.

    >>> list(recipes())[:2]
    ['glyphs-5way-1shot', 'omniglot-5way-1shot']
    """
    found: list[Config] = [
        _glyphs(),
        *(_omniglot(ways, shots) for ways in (5, 20) for shots in (1, 5)),
        *(_omniglot_papers(ways, shots) for ways in (5, 20) for shots in (1, 5)),
        *(_miniimagenet(network, shots) for network in ("c4l", "rn") for shots in (1, 5)),
        _folder(),
        EffectOfTConfig(),
        *(study() for study in STUDIES),
    ]
    return {config.recipe: config for config in found}


def recipe(name: str, **changes: Any) -> Any:
    """The recipe of this name, with some fields changed.

    Arguments:
        name: one of `recipes()`.
        changes: fields of its configuration, a `FewShotConfig` or that of another kind.

    Returns: a complete, frozen configuration.
    Raises: `ValueError` for an unknown recipe, with the nearest names, an unknown field, or a value without sense.

    >>> recipe("omniglot-5way-1shot-papers", seed=1).tasks
    32
    """
    known = recipes()
    if name not in known:
        near = difflib.get_close_matches(name, known, 3, 0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known)}"
        raise ValueError(f"there is no recipe {name!r}: {hint}")
    unknown = set(changes) - set(known[name].__dataclass_fields__)
    if unknown:
        raise ValueError(f"the recipe {name} has no field {', '.join(sorted(unknown))}")
    return replace(known[name], **changes)
