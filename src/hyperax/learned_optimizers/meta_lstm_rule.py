"""The update of Meta-LSTM: the inner variables are the cell state of an LSTM."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from hyperax.dynamics.dynamics import Step
from hyperax.learned_optimizers.coordinatewise import lstm_step
from hyperax.learned_optimizers.preprocessing import log_and_sign
from hyperax.learned_optimizers.update_rule import Inputs, UpdateRule, in_type, like, ravelled
from hyperax.problem import W
from hyperax.rollout import check_steps


class Gate(eqx.Module):
    """One number in (0, 1) for each coordinate: sigma(a . h + b w + c previous + d)."""

    of_hidden: Float[Array, " units"]
    of_w: Float[Array, ""]
    of_previous: Float[Array, ""]
    bias: Float[Array, ""]

    def __call__(self, h: Float[Array, "units d"], w: Float[Array, " d"], previous: Float[Array, " d"]) -> Array:
        """The argument of the sigmoid, [d]."""
        return self.of_hidden @ h + self.of_w * w + self.of_previous * previous + self.bias


class Memory(NamedTuple):
    """State and output of the first layer, and the last gates of the second."""

    h: Float[Array, "units d"]
    c: Float[Array, "units d"]
    f: Float[Array, " d"]
    i: Float[Array, " d"]


class MetaLSTMRule(UpdateRule):
    """An LSTM whose cell state is w and whose candidate is the negative gradient; coordinates share its weights:

        w_t = f_t w_{t-1} - i_t g_t,   so u_t = -(1 - f_t) w_{t-1} - i_t g_t,
        f_t = sigma(a_F . h_t + b_F w_{t-1} + c_F f_{t-1} + d_F),
        i_t = sigma(a_I . h_t + b_I w_{t-1} + c_I i_{t-1} + d_I),
        (h_t, c_t) = LSTM([preprocess(g_t), preprocess(L_t)], h_{t-1}, c_{t-1}),

    with L_t the value of the inner objective at w_{t-1} and preprocess(x) = (log|x| / p, sign x) where |x| >= e^{-p},
    (-1, e^p x) elsewhere. The gate i is a step size for each coordinate, 1 - f a decay of its weight.

    Arguments:
        key: a PRNG key for the weights.
        units: of the first layer, the LSTM.
        step_size: sigma(d_I), about what i is before training; in (0, 1).
        decay: 1 - sigma(d_F), about what 1 - f is before training; in (0, 1).
        p: of the preprocessing; > 0.

    Raises: `ValueError` for numbers outside these ranges.
    Cost: that of `lstm_step` with 4 inputs; memory 2 (units + 1) d numbers, and in a reverse pass as much for each
    step; about 2,100 parameters whatever d is, with the defaults.
    Reference: Ravi and Larochelle 2017, eq. 1-2 and Sec. 3, with the preprocessing of Andrychowicz et al. 2016, App. A.
    In their code d_F and d_I are drawn around 5 and -4.5, so that f is about 0.993 and i about 0.011: the defaults.
    Here f_0 = i_0 = 0.
    Do not use it where a step larger than the gradient itself is needed: i < 1. Nor for long runs before `decay` has
    been learned: half of w is forgotten in log(2) / decay steps.

    >>> rule = MetaLSTMRule(jax.random.key(0))
    >>> w = {"weight": jnp.ones((3, 2)), "bias": jnp.ones(2)}
    >>> inputs = Inputs(w, gradient=w, value=jnp.asarray(0.5))
    >>> update, memory = eqx.filter_jit(rule.update)(inputs, rule.init(w), jnp.asarray(1))
    >>> update["bias"].round(3).tolist(), memory.h.shape
    ([-0.018, -0.018], (20, 8))
    """

    uses_value: ClassVar[bool] = True

    cell: eqx.nn.LSTMCell
    forget: Gate
    take: Gate
    p: float = eqx.field(static=True)

    def __init__(
        self, key: Key[Array, ""], units: int = 20, step_size: float = 0.011, decay: float = 0.007, p: float = 10.0
    ):
        check_steps(units, "units", 1)
        for name, value in (("step_size", step_size), ("decay", decay)):
            if not 0 < value < 1:
                raise ValueError(f"{name} is {value!r}; a gate lies between 0 and 1, without them: 0.01 is usual")
        if not p > 0:
            raise ValueError(f"p is {p!r}; it must be positive, such as 10")
        for_cell, for_forget, for_take = jax.random.split(key, 3)
        self.cell = eqx.nn.LSTMCell(4, units, key=for_cell)
        self.forget, self.take = _gate(for_forget, units, 1 - decay), _gate(for_take, units, step_size)
        self.p = p

    def init(self, w: W) -> Memory:
        """Nothing remembered: zeros."""
        flat, units = ravelled(w), self.cell.hidden_size
        layer, gate = jnp.zeros((units, flat.size), flat.dtype), jnp.zeros(flat.size, flat.dtype)
        return Memory(layer, layer, gate, gate)

    def update(self, inputs: Inputs, memory: Memory, t: Step) -> tuple[W, Memory]:
        """One step of both layers at every coordinate."""
        w, g = ravelled(inputs.w), ravelled(inputs.gradient)
        rule: Any = in_type(self, g.dtype)
        of_value = log_and_sign(jnp.asarray(inputs.value, g.dtype), self.p)
        x = jnp.concatenate([log_and_sign(g, self.p).T, jnp.broadcast_to(of_value[:, None], (2, g.size))])
        h, c = lstm_step(rule.cell, x, (memory.h, memory.c))
        before_f, before_i = rule.forget(h, w, memory.f), rule.take(h, w, memory.i)
        i = jax.nn.sigmoid(before_i)
        # sigma(-x) = 1 - sigma(x), without the rounding of a number near one.
        u = -jax.nn.sigmoid(-before_f) * w - i * g
        return like(inputs.w, u), Memory(h, c, jax.nn.sigmoid(before_f), i)


def _gate(key: Key[Array, ""], units: int, value: float) -> Gate:
    """A gate at about this value, with weights that are small beside its bias."""
    of_hidden, of_w, of_previous = jnp.split(0.01 * jax.random.normal(key, (units + 2,)), [units, units + 1])
    bias = jnp.log(jnp.asarray(value / (1 - value)))
    return Gate(of_hidden, of_w[0], of_previous[0], bias)
