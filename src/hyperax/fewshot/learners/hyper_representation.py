"""Hyper-representation: a representation shared by all tasks is the hyperparameter of their linear classifiers."""

from __future__ import annotations

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hyperax.constraints import Positive
from hyperax.dynamics import GradientDescent
from hyperax.fewshot.episodes import Episode
from hyperax.fewshot.layers import Statistics
from hyperax.fewshot.networks import Network, encode
from hyperax.methods import Method, hypergradient
from hyperax.methods.hypergradient import HypergradientFunction
from hyperax.problem import Problem
from hyperax.rollout import rollout


class Prepared(NamedTuple):
    """An episode seen through the representation: all that the ground classifier needs of it."""

    support: Float[Array, "NK features"]
    support_targets: Float[Array, "NK ways"]
    query: Float[Array, "NQ features"]
    query_labels: Int[Array, " NQ"]


class Classifier(NamedTuple):
    """The inner variables w: multinomial logistic regression on features."""

    # A row a class: on a CPU, products of so few rows are fastest along contiguous features.
    weight: Float[Array, "ways features"]
    bias: Float[Array, " ways"]

    def __call__(self, features: Float[Array, "images features"]) -> Float[Array, "images ways"]:
        """Logits."""
        # Not `features @ weight.T`: a reverse pass would keep a transposed copy of the weights of every inner step.
        return jnp.einsum("if,wf->iw", features, self.weight) + self.bias


class HyperRepresentation(eqx.Module):
    """Few-shot learning with a representation h_lam as hyperparameter and softmax regression as ground model.

        L^j(w, lam) = mean over D_tr^j of cross_entropy(y, w . h_lam(x)),   w_0^j = 0,
        w_t^j = w_{t-1}^j - eta grad_w L^j(w_{t-1}^j, lam),
        f_T(lam) = (1 / N) sum over j of the same loss on D_val^j at w_T^j

    Arguments:
        ways: classes an episode.
        statistics: where batch normalisation takes its statistics; "set" as in the papers (transductive over the
            query set).
        step_size: eta, the inner step size, or its initial value with `learn_step_size`.
        learn_step_size: whether eta > 0 is a hyperparameter too (the Bridge paper) or fixed (ICML).

    lam is `{"network": module}`, with `learn_step_size` also `"step_size"`, to be kept positive by `constraint()`.
    Raises: `ValueError` for statistics that do not exist, when features are computed; `hypergradient` and `accuracies`
    what the dynamics and the method raise.
    Cost: h_lam is computed, and differentiated, once an episode; the T inner steps run on features, so time hardly
    depends on T.
    Reference: Franceschi et al. 2018, Sec. 4, eq. 9-10, Algorithm 1; Bridge paper 2017, Sec. 4.
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

    def lam(self, network: Network) -> dict[str, Any]:
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

    @property
    def problem(self) -> Problem:
        """The bilevel problem of one episode."""
        return Problem(self._inner, self._outer, self._init, prepare=self._prepare, has_metrics=True)

    def hypergradient(self, method: Method) -> HypergradientFunction:
        """The hypergradient of one episode; take `mean_over_tasks` of it."""
        return hypergradient(self.problem, self.dynamics, method)

    def accuracies(self, lam: Any, episode: Episode, steps: int) -> Float[Array, " steps"]:
        """Accuracy on the query set after t = 1, ..., `steps` inner steps: what T is validated by (ICML Fig. 6)."""
        prepared = self._prepare(lam, episode)
        on_features = Problem(self._inner, self._outer, self._init, has_metrics=True)
        observe = lambda w: jnp.mean(jnp.argmax(w(prepared.query), -1) == prepared.query_labels)
        return rollout(on_features, self.dynamics, steps, lam, prepared, observe=observe)[1]

    def _prepare(self, lam: Any, episode: Episode) -> Prepared:
        support, query = (images.astype(jnp.float32) / 255 for images in (episode.support, episode.query))
        support, query = encode(lam["network"], support, query, self.statistics)
        targets = jax.nn.one_hot(episode.support_labels, self.ways, dtype=support.dtype)
        return Prepared(support, targets, query, episode.query_labels)

    def _init(self, lam: Any, prepared: Prepared) -> Classifier:
        size, dtype = prepared.support.shape[1], prepared.support.dtype
        return Classifier(jnp.zeros((self.ways, size), dtype), jnp.zeros(self.ways, dtype))

    def _inner(self, w: Classifier, lam: Any, prepared: Prepared) -> Array:
        return _cross_entropy(w(prepared.support), prepared.support_targets)

    def _outer(self, w: Classifier, lam: Any, prepared: Prepared) -> tuple[Array, dict[str, Array]]:
        logits = w(prepared.query)
        accuracy = jnp.mean(jnp.argmax(logits, -1) == prepared.query_labels)
        targets = jax.nn.one_hot(prepared.query_labels, self.ways, dtype=logits.dtype)
        return _cross_entropy(logits, targets), {"accuracy": accuracy}


def _cross_entropy(logits: Float[Array, "images ways"], targets: Float[Array, "images ways"]) -> Array:
    # Written out because this is the inner loop: the general log-sum-exp, which guards against infinite logits, and
    # the indexing by labels take most of the time of an inner step on a CPU.
    largest = jax.lax.stop_gradient(jnp.max(logits, -1, keepdims=True))
    normaliser = largest + jnp.log(jnp.sum(jnp.exp(logits - largest), -1, keepdims=True))
    return jnp.mean(normaliser) - jnp.sum(targets * logits) / logits.shape[0]
