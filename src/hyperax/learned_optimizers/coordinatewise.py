"""One LSTM at many coordinates at once."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

State = tuple[Float[Array, "units d"], Float[Array, "units d"]]
"""(h, c) of all coordinates."""


def lstm_step(cell: eqx.nn.LSTMCell, x: Float[Array, "inputs d"], state: State) -> State:
    """The next state of an LSTM that all coordinates share, each with an input and a state of its own.

        c' = sigmoid(f) c + sigmoid(i) tanh(g),   h' = sigmoid(o) tanh(c'),   (i, f, g, o) = W x + V h + b

    Arguments:
        cell: W, V and b, with a bias.
        x: the inputs, coordinates last.
        state: (h, c), coordinates last.

    Returns: (h', c').
    Cost: 4 units (inputs + units) d multiplications. In a reverse pass the gates are computed again: what is kept of
    a step is x and the state, (inputs + 2 units) d numbers. With coordinates last, all rows that are read are
    contiguous.
    Do not use it for a single coordinate, where the cell itself does.

    >>> cell, d = eqx.nn.LSTMCell(2, 5, key=jax.random.key(0)), 3
    >>> h, c = lstm_step(cell, jnp.ones((2, d)), (jnp.zeros((5, d)), jnp.zeros((5, d))))
    >>> bool(jnp.allclose(h[:, 0], cell(jnp.ones(2), (jnp.zeros(5), jnp.zeros(5)))[0], rtol=1e-5))
    True
    """
    return _step(cell.weight_ih, cell.weight_hh, cell.bias, x, *state)


@jax.checkpoint
def _step(of_input: Array, of_state: Array, bias: Array, x: Array, h: Array, c: Array) -> State:
    i, f, g, o = jnp.split(of_input @ x + of_state @ h + bias[:, None], 4)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c
