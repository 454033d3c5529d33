"""The part of the outer loop that runs on the host: records, validation, stopping, checkpoints between dispatches."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass, field
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from hyperax import free_variables, outer_loop
from hyperax.checkpoint import Checkpoint
from hyperax.outer_loop import OuterState, Program
from hyperax.problem import Data, Lam
from hyperax.processes import Processes, placed
from hyperax.progress import ProgressDisplay
from hyperax.stopping import Callback, DivergenceWarning, Progress, Validation

# A dispatch grows while it is shorter than this and shrinks when far longer: long enough to hide the ~0.1 ms that it
# costs, short enough for a live display and an interrupt. How many share a dispatch changes none of the results.
_DISPATCH_SECONDS = 0.5

_TROUBLE = {
    outer_loop.VALUE: "f_T is not finite",
    outer_loop.GRADIENT: "the hypergradient is not finite",
    outer_loop.GROWTH: "|f_T| is more than divergence_factor times max(1, |first f_T|)",
    outer_loop.UPDATE: "the optimizer's update made lam not finite",
}


@dataclass
class HostLoop:
    """One run of `minimize`: its state on the device, and what was recorded of it.

    Everything that decides how the run goes on is in `state`, `best_u`, `best`, `history` and `pending`, and all of it
    is in a checkpoint; that is why a resumed run equals an uninterrupted one.
    """

    program: Program
    data: Data
    key: Array | None
    state: OuterState
    steps: int
    validation: Validation | None
    callbacks: tuple[Callback, ...]
    checkpoint: Checkpoint | None
    dispatch: int
    record_every: int
    processes: Processes = field(default_factory=Processes)
    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    pending: list[dict[str, float]] = field(default_factory=list)  # the hyperiterations since the last record
    timings: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None
    stopped: str | None = None

    def __post_init__(self) -> None:
        self.best_u = jax.tree.map(outer_loop.own, self.state.u)
        self._begin_step, self._begin = 0, time.perf_counter()

    def lam(self, u: PyTree = None) -> Lam:
        """The lam of u (by default the current one) in buffers of its own, which no later dispatch takes away."""
        arrays = free_variables.constrained(self.program.sets, self.state.u if u is None else u)
        arrays = jax.tree.map(_on_one_device, arrays)
        return eqx.combine(jax.tree.map(outer_loop.own, arrays), self.program.fixed)

    def until_stopped(self, display: ProgressDisplay | None) -> str:
        """Run, and say why the run ended."""
        if self.steps == 0:
            self.stopped = self._completed()
        # Clocks differ: processes that went by theirs would call programs of different lengths, and wait for ever.
        timed = self.processes.count == 1
        allowed = 1 if timed else self.dispatch
        while self.stopped is None:
            before = time.perf_counter()
            self._dispatch(min(allowed, self._next_boundary() - self.step))
            took = time.perf_counter() - before
            if took < _DISPATCH_SECONDS:
                allowed = min(2 * allowed, self.dispatch)
            elif timed and took > 4 * _DISPATCH_SECONDS:
                allowed = max(allowed // 2, 1)
            self._after_dispatch()
            if display is not None and self.history:
                record = self.history[-1]
                score = record.get("score") if record["step"] == self.step else None
                last = self.stopped is not None
                display.update(
                    self.step,
                    value=record["value"],
                    score=score,
                    seconds=self._seconds(),
                    last=last,
                    validation=record.get("validation"),
                )
        return self.stopped

    def _next_boundary(self) -> int:
        """The next step at which the host has something to do."""
        periods = [self.record_every] if self.callbacks else []
        periods += [part.every for part in (self.validation, self.checkpoint) if part is not None]
        return min([self.steps, *(self.step - self.step % period + period for period in periods)])

    def _dispatch(self, n: int) -> None:
        constant = (self.program, self.data, self.key, jnp.asarray(n, jnp.int32))
        self.state, seen = outer_loop.hyperiterations(constant, self.state, self.dispatch)
        seen = {name: np.asarray(x, float) for name, x in jax.device_get(seen).items()}
        for i in range(int(self.state.step) - self.step):
            self.step += 1
            self.pending.append({name: float(x[i]) for name, x in seen.items()})
            if self.step == self.steps or any(self.step % period == 0 for period in self._record_periods()):
                self._record()
        self.timings.append({"step": self.step, "seconds": self._seconds()})

    def _record_periods(self) -> list[int]:
        # Records fall on multiples of a step count, never on "so many after the start", and so do not move on a resume.
        return [self.record_every] + ([] if self.validation is None else [self.validation.every])

    def _record(self) -> None:
        # The mean is taken here, over all values at once: partial sums would depend on where dispatches end.
        means = {name: float(np.mean([entry[name] for entry in self.pending])) for name in self.pending[0]}
        metrics = {name.removeprefix("metrics/"): x for name, x in means.items() if name.startswith("metrics/")}
        norm = self.pending[-1]["gradient_norm"]
        self.history.append({"step": self.step, "value": means["value"], "gradient_norm": norm, "metrics": metrics})
        self.pending = []

    def _after_dispatch(self) -> None:
        trouble = int(self.state.trouble)
        if trouble != outer_loop.HEALTHY:
            self._diverge(trouble)
            return
        if self.history and self.history[-1]["step"] == self.step:
            due = self.validation is not None and self.step % self.validation.every == 0
            if due or self.step == self.steps:
                self._validate()
            self.stopped = self._verdict()
            if self.stopped is not None:
                self._validate()  # a run that ends by a rule may be between two evaluations
        if self.stopped is None and self.step == self.steps:
            self.stopped = self._completed()
        checkpoint = self.checkpoint
        if checkpoint is not None and (self.stopped is not None or self.step % checkpoint.every == 0):
            self._save(checkpoint)

    def _validate(self) -> None:
        record = self.history[-1]
        if self.validation is None or "score" in record:
            return
        # On every process, so that none waits long; the first one's decides, because last digits may differ.
        record["score"], record["validation"] = self.processes.of_first(self.validation.score(self.lam()))
        if record["score"] < (float("inf") if self.best is None else self.best["score"]):  # nan is no improvement
            self.best = {"step": self.step, "score": record["score"]}
            self.best_u = jax.tree.map(outer_loop.own, self.state.u)

    def _verdict(self) -> str | None:
        """Why to stop after the last record, by the rules; all callbacks are called."""
        record = self.history[-1]
        reasons = [] if self.validation is None else [self.validation.impatient(self.history)]
        if self.callbacks:
            seconds = self._seconds()
            seen = Progress(
                step=self.step,
                steps=self.steps,
                value=record["value"],
                metrics=record["metrics"],
                gradient_norm=record["gradient_norm"],
                score=record.get("score"),
                history=self.history,
                seconds=seconds,
                rate=(self.step - self._begin_step) / max(seconds, 1e-9),
                lam=self.lam,
            )
            reasons += [callback(seen) for callback in self.callbacks]
        for reason in reasons:
            if not (reason is None or isinstance(reason, str)):
                raise ValueError(
                    f"a callback returned {reason!r}; return None to go on, or a string, the reason, to stop."
                )
        return self.processes.of_first(next((reason for reason in reasons if reason is not None), None))

    def _completed(self) -> str:
        return f"completed {self.steps} hyperiterations"

    def _seconds(self) -> float:
        return time.perf_counter() - self._begin

    def _diverge(self, trouble: int) -> None:
        if self.pending:
            self._record()
        # No checkpoint now: it would push out a good one.
        self.state = self.state._replace(u=self.state.good)
        kept = "The last good lam was kept." if self.step else "There is no good lam: it is the initial one."
        self.stopped = (
            f"diverged at step {self.step + 1}: {_TROUBLE[trouble]}. {kept} Try a smaller inner step size (below 2/nu, "
            "nu the largest curvature of the inner objective), a smaller outer learning rate, or clip the "
            "hypergradient: optax.chain(optax.clip_by_global_norm(1.0), ...). hx.certify(hypergradient, lam, data) "
            "tells more."
        )
        # To the caller of `minimize`: through _after_dispatch, until_stopped and minimize.
        warnings.warn(self.stopped, DivergenceWarning, stacklevel=5)

    def _arrays(self) -> dict[str, PyTree]:
        return {"state": self.state, "best": self.best_u}

    def _settings(self) -> dict[str, Any]:
        """What must be the same in a resumed run for its history to be the same."""
        key = self.key
        if key is not None and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            key = jax.random.key_data(key)
        return {
            "key": None if key is None else np.asarray(key).tolist(),
            "record_every": self.record_every,
            # u, which is saved, means another lam under another set.
            "constraint": [repr(jax.tree.map(lambda x: np.asarray(x).tolist(), s)) for s in self.program.sets],
            "validation_every": None if self.validation is None else self.validation.every,
        }

    def _save(self, checkpoint: Checkpoint) -> None:
        record = {name: getattr(self, name) for name in ("step", "stopped", "best", "history", "pending")}
        arrays = self.processes.whole(self._arrays())
        if self.processes.is_first:
            checkpoint.save(arrays, {"settings": self._settings(), **record})

    def restore(self, checkpoint: Checkpoint, name: str | None) -> None:
        """Go back to a checkpoint: the newest, or the one of this name."""
        like = self._arrays()
        arrays, record = self.processes.together(lambda: checkpoint.load(like, {"settings": self._settings()}, name))
        self.processes.agree("the step of the checkpoint", record["step"])
        if record["step"] > self.steps:
            raise ValueError(
                f"the checkpoint is at step {record['step']}, past steps={self.steps}; raise steps, or name an earlier "
                "file in resume."
            )
        arrays = jax.tree.map(_like, arrays, like)
        self.state, self.best_u = arrays["state"], arrays["best"]
        self.step, self.best = record["step"], record["best"]
        self.history, self.pending = record["history"], record["pending"]
        self._begin_step = self.step
        # A run that a rule ended is asked again, not obeyed: the rule, or the number of steps, may be another one now.
        if record["stopped"] is not None and self.history:
            self.stopped = self._verdict()
        if self.stopped is None and self.step == self.steps:
            if self.pending:
                self._record()
            self._after_dispatch()


def _on_one_device(x: Array) -> Array | np.ndarray:
    """What all devices hold, for a caller who knows nothing of them."""
    return np.asarray(x) if len(x.sharding.device_set) > 1 and x.is_fully_replicated else x


def _like(x: Array, like: Array) -> Array:
    return outer_loop.own(placed(x, like.sharding) if len(like.sharding.device_set) > 1 else x)
