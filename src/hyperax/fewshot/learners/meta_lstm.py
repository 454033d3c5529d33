"""Meta-LSTM: where the parameters of a network start and how they are updated are learned together."""

from __future__ import annotations

from typing import Any

import equinox as eqx

from hyperax.fewshot.learners.initialisation import Initialisation
from hyperax.learned_optimizers.meta_lstm_rule import MetaLSTMRule
from hyperax.methods import FirstOrder, Reverse


def meta_lstm(
    ways: int,
    step_size: float = 0.011,
    decay: float = 0.007,
    units: int = 20,
    first_order: bool = True,
    **settings: Any,
) -> Initialisation:
    """Meta-LSTM: the update of an LSTM whose cell state are the parameters of the network, from a learned start.

        w_0 = lam_0,   w_t = f_t w_{t-1} - i_t grad L(w_{t-1}),   (f_t, i_t) = gates(grad L, L, w_{t-1}; lam_rule)

    Arguments:
        ways: classes an episode.
        step_size: what the gates i are before training, about.
        decay: what 1 - f is before training, about.
        units: of the LSTM before the gates; 20 in the paper.
        first_order: as in the paper, the gradients and values of L that enter the gates and the update are constants of
            the derivative; start and rule have one all the same. `False`: exact.
        settings: other arguments of `Initialisation`.

    lam is that of `Initialisation` and `"rule"`, for which `lam` needs a `key`. In the paper T is about ten.
    Returns: the learner, an `Initialisation`.
    Cost: beside the inner run, some thousand multiplications a step for each adapted parameter, and in training the
    memory of about 2 units numbers for each step and parameter: on a CPU use few filters, or adapt a part (`adapted`).
    Reference: Ravi and Larochelle 2017, Sec. 3. There the head's start is learned too (head="learned"), and batch
    normalisation takes statistics that are kept over the images of an episode in training, of all episodes in the test;
    here of the images at hand ("set").
    Do not use it with a T far from that of training: the rule has learned to be at its best after T steps.

    >>> meta_lstm(5).method(3), meta_lstm(5, first_order=False).method(3)
    (FirstOrder(steps=3), Reverse(steps=3))
    """
    rule = eqx.Partial(MetaLSTMRule, units=units, step_size=step_size, decay=decay)
    settings = {"differentiated_by": FirstOrder if first_order else Reverse} | settings
    return Initialisation(ways, rule=rule, **settings)
