"""Settings of an optimizer: a number, a schedule, or one of either for each layer."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch


def matching(patterns: str | Iterable[str], names: Iterable[str], what: str) -> list[str]:
    """The names that any of these patterns matches; `ValueError` for a pattern that matches none."""
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    names = list(names)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ValueError(f'{what} is made of {pattern!r}; give names of parameters or layers, such as "features.*"')
        if not any(_matches(pattern, name) for name in names):
            there = names if len(names) <= 20 else [*names[:20], f"{len(names) - 20} more"]
            raise ValueError(f"no trainable parameter matches {pattern!r} of {what}; there are {', '.join(there)}")
    return [name for name in names if any(_matches(pattern, name) for pattern in patterns)]


def _matches(pattern: str, name: str) -> bool:
    """Whether a pattern is the name of a parameter (with wildcards), or of the layer that holds it."""
    return fnmatchcase(name, pattern) or name.rpartition(".")[0] == pattern


def chosen(patterns: Iterable[str], name: str) -> str | None:
    """The most specific of the patterns that match: the parameter's name, its layer's, then the longest pattern.

    Not the first one, for JAX sorts the keys of a dict.
    """
    rank = lambda p: (p == name, p == name.rpartition(".")[0], len(p.replace("*", "")), p)
    return max((p for p in patterns if _matches(p, name)), key=rank, default=None)


class Setting:
    """How one setting is read from its value at step t, for each parameter.

    Arguments:
        name: of the setting.
        value: a number, [K] numbers (a schedule), or {pattern: either}; of these only the form is kept.
        parameters: the names of the parameters.
        steps: T, for schedules, which have at most T knots.
        missing: what parameters have that no pattern of a dict matches, whatever the default of the setting is where it
            is not given at all; `None` if all must be matched.
    """

    def __init__(self, name: str, value: Any, parameters: Iterable[str], steps: int | None, missing: float | None):
        self.steps, self.missing = steps, missing
        self.keys: dict[str, str | None] | None = None
        if isinstance(value, dict):
            parameters = list(parameters)
            matching(value, parameters, f"the {name}")
            self.keys = {p: chosen(value, p) for p in parameters}
            lost = [p for p, key in self.keys.items() if key is None]
            if lost and missing is None:
                raise ValueError(f'no pattern of the {name} matches {", ".join(lost)}; add one, "*" for all others')
        for key, one in value.items() if isinstance(value, dict) else [("", value)]:
            shape = tuple(getattr(one, "shape", ()))
            if len(shape) > 1 or shape == (0,):
                of = f"{name} of {key}" if key else name
                raise ValueError(f"the {of} has shape {list(shape)}; use a number, or [K] knots of a schedule")
            if shape:
                if steps is None:
                    raise ValueError(f"the {name} is a schedule of {shape[0]} knots; say over how many steps: steps=T")
                if shape[0] > steps:
                    raise ValueError(
                        f"the {name} is a schedule of {shape[0]} knots over {steps} steps, so that some would never be "
                        f"used: at most one knot a step, or steps={shape[0]} and more"
                    )

    def is_constant(self, value: Any) -> bool:
        """Whether the setting is the same at every step."""
        return not any(
            isinstance(x, torch.Tensor) and x.dim() and len(x) > 1
            for x in (value.values() if isinstance(value, dict) else [value])
        )

    def at(self, value: Any, t: int, like: dict[str, torch.Tensor]) -> dict[str, Any]:
        """The setting of every parameter at step t."""
        if self.keys is None:
            now = self._now(value, t, next(iter(like.values())))
            return dict.fromkeys(like, now)
        some = next(iter(like.values()))
        now = {key: self._now(one, t, some) for key, one in value.items()}
        return {p: self.missing if (key := self.keys[p]) is None else now[key] for p in like}

    def _now(self, value: Any, t: int, like: torch.Tensor) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        value = value.to(like)  # a float64 rate must not make a float32 parameter float64
        if not value.dim():
            return value
        # Knots evenly spaced over t = 1, ..., T, linear between them; as hyperax.piecewise_schedule.
        assert self.steps is not None
        position = (len(value) - 1) * min((t - 1) / max(self.steps - 1, 1), 1.0)
        left = min(int(position), len(value) - 1)
        right = min(left + 1, len(value) - 1)
        return value[left] + (position - left) * (value[right] - value[left])
