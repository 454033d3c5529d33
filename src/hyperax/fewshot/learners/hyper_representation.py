"""Hyper-representation: a representation shared by all tasks is the hyperparameter of their linear classifiers."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from hyperax.constraints import Positive
from hyperax.dynamics import GradientDescent
from hyperax.fewshot.layers import Statistics
from hyperax.fewshot.learners.learner import FeatureLearner, OnFeatures
from hyperax.fewshot.networks import Network
from hyperax.fewshot.targets import cross_entropy


class Classifier(NamedTuple):
    """The inner variables w: multinomial logistic regression on features."""

    # A row a class: on a CPU, products of so few rows are fastest along contiguous features.
    weight: Float[Array, "ways features"]
    bias: Float[Array, " ways"]

    def __call__(self, features: Float[Array, "images features"]) -> Float[Array, "images ways"]:
        """Logits."""
        # Not `features @ weight.T`: a reverse pass would keep a transposed copy of the weights of every inner step.
        return jnp.einsum("if,wf->iw", features, self.weight) + self.bias


class HyperRepresentation(FeatureLearner):
    """Few-shot learning with a representation h_lam as hyperparameter and softmax regression as ground model.

        L^j(w, lam) = mean over D_tr^j of cross_entropy(y, w . h_lam(x)),   w_0^j = 0,
        w_t^j = w_{t-1}^j - eta grad_w L^j(w_{t-1}^j, lam),
        f_T(lam) = (1 / N) sum over j of the same loss on D_val^j at w_T^j

    Arguments:
        ways: classes an episode; of episodes with a varying number, the most.
        statistics: where batch normalisation takes its statistics; "set" as in the papers (transductive over the
            query set).
        step_size: eta, the inner step size, or its initial value with `learn_step_size`.
        learn_step_size: whether eta > 0 is a hyperparameter too (the Bridge paper) or fixed (ICML).

    lam is `{"network": module}`, with `learn_step_size` also `"step_size"`, to be kept positive by `constraint()`.
    Raises: `ValueError` for statistics that do not exist, when features are computed; `hypergradient` and `accuracies`
    what the dynamics and the method raise.
    Cost: h_lam is computed, and differentiated, once an episode; the T inner steps run on features, so time hardly
    depends on T.
    Reference: Franceschi et al. 2018, Sec. 4, eq. 9-10, Algorithm 1; Bridge paper 2017, Sec. 4. With `FirstOrder` it is
    their Approx, with query sets that are the support sets (`Episodes(held_out=False)`) their -train variants.
    Do not use it where tasks need other features: the representation stays fixed while a task is learned.

    >>> from hyperax.fewshot import PerImage
    >>> learner = HyperRepresentation(ways=5, step_size=0.1, learn_step_size=True)
    >>> lam = learner.lam(PerImage(jnp.ravel))
    >>> sorted(lam), float(lam["step_size"])
    (['network', 'step_size'], 0.1)
    """

    ways: int
    statistics: Statistics = "set"
    step_size: float = 0.1
    learn_step_size: bool = False

    def lam(
        self,
        network: Network,
        image_shape: tuple[int, int, int] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> dict[str, Any]:
        """The initial outer variables around a network."""
        lam: dict[str, Any] = {"network": network}
        if self.learn_step_size:
            lam["step_size"] = jnp.asarray(self.step_size, jnp.float32)
        return lam

    def constraint(self) -> dict[str, Any] | None:
        """What `minimize` has to keep: a positive step size."""
        return {"network": None, "step_size": Positive()} if self.learn_step_size else None

    @property
    def dynamics(self) -> GradientDescent:
        """Gradient descent with eta, fixed or from lam."""
        return GradientDescent((lambda lam: lam["step_size"]) if self.learn_step_size else self.step_size)

    def init(self, lam: Any, prepared: OnFeatures) -> Classifier:
        """w_0 = 0."""
        size, dtype = prepared.support.shape[1], prepared.support.dtype
        return Classifier(jnp.zeros((self.ways, size), dtype), jnp.zeros(self.ways, dtype))

    def inner(self, w: Classifier, lam: Any, prepared: OnFeatures) -> Array:
        """L: the cross-entropy of the support set."""
        return cross_entropy(w(prepared.support), prepared.support_targets)

    def logits(self, w: Classifier, lam: Any, prepared: OnFeatures) -> Float[Array, "NQ ways"]:
        """The product w . h_lam(x) for the query images."""
        return w(prepared.query)
