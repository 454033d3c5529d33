"""What was learned: how strongly an image pulls at its logits, by how likely the model finds its label."""

from __future__ import annotations

from collections.abc import Mapping

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from hyperax.experiments.figures import BLUE, GREEN, GREY, RED, legend, new_figure, style
from hyperax.experiments.study import Shown
from hyperax.fewshot.learners.losses import GroundLoss
from hyperax.fewshot.targets import Targets

PROBABILITIES = np.linspace(0.005, 0.995, 100)


def slope(loss: GroundLoss, ways: int) -> np.ndarray:
    """-dl / dz_y at each of `PROBABILITIES` of the label, the other classes being equally likely.

    >>> from hyperax.fewshot.learners.losses import CrossEntropy
    >>> bool(np.allclose(slope(CrossEntropy(), 5), 1 - PROBABILITIES, atol=1e-5))
    True
    """
    p = jnp.asarray(PROBABILITIES, jnp.float32)[:, None]
    logits = jnp.concatenate([jnp.log(p), jnp.broadcast_to(jnp.log((1 - p) / (ways - 1)), (len(p), ways - 1))], 1)
    targets = Targets(jax.nn.one_hot(jnp.zeros(len(p), jnp.int32), ways))
    summed = lambda logits: jnp.sum(loss.per_image(logits, targets))
    return -np.asarray(eqx.filter_jit(jax.grad(summed))(logits))[:, 0]


def slopes_figure(slopes: Mapping[str, Mapping[str, np.ndarray]]) -> Shown:
    """A panel a setting.

    Arguments:
        slopes: setting, in words -> entrant -> `slope` of its loss.
    """
    figure = new_figure(3.2)
    panels = figure.subplots(1, len(slopes), squeeze=False)[0]
    for panel, (setting, curves) in zip(panels, slopes.items(), strict=True):
        panel.plot(PROBABILITIES, 1 - PROBABILITIES, color=GREY, linewidth=1.4, label="cross-entropy")
        for (name, values), color in zip(curves.items(), (BLUE, RED, GREEN), strict=False):
            panel.plot(PROBABILITIES, values, color=color, linewidth=1.6, label=name)
        style(panel, "probability of the label", r"$-\partial \ell / \partial z_y$")
        panel.set_title(setting, loc="left", fontsize=9)
        legend(panel, "best")
    caption = (
        "<strong>How an image pulls at its logits</strong>, against the probability that the model gives its label. "
        "Cross-entropy is pulled most by the labels that look wrong; a loss that has learned to distrust labels is not."
    )
    return Shown("slopes", figure, "derivative of the learned losses", caption)
