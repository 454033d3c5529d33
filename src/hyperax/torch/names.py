"""The names of optimizers and of what is tuned, and what is probably meant by those that do not exist."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

import torch

from hyperax.torch.optimizers import OPTIMIZERS, Optimizer
from hyperax.torch.values import shown

OTHERS = ("loss_weights", "example_weights", "init", "parameters")
"""What `tune` may name besides the settings of an optimizer."""

_MEANT = {"lr": "step_size", "learning_rate": "step_size", "betas": "beta1 and beta2"}


def optimizer_named(name: Any) -> Optimizer:
    """The optimizer; `ValueError` with the right name for another spelling, or a class of `torch.optim`."""
    if isinstance(name, str) and name in OPTIMIZERS:
        return OPTIMIZERS[name]
    advice = f"use one of {', '.join(OPTIMIZERS)}, or write the step of another: Problem"
    spelled = name if isinstance(name, str) else (name if isinstance(name, type) else type(name)).__name__
    is_optim = isinstance(name, torch.optim.Optimizer) or (
        isinstance(name, type) and issubclass(name, torch.optim.Optimizer)
    )
    if isinstance(name, str) or is_optim:
        meant = get_close_matches(spelled.lower(), OPTIMIZERS, 1, 0.75)
        advice = f'write "{meant[0]}", or {advice}' if meant else advice
    raise ValueError(f"optimizer is {shown(name)}; {advice}")


def check_names(optimizer: str, chosen: Optimizer, tune: Any, fixed: Any, reads_lam: bool) -> None:
    """`ValueError` for names that nothing answers to, names that are probably misprints, and settings that lack."""
    for what, given in (("tune", tune), ("fixed", fixed)):
        if not isinstance(given, dict) or (what == "tune" and not given):
            raise ValueError(
                f"{what} is {shown(given)}; it is a dict of names and values, such as "
                '{"step_size": hyperax.log_scale(0.1)}: tune is to name what lam holds'
            )
    known = [*chosen.settings, *OTHERS]
    unknown = [name for name in fixed if name not in chosen.settings]
    unknown += [] if reads_lam else [name for name in tune if name not in known]
    if unknown:
        meant = [f"{name}{_hint(optimizer, name, known, 0.75)}" for name in unknown]
        raise ValueError(
            f"{optimizer} has no {', '.join(meant)}; it has {', '.join(chosen.settings)}, and tune may have "
            f"{', '.join(OTHERS)}, and what else a loss (model, batch, lam) reads"
        )
    for name in tune:
        hint = "" if name in known else _hint(optimizer, name, known, 0.9)
        if hint:
            raise ValueError(
                f"tune has {name!r}, which {optimizer} does not know{hint}: correct it, or, if the loss is to read it "
                "from lam, give it a name that is less like a setting's"
            )
    twice = [name for name in fixed if name in tune]
    if twice:
        raise ValueError(f"{', '.join(twice)} cannot be both tuned and fixed: leave it out of one of them")
    missing = [name for name, default in chosen.settings.items() if default is None and name not in {**tune, **fixed}]
    if missing:
        raise ValueError(f"{optimizer} needs {', '.join(missing)}: put it into tune, or into fixed={{...}}")


def _hint(optimizer: str, name: Any, known: list[str], likeness: float) -> str:
    """What a name is probably meant to be, in brackets; nothing for one that is like none."""
    if not isinstance(name, str):
        return " (names are strings)"
    plain = name.lower()
    if plain == "momentum" and optimizer == "sgd":
        return ' (it is a setting of optimizer="momentum")'
    meant = _MEANT.get(plain)
    if meant is None and (plain in known or len(plain) > 5):  # of short names many are alike, such as beta and beta1
        # Settings are told from further away: "class_weights" is a good name for what a loss reads.
        settings = [one for one in known if one not in OTHERS]
        found = get_close_matches(plain, settings, 1, min(likeness, 0.87)) or get_close_matches(
            plain, known, 1, likeness
        )
        meant = found[0] if found else None
    if meant is None or meant.partition(" ")[0] not in known:
        return ""
    return f" ({meant}, probably)"
