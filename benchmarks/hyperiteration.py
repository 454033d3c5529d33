"""Time of one hyperiteration against the number of inner steps: 5-way 1-shot, 8 episodes, the Omniglot network.

    python -m benchmarks.hyperiteration [--rounds 15]

The calls for the different T take turns within one run, so that a machine whose speed drifts slows all of them alike;
what counts is the ratio to T = 1. Uses Omniglot where HYPERAX_DATA has it, else Glyphs (images of the same size).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import hyperax as hx
from hyperax.experiments import environment
from hyperax.fewshot.datasets import Glyphs, Omniglot
from hyperax.fewshot.episodes import Episodes
from hyperax.fewshot.image_classes import ImageClasses
from hyperax.fewshot.learners.hyper_representation import HyperRepresentation
from hyperax.fewshot.networks import OmniglotNet

INNER_STEPS = (1, 4, 16, 64, 256)
TASKS = 8
RECORD = Path(__file__).parent / "records" / "hyperiteration.json"


def hyperiteration(steps: int, parallel: int, classes: ImageClasses):
    """A function k -> nothing that does the k-th hyperiteration: episodes drawn, hypergradient, one step of Adam."""
    learner, episodes, optimizer = HyperRepresentation(ways=5), Episodes(5, 1, 15), optax.adam(1e-3)
    hypergradient = hx.mean_over_tasks(learner.hypergradient(hx.Reverse(steps)), parallel=parallel)
    lam = learner.lam(OmniglotNet((28, 28, 1), jax.random.key(0)))
    state = optimizer.init(eqx.filter(lam, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(lam, state, classes, k):
        h = hypergradient(lam, episodes.sample_many(jax.random.key(k), classes, TASKS))
        updates, state = optimizer.update(h.grad, state)
        return eqx.apply_updates(lam, updates), state

    def run(k: int) -> None:
        nonlocal lam, state
        lam, state = jax.block_until_ready(step(lam, state, classes, jnp.asarray(k)))

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    try:
        dataset = Omniglot().load()
    except ValueError:
        dataset = Glyphs().load()
    classes = jax.tree.map(jnp.asarray, dataset.train)
    parallel = 1 if jax.default_backend() == "cpu" else TASKS

    runs = {steps: hyperiteration(steps, parallel, classes) for steps in INNER_STEPS}
    for run in runs.values():
        run(0)
    seconds = {steps: [] for steps in INNER_STEPS}
    for k in range(1, rounds + 1):
        for steps, run in runs.items():
            begin = time.perf_counter()
            run(k)
            seconds[steps].append(time.perf_counter() - begin)

    table = []
    print(f"one hyperiteration, {dataset.name}, 5-way 1-shot, {TASKS} episodes: median of {rounds} rounds")
    for steps in INNER_STEPS:
        ratios = np.asarray(seconds[steps]) / np.asarray(seconds[1])
        table.append({"steps": steps, "seconds": float(np.median(seconds[steps])), "ratio": float(np.median(ratios))})
        print(f"  T = {steps:3d}   {1000 * table[-1]['seconds']:6.0f} ms   {table[-1]['ratio']:.3f} of T = 1")
    record = {
        "command": "python -m benchmarks.hyperiteration",
        "data": dataset.name,
        "tasks": TASKS,
        "rounds": rounds,
        "table": table,
        "commit": environment.commit(),
        "versions": environment.versions(),
        "machine": environment.machine(),
    }
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    print(f"record: {RECORD.relative_to(Path.cwd()) if RECORD.is_relative_to(Path.cwd()) else RECORD.name}")


if __name__ == "__main__":
    main()
