"""A multilayer perceptron at every coordinate, on features of the gradient's past."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from hyperax.dynamics.dynamics import Step
from hyperax.learned_optimizers.preprocessing import log_and_sign, root, time_features
from hyperax.learned_optimizers.update_rule import (
    Inputs,
    UpdateRule,
    in_type,
    like,
    mean_of_leaves,
    ravelled,
    to_coordinates,
)
from hyperax.problem import W
from hyperax.rollout import check_steps


class Averages(NamedTuple):
    """The memory: moving averages of the gradient, a column for each decay, and of its square."""

    gradient: Float[Array, "d decays"]
    square: Float[Array, " d"]


class PerceptronRule(UpdateRule):
    """A small network at every coordinate, which all share, on the gradient and its moving averages:

        m_k <- beta_k m_k + (1 - beta_k) g,   v <- beta v + (1 - beta) g^2,   (direction, size) = MLP(features)
        u = step_scale exp(size_scale size) direction

    Features of a coordinate, with the averages corrected for their start at zero: g and each m_k over sqrt(v); over
    the root mean square of its leaf's coordinates, g, each m_k and w; the log-magnitude and the sign of g; the
    log-magnitude of sqrt(v); and the time at several scales.

    Arguments:
        key: a PRNG key for the weights.
        width: of the hidden layers.
        depth: hidden layers, at least 1.
        decays: beta_k in [0, 1).
        square_decay: beta in [0, 1).
        time_scales: in steps.
        step_scale: > 0, in units of w.
        size_scale: > 0: how fast the size of a step changes with the weights.
        floor: > 0, in units of the gradient (and of w): what is smaller counts as zero before it is divided.

    Raises: `ValueError` for numbers outside these ranges.
    Cost: a step multiplies a [d, features] matrix by the weights, features = 2 decays + 6 + time scales; memory
    (decays + 1) d numbers; parameters about 1,900 whatever d is, with the defaults.
    Reference: in the manner of Metz et al. 2019 and 2020 (the features, the two outputs). Their networks see more
    scales, the later ones the loss and statistics of whole tensors too; here the last layer begins a tenth as large, so
    that the untrained rule hardly moves w.
    Do not use it where the past matters beyond its averages: `LSTMRule` learns what to remember.

    >>> rule = PerceptronRule(jax.random.key(0))
    >>> w = {"weight": jnp.ones((3, 2)), "bias": jnp.ones(2)}
    >>> update, memory = jax.eval_shape(rule.update, Inputs(w, gradient=w), rule.init(w), jnp.asarray(1))
    >>> update["weight"].shape, memory.gradient.shape
    ((3, 2), (8, 3))
    """

    network: eqx.nn.MLP
    decays: tuple[float, ...]
    square_decay: float
    time_scales: tuple[float, ...]
    step_scale: float
    size_scale: float
    floor: float

    def __init__(
        self,
        key: Key[Array, ""],
        width: int = 32,
        depth: int = 2,
        decays: Sequence[float] = (0.5, 0.9, 0.99),
        square_decay: float = 0.99,
        time_scales: Sequence[float] = (1.0, 10.0, 100.0, 1000.0),
        step_scale: float = 0.01,
        size_scale: float = 0.1,
        floor: float = 1e-6,
    ):
        check_steps(width, "width", 1)
        check_steps(depth, "depth", 1)
        if not all(0 <= beta < 1 for beta in (*decays, square_decay)):
            raise ValueError(f"decays are {tuple(decays)} and {square_decay!r}; each must be at least 0 and below 1")
        if not all(x > 0 for x in (*time_scales, step_scale, size_scale, floor)):
            raise ValueError(
                f"time_scales {tuple(time_scales)}, step_scale {step_scale!r}, size_scale {size_scale!r} and floor "
                f"{floor!r} must all be positive"
            )
        features = 2 * len(decays) + 6 + len(time_scales)
        network = eqx.nn.MLP(features, 2, width, depth, key=key)
        self.network = eqx.tree_at(lambda n: n.layers[-1], network, replace_fn=_smaller)
        self.decays, self.square_decay, self.time_scales = tuple(decays), square_decay, tuple(time_scales)
        self.step_scale, self.size_scale, self.floor = step_scale, size_scale, floor

    def init(self, w: W) -> Averages:
        """Averages of nothing: zeros."""
        flat = ravelled(w)
        return Averages(jnp.zeros((flat.size, len(self.decays)), flat.dtype), jnp.zeros_like(flat))

    def update(self, inputs: Inputs, memory: Averages, t: Step) -> tuple[W, Averages]:
        """The averages first, then the network on their features."""
        w, g = ravelled(inputs.w), ravelled(inputs.gradient)
        betas = jnp.asarray(self.decays, g.dtype)
        averages = betas * memory.gradient + (1 - betas) * g[:, None]
        square = self.square_decay * memory.square + (1 - self.square_decay) * g**2
        unbiased = lambda average, beta: (average / (1 - beta**t)).astype(g.dtype)

        gradients = jnp.concatenate([g[:, None], unbiased(averages, betas)], 1)
        size = root(unbiased(square, self.square_decay), self.floor)
        relative = jnp.concatenate([gradients, w[:, None]], 1)
        times = time_features(t, self.time_scales, g.dtype)
        features = [
            gradients / size[:, None],
            relative / root(to_coordinates(inputs.w, mean_of_leaves(inputs.w, relative**2)), self.floor),
            log_and_sign(g),
            log_and_sign(size)[:, :1],
            jnp.broadcast_to(times, (g.size, len(self.time_scales))),
        ]
        output = jax.vmap(in_type(self.network, g.dtype))(jnp.concatenate(features, 1))
        u = self.step_scale * jnp.exp(self.size_scale * output[:, 1]) * output[:, 0]
        return like(inputs.w, u), Averages(averages, square)


def _smaller(layer: eqx.nn.Linear) -> eqx.nn.Linear:
    """The layer with a tenth of its weights."""
    return jax.tree.map(lambda x: x / 10, layer)
