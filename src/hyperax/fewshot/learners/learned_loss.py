"""Learned ground losses: what the classifier of a task minimises is the hyperparameter, beside its representation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from hyperax.constraints import Positive
from hyperax.dynamics import GradientDescent
from hyperax.fewshot.episodes import Episode
from hyperax.fewshot.layers import Statistics
from hyperax.fewshot.learners.hyper_representation import Classifier
from hyperax.fewshot.learners.learner import FeatureLearner
from hyperax.fewshot.learners.losses import CrossEntropy, GroundLoss
from hyperax.fewshot.learners.regularisers import TowardsClassMeans
from hyperax.fewshot.learners.similarities import class_means, features_like
from hyperax.fewshot.networks import Network
from hyperax.fewshot.targets import Targets


class WithClassMeans(NamedTuple):
    """An episode seen through a representation, and the class means of its support set where they are needed."""

    support: Float[Array, "NK features"]
    support_targets: Targets
    query: Float[Array, "NQ features"]
    query_targets: Targets
    means: Float[Array, "ways features"] | None


def _cross_entropy(key: Key[Array, ""] | None) -> GroundLoss:
    """The loss that is none of lam's."""
    return CrossEntropy()


@final
class LearnedLoss(FeatureLearner):
    """Few-shot learning with a representation and a ground loss as hyperparameters, and softmax regression.

        L^j(w, lam) = mean over D_tr^j of l_lam(w . h_lam(x), y) + R_lam(w),   w_0^j = 0,
        w_t^j = w_{t-1}^j - eta grad_w L^j(w_{t-1}^j, lam),
        f_T(lam) = (1 / N) sum over j of cross_entropy on D_val^j at w_T^j

    The outer objective stays cross-entropy on the queries: it says what the learned inner objective is good for.

    Arguments:
        ways: classes an episode; of episodes with a varying number, the most.
        statistics: where batch normalisation takes its statistics.
        loss: key -> the first l_lam, for instance `NetworkLoss`, or `lambda key: ParametricCrossEntropy()`.
        regulariser: number of features -> the first R_lam, for instance `TowardsClassMeans`; `None`: there is none.
        step_size: eta, or its initial value with `learn_step_size`.
        learn_step_size: whether eta > 0 is a hyperparameter too.

    lam is `{"network": module, "loss": l_lam}`, with a regulariser also `"regulariser"`, and `"step_size"`, to be kept
    in their sets by `constraint()`. Where l_lam and R_lam start as cross-entropy and 0, the learner starts as
    `HyperRepresentation`.
    Raises: `ValueError` in `lam` if the regulariser needs `image_shape`, or the loss a key, and there is none.
    Cost: as `HyperRepresentation`, and T times what the loss costs on N K logits.
    Reference: Bridge paper 2017, Sec. 3, "learning ground loss functions".
    Do not use it with T = 1 and a loss alone: at w_0 = 0 all logits are alike, so the derivative of a loss that treats
    classes alike has one value at the target and one at the other classes. w_1 is then that of cross-entropy with
    another step size: `HyperRepresentation(learn_step_size=True)` learns that with one number.

    >>> from hyperax.fewshot import PerImage
    >>> from hyperax.fewshot.learners.losses import ParametricCrossEntropy
    >>> learner = LearnedLoss(2, loss=lambda key: ParametricCrossEntropy(), regulariser=TowardsClassMeans)
    >>> lam = learner.lam(PerImage(jnp.ravel), image_shape=(1, 2, 1))
    >>> sorted(lam), float(lam["loss"].temperature)
    (['loss', 'network', 'regulariser'], 1.0)
    >>> images = jnp.asarray([[255, 0], [0, 255]], jnp.uint8).reshape(2, 1, 2, 1)
    >>> adapted = learner.adapt(lam, images, jnp.array([0, 1]), steps=5)
    >>> learner.predict(lam, adapted, images).argmax(-1).tolist()
    [0, 1]
    """

    ways: int
    statistics: Statistics = "set"
    loss: Callable[[Key[Array, ""] | None], GroundLoss] = _cross_entropy
    regulariser: Callable[[int], TowardsClassMeans] | None = None
    step_size: float = 0.1
    learn_step_size: bool = False

    def lam(
        self,
        network: Network,
        image_shape: tuple[int, int, int] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> dict[str, Any]:
        """The initial outer variables around a network."""
        lam: dict[str, Any] = {"network": network, "loss": self.loss(key)}
        if self.regulariser is not None:
            size = features_like(network, image_shape, "LearnedLoss", "its regulariser").shape[1]
            lam["regulariser"] = self.regulariser(size)
        if self.learn_step_size:
            lam["step_size"] = jnp.asarray(self.step_size, jnp.float32)
        return lam

    def constraint(self) -> dict[str, Any]:
        """What `minimize` has to keep: the sets of the loss and the regulariser, a positive step size."""
        # Which sets there are depends neither on the key nor on the number of features.
        sets: dict[str, Any] = {"network": None, "loss": self.loss(jax.random.key(0)).constraint()}
        if self.regulariser is not None:
            sets["regulariser"] = self.regulariser(1).constraint()
        return sets | ({"step_size": Positive()} if self.learn_step_size else {})

    @property
    def dynamics(self) -> GradientDescent:
        """Gradient descent with eta, fixed or from lam."""
        return GradientDescent((lambda lam: lam["step_size"]) if self.learn_step_size else self.step_size)

    def prepare(self, lam: Any, episode: Episode) -> WithClassMeans:
        """h_lam(x) of support and query images, and what the regulariser needs of them."""
        seen = super().prepare(lam, episode)
        means = None if self.regulariser is None else class_means(seen.support, seen.support_targets)
        return WithClassMeans(seen.support, seen.support_targets, seen.query, seen.query_targets, means)

    def init(self, lam: Any, prepared: WithClassMeans) -> Classifier:
        """w_0 = 0."""
        size, dtype = prepared.support.shape[1], prepared.support.dtype
        return Classifier(jnp.zeros((self.ways, size), dtype), jnp.zeros(self.ways, dtype))

    def inner(self, w: Classifier, lam: Any, prepared: WithClassMeans) -> Array:
        """L: the learned loss of the support set, and the learned regulariser."""
        value = lam["loss"](w(prepared.support), prepared.support_targets)
        return value if prepared.means is None else value + lam["regulariser"](w.weight, prepared.means)

    def logits(self, w: Classifier, lam: Any, prepared: WithClassMeans) -> Float[Array, "NQ ways"]:
        """The product w . h_lam(x) for the query images."""
        return w(prepared.query)
