"""The outer loop: lam_{k+1} = lam_k - optimizer(grad f_T(lam_k)), with records, validation, stopping and resume."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from hyperax import free_variables, outer_loop
from hyperax.checkpoint import Checkpoint
from hyperax.checks import variables_of
from hyperax.host_loop import HostLoop
from hyperax.outer_loop import Program
from hyperax.problem import Data, Hypergradient, Lam
from hyperax.processes import Processes, processes_of
from hyperax.progress import ProgressDisplay
from hyperax.stopping import Callback, Validation


@dataclass(frozen=True)
class Solution:
    """What `minimize` found.

    Fields:
        lam: the best lam by validation score if there was one, else the last.
        last_lam: the last lam (on divergence, the last at which value and hypergradient were finite).
        value: f_T in the last record, a mean over `record_every` hyperiterations; `None` if there was none.
        best: {"step", "score"} of `lam`, `None` without validation.
        history: the records {"step", "value", "gradient_norm", "metrics"}, with "score" and "validation" (what else
            its function returned) where there was an evaluation. f_T and its hypergradient belong to lam before the
            step, the score to lam after it. The same after a resume as without.
        timings: {"step", "seconds"} after each dispatch of this call; the first contains compilation.
        stopped: why the run ended.
        steps: hyperiterations done, of all calls.
        carry: the method's carry. For w_T at the solution call `hypergradient(solution.lam, data).state`.

    >>> Solution(1.0, 1.0, None, None, [], [], "completed 0 hyperiterations", 0, ()).steps
    0
    """

    lam: Lam
    last_lam: Lam
    value: float | None
    best: dict[str, Any] | None
    history: list[dict[str, Any]]
    timings: list[dict[str, Any]]
    stopped: str
    steps: int
    carry: Any


def minimize(
    hypergradient: Callable[..., Hypergradient],
    lam: Lam,
    *,
    data: Data = None,
    sample: Callable[[Array, Data], Data] | None = None,
    key: Array | None = None,
    optimizer: optax.GradientTransformation,
    steps: int,
    constraint: PyTree = None,
    validation: Validation | None = None,
    callbacks: Callback | Sequence[Callback] = (),
    checkpoint: Checkpoint | None = None,
    resume: bool | str = False,
    dispatch: int = 64,
    record_every: int = 1,
    divergence_factor: float = 1e6,
    progress: bool = False,
) -> Solution:
    """Minimise f_T over lam with an optax optimizer.

        u_{k+1} = project(u_k + update(grad_u f_T(forward(u_k), data_k))),   lam_k = forward(u_k),   k = 0, 1, ...

    with `forward` and `project` the identity where there is no constraint, and data_k = data, or with `sample` the
    tasks sample(fold_in(key, k), data), drawn inside the compiled step.

    Arguments:
        hypergradient: (lam, data, carry) -> Hypergradient, from `hx.hypergradient` or your own pure function.
        lam: the initial outer variables, a pytree with floating-point leaves; what is not a number stays as it is.
        data: what every hyperiteration sees, or `sample` draws from; an argument of the compiled step, so it may be
            large.
        sample: (key, data) -> data_k, pure.
        key: a PRNG key, for `sample` and required with it.
        optimizer: any optax transformation but those that evaluate f_T themselves (line searches: L-BFGS); it sees the
            floating-point leaves only. Schedules count hyperiterations.
        steps: hyperiterations in all, those before a resume included.
        constraint: a set for all of lam, or a pytree prefix of lam with sets and `None`; see `Constraint`.
        validation: scores lam on held-out data, keeps the best, stops when it is patient no more.
        callbacks: functions of a `Progress`, called after each record; a string returned ends the run. Ready-made:
            `GradientTolerance`, `Plateau`, `GradientExplosion`.
        checkpoint: where and how often to save.
        resume: go on from the newest checkpoint (True; ValueError if there is none), from the newest if there is one
            ("auto"), or from the file of this name ("step-00000400.ckpt").
        dispatch: the most hyperiterations in one call of compiled code. 1 compiles the step without a loop around it.
        record_every: hyperiterations per record; values and metrics are averaged over them.
        divergence_factor: |f_T| above this times max(1, |first f_T|) counts as divergence.
        progress: show a live bar (or plain lines outside a terminal).

    Returns: a `Solution`. On divergence also a `DivergenceWarning`; `stopped` then says what happened and what to try.
    Raises: ValueError for what cannot run, before any work.

    Cost: per hyperiteration one hypergradient and one optimizer update; memory for three lams.
    A resumed run equals an uninterrupted one bit for bit on the same machine, with the same `dispatch`. An extended one
    (`steps` raised) too, except for the record at the old end if `record_every` does not divide it.
    Where the mesh of `mean_over_tasks` has devices of several processes, each calls this with the same arguments: the
    first one's lam, scores and reasons to stop count, it alone saves and shows, all read its checkpoints at a resume,
    and every dispatch has the full length.
    Reference: Franceschi et al. 2018 (ICML), Alg. 1 for the hypergradient inside; eq. 5 for the problem.
    Do not use it when f_T is not smooth in lam, or for two outer variables that a grid would settle at once.

    >>> import jax, optax
    >>> def quadratic(lam, data, carry):
    ...     value, grad = jax.value_and_grad(lambda lam: (lam - data) ** 2)(lam)
    ...     return Hypergradient(value, grad, None, {}, carry)
    >>> solution = minimize(quadratic, 0.0, data=3.0, optimizer=optax.sgd(0.25), steps=30)
    >>> float(solution.lam), solution.stopped
    (3.0, 'completed 30 hyperiterations')
    """
    if isinstance(optimizer, optax.MultiSteps):
        optimizer = optimizer.gradient_transformation()
    callbacks = (callbacks,) if callable(callbacks) else tuple(callbacks)
    _check(hypergradient, optimizer, validation, callbacks)
    for name, count, least in (("steps", steps, 0), ("dispatch", dispatch, 1), ("record_every", record_every, 1)):
        _check_count(name, count, least)
    _check_sampling(sample, key, hypergradient)
    mesh = getattr(hypergradient, "mesh", None)
    processes = processes_of(mesh)
    processes.together(lambda: _check_resume(checkpoint, resume))
    arrays, fixed = eqx.partition(variables_of(lam), eqx.is_inexact_array)
    sets = free_variables.resolve(constraint, arrays)
    arrays = processes.arrays_of_first(arrays)

    data = jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, data)
    program = Program(
        hypergradient, optax.with_extra_args_support(optimizer), sample, sets, fixed, float(divergence_factor)
    )
    state = outer_loop.start(program, data, key, free_variables.free(sets, arrays))
    if mesh is not None:
        program, data, key, state = outer_loop.over_devices(mesh, program, data, key, state)
    run = HostLoop(
        program, data, key, state, steps, validation, callbacks, checkpoint, dispatch, record_every, processes
    )
    if checkpoint is not None and resume and (_have_files(processes, checkpoint) or resume != "auto"):
        run.restore(checkpoint, resume if isinstance(resume, str) and resume != "auto" else None)
    shown = progress and processes.is_first
    with ProgressDisplay(steps, run.step) if shown else contextlib.nullcontext() as display:
        stopped = run.until_stopped(display)

    last = run.lam()
    return Solution(
        lam=last if run.best is None else run.lam(run.best_u),
        last_lam=last,
        value=run.history[-1]["value"] if run.history else None,
        best=run.best,
        history=run.history,
        timings=run.timings,
        stopped=stopped,
        steps=run.step,
        carry=run.state.carry,
    )


def _have_files(processes: Processes, checkpoint: Checkpoint) -> bool:
    names = [file.name for file in checkpoint.files()]
    processes.agree("the list of checkpoints", names)
    return bool(names)


def _check(hypergradient: Any, optimizer: Any, validation: Any, callbacks: tuple) -> None:
    if not callable(hypergradient):
        raise ValueError(
            f"hypergradient is {hypergradient!r}; use hx.hypergradient(problem, dynamics, method), or your own "
            "function (lam, data, carry) -> Hypergradient."
        )
    if not isinstance(optimizer, optax.GradientTransformation):
        raise ValueError(f"optimizer is {optimizer!r}; use an optax transformation, for instance optax.adam(1e-2).")
    if not (validation is None or isinstance(validation, Validation)):
        raise ValueError(f"validation is {validation!r}; use Validation(function, every=..., patience=...).")
    for callback in callbacks:
        if not callable(callback):
            raise ValueError(f"callback {callback!r} is not a function; use Progress -> None, or a string to stop.")


def _check_count(name: str, count: Any, least: int) -> None:
    if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or count < least:
        raise ValueError(f"{name} is {count!r}; use an integer, at least {least}.")


def _check_sampling(sample: Any, key: Any, hypergradient: Any) -> None:
    if not (sample is None or callable(sample)):
        raise ValueError(f"sample is {sample!r}; use a function (key, data) -> data of one hyperiteration.")
    if sample is not None and getattr(hypergradient, "remembers_tasks", False):
        raise ValueError(
            "the method remembers the inner variables of its data from one hyperiteration to the next, and `sample` "
            "draws other data each time; give it fixed data (mini-batches of the inner steps: Problem.batch), or use "
            "a method without memory (Reverse, Truncated, Implicit without warm_start)."
        )
    if sample is not None and key is None:
        raise ValueError("sample needs a key; pass key=jax.random.key(seed).")
    if sample is None and key is not None:
        raise ValueError("key is used by sample alone; pass sample=..., or put the key into data.")


def _check_resume(checkpoint: Any, resume: Any) -> None:
    if not isinstance(resume, (bool, str)):
        raise ValueError(f'resume is {resume!r}; use True, False, "auto" or the name of a checkpoint file.')
    if checkpoint is None:
        if resume:
            raise ValueError(f"resume={resume!r} needs a checkpoint; pass checkpoint=Checkpoint(directory, every=...).")
        return
    if not isinstance(checkpoint, Checkpoint):
        raise ValueError(f"checkpoint is {checkpoint!r}; use Checkpoint(directory, every=...).")
    files = checkpoint.files()
    if files and not resume:
        raise ValueError(
            f"{checkpoint.directory} already holds a run ({files[-1].name}); pass resume=True to go on with it, or use "
            "another directory."
        )
    if resume is True and not files:
        raise ValueError(
            f'no checkpoint in {checkpoint.directory}; start with resume=False, or use resume="auto" for both cases.'
        )
