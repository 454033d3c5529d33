"""Softmax regression on cosine similarities as ground model, from the class means by gradient descent."""

from __future__ import annotations

from typing import Any, final

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from hyperax.constraints import Logarithmic
from hyperax.dynamics import GradientDescent
from hyperax.fewshot.layers import Statistics
from hyperax.fewshot.learners.learner import FeatureLearner, OnFeatures
from hyperax.fewshot.learners.similarities import class_means, cosines, normalised
from hyperax.fewshot.networks import Network
from hyperax.fewshot.targets import cross_entropy


@final
class CosineClassifier(FeatureLearner):
    """Few-shot learning with a representation h_lam as hyperparameter and a cosine classifier as ground model.

        logits_c(x) = alpha w_c . h_lam(x) / (|w_c| |h_lam(x)|),
        L^j(w, lam) = mean over D_tr^j of cross_entropy(y, logits(x)),
        w_0 = mean of h_lam(x) / |h_lam(x)| over the images of each class,
        w_t^j = w_{t-1}^j - eta grad_w L^j(w_{t-1}^j, lam)

    The start is the class means (imprinted weights), not 0, where the cosine has no derivative; so T = 0 is a learner
    too, nearest mean by cosine.

    Arguments:
        ways: classes an episode; of episodes with a varying number, the most.
        statistics: where batch normalisation takes its statistics.
        step_size: eta.
        scale: alpha > 0, or its first value with `learn_scale`.
        learn_scale: whether alpha is a hyperparameter too or fixed.

    lam is `{"network": module}`, with `learn_scale` also `"scale"`, to be kept positive by `constraint()`.
    Raises: `ValueError` for a scale that is not positive.
    Cost: h_lam is computed, and differentiated, once an episode; the T inner steps run on features.
    Reference: Gidaris and Komodakis 2018 (cosine classifier, learned scale); Qi et al. 2018 (imprinting);
    Franceschi et al. 2018, eq. 9-10, for the bilevel problem.
    Do not use it where the length of the features says something: it is divided out.

    >>> from hyperax.fewshot import PerImage
    >>> learner, images = CosineClassifier(ways=2), jnp.asarray([[255, 0], [0, 255]], jnp.uint8).reshape(2, 1, 2, 1)
    >>> lam = learner.lam(PerImage(jnp.ravel))
    >>> adapted = learner.adapt(lam, images, jnp.array([0, 1]), steps=5)
    >>> [round(float(p), 4) for p in learner.predict(lam, adapted, images)[0]]
    [1.0, 0.0]
    """

    ways: int
    statistics: Statistics = "set"
    step_size: float = 0.1
    scale: float = 10.0
    learn_scale: bool = True

    def __check_init__(self):
        if not self.scale > 0:
            raise ValueError(f"scale is {self.scale!r}; it must be positive")

    def lam(
        self,
        network: Network,
        image_shape: tuple[int, int, int] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> dict[str, Any]:
        """The initial outer variables around a network."""
        return {"network": network, **({"scale": jnp.asarray(self.scale, jnp.float32)} if self.learn_scale else {})}

    def constraint(self) -> dict[str, Any] | None:
        """What `minimize` has to keep: a positive scale."""
        return {"network": None, "scale": Logarithmic()} if self.learn_scale else None

    @property
    def dynamics(self) -> GradientDescent:
        """Gradient descent with eta."""
        return GradientDescent(self.step_size)

    def init(self, lam: Any, prepared: OnFeatures) -> Float[Array, "ways features"]:
        """w_0: the class means of the normalised features; zero for a class that is not in the task."""
        return class_means(normalised(prepared.support), prepared.support_targets)

    def inner(self, w: Float[Array, "ways features"], lam: Any, prepared: OnFeatures) -> Array:
        """L: the cross-entropy of the support set."""
        return cross_entropy(self._scale(lam) * cosines(prepared.support, w), prepared.support_targets)

    def logits(self, w: Float[Array, "ways features"], lam: Any, prepared: OnFeatures) -> Float[Array, "NQ ways"]:
        """The scaled cosines of the query images."""
        return self._scale(lam) * cosines(prepared.query, w)

    def _scale(self, lam: Any) -> Array | float:
        return lam["scale"] if self.learn_scale else self.scale
