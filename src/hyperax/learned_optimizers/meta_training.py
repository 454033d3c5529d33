"""Training a learned optimizer: many inner runs at once, each on a task of its own, a window of steps at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import KW_ONLY, replace
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from hyperax.dynamics.dynamics import Dynamics, State
from hyperax.methods.first_order import constant_gradient
from hyperax.methods.hypergradient import HypergradientFunction, call
from hyperax.methods.method import Method, Outcome, detach
from hyperax.problem import Data, Hypergradient, Lam, Problem, Scalar, Shared
from hyperax.rollout import advance, check_steps, exact_gradient, initial_state
from hyperax.tasks import TASKS, MeanOverTasks, one_task, split_tasks


class InnerRun(NamedTuple):
    """An inner run that goes on in the next hyperiteration: s_t after t steps; with t = 0 it is to begin."""

    t: Int[Array, ""]
    state: State


class MeanOverSteps(Method):
    """The method of `MetaTraining`: E averaged over the next K steps of a run, what came before being constant.

        f(lam) = (1 / K) sum over i = 1, ..., K of E(w_{t+i}, lam),   s_t constant, or s_0 = (Phi_0(lam), memory_0)

    Arguments:
        steps: K >= 1.
        at_end: E(w_{t+K}, lam) alone.
        first_order: gradients of L as constants of the derivative.
        segment: keep only every `segment`-th state and run the steps between again in the backward pass.

    `info["last"]` is E(w_{t+K}). The carry is an `InnerRun`; `()` begins a run.
    Cost: K steps, K values of E, and one backward pass through them.
    Reference: Andrychowicz et al. 2016, eq. 3, with all weights equal.
    """

    steps: int
    at_end: bool = False
    first_order: bool = False
    segment: int | None = None

    def value(self, problem: Problem, dynamics: Dynamics, lam: Lam, data: Data, carry: Any) -> tuple[Scalar, Outcome]:
        """The mean over the steps, or E at the last."""
        prepared = problem.prepare(lam, data)
        begin = lambda: initial_state(problem, dynamics, lam, prepared)
        t = jnp.asarray(0, jnp.int32)
        if isinstance(carry, InnerRun):
            t = carry.t
            state = jax.lax.cond(t == 0, begin, lambda: detach(carry.state))
        else:
            state = begin()
        outer = lambda w: problem.evaluate(w, lam, prepared)[0]
        state, values = advance(
            problem,
            dynamics,
            state,
            lam,
            prepared,
            first=t + 1,
            steps=self.steps,
            segments=() if self.segment is None else (self.segment,),
            gradient_of=constant_gradient if self.first_order else exact_gradient,
            observe=None if self.at_end else outer,
        )
        last, metrics = problem.evaluate(state.w, lam, prepared)
        info = {"metrics": metrics, "last": detach(last)}
        if isinstance(carry, InnerRun):
            carry = InnerRun(t + self.steps, detach(state))
        return last if self.at_end else jnp.mean(values), Outcome(state, info, carry)


class MetaProgress(NamedTuple):
    """The carry of `MetaTraining`.

    Fields:
        k: hyperiterations done.
        runs: an `InnerRun` for each slot, stacked; `()` without a window.
        born: the hyperiteration in which the run of each slot began. Its task and its horizon follow from that.
        ended: how many runs of each slot are over.
        last: E at the end of the last of those, 0 before there is one.
    """

    k: Int[Array, ""]
    runs: Any
    born: Int[Array, " tasks"]
    ended: Int[Array, " tasks"]
    last: Float[Array, " tasks"]


class MetaTraining(eqx.Module):
    """The hypergradient of a learned optimizer: the mean of E along inner runs on random tasks, for `minimize`.

        f(lam) = mean over slots j, and steps t of the window of j, of E(w_t^j, lam, D^j),   D^j = sample(key^j, data)

    Each of the slots holds an inner run. With a window, a hyperiteration takes every run K steps on and differentiates
    these alone: where the run stood before is a constant. A run that has done its horizon gives its slot to the next
    one, on a new task. Without a window each hyperiteration does whole runs on fresh tasks.

    Arguments:
        problem: of one task; its E is what the optimizer is to lower on the way (often L itself).
        dynamics: `LearnedOptimizer(...)`, or any whose settings are functions of lam.
        sample: (key, data) -> the data of one task, pure.
        horizon: the steps of a run, or (low, high): each draws its own, log-uniformly. In multiples of the window.
        window: K, or `None` for whole runs, then with one horizon.
        tasks: how many slots.
        at_end: E at the last step of the window alone, in place of the mean.
        curriculum: hyperiterations over which `high` grows from low to high, at a constant rate; 0 for none.
        staggered: whether the first runs of slots 1, ..., n end at 1/n, 2/n, ... of their horizons, so that the slots
            are at different steps from then on; with a window only.
        first_order: gradients of L as constants of the derivative, as in Andrychowicz et al. 2016.
        segment: keep only every `segment`-th state of the window, and run the steps between again.
        parallel: how many slots are mapped together, a divisor of `tasks`; `None`: all.
        norms: whether to report the norms of the hypergradients of single slots.
        seed: of tasks and horizons. The key of a run is fold_in(fold_in(key(seed), hyperiteration), slot), so a resumed
            training sees the same tasks.

    `info["metrics"]`, recorded by `minimize`: `run_end`, E at the ends of the last runs (at the present step in slots
    that have not finished one); `horizon`; with `norms`, `largest_norm` and `median_norm`; and the metrics of E.
    `info["step"]` and `info["horizon"]` have the t and the T of each slot.

    Raises: `ValueError` for settings outside of what is said here.
    Cost: (K or T) steps of `tasks` inner runs and a backward pass; memory as many steps of them. The carry holds one
    state a slot and no task: those are drawn again each time. `norms`: `tasks` hypergradients in memory.
    Reference: Andrychowicz et al. 2016, eq. 3 and Sec. 2.1; Wichrowska et al. 2017 (random horizons); Chen et al. 2020
    (curriculum).
    Do not use a window where what matters are effects over more than K steps (step sizes that stay small now and pay
    later: Wu et al. 2018): lengthen it, or use `EvolutionStrategy`. Nor `sample` and `key` of `minimize` with it: it
    draws its tasks itself.

    >>> from hyperax.dynamics.learned_optimizer import LearnedOptimizer
    >>> from hyperax.learned_optimizers import StepSizeRule
    >>> sphere = lambda w, lam, d: jnp.sum((w - d) ** 2)
    >>> problem = Problem(inner=sphere, outer=sphere, init=lambda lam, d: jnp.zeros_like(d))
    >>> draw = lambda key, data: jax.random.normal(key, (2,))
    >>> f = MetaTraining(problem, LearnedOptimizer(), draw, horizon=(4, 16), window=2, tasks=3)
    >>> lam = StepSizeRule(jnp.zeros(2))
    >>> h = f(lam)
    >>> h = f(lam, None, h.carry)
    >>> h.info["step"].tolist(), h.grad.log_step.shape
    ([2, 4, 4], (2,))
    """

    problem: Problem
    dynamics: Dynamics
    sample: Callable[[Key[Array, ""], Data], Data]
    _: KW_ONLY
    horizon: int | tuple[int, int]
    window: int | None = None
    tasks: int = 8
    at_end: bool = False
    curriculum: int = 0
    staggered: bool = True
    first_order: bool = False
    segment: int | None = None
    parallel: int | None = None
    norms: bool = False
    seed: int = 0

    def __check_init__(self):
        for name, noun, kind in (("problem", self.problem, Problem), ("dynamics", self.dynamics, Dynamics)):
            if not isinstance(noun, kind):
                raise ValueError(
                    f"{name} must be a {kind.__name__}, not {type(noun).__name__}: "
                    "MetaTraining(problem, dynamics, sample, horizon=...)"
                )
        if not callable(self.sample):
            raise ValueError(f"sample is {self.sample!r}; use a function (key, data) -> data of one task")
        for name, lowest in (("tasks", 1), ("seed", 0), ("curriculum", 0)):
            check_steps(getattr(self, name), name, lowest)
        for name in ("window", "segment", "parallel"):
            if getattr(self, name) is not None:
                check_steps(getattr(self, name), name, 1)
        if self.parallel is not None and self.tasks % self.parallel:
            raise ValueError(f"{self.tasks} tasks cannot be run {self.parallel} at a time: let `parallel` divide them")
        _check_horizon(self.horizon, self.window, self.curriculum)

    def __call__(self, lam: Lam, data: Data = None, carry: Any = None) -> Hypergradient:
        """The hypergradient of the next window at lam; `data` is what `sample` draws from."""
        return call(self, lam, data, carry)

    @property
    def remembers_tasks(self) -> bool:
        """With a window the carry holds runs on tasks drawn from the data of the last call."""
        return self.window is not None

    def init(self, lam: Lam, data: Data = None) -> MetaProgress:
        """The carry before the first hyperiteration: every slot is to begin."""

        def begin(key: Key[Array, ""]) -> tuple[Scalar, State]:
            prepared = self.problem.prepare(lam, self.sample(key, data))
            state = initial_state(self.problem, self.dynamics, lam, prepared)
            return self.problem.evaluate(state.w, lam, prepared)[0], state

        none = jnp.zeros(self.tasks, jnp.int32)
        # Neither is read before the first window has begun the runs: only their shapes count.
        values, states = jax.vmap(begin, axis_name=TASKS)(self._keys(none)[0])
        runs = () if self.window is None else InnerRun(none, states)
        return MetaProgress(jnp.asarray(0, jnp.int32), runs, none, none, jnp.zeros_like(values))

    def check(self, lam: Lam, data: Data) -> None:
        """As for one task."""
        self._mean.check(lam, self._tasks(data, jnp.zeros(self.tasks, jnp.int32)))

    def evaluate(self, lam: Lam, data: Data, carry: MetaProgress) -> Hypergradient:
        """The hypergradient, unchecked and in the caller's trace."""
        if self.window is None:
            born, t = jnp.full(self.tasks, carry.k), jnp.zeros(self.tasks, jnp.int32)
        else:
            t = carry.runs.t
            born = jnp.where(t == 0, carry.k, carry.born)
        h, norms = self._hypergradient(lam, self._tasks(data, born), carry.runs)

        t, horizon, now = t + self._steps, self._horizons(born), h.info["last"]
        over = t >= horizon
        last, ended = jnp.where(over, now, carry.last), carry.ended + over
        runs = h.carry if self.window is None else h.carry._replace(t=jnp.where(over, 0, t))
        metrics = {**h.info["metrics"], "run_end": jnp.where(ended > 0, last, now), "horizon": horizon, **norms}
        info = {"metrics": metrics, "step": t, "horizon": horizon}
        return h._replace(info=info, carry=MetaProgress(carry.k + 1, runs, born, ended, last))

    @property
    def _steps(self) -> int:
        """Inner steps of a hyperiteration."""
        return _bounds(self.horizon)[1] if self.window is None else self.window

    @property
    def _mean(self) -> MeanOverTasks:
        """The mean over slots, whose data are (a key for each slot, the data that all draw from)."""

        def prepare(lam: Lam, data: Data) -> Data:
            key, source = data
            return self.problem.prepare(lam, self.sample(key, source))

        method = MeanOverSteps(self._steps, self.at_end, self.first_order, self.segment)
        problem = replace(self.problem, prepare=prepare)
        return MeanOverTasks(HypergradientFunction(problem, self.dynamics, method), self.parallel)

    def _hypergradient(self, lam: Lam, data: Data, runs: Any) -> tuple[Hypergradient, dict[str, Array]]:
        """The mean hypergradient, and what its parts are like."""
        if not self.norms:
            return self._mean.evaluate(lam, data, runs), {}
        arrays, rest = split_tasks(data)
        of_slot = lambda slot: self._mean.hypergradient.evaluate(lam, one_task(slot[0], rest), slot[1])
        h = jax.lax.map(of_slot, (arrays, runs), batch_size=self.parallel or self.tasks)
        norms = jax.vmap(optax.tree.norm)(h.grad)
        mean = lambda tree: jax.tree.map(lambda x: jnp.mean(x, 0), tree)
        return h._replace(value=mean(h.value), grad=mean(h.grad)), {
            "largest_norm": jnp.max(norms),
            "median_norm": jnp.median(norms),
        }

    def _keys(self, born: Int[Array, " tasks"]) -> tuple[Key[Array, " tasks"], Key[Array, " tasks"]]:
        """For each run, the key of its task and that of its horizon."""
        key = jax.random.key(self.seed)
        of_run = lambda k, slot: jax.random.split(jax.random.fold_in(jax.random.fold_in(key, k), slot))
        keys = jax.vmap(of_run)(born, jnp.arange(self.tasks))
        return keys[:, 0], keys[:, 1]

    def _tasks(self, data: Data, born: Int[Array, " tasks"]) -> Data:
        """What the slots see; `sample` runs inside of each, so that what it does not change is not copied."""
        return self._keys(born)[0], Shared(data)

    def _horizons(self, born: Int[Array, " tasks"]) -> Int[Array, " tasks"]:
        """T of each run: functions of the hyperiteration it began in, and of its slot."""
        low, high = _bounds(self.horizon)
        if self.window is None:
            return jnp.full(self.tasks, high)
        # Counted in windows.
        least, most = low // self.window, high // self.window
        grown = jnp.minimum(born / self.curriculum, 1.0) if self.curriculum else 1.0
        uniform = jax.vmap(jax.random.uniform)(self._keys(born)[1])
        windows = jnp.clip(jnp.round(least * (most / least) ** (grown * uniform)), least, most)
        if self.staggered:
            part = (jnp.arange(self.tasks) + 1) / self.tasks
            windows = jnp.where(born == 0, jnp.ceil(windows * part), windows)
        return self.window * windows.astype(jnp.int32)


def _bounds(horizon: int | tuple[int, int]) -> tuple[int, int]:
    """The shortest and the longest run."""
    return horizon if isinstance(horizon, tuple) else (horizon, horizon)


def _check_horizon(horizon: Any, window: int | None, curriculum: int) -> None:
    """Raise a `ValueError` unless these go together."""
    if isinstance(horizon, tuple) and len(horizon) != 2:
        raise ValueError(f"horizon is {horizon!r}; use a number of steps, or a pair (low, high)")
    low, high = _bounds(horizon)
    check_steps(low, "horizon" if low is high else "the lowest horizon", 1)
    check_steps(high, "the highest horizon", low)
    if window is None and low != high:
        raise ValueError(
            f"horizons from {low} to {high} need a window: without one every run is done in a single hyperiteration, "
            "and those have one length; set window, or horizon to one number"
        )
    if window is not None and (low % window or high % window):
        raise ValueError(
            f"horizons from {low} to {high} are not multiples of window={window}: a run would end inside of a "
            "hyperiteration; change one of them"
        )
    if curriculum and low == high:
        raise ValueError(f"curriculum={curriculum} grows the horizon from low to high: give horizon=(low, high)")
