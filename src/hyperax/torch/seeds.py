"""Random numbers as a function of (seed, t): for replays that see the same dropout, the same mini-batches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

_BITS = (1 << 64) - 1


def mixed(*numbers: int) -> int:
    """One number of 63 bits from several, by the finaliser of SplitMix64: seeds side by side give unlike streams."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & _BITS
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _BITS
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _BITS
        state ^= state >> 31
    return state >> 1


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw torch's random numbers from this seed inside; the generators outside go on as if nothing had been drawn."""
    devices = []
    if device.type == "cuda":
        devices = [torch.cuda.current_device() if device.index is None else device.index]
    with torch.random.fork_rng(devices=devices):
        torch.random.default_generator.manual_seed(seed)
        for index in devices:
            with torch.cuda.device(index):
                torch.cuda.manual_seed(seed)
        yield
