"""What all few-shot learners are: a bilevel problem of one episode, adapted to a support set, asked about queries."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from hyperax.dynamics import Dynamics, GradientDescent
from hyperax.fewshot.episodes import Episode
from hyperax.fewshot.layers import Statistics
from hyperax.fewshot.networks import Features, Network, encode
from hyperax.fewshot.targets import Targets, accuracy, cross_entropy, targets_of
from hyperax.methods import Method, Reverse, hypergradient
from hyperax.methods.hypergradient import HypergradientFunction
from hyperax.problem import Problem
from hyperax.rollout import rollout

Images = Float[Array, "images height width channels"]


class Adapted(NamedTuple):
    """A learner after a support set: what `predict` needs.

    Fields:
        w: the inner variables w_T.
        support: the support images, uint8 [N K, height, width, channels].
        labels: int32 [N K].
        mask: which of them are there, bool [N K]; `None`: all.

    >>> Adapted(None, jnp.zeros((2, 4, 4, 1), jnp.uint8), jnp.arange(2), None).labels.tolist()
    [0, 1]
    """

    w: Any
    support: UInt8[Array, "NK height width channels"]
    labels: Int[Array, " NK"]
    mask: Bool[Array, " NK"] | None


class Learner(eqx.Module):
    """A few-shot learner: lam is learned across episodes, w in each of them.

        f_T(lam) = (1 / N) sum over j of E(w_T^j, lam, D_val^j),   w_T^j by T inner steps on D_tr^j from Phi_0(lam)

    A learner says what of an episode is computed once (`prepare`), where w starts (`init`), what it minimises (`inner`)
    and how it classifies (`logits`); E is the cross-entropy of the query images unless `outer` says otherwise. The
    same `problem` serves training (`hypergradient`), adaptation (`adapt`, `predict`) and evaluation (`accuracies`).

    Cost: a hypergradient costs what its method says of this problem; `accuracies` classifies the query images after
    each step.
    Reference: Bridge paper 2017, eq. 3.1; Franceschi et al. 2018, Sec. 4.
    Do not use it as a base where all of the network is shared by the tasks: `FeatureLearner` has half of it done.

    >>> from hyperax.fewshot import HyperRepresentation, PerImage
    >>> learner = HyperRepresentation(ways=2)
    >>> isinstance(learner, Learner), learner.method(5)
    (True, Reverse(steps=5))
    >>> images = jnp.asarray([[0, 255], [255, 0]], jnp.uint8).reshape(2, 1, 2, 1)
    >>> lam = learner.lam(PerImage(jnp.ravel))
    >>> adapted = learner.adapt(lam, images, jnp.arange(2), steps=10)
    >>> learner.predict(lam, adapted, images).argmax(-1).tolist()
    [0, 1]
    """

    ways: eqx.AbstractVar[int]
    statistics: eqx.AbstractVar[Statistics]

    adapts: ClassVar[bool] = True
    """Whether the number of inner steps matters; if not, w is a formula of the support set."""

    @abstractmethod
    def lam(
        self,
        network: Network,
        image_shape: tuple[int, int, int] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> dict[str, Any]:
        """The initial outer variables around a network; some learners need the images' shape or a key."""

    def constraint(self) -> dict[str, Any] | None:
        """What `minimize` has to keep."""
        return None

    @property
    def dynamics(self) -> Dynamics:
        """The inner optimizer; of learners without inner steps, one that stays where it is."""
        return GradientDescent(0.0)

    @property
    def problem(self) -> Problem:
        """The bilevel problem of one episode."""
        return Problem(self.inner, self.outer, self.init, prepare=self.prepare, has_metrics=True)

    def method(self, steps: int) -> Method:
        """The learner's own method for T = `steps`; where w is a formula, `steps` has no effect."""
        return Reverse(steps if self.adapts else 0)

    def hypergradient(self, method: Method) -> HypergradientFunction:
        """The hypergradient of one episode; take `mean_over_tasks` of it."""
        return hypergradient(self.problem, self.dynamics, method)

    @abstractmethod
    def prepare(self, lam: Any, episode: Episode) -> Any:
        """What of an episode depends on lam but not on w."""

    @abstractmethod
    def init(self, lam: Any, prepared: Any) -> Any:
        """Phi_0: the first w."""

    @abstractmethod
    def inner(self, w: Any, lam: Any, prepared: Any) -> Array:
        """L, the loss on the support set."""

    @abstractmethod
    def logits(self, w: Any, lam: Any, prepared: Any) -> Float[Array, "NQ ways"]:
        """The logits of the query images."""

    def outer(self, w: Any, lam: Any, prepared: Any) -> tuple[Array, dict[str, Array]]:
        """E, the loss on the query set, and the accuracy there."""
        logits = self.logits(w, lam, prepared)
        return cross_entropy(logits, prepared.query_targets), {"accuracy": accuracy(logits, prepared.query_targets)}

    def accuracies(self, lam: Any, episode: Episode, steps: int) -> Float[Array, " steps"]:
        """Accuracy on the query set after t = 1, ..., `steps` inner steps: what T is validated by (ICML Fig. 6)."""
        prepared = self.prepare(lam, episode)
        observe = lambda w: accuracy(self.logits(w, lam, prepared), prepared.query_targets)
        if not self.adapts:
            return jnp.broadcast_to(observe(self.solution(lam, prepared, 0)), (steps,))
        return rollout(self._prepared_problem, self.dynamics, steps, lam, prepared, observe=observe)[1]

    def solution(self, lam: Any, prepared: Any, steps: int) -> Any:
        """w_T on what `prepare` returned."""
        if not self.adapts:
            return self.init(lam, prepared)
        problem = self._prepared_problem
        return problem.whole(rollout(problem, self.dynamics, steps, lam, prepared)[0].w, lam, prepared)

    @property
    def _prepared_problem(self) -> Problem:
        return Problem(self.inner, self.outer, self.init, has_metrics=True)

    def adapt(
        self,
        lam: Any,
        support: UInt8[Array, "NK height width channels"],
        labels: Int[Array, " NK"],
        steps: int,
        mask: Bool[Array, " NK"] | None = None,
    ) -> Adapted:
        """Learn a task from its support set alone.

        Arguments:
            lam: the outer variables.
            support: images, 0 to 255.
            labels: 0, ..., ways - 1.
            steps: T; without effect where w is a formula.
            mask: which images are there; `None`: all.

        Raises: `ValueError` where batch normalisation needs the query images for that ("episode", "batch").
        """
        if self.statistics not in ("set", "support"):
            raise ValueError(
                f"with statistics {self.statistics!r} w depends on the query images: use 'set' or 'support' to adapt "
                "to a support set alone"
            )
        episode = Episode(support, labels, support[:1], labels[:1], mask)
        return Adapted(self.solution(lam, self.prepare(lam, episode), steps), support, labels, mask)

    def predict(
        self, lam: Any, adapted: Adapted, query: UInt8[Array, "NQ height width channels"]
    ) -> Float[Array, "NQ ways"]:
        """The probabilities of the classes for each query image; with statistics "set" they depend on all of them."""
        unknown = jnp.zeros(query.shape[0], jnp.int32)
        prepared = self.prepare(lam, Episode(adapted.support, adapted.labels, query, unknown, adapted.mask))
        logits = self.logits(adapted.w, lam, prepared)
        absent = prepared.query_targets.absent
        return jax.nn.softmax(logits if absent is None else logits + absent)


class OnFeatures(NamedTuple):
    """An episode seen through a representation: all that a learner on features needs of it."""

    support: Float[Array, "NK features"]
    support_targets: Targets
    query: Float[Array, "NQ features"]
    query_targets: Targets


class FeatureLearner(Learner):
    """A learner whose network is all in lam: h_lam is computed once an episode, w works on features.

    A subclass has fields `ways` and `statistics`, and the methods `init`, `inner` and `logits` of a `Learner`, which
    receive features (`OnFeatures`) in place of images; and `lam`, if it has hyperparameters beside the network's.

    Cost: one forward and one backward pass of the network an episode, whatever T is.
    Reference: Franceschi et al. 2018, eq. 9-10.
    Do not use it where a task adapts a part of the network: `Initialisation` takes a filter.

    >>> from hyperax.fewshot import Prototypical
    >>> issubclass(Prototypical, FeatureLearner)
    True
    """

    def lam(
        self,
        network: Network,
        image_shape: tuple[int, int, int] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> dict[str, Any]:
        """The initial outer variables around a network."""
        return {"network": network}

    def prepare(self, lam: Any, episode: Episode) -> OnFeatures:
        """h_lam(x) of support and query images."""
        support, query = features_of(lam["network"], episode, self.statistics)
        of_support, of_query = targets_of(episode, self.ways, support.dtype)
        return OnFeatures(support, of_support, query, of_query)


def features_of(network: Network, episode: Episode, statistics: Statistics) -> tuple[Features, Features]:
    """h_lam of the support and of the query images."""
    masks = episode.support_mask, episode.query_mask
    return encode(network, unit(episode.support), unit(episode.query), statistics, *masks)


def unit(images: Array) -> Array:
    """0, ..., 255 -> [0, 1]."""
    return images.astype(jnp.float32) / 255
