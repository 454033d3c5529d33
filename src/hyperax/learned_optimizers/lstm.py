"""The coordinatewise LSTM optimizer."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from hyperax.dynamics.dynamics import Step
from hyperax.learned_optimizers.coordinatewise import State, lstm_step
from hyperax.learned_optimizers.preprocessing import log_and_sign
from hyperax.learned_optimizers.update_rule import Inputs, UpdateRule, in_type, like, random_matrix, ravelled
from hyperax.problem import W
from hyperax.rollout import check_steps

Memory = tuple[State, ...]
"""(h, c) of each layer, [units, d] each."""


class LSTMRule(UpdateRule):
    """A small LSTM that sees the gradient of one coordinate and moves it; all coordinates share its weights:

        (h_t, c_t) = LSTM(x_t, h_{t-1}, c_{t-1}),   x_t = preprocess(g_t),   u_t = output_scale (a^T h_t + b)

    with x_t = (log|g| / p, sign g) where |g| >= e^{-p} and (-1, e^p g) elsewhere, coordinate by coordinate.

    Arguments:
        key: a PRNG key for the weights.
        units: of each layer.
        layers: at least 1.
        p: of the preprocessing; > 0.
        output_scale: > 0, in units of w.

    Raises: `ValueError` for numbers outside these ranges.
    Cost: `lstm_step` for each layer; memory 2 layers units d numbers, and in a reverse pass as much for each step;
    parameters about 5,300 whatever d is, with the defaults.
    Reference: Andrychowicz et al. 2016, Sec. 2.1 and App. A. There the derivative of the gradients is dropped, which
    is `FirstOrder`, or `first_order` of `MetaTraining`; with `Reverse` it is kept. Published weights begin at random
    sizes; here a, b are a tenth of that, so that the untrained rule hardly moves w, and a forget gate begins near one.
    Do not use it where coordinates must know of each other: it cannot tell a step along a valley from one across.

    >>> rule = LSTMRule(jax.random.key(0))
    >>> w = {"weight": jnp.ones((3, 2)), "bias": jnp.ones(2)}
    >>> update, memory = jax.eval_shape(rule.update, Inputs(w, gradient=w), rule.init(w), jnp.asarray(1))
    >>> update["weight"].shape, memory[0][0].shape
    ((3, 2), (20, 8))
    """

    cells: tuple[eqx.nn.LSTMCell, ...]
    weight: Float[Array, "1 units"]
    bias: Float[Array, ""]
    p: float
    output_scale: float

    def __init__(
        self, key: Key[Array, ""], units: int = 20, layers: int = 2, p: float = 10.0, output_scale: float = 0.1
    ):
        check_steps(units, "units", 1)
        check_steps(layers, "layers", 1)
        if not (p > 0 and output_scale > 0):
            raise ValueError(f"p is {p!r} and output_scale {output_scale!r}; both must be positive, such as 10 and 0.1")
        first, *keys = jax.random.split(key, layers + 1)
        sizes = (2, *(units,) * (layers - 1))
        self.cells = tuple(_remembering(eqx.nn.LSTMCell(n, units, key=k)) for n, k in zip(sizes, keys, strict=True))
        self.weight = random_matrix(first, 1, units, 0.1)
        self.bias = jnp.zeros(())
        self.p, self.output_scale = p, output_scale

    def init(self, w: W) -> Memory:
        """Nothing remembered: zeros."""
        flat = ravelled(w)
        zeros = lambda cell: jnp.zeros((cell.hidden_size, flat.size), flat.dtype)
        return tuple((zeros(cell), zeros(cell)) for cell in self.cells)

    def update(self, inputs: Inputs, memory: Memory, t: Step) -> tuple[W, Memory]:
        """One step of the LSTM at every coordinate."""
        g = ravelled(inputs.gradient)
        rule = in_type(self, g.dtype)
        x, following = log_and_sign(g, self.p).T, []
        for cell, state in zip(rule.cells, memory, strict=True):
            state = lstm_step(cell, x, state)
            x = state[0]
            following.append(state)
        u = self.output_scale * (rule.weight[0] @ x + rule.bias)
        return like(inputs.w, u), tuple(following)


def _remembering(cell: eqx.nn.LSTMCell) -> eqx.nn.LSTMCell:
    """The cell with one added to the bias of its forget gate: gradients of long runs come through from the start."""
    forget = jnp.repeat(jnp.asarray([0.0, 1.0, 0.0, 0.0]), cell.hidden_size)
    return eqx.tree_at(lambda cell: cell.bias, cell, replace_fn=lambda bias: bias + forget)
