"""The effect of T (ICML 2018, Sec. 5.1): a linear map H of features learned with T inner steps, and exactly."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from hyperax.dynamics import GradientDescent
from hyperax.experiments import environment
from hyperax.experiments.effect_of_t.config import EffectOfTConfig, config_from_json
from hyperax.experiments.effect_of_t.data import Source, draw_sets, open_source
from hyperax.experiments.effect_of_t.figures import EXACT
from hyperax.experiments.effect_of_t.problem import Sets, identity, linear_representation
from hyperax.experiments.effect_of_t.report import summarise, write_report
from hyperax.experiments.run_folder import RunFolder
from hyperax.methods import Reverse, hypergradient
from hyperax.methods.doubling import Doubling
from hyperax.methods.hypergradient import HypergradientFunction
from hyperax.minimize import minimize
from hyperax.stopping import Progress

Key = tuple[int | str, int]
"""A curve: T (or "exact") and the number of its draw."""


class Workbench:
    """The problem of a configuration with a hypergradient for every T, made once so that each compiles once."""

    def __init__(self, config: EffectOfTConfig):
        self.config = config
        self.problem, closed_form = linear_representation(config.regularisation)
        self.dynamics = GradientDescent(config.step_size)
        self.exact = hypergradient(self.problem, None, closed_form)
        self.optimizer = optax.sgd(config.learning_rate, momentum=config.momentum)
        doubling = {T: self.of(Doubling(T)) for T in config.step_counts}
        self.hypergradients: dict[int | str, HypergradientFunction] = {**doubling, EXACT: self.exact}

    def of(self, method: Any) -> HypergradientFunction:
        """The hypergradient of f_T by another method."""
        return hypergradient(self.problem, self.dynamics, method)

    def curve(self, key: Key, sets: Sets, progress: bool) -> tuple[list[dict[str, Any]], str]:
        """Learn H from the identity; what was recorded on the way, and why it ended."""
        T, draw = key
        records: list[dict[str, Any]] = []
        function, config = self.hypergradients[T], self.config

        def record(step: int, H: Array) -> None:
            seen = {name: float(x) for name, x in observe(function, self.exact, H, sets).items()}
            records.append({"steps": T, "draw": draw, "step": step} | seen)

        def note(now: Progress) -> None:
            # The larger T, the earlier the curve bends.
            every = config.record_every
            if now.step <= 10 * every or now.step % (5 * every) == 0 or now.step == now.steps:
                record(now.step, now.lam())

        H = identity(sets)
        record(0, H)
        solution = minimize(
            function,
            H,
            data=sets,
            optimizer=self.optimizer,
            steps=config.hyperiterations,
            record_every=config.record_every,
            callbacks=note,
            progress=progress,
        )
        return records, solution.stopped

    def disagreement(self, T: int, sets: Sets) -> float:
        """|H by Reverse - H by Doubling| / |H by Reverse - I| after the first hyperiterations, in largest entries."""
        start, steps = identity(sets), self.config.compared_hyperiterations
        by_reverse, by_doubling = (
            minimize(function, start, data=sets, optimizer=self.optimizer, steps=steps).lam
            for function in (self.of(Reverse(T)), self.hypergradients[T])
        )
        return float(jnp.max(jnp.abs(by_reverse - by_doubling)) / jnp.max(jnp.abs(by_reverse - start)))

    def seconds(self, sets: Sets) -> list[dict[str, Any]]:
        """Seconds a hypergradient takes, for every T and method: medians of calls in turns, after compilation."""
        rows: dict[tuple[int | str, str], Any] = {}
        for T in self.config.step_counts:
            rows |= {(T, "Reverse"): self.of(Reverse(T)), (T, "Doubling"): self.hypergradients[T]}
        rows[EXACT, "ClosedForm"] = self.exact
        start = identity(sets)
        taken: dict[tuple[int | str, str], list[float]] = {row: [] for row in rows}
        for _ in range(1 + self.config.timed_calls):
            for row, function in rows.items():
                begin = time.perf_counter()
                jax.block_until_ready(function(start, sets).grad)
                taken[row].append(time.perf_counter() - begin)
        return [{"steps": T, "method": m, "seconds": float(np.median(x[1:]))} for (T, m), x in taken.items()]


@eqx.filter_jit
def observe(function: HypergradientFunction, exact: HypergradientFunction, H: Array, sets: Sets) -> dict[str, Array]:
    """f_T and f at one H, and the accuracies of w_T on the three sets."""
    value, outcome = function.value(H, sets, function.init(H, sets))
    seen, w = function.problem.prepare(H, sets), outcome.state.w
    of = lambda x, y: jnp.mean(jnp.argmax(x @ w, -1) == jnp.argmax(y, -1))
    return {
        "value": value,
        "exact": exact.value(H, sets, exact.init(H, sets))[0],
        "train": of(seen.x_train, seen.y_train),
        "validation": of(seen.x_validation, seen.y_validation),
        "test": of(seen.x_test, seen.y_test),
    }


def run(
    config: EffectOfTConfig, out: str | Path, *, data_dir: str | None = None, progress: bool = False
) -> dict[str, Any]:
    """Run a configuration in a new folder and return its summary.

    Arguments:
        config: the recipe `effect-of-t`, with some fields changed or not.
        out: a folder that is empty or does not exist.
        data_dir: where the images are; else the environment variable HYPERAX_DATA.
        progress: say which curve is being learned, with a live bar.

    Returns: what `summary.json` holds.
    Raises: `ValueError` for a folder in use, no learned representation, or images that cannot give the sets; all
    before any work and before the folder is made.
    Cost: draws x (step counts + 1) x hyperiterations hypergradients, of 10 to 40 ms each on two cores.
    """
    RunFolder(out).require_unused()
    source = open_source(config, data_dir)
    folder = RunFolder.create(out, config, data_dir)
    folder.write_json("source.json", source.provenance)
    return _run(config, folder, source, progress)


def resume(
    out: str | Path, *, data_dir: str | None = None, checkpoint: str | None = None, progress: bool = False
) -> dict[str, Any]:
    """Go on with an interrupted run and return its summary: finished curves are kept, the one begun starts again.

    Arguments:
        out: the run's folder.
        data_dir: where the images are; by default where they were when the run began.
        checkpoint: to be left out, because curves are short and have none.
        progress: as in `run`.

    Returns: what `summary.json` holds.
    Raises: `ValueError` for another representation or other images than the run began with.
    """
    if checkpoint is not None:
        raise ValueError("a run of this kind has no checkpoints, it keeps finished curves: resume without --checkpoint")
    folder, config = RunFolder.open(out, config_from_json)
    source = open_source(config, data_dir or folder.data_dir())
    if folder.read_json("source.json") != source.provenance:
        raise ValueError(
            f"{config.representation} or the images are not those that {folder.path} began with (source.json): start "
            "the run again in another folder"
        )
    return _run(config, folder, source, progress)


def _run(config: EffectOfTConfig, folder: RunFolder, source: Source, progress: bool) -> dict[str, Any]:
    begin = time.perf_counter()
    say = lambda words: print(words, file=sys.stderr, flush=True) if progress else None
    say(f"run folder: {folder.path}")
    where = {"commit": environment.commit(), "versions": environment.versions(), "machine": environment.machine()}
    folder.begin_session()
    bench, classes = Workbench(config), source.dataset.splits[config.split]
    draws = [draw_sets(config, source.network, classes, draw) for draw in range(config.draws)]
    # A curve is written when it is finished, so a line cut in two belongs to one that is learned again.
    curves = {}
    for ended in folder.lines("curves.jsonl"):
        curves[ended["steps"], ended["draw"]] = ended
    records = [record for record in folder.lines("records.jsonl") if (record["steps"], record["draw"]) in curves]
    keys: list[Key] = [(T, draw) for draw in range(config.draws) for T in bench.hypergradients]
    for at, key in enumerate(keys):
        if key in curves:
            continue
        say(f"curve {at + 1} of {len(keys)}: T = {key[0]}, draw {key[1] + 1} of {config.draws}")
        new, stopped = bench.curve(key, draws[key[1]], progress)
        records += new
        curves[key] = {"steps": key[0], "draw": key[1], "stopped": stopped}
        folder.replace_lines("records.jsonl", records)
        folder.replace_lines("curves.jsonl", list(curves.values()))  # last: it says that the records are complete
        folder.note_seconds(at + 1, time.perf_counter() - begin)
    say("comparing Reverse and Doubling, and timing both")
    disagreement = {T: bench.disagreement(T, draws[0]) for T in config.step_counts}
    summary = summarise(config.to_json(), records, list(curves.values()))
    summary |= {
        "disagreement": [{"steps": T, "relative": x} for T, x in disagreement.items()],
        "features": int(draws[0].x_train.shape[1]),
        "source": source.provenance,
        **where,
        "timing": {"seconds_per_hypergradient": bench.seconds(draws[0])},
    }
    summary["timing"]["seconds"] = round(folder.seconds(time.perf_counter() - begin), 1)
    folder.write_json("summary.json", summary)
    write_report(folder.path)
    return summary
