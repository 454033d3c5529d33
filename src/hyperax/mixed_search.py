"""Discrete choices by Optuna, and inside each trial the continuous ones by hypergradient."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hyperax.minimize import Solution
from hyperax.rollout import check_steps
from hyperax.stopping import DivergenceWarning, Progress
from hyperax.tuning.tune import Tuned

if TYPE_CHECKING:
    import optuna

Search = Callable[..., Solution | Tuned]
"""`functools.partial(hx.minimize, ...)` or `functools.partial(hx.tune, ...)`: called with `callbacks` alone."""


class TrialFailedWarning(RuntimeWarning):
    """A trial of `mixed_search` diverged or raised an exception; the others go on."""


@dataclass(frozen=True, repr=False)
class MixedSolution:
    """What `mixed_search` found.

    Fields:
        choices: the discrete choices of the best trial: what `trial.suggest_...` returned, by name.
        solution: what its search returned: a `Solution`, or a `Tuned`.
        value: its score (lower is better): the best validation score if it was validated, else the last f_T.
        study: the Optuna study, with every trial; `study.trials_dataframe()` is a table of them.

    >>> found.choices, found.solution.lam  # doctest: +SKIP
    ({'kernel': 'rbf'}, {'width': 0.3})
    """

    choices: dict[str, Any]
    solution: Solution | Tuned
    value: float
    study: optuna.Study

    def __repr__(self) -> str:
        states = [trial.state.name.lower() for trial in self.study.trials]
        counts = ", ".join(f"{states.count(name)} {name}" for name in dict.fromkeys(states))
        return f"MixedSolution({self.choices}: {self.value:.6g}; trials: {counts})"


def mixed_search(
    build: Callable[[optuna.Trial], Search],
    *,
    trials: int,
    study: optuna.Study | None = None,
    seed: int | None = None,
) -> MixedSolution:
    """Search discrete choices c by Optuna, with continuous lam by hypergradient for each c.

        min over c of  F(c) = min over lam of f_T(lam; c)

    Arguments:
        build: trial -> a search. It asks `trial.suggest_categorical`, `suggest_int`, ... for the choices, and returns
            `functools.partial(hx.minimize, hypergradient, lam, optimizer=..., steps=...)`, or a partial of `hx.tune`.
            It must be a pure function of the choices.
        trials: how many are finished, pruned or failed in the end; those that the study has already count.
        study: an Optuna study that minimises; with a storage, the search goes on where it ended. By default one in
            memory, with Optuna's own pruner (the median of the trials before, after 5 of them).
        seed: after i trials the choices are drawn by a TPE sampler seeded with (seed, i), so that a resumed search
            equals an uninterrupted one. `None`: 0 without a study; the study's own sampler with one.

    The f_T of each record is reported to the trial, which may be pruned by it: let all trials have the same outer
    objective, and records at the same steps.

    Returns: a `MixedSolution`. If the best trial is of an earlier call, it is solved once more for its solution.
    Raises: `ValueError` if Optuna is not installed, for trials < 1, a study of several objectives or one that
    maximises, or no trial that finished. An exception in the first trial is raised; later ones, and divergence, are a
    `TrialFailedWarning`, and the trial counts as failed, with the reason in its attribute "failure".
    Cost: at most `trials` searches.
    Reference: Akiba et al. 2019 (Optuna); Li et al. 2018 on what pruning assumes: that early values tell.
    Do not use it for choices that a hypergradient could make (a continuous one among them costs whole trials), nor for
    a handful of choices: a loop over all of them leaves nothing to chance.

    >>> from functools import partial
    >>> import jax, optax
    >>> from hyperax import Hypergradient, minimize
    >>> def build(trial):
    ...     degree = trial.suggest_int("degree", 1, 3)
    ...     f = jax.value_and_grad(lambda lam: (lam - 1.0) ** 2 + abs(degree - 2))
    ...     answer = lambda lam, data, carry: Hypergradient(*f(lam), None, {}, carry)
    ...     return partial(minimize, answer, 0.0, optimizer=optax.sgd(0.5), steps=2)
    >>> found = mixed_search(build, trials=4)
    >>> found.choices, found.value, float(found.solution.lam)
    ({'degree': 2}, 0.0, 1.0)
    """
    optuna = _optuna()
    check_steps(trials, "trials", 1)
    if seed is not None:
        check_steps(seed, "seed")
    if not callable(build):
        raise ValueError(f"build is {build!r}; use a function trial -> functools.partial(hx.minimize, ...)")
    with _quiet(optuna):
        if study is None:
            study, seed = optuna.create_study(), 0 if seed is None else seed
        _check_study(study)
        assert study is not None  # for the type checker, to whom Optuna is unknown
        best: tuple[int, Solution | Tuned] | None = None
        own = study.sampler
        try:
            while (ended := len(_ended(study))) < trials:
                study.sampler = own if seed is None else _sampler(optuna, seed, ended)
                trial = study.ask()
                solution = _measured(study, trial, build, first=not ended)
                if solution is not None and study.best_trial.number == trial.number:
                    best = trial.number, solution
        finally:
            study.sampler = own
        if not _ended(study, only="COMPLETE"):
            reasons = [trial.user_attrs.get("failure", trial.state.name) for trial in study.trials]
            raise ValueError(f"no trial finished; the last of {len(reasons)}: {reasons[-1]}")
        chosen = study.best_trial
        if best is None or best[0] != chosen.number:
            again = optuna.trial.FixedTrial(chosen.params, chosen.number)
            best = chosen.number, _search(build(again))(callbacks=())
        assert chosen.value is not None
    return MixedSolution(dict(chosen.params), best[1], chosen.value, study)


def _optuna() -> Any:
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise ValueError("mixed_search needs Optuna: pip install hyperax[search]") from error
    return optuna


@contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    """Without Optuna's line a trial and its notes on experimental features; the caller's settings are put back."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(max(level, optuna.logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(level)


def _check_study(study: Any) -> None:
    if not hasattr(study, "ask") or not hasattr(study, "directions"):
        raise ValueError(f"study is a {type(study).__name__}; use optuna.create_study(...)")
    if [direction.name for direction in study.directions] != ["MINIMIZE"]:
        raise ValueError("the study must minimise one objective: optuna.create_study(direction='minimize')")


def _ended(study: optuna.Study, only: str | None = None) -> list[optuna.trial.FrozenTrial]:
    states = (only,) if only else ("COMPLETE", "PRUNED", "FAIL")
    return [trial for trial in study.get_trials(deepcopy=False) if trial.state.name in states]


def _sampler(optuna: Any, seed: int, ended: int) -> Any:
    # Trials that a killed process left as running must not count, or the search after it would be another one.
    seeded = int(np.random.SeedSequence((seed, ended)).generate_state(1)[0])
    return optuna.samplers.TPESampler(seed=seeded, constant_liar=False)


def _measured(
    study: optuna.Study, trial: optuna.Trial, build: Callable[..., Search], first: bool
) -> Solution | Tuned | None:
    """The solution of a trial that finished, told to the study with its score; `None` if it was pruned or failed."""
    optuna = _optuna()
    from optuna.trial import TrialState

    def failed(reason: str) -> None:
        trial.set_user_attr("failure", reason)
        study.tell(trial, state=TrialState.FAIL)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DivergenceWarning)
            solution = _search(build(trial))(callbacks=(_reporter(trial),))
    except optuna.TrialPruned:
        study.tell(trial, state=TrialState.PRUNED)
        return None
    except Exception as error:
        failed(f"{type(error).__name__}: {error}")
        if first:
            raise
        warnings.warn(f"trial {trial.number} failed: {error}", TrialFailedWarning, stacklevel=3)
        return None
    value = _value(solution)
    if solution.stopped.startswith("diverged") or value is None or not np.isfinite(value):
        failed(solution.stopped)
        warnings.warn(f"trial {trial.number} failed: {solution.stopped}", TrialFailedWarning, stacklevel=3)
        return None
    study.tell(trial, value)
    return solution


def _search(search: Any) -> Callable[..., Any]:
    """The search with the callbacks of its own, if it has any, before those that it is called with."""
    if not callable(search):
        raise ValueError(
            f"build returned {type(search).__name__}; return functools.partial(hx.minimize, hypergradient, lam, ...), "
            "to be called with callbacks"
        )
    own = getattr(search, "keywords", {}).get("callbacks", ())
    own = (own,) if callable(own) else tuple(own)
    return lambda callbacks: search(callbacks=(*own, *callbacks))


def _reporter(trial: optuna.Trial) -> Callable[[Progress], None]:
    """Reports the f_T of each record, and ends the trial if it is to be pruned."""
    optuna = _optuna()

    def report(progress: Progress) -> None:
        trial.report(progress.value, progress.step)
        if trial.should_prune():
            raise optuna.TrialPruned

    return report


def _value(solution: Solution | Tuned) -> float | None:
    if isinstance(solution, Tuned):
        return solution.after
    return solution.value if solution.best is None else solution.best["score"]
