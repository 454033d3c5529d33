"""The hierarchical recurrent optimizer: a network for each parameter, for each tensor, and for all."""

from __future__ import annotations

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from hyperax.dynamics.dynamics import Step
from hyperax.learned_optimizers.preprocessing import root
from hyperax.learned_optimizers.update_rule import (
    Inputs,
    UpdateRule,
    in_type,
    leaf_sizes,
    like,
    mean_of_leaves,
    random_matrix,
    ravelled,
    to_coordinates,
)
from hyperax.problem import W
from hyperax.rollout import check_steps

# In units of the gradient: a mean square below its square counts as this one, before its root divides or its logarithm
# is taken. 1e-8 in the published code; larger here, for derivatives of the root through steps with zero gradients.
FLOOR = 1e-6

# Log step sizes are kept within these: e^-33 is the published limit below, steps of size e^2 are of no use.
LOWEST, HIGHEST = -33.0, 2.0


class Memory(NamedTuple):
    """What the optimizer remembers.

    Fields:
        parameters, tensors, whole: the hidden states of the three levels.
        averages, squares: of the gradient, and of the square of those averages, at each time scale.
        decays: the logits of the decays of the next step: of the averages, and of the squares.
        log_step: the running average of the log step sizes.
    """

    parameters: Float[Array, "d units"]
    tensors: Float[Array, "leaves tensor_units"]
    whole: Float[Array, " global_units"]
    averages: Float[Array, "d scales"]
    squares: Float[Array, "d scales"]
    decays: Float[Array, "d 2"]
    log_step: Float[Array, " d"]


class HierarchicalRule(UpdateRule):
    """A recurrent network for each coordinate, led by one for each tensor (leaf of w), and that by one for all of w:

        h = GRU(x, h; A k + B G),   k = GRU((mean h, mean x), k; C G),   G = GRU(mean k, G)      (A, B, C: gate biases)
        u = -exp(eta) r / rms(r),   r = a^T m + d^T h,   eta = eta_bar + s^T h,   eta_bar <- mu eta_bar + (1 - mu) eta

    The inputs x of a coordinate: averages of the gradient at scales s = 0, 1, ..., over the roots of their running mean
    squares, m_s = g_s / sqrt(v_s); how log v_s differs from its mean over s; and how eta_bar differs from its mean
    over the tensor. The average s has the decay b^(2^-s), so twice the length of the one before. b, and the decay
    of the mean squares, are sigmoids of readouts of the last h; the mean of r^2 is over the tensor.

    Arguments:
        key: a PRNG key for the weights.
        units, tensor_units, global_units: of the three GRUs.
        scales: of the averages of the gradient, at least 1.
        step_size: exp(eta_bar) at first, in units of w.

    Raises: `ValueError` for numbers of units or scales below 1, or a step size that is not positive.
    Cost: a step multiplies a [d, 2 scales + 1] and a [d, units] matrix by the weights, and a small one for each tensor;
    memory (units + 2 scales + 3) d numbers; parameters about 5,800 whatever d is, with the defaults.
    Reference: Wichrowska et al. 2017, Sec. 3 and App. Left out: the gradient at an attended location (Nesterov-like);
    the initial step size drawn at random (it is learned here). The untrained rule descends along normalised averages:
    a begins at 1 / scales (the gradient shortcut of the published code), d at a tenth of its published size, s at 0.
    Do not use it for tensors of one coordinate or where steps must become small by themselves: |u| is exp(eta) on the
    average over a tensor, however small the gradient is, until the rule learns to lower eta.

    >>> rule = HierarchicalRule(jax.random.key(0))
    >>> w = {"weight": jnp.ones((3, 2)), "bias": jnp.ones(2)}
    >>> update, memory = jax.eval_shape(rule.update, Inputs(w, gradient=w), rule.init(w), jnp.asarray(1))
    >>> update["weight"].shape, memory.parameters.shape, memory.tensors.shape
    ((3, 2), (8, 10), (2, 20))
    """

    parameter_cell: eqx.nn.GRUCell
    tensor_cell: eqx.nn.GRUCell
    global_cell: eqx.nn.GRUCell
    tensor_to_parameters: Float[Array, "gates tensor_units"]
    global_to_parameters: Float[Array, "gates global_units"]
    global_to_tensors: Float[Array, "tensor_gates global_units"]
    start: tuple[Float[Array, " units"], Float[Array, " tensor_units"], Float[Array, " global_units"]]
    shortcut: Float[Array, " scales"]
    direction: Float[Array, " units"]
    decays: Float[Array, "2 units"]
    decay_logits: Float[Array, " 2"]
    step_change: Float[Array, " units"]
    log_step: Float[Array, ""]
    step_momentum_logit: Float[Array, ""]

    def __init__(
        self,
        key: Key[Array, ""],
        units: int = 10,
        tensor_units: int = 20,
        global_units: int = 20,
        scales: int = 4,
        step_size: float = 0.01,
    ):
        for name, count in (("units", units), ("tensor_units", tensor_units), ("global_units", global_units)):
            check_steps(count, name, 1)
        check_steps(scales, "scales", 1)
        if not step_size > 0:
            raise ValueError(f"step_size is {step_size!r}; it is learned as a logarithm, so start from a positive one")
        keys = jax.random.split(key, 9)
        features = 2 * scales + 1
        self.parameter_cell = eqx.nn.GRUCell(features, units, key=keys[0])
        self.tensor_cell = eqx.nn.GRUCell(units + features, tensor_units, key=keys[1])
        self.global_cell = eqx.nn.GRUCell(tensor_units, global_units, key=keys[2])
        self.tensor_to_parameters = random_matrix(keys[3], 3 * units, tensor_units, 0.5)
        self.global_to_parameters = random_matrix(keys[4], 3 * units, global_units, 0.5)
        self.global_to_tensors = random_matrix(keys[5], 3 * tensor_units, global_units, 0.5)
        self.start = (jnp.zeros(units), jnp.zeros(tensor_units), jnp.zeros(global_units))
        self.shortcut = jnp.full(scales, 1 / scales)
        self.direction = random_matrix(keys[6], 1, units, 0.05)[0]
        self.decays = random_matrix(keys[7], 2, units, 0.5)
        self.decay_logits = jnp.asarray([2.2, 3.2])  # the published ones: decays of 0.90 and 0.96
        self.step_change = jnp.zeros(units)
        self.log_step = jnp.log(jnp.asarray(step_size, jnp.result_type(float)))
        self.step_momentum_logit = jnp.asarray(3.2)

    def init(self, w: W) -> Memory:
        """The learned first states for all, averages of nothing."""
        flat = ravelled(w)
        rule = in_type(self, flat.dtype)
        each = lambda x, count: jnp.broadcast_to(x, (count, *x.shape))
        zeros = jnp.zeros((flat.size, len(self.shortcut)), flat.dtype)
        return Memory(
            parameters=each(rule.start[0], flat.size),
            tensors=each(rule.start[1], len(leaf_sizes(w))),
            whole=rule.start[2],
            averages=zeros,
            squares=zeros,
            decays=each(rule.decay_logits, flat.size),
            log_step=each(rule.log_step, flat.size),
        )

    def update(self, inputs: Inputs, memory: Memory, t: Step) -> tuple[W, Memory]:
        """The averages, the three networks from the lowest up, the step."""
        w, g = inputs.w, ravelled(inputs.gradient)
        rule = in_type(self, g.dtype)
        over_tensor = lambda x: to_coordinates(w, mean_of_leaves(w, x))

        lengths = 2.0 ** jnp.arange(len(self.shortcut), dtype=g.dtype)
        of_average = jax.nn.sigmoid(memory.decays[:, :1]) ** (1 / lengths)
        of_square = jax.nn.sigmoid(memory.decays[:, 1:])
        averages = of_average * memory.averages + (1 - of_average) * g[:, None]
        squares = of_square * memory.squares + (1 - of_square) * averages**2
        size = root(squares, FLOOR)
        m, log_size = averages / size, 2 * jnp.log(size)
        log_step = memory.log_step[:, None]
        relative = log_size - jnp.mean(log_size, 1, keepdims=True)
        x = jnp.concatenate([m, relative, log_step - over_tensor(log_step)], 1)

        biases = to_coordinates(w, memory.tensors @ rule.tensor_to_parameters.T)
        h = _gru(rule.parameter_cell, x, memory.parameters, biases + rule.global_to_parameters @ memory.whole)
        summary = mean_of_leaves(w, jnp.concatenate([h, x], 1))
        biases = jnp.broadcast_to(rule.global_to_tensors @ memory.whole, (len(summary), len(rule.global_to_tensors)))
        k = _gru(rule.tensor_cell, summary, memory.tensors, biases)
        whole = rule.global_cell(jnp.mean(k, 0), memory.whole)

        r = m @ rule.shortcut + h @ rule.direction
        r = r / root(over_tensor(r[:, None] ** 2)[:, 0], FLOOR)
        eta = jnp.clip(memory.log_step + h @ rule.step_change, LOWEST, HIGHEST)
        mu = jax.nn.sigmoid(rule.step_momentum_logit)
        following = Memory(
            parameters=h,
            tensors=k,
            whole=whole,
            averages=averages,
            squares=squares,
            decays=h @ rule.decays.T + rule.decay_logits,
            log_step=mu * memory.log_step + (1 - mu) * eta,
        )
        return like(w, -jnp.exp(eta) * r), following


def _gru(cell: eqx.nn.GRUCell, x: Array, state: Array, biases: Array) -> Array:
    """The next states of many cells with the same weights, each with a bias of its own at the gates."""
    shifted = lambda bias: eqx.tree_at(lambda cell: cell.bias, cell, cell.bias + bias)
    return jax.vmap(lambda x, state, bias: shifted(bias)(x, state))(x, state, biases)
