"""`tune`: the hyperparameters of a user's own training loop, learned through it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import optax
from jaxtyping import Array, Key, PyTree

from hyperax.methods.hypergradient import hypergradient
from hyperax.methods.method import Method
from hyperax.methods.real_time import RealTime
from hyperax.minimize import Solution, minimize
from hyperax.problem import Data, Lam, Scalar, W
from hyperax.rollout import check_steps
from hyperax.stopping import Validation
from hyperax.tuning.hyperparameters import sets_of
from hyperax.tuning.refusals import check_learnable, initial_values, method_and_steps
from hyperax.tuning.training import Trained, Training, TrainingData, training

HYPERITERATIONS = 50

# One object for all calls, so that a second call with the same losses does not compile again.
_OUTER_OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.05))

_OPTIONS = ("callbacks", "checkpoint", "resume", "dispatch", "record_every", "divergence_factor", "progress")
"""What of `minimize` is passed on."""


@dataclass(frozen=True, repr=False)
class Tuned:
    """What `tune` found.

    Fields:
        hyperparameters: the best of those evaluated, the initial ones included; values in their own units.
        params: the parameters after training with them.
        before, after: the validation loss after training with the initial and with the best hyperparameters, with the
            same initial parameters, mini-batches and noise.
        metrics: those of the validation loss with the best ones.
        history: one record a hyperiteration, as in `Solution`; "score" is the validation loss at an evaluation.
        stopped: why the search ended, and whether it found anything better.
        train: trains with any hyperparameters in the same way; see `Training`.
        solution: of `minimize`, with the last hyperparameters and the method's carry.

    >>> tuned.hyperparameters["momentum"], tuned.before, tuned.after  # doctest: +SKIP
    (0.93, 0.52, 0.31)
    """

    hyperparameters: Lam
    params: W
    before: float
    after: float
    metrics: dict[str, float]
    history: list[dict[str, Any]]
    stopped: str
    train: Training
    solution: Solution

    def __repr__(self) -> str:
        return f"Tuned(validation loss {self.before:.6g} before, {self.after:.6g} after; {self.stopped})"


def tune(
    training_loss: Callable[..., Scalar],
    validation_loss: Callable[..., Any],
    params: W,
    optimizer: Callable[[Lam], optax.GradientTransformation],
    hyperparameters: PyTree,
    *,
    data: PyTree,
    validation_data: PyTree,
    steps: int | None = None,
    method: Method | None = None,
    batch_size: int | None = None,
    key: Key[Array, ""] | None = None,
    fresh_batches: bool = True,
    outer_optimizer: optax.GradientTransformation | None = None,
    hyperiterations: int | None = None,
    evaluate_every: int | None = None,
    patience: int | None = None,
    has_metrics: bool = False,
    **options: Any,
) -> Tuned:
    """Learn the hyperparameters h of a training loop by the gradient of the validation loss after T steps of it.

        min over h of E(w_T(h)),   w_t = w_{t-1} + update_h(grad_w L(w_{t-1}, batch_t, h)),   t = 1, ..., T

    Arguments:
        training_loss: L, (params, batch, h) -> scalar; with a fourth argument without a default it also receives the
            key of the step, for dropout and augmentation.
        validation_loss: E, (params, validation data) -> scalar; with `has_metrics` (scalar, dict of arrays).
        params: w_0: an array, a dict of them (Flax, Haiku), an Equinox module.
        optimizer: h -> an Optax transformation: `lambda h: optax.sgd(h["step_size"])`.
        hyperparameters: the initial h, any pytree. Its leaves are `log_scale(0.1)`, `logit_scale(0.9)`,
            `Hyperparameter(value, constraint)`, or numbers and arrays, which may become any number. The losses and
            `optimizer` see the values. Whatever is smooth can be learned: step sizes and momenta (`piecewise_schedule`
            for schedules), weight decay of each layer, weights of losses, label smoothing, strength of augmentation.
        data, validation_data: pytrees of arrays with the examples on the leading axis. They must be disjoint.
        steps: T, by `Reverse(T, segment="sqrt")`.
        method: in its place, a method with its steps: `Reverse(T, memory="2GiB")`, `Forward(T)` (few hyperparameters),
            `RealTime(T, every)` (h moves while one run goes on), `Truncated(T, window)`, ...
        batch_size: examples a step (`hx.minibatch`); `None` is all.
        key: decides mini-batches and noise; required if there are any.
        fresh_batches: whether each hyperiteration trains on other mini-batches and noise. If not, all of them, and the
            evaluations, see the same: f_T has no noise, and h may fit that one order of examples. `RealTime` has one
            run, so one order.
        outer_optimizer: moves h, in the variables that the sets are parametrised by; `None` is
            `optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.05))`: 0.05 is 5 % of a `log_scale`.
        hyperiterations: 50 if `None`; with `RealTime` those of one run.
        evaluate_every: hyperiterations between trainings with the current h on the key of `before` and `after`, of
            which the best is kept; `None` is a tenth of them, and with `RealTime` once at the end.
        patience: evaluations without a better one after which to stop.
        options: of `minimize`: `callbacks`, `checkpoint`, `resume`, `progress`, `dispatch`, `record_every`,
            `divergence_factor`.

    Returns: a `Tuned`.
    Raises: `ValueError`, before any training, for data that are missing, not finite or of unequal lengths, a batch
    larger than the data, a hyperparameter that nothing uses, a method that has no T steps to differentiate, or an
    optimizer without a derivative where an entry of the gradient is zero (Adam without `eps_root`).
    Cost: a hyperiteration is about 4 to 5 training runs with Reverse, memory 2 sqrt(T) states; m + 1 runs with Forward,
    memory m + 1 states. An evaluation is one run.
    Reference: Franceschi et al. 2018 (ICML), eq. 5-6; Franceschi et al. 2017 (ICML), Sec. 3.3 (`RealTime`).
    A step size that climbs to the edge of stability makes the hypergradient explode: bound it
    (`logit_scale(0.1, high=1.0)`) and clip, as the default does; the best h is kept in any case.
    Do not use it for what is not smooth in h (widths, numbers of layers: `mixed_search`), nor for layers that keep
    running statistics, since params are all that a step carries; nor report `after` as an error on unseen data: h was
    chosen by it.

    >>> import jax.numpy as jnp, optax
    >>> from hyperax.tuning import log_scale, logit_scale
    >>> x = jnp.array([[1.0], [2.0], [3.0], [4.0]])
    >>> square = lambda w, d: jnp.mean((d["x"] @ w - d["y"]) ** 2)
    >>> tuned = tune(
    ...     training_loss=lambda w, batch, h: square(w, batch) + h["decay"] * jnp.sum(w**2),
    ...     validation_loss=square,
    ...     params=jnp.zeros(1),
    ...     optimizer=lambda h: optax.sgd(h["step_size"]),
    ...     hyperparameters={"decay": log_scale(1.0), "step_size": logit_scale(0.01, high=0.1)},
    ...     data={"x": x, "y": x[:, 0]},
    ...     validation_data={"x": x, "y": x[:, 0]},
    ...     steps=20,
    ... )
    >>> tuned.after < 0.01 < tuned.before
    True
    """
    method, steps = method_and_steps(steps, method)
    h = initial_values(hyperparameters)
    model, random = training(
        training_loss,
        validation_loss,
        params,
        optimizer,
        h,
        steps=steps,
        data=data,
        validation_data=validation_data,
        batch_size=batch_size,
        key=key,
        has_metrics=has_metrics,
    )
    unknown = sorted(set(options) - set(_OPTIONS))
    if unknown:
        raise ValueError(f"tune has no option {', '.join(unknown)}; it passes on {', '.join(_OPTIONS)}")
    function = hypergradient(model.problem, model.dynamics, method)
    check_learnable(function, h, model)

    online = method.remembers_tasks
    if hyperiterations is None:
        hyperiterations = steps // method.every if isinstance(method, RealTime) else HYPERITERATIONS
    check_steps(hyperiterations, "hyperiterations")
    if evaluate_every is None:
        evaluate_every = max(1, hyperiterations if online else hyperiterations // 10)
    # Of the two keys one is for the evaluations (and for all, without fresh batches), one for the hyperiterations.
    of_search = None
    if random and fresh_batches and not online:
        evaluation, of_search = jax.random.split(model.data.key)
        model = eqx.tree_at(lambda model: model.data.key, model, evaluation)

    validation = Validation(lambda h: _score(model(h)), every=evaluate_every, patience=patience)
    before = model(h)
    solution = minimize(
        function,
        h,
        data=model.data,
        sample=None if of_search is None else _fresh,
        key=of_search,
        optimizer=_OUTER_OPTIMIZER if outer_optimizer is None else outer_optimizer,
        steps=hyperiterations,
        constraint=sets_of(hyperparameters),
        validation=validation,
        **options,
    )
    return _best(model, h, before, solution)


def _fresh(key: Key[Array, ""], data: TrainingData) -> Data:
    return data._replace(key=key)


def _score(run: Trained) -> tuple[float, dict[str, float]]:
    return run.validation, run.metrics


def _best(model: Training, h: Lam, before: Trained, solution: Solution) -> Tuned:
    """The best of the initial and the evaluated hyperparameters, trained with once more."""
    stopped = solution.stopped
    # Written so that anything finite is better than the NaN of a run that diverged.
    if solution.best is not None and not before.validation <= solution.best["score"]:
        h, after = solution.lam, model(solution.lam)
    else:
        after = before
        stopped += "; no evaluation was better than the initial hyperparameters, which are returned"
    return Tuned(
        hyperparameters=h,
        params=after.params,
        before=before.validation,
        after=after.validation,
        metrics=after.metrics,
        history=solution.history,
        stopped=stopped,
        train=model,
        solution=solution,
    )
