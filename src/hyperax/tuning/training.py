"""The user's training loop as the inner problem: what `tune` and `Tuned.train` share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key, PyTree

from hyperax.batches import minibatch
from hyperax.checks import leaf_name
from hyperax.dynamics.dynamics import Step
from hyperax.dynamics.dynamics import arity as arguments
from hyperax.dynamics.optax_dynamics import Optax
from hyperax.problem import Lam, Problem, Scalar, W
from hyperax.rollout import check_steps, rollout
from hyperax.tuning.examples import checked_examples, count_examples
from hyperax.tuning.hyperparameters import values_of


class TrainingData(NamedTuple):
    """D: the initial parameters, the examples of both sides, and the key of mini-batches and noise.

    `batches` are the indices of all T mini-batches, [T, size], once they are prepared.
    """

    params: W
    examples: PyTree
    validation: PyTree
    key: Key[Array, ""]
    batches: Int[Array, "T size"] | None = None


class _Loss(eqx.Module):
    """L(w, h, D_t) = training_loss(w, batch_t, h), and the key of step t where the loss has a fourth argument."""

    function: Callable[..., Scalar]
    noisy: bool

    def __call__(self, w: W, h: Lam, data: TrainingData) -> Scalar:
        return self.function(w, data.examples, h, data.key) if self.noisy else self.function(w, data.examples, h)


class _Validation(eqx.Module):
    """E(w, h, D) = validation_loss(w, validation data)."""

    function: Callable[..., Any]

    def __call__(self, w: W, h: Lam, data: TrainingData) -> Any:
        return self.function(w, data.validation)


class _Batches(eqx.Module):
    """D with the mini-batches of all steps: an epoch is one permutation here, where a step alone would draw its own."""

    count: int
    size: int | None
    steps: int

    def __call__(self, h: Lam, data: TrainingData) -> TrainingData:
        if self.size is None:
            return data
        key, per_epoch = jax.random.fold_in(data.key, 0), self.count // self.size
        # An epoch is a mini-batch of per_epoch * size examples, cut into per_epoch pieces.
        epoch = lambda e: minibatch(key, e, self.count, per_epoch * (self.size or 0))
        epochs = jax.vmap(epoch)(jnp.arange(1, -(-self.steps // per_epoch) + 1))
        return data._replace(batches=epochs.reshape(-1, self.size))


def _step_data(data: TrainingData, t: Step) -> TrainingData:
    """D_t: the mini-batch and the key of step t = 1, 2, ..."""
    key = jax.random.fold_in(data.key, t)
    if data.batches is None:
        return data._replace(key=key)
    index = data.batches[t - 1]
    return data._replace(key=key, examples=jax.tree.map(lambda x: x[index], data.examples))


def _initial(h: Lam, data: TrainingData) -> W:
    return data.params


class Trained(NamedTuple):
    """One training run.

    Fields:
        params: w_T, like the initial parameters.
        validation: E(w_T), a float.
        metrics: those of the validation loss, floats; empty if it has none.
    """

    params: W
    validation: float
    metrics: dict[str, float]


class Training(eqx.Module):
    """A training run as a function of its hyperparameters: `tuned.train(h)` trains with others in the same way.

        w_t = w_{t-1} + update_h(grad_w L(w_{t-1}, batch_t, h)),   t = 1, ..., T

    Fields:
        problem: the training loss as inner, the validation loss as outer objective.
        dynamics: the optimizer.
        steps: T.
        data: a `TrainingData`, the key of the evaluations included.
        like: the initial hyperparameters.

    Cost: T optimizer steps and one validation loss; compiled at the first call.
    Do not use it to differentiate: `hx.hypergradient(tuned.train.problem, ...)` does.

    >>> tuned.train({"step_size": 0.1}, key=jax.random.key(7)).validation  # doctest: +SKIP
    0.31
    """

    problem: Problem
    dynamics: Optax
    steps: int
    data: TrainingData
    like: Lam

    def __call__(
        self, hyperparameters: PyTree, *, key: Key[Array, ""] | None = None, params: W | None = None
    ) -> Trained:
        """Train anew.

        Arguments:
            hyperparameters: like those that were tuned; a number in place of an array counts for all its entries (a
                constant in place of a schedule).
            key: of other mini-batches and noise; by default those of `Tuned.before` and `after`.
            params: other initial parameters.
        """
        data = self.data if params is None else self.data._replace(params=self._alike(params))
        data = data if key is None else data._replace(key=key)
        w, value, metrics = _run(self.problem, self.dynamics, self.steps, self._fitted(hyperparameters), data)
        return Trained(w, float(value), {name: float(metric) for name, metric in metrics.items()})

    def _fitted(self, hyperparameters: PyTree) -> Lam:
        values = values_of(hyperparameters)
        if jax.tree.structure(values) != jax.tree.structure(self.like):
            raise ValueError(
                f"hyperparameters have the structure {jax.tree.structure(values)}, and those that were tuned "
                f"{jax.tree.structure(self.like)}"
            )

        def fit(path: Any, like: Any, value: Any) -> Any:
            if not eqx.is_array(like):
                return value
            if np.shape(value) not in ((), like.shape):
                raise ValueError(
                    f"{leaf_name('hyperparameters', path)} has shape {list(np.shape(value))}; give a number, or "
                    f"{list(like.shape)} of them"
                )
            return jnp.broadcast_to(jnp.asarray(value, like.dtype), like.shape)

        return jax.tree_util.tree_map_with_path(fit, self.like, values)

    def _alike(self, params: W) -> W:
        shapes = lambda tree: [np.shape(leaf) for leaf in jax.tree.leaves(eqx.filter(tree, eqx.is_array_like))]
        if jax.tree.structure(params) != jax.tree.structure(self.data.params) or shapes(params) != shapes(
            self.data.params
        ):
            raise ValueError("params differ from the initial ones in structure or shape; start from the same model")
        return _on_device(params)


@eqx.filter_jit
def _run(
    problem: Problem, dynamics: Optax, steps: int, h: Lam, data: TrainingData
) -> tuple[W, Scalar, dict[str, Array]]:
    w = rollout(problem, dynamics, steps, h, data)[0].w
    prepared = problem.prepare(h, data)
    return (problem.whole(w, h, prepared), *problem.evaluate(w, h, prepared))


def training(
    training_loss: Callable[..., Scalar],
    validation_loss: Callable[..., Any],
    params: W,
    optimizer: Callable[[Lam], Any],
    like: Lam,
    *,
    steps: int,
    data: PyTree,
    validation_data: PyTree,
    batch_size: int | None,
    key: Key[Array, ""] | None,
    has_metrics: bool,
) -> tuple[Training, bool]:
    """The checked training run, and whether it draws anything at random. Raises `ValueError`: see `tune`."""
    for name, function in (("training_loss", training_loss), ("validation_loss", validation_loss)):
        if not callable(function):
            raise ValueError(f"{name} is {function!r}; use a function of (params, ...)")
    if not callable(optimizer):
        raise ValueError(
            f"optimizer is a {type(optimizer).__name__}; use a function of the hyperparameters that returns an Optax "
            'transformation: lambda h: optax.sgd(h["step_size"])'
        )
    examples, validation = checked_examples("data", data), checked_examples("validation_data", validation_data)
    count = count_examples("data", examples)
    count_examples("validation_data", validation)
    if batch_size is not None:
        check_steps(batch_size, "batch_size", 1)
        if batch_size > count:
            raise ValueError(f"batch_size is {batch_size} and data has {count} examples: use at most {count}, or None")
    noisy = arguments(training_loss) == 4
    if arguments(training_loss) not in (3, 4) or arguments(validation_loss) != 2:
        raise ValueError(
            "use training_loss(params, batch, h) or training_loss(params, batch, h, key), and "
            f"validation_loss(params, data); they take {arguments(training_loss)} and {arguments(validation_loss)} "
            "arguments"
        )
    random = noisy or batch_size is not None
    if random and key is None:
        raise ValueError("mini-batches and noise are drawn from a key: pass key=jax.random.key(seed)")
    if key is not None and not hasattr(key, "dtype"):
        raise ValueError(f"key is {key!r}; pass key=jax.random.key(seed)")
    problem = Problem(
        inner=_Loss(training_loss, noisy),
        outer=_Validation(validation_loss),
        init=_initial,
        prepare=_Batches(count, batch_size, steps),
        batch=_step_data,
        has_metrics=has_metrics,
    )
    start = TrainingData(_on_device(params), examples, validation, jax.random.key(0) if key is None else key)
    return Training(problem, Optax(optimizer), steps, start, like), random


def _on_device(params: W) -> W:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf, params)
