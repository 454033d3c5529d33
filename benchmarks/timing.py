"""Timing functions in turns, the memory of compiled programs, and where it was measured."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from hyperax.experiments import environment

SLICE = 0.02  # seconds: faster functions are called several times in a turn


def seconds_of(run: Callable[[], Any], repeats: int = 1) -> float:
    """Seconds of one call; the result is waited for."""
    begin = time.perf_counter()
    for _ in range(repeats):
        jax.block_until_ready(run())
    return (time.perf_counter() - begin) / repeats


def in_turns(runs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each function in each round; in a round each has its turn, another one first each time."""
    repeats = {}
    for name, run in runs.items():
        seconds_of(run)  # compiles
        repeats[name] = max(1, int(SLICE / seconds_of(run)))
    found: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for k in range(rounds):
        for name in names[k % len(names) :] + names[: k % len(names)]:
            found[name].append(float(f"{seconds_of(runs[name], repeats[name]):.4g}"))
    return found


def ratio(seconds: Mapping[str, list[float]], one: str, other: str) -> float:
    """The median over rounds of the ratio within a round."""
    return float(np.median(np.asarray(seconds[one]) / np.asarray(seconds[other])))


def temporary_bytes(compiled: Any) -> int:
    """What a compiled program holds besides its arguments and results."""
    return int(compiled.memory_analysis().temp_size_in_bytes)


def circumstances(command: str) -> dict[str, Any]:
    """For a record: command, commit, versions, machine, and how busy it was."""
    return {
        "command": command,
        "commit": environment.commit(),
        "versions": environment.versions(),
        "machine": environment.machine(),
        "load": os.getloadavg()[0],
    }
