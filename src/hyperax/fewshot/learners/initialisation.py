"""Initialisation: where the parameters of a network start in every task is the hyperparameter, Phi_0(lam) = lam."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import prod
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from hyperax.dynamics import Dynamics, GradientDescent
from hyperax.dynamics.dynamics import Setting
from hyperax.dynamics.learned_optimizer import LearnedOptimizer
from hyperax.fewshot.episodes import Episode
from hyperax.fewshot.layers import Activations, Statistics, own_moments
from hyperax.fewshot.learners.hyper_representation import Classifier
from hyperax.fewshot.learners.learner import Learner, unit
from hyperax.fewshot.learners.partition import Filter, adapted_part, masks_of, merged, shared_stages
from hyperax.fewshot.networks import Network, encode, moments_of_set, stages_of, through
from hyperax.fewshot.targets import Targets, cross_entropy, targets_of
from hyperax.learned_optimizers.update_rule import UpdateRule
from hyperax.linear_solvers import check_positive
from hyperax.methods import Method, Reverse
from hyperax.problem import Problem
from hyperax.rollout import check_steps


class Activated(NamedTuple):
    """An episode after the stages that all tasks share; the images themselves where the first stage is adapted."""

    support: Activations
    support_targets: Targets
    query: Activations
    query_targets: Targets
    support_mask: Bool[Array, " NK"] | None
    query_mask: Bool[Array, " NQ"] | None


class Initialisation(Learner):
    """Few-shot learning from a common start: MAML, ANIL, Meta-SGD, iMAML, Reptile, Meta-LSTM, and what lies between.

        w = (the adapted part of a network h, the head),   w_0^j = Phi_0(lam) = those of lam,
        L^j(w, lam) = mean over D_tr^j of cross_entropy(y, head(h_{w, lam}(x))) + (rho / 2) |w - Phi_0(lam)|^2,
        w_t^j = w_{t-1}^j - eta grad_w L^j(w_{t-1}^j, lam),   f_T(lam) = (1 / N) sum over j of E^j(w_T^j, lam),

    E the mean cross-entropy on D_val^j. What is not adapted is a hyperparameter as in `HyperRepresentation`: the same
    for all tasks and steps.

    Arguments:
        ways: classes an episode; of episodes with a varying number, the most.
        statistics: where batch normalisation takes its statistics; "set" as in MAML's code (transductive over the
            query set).
        step_size: eta of the inner optimizer, or with `learn_step_sizes` its initial value.
        adapted: which part of the network starts at lam and is adapted; what is not is shared by all tasks. `True`:
            all. `False`: nothing, the head alone. A function network -> truth values and boolean arrays: `LastStages`,
            `ShareOfFilters`, or one of your own.
        head: "zero": the linear classifier starts at zero, as in `HyperRepresentation`. "learned": at lam["head"], one
            row for each label (as MAML was published), so with a fixed number of ways.
        learn_step_sizes: whether each adapted parameter has a step size of its own, free in sign, in lam (Meta-SGD).
        proximity: rho > 0, or `None` for no such term (iMAML).
        batch_size: support images that a step of training sees, every class in turn; `None`: all. Adaptation for
            evaluation always takes all.
        optimizer: from a step size to the inner optimizer: `GradientDescent`, `Adam`, ...
        rule: from a key to the update rule that takes the place of step size and optimizer, and is learned (Meta-LSTM).
        differentiated_by: from T to the method: `Reverse` (exact), `FirstOrder`, `Reptile`, ...

    lam is `{"network": module}`, with "head" learned also `"head"`, with `learn_step_sizes` also `"step_sizes"`, a tree
    like w (its head has one row for all labels where the head starts at zero), with a rule `"rule"`.

    A head at zero serves any number of ways, and the order of the labels cannot matter. One learned row repeated for
    every class (Ye and Chao 2022) is the same function: the softmax does not see what all classes have in common. As
    long as the rows are equal the gradient reaches the head alone: the network is adapted from the second step on.

    Raises: `ValueError` for a filter that does not fit the network or adapts nothing of it, a head that is neither, a
    learned head of another number of ways, for what needs `image_shape` without it, and a rule beside another optimizer
    or without a key.
    Cost: each inner step a forward and a backward pass of the adapted stages over N K images; with `Reverse` a small
    multiple of that, and memory for T of them. Stages before the first adapted one are computed once an episode: with
    `adapted=False` time hardly depends on T.
    Reference: Bridge paper 2017, Sec. 3 (learned initialisations as meta-models, Finn et al. 2017) and end of Sec. 4
    (mixed designs); Kao et al. 2022 (zeroing the head).
    Do not use it where tasks share their features: `HyperRepresentation` learns them at a fraction of the cost.

    >>> from hyperax.fewshot import OmniglotNet
    >>> learner = Initialisation(ways=5, head="learned")
    >>> lam = learner.lam(OmniglotNet((28, 28, 1), jax.random.key(0)), (28, 28, 1))
    >>> sorted(lam), lam["head"].weight.shape
    (['head', 'network'], (5, 256))
    """

    ways: int
    statistics: Statistics = "set"
    step_size: float = 0.4
    adapted: Filter = True
    head: Literal["zero", "learned"] = "zero"
    learn_step_sizes: bool = False
    proximity: float | None = None
    batch_size: int | None = None
    optimizer: Callable[[Setting], Dynamics] = GradientDescent
    rule: Callable[[Key[Array, ""]], UpdateRule] | None = None
    differentiated_by: Callable[[int], Method] = Reverse

    def __check_init__(self):
        if not (isinstance(self.adapted, bool) or callable(self.adapted)):
            raise ValueError(f"adapted is {self.adapted!r}; use True, False or a function of the network")
        if self.head not in ("zero", "learned"):
            raise ValueError(f"unknown head {self.head!r}: use 'zero' or 'learned'")
        check_positive("proximity", self.proximity)
        if self.batch_size is not None:
            check_steps(self.batch_size, "batch_size", 1)
        if self.rule is not None and (self.learn_step_sizes or self.optimizer is not GradientDescent):
            raise ValueError(
                "a learned rule takes the place of the inner optimizer and its step sizes: leave `optimizer` and "
                "`learn_step_sizes` out, or `rule`"
            )

    def lam(
        self,
        network: Network,
        image_shape: tuple[int, int, int] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> dict[str, Any]:
        """The initial outer variables around a network; a learned head starts at zero."""
        masks = masks_of(self.adapted, network)
        chosen = [bool(np.any(mask)) for mask in jax.tree.leaves(masks)]
        if chosen and not any(chosen) and self.adapted is not False:
            raise ValueError("the filter adapts nothing of the network: use adapted=False if that is what you want")
        lam: dict[str, Any] = {"network": network}
        if self.rule is not None:
            if key is None:
                raise ValueError("a learner with a rule draws its parameters: pass key=jax.random.key(seed) to lam")
            lam["rule"] = self.rule(key)
        if self.head == "zero" and not self.learn_step_sizes:
            return lam
        if image_shape is None:
            raise ValueError(
                "a learned head and learned step sizes have a number for every feature: give the images' shape "
                "(height, width, channels)"
            )
        images = jnp.zeros((1, *image_shape), jnp.float32)
        features = jax.eval_shape(lambda images: network(images, own_moments), images)
        head = self._zero_head(features, self.ways if self.head == "learned" else 1)
        if self.head == "learned":
            lam["head"] = head
        if self.learn_step_sizes:
            w = {"network": adapted_part(masks, network), "head": head}
            lam["step_sizes"] = jax.tree.map(lambda leaf: jnp.full(leaf.shape, self.step_size, leaf.dtype), w)
        return lam

    @property
    def dynamics(self) -> Dynamics:
        """The inner optimizer, with its step size or those of lam; or the rule of lam."""
        if self.rule is not None:
            return LearnedOptimizer(_rule)
        return self.optimizer(_step_sizes if self.learn_step_sizes else self.step_size)

    @property
    def problem(self) -> Problem:
        """The bilevel problem of one episode."""
        batch = None if self.batch_size is None else self._batch
        return Problem(self.inner, self.outer, self.init, prepare=self.prepare, batch=batch, has_metrics=True)

    def method(self, steps: int) -> Method:
        """`differentiated_by` at T = `steps`."""
        return self.differentiated_by(steps)

    def prepare(self, lam: Any, episode: Episode) -> Activated:
        """The activations after the shared stages."""
        network, count = lam["network"], shared_stages(masks_of(self.adapted, lam["network"]))
        masks = episode.support_mask, episode.query_mask
        lower = _stages(network, slice(count))
        support, query = encode(lower, unit(episode.support), unit(episode.query), self.statistics, *masks)
        dtype = jnp.result_type(support, *jax.tree.leaves(eqx.filter(network, eqx.is_inexact_array)))
        of_support, of_query = targets_of(episode, self.ways, dtype)
        return Activated(support, of_support, query, of_query, *masks)

    def init(self, lam: Any, prepared: Activated) -> dict[str, Any]:
        """w_0: the adapted part of lam's network, and its head or zero."""
        network = lam["network"]
        masks = masks_of(self.adapted, network)
        if self.head == "zero":
            upper = _stages(network, slice(shared_stages(masks), None))
            head = self._zero_head(jax.eval_shape(upper, prepared.support), self.ways)
        else:
            head = self._learned_head(lam)
        return {"network": adapted_part(masks, network), "head": head}

    def inner(self, w: Any, lam: Any, prepared: Activated) -> Array:
        """L: the cross-entropy of the support set and the distance from w_0."""
        upper = self._upper(w, lam)
        if self.statistics in ("set", "support"):  # the support images by themselves
            features = upper(prepared.support, moments_of_set(prepared.support_mask))
        else:
            features = self._both(upper, prepared)[0]
        value = cross_entropy(w["head"](_flat(features)), prepared.support_targets)
        if self.proximity is None:
            return value
        squares = jax.tree.map(lambda a, b: jnp.sum(jnp.square(a - b)), w, self.init(lam, prepared))
        return value + self.proximity / 2 * sum(jax.tree.leaves(squares))

    def logits(self, w: Any, lam: Any, prepared: Activated) -> Float[Array, "NQ ways"]:
        """The adapted head of the adapted network, for the query images."""
        upper = self._upper(w, lam)
        if self.statistics == "set":
            features = upper(prepared.query, moments_of_set(prepared.query_mask))
        else:
            features = self._both(upper, prepared)[1]
        return w["head"](_flat(features))

    def _upper(self, w: Any, lam: Any) -> Callable[..., Activations]:
        """The stages of the adapted network that `prepare` leaves to be computed."""
        masks = masks_of(self.adapted, lam["network"])
        return _stages(merged(masks, w["network"], lam["network"]), slice(shared_stages(masks), None))

    def _both(self, upper: Any, prepared: Activated) -> tuple[Activations, Activations]:
        masks = prepared.support_mask, prepared.query_mask
        return encode(upper, prepared.support, prepared.query, self.statistics, *masks)

    def _batch(self, prepared: Activated, t: Any) -> Activated:
        """The support images of step t: first one image of every class, then the next ones, over and over."""
        count, size = prepared.support.shape[0], self.batch_size
        if size is None or size >= count:
            return prepared
        one_hot, _, absent = prepared.support_targets
        mask = jnp.ones(count, bool) if prepared.support_mask is None else prepared.support_mask
        earlier = jnp.sum((jnp.cumsum(one_hot, 0) - one_hot) * one_hot, -1)
        order = jnp.argsort(jnp.where(mask, earlier, count))  # stable: classes in turn, padding last
        rows = order[((t - 1) * size + jnp.arange(size)) % jnp.sum(mask)]
        return prepared._replace(
            support=prepared.support[rows],
            support_targets=Targets(one_hot[rows], None, absent),
            support_mask=None if prepared.support_mask is None else jnp.ones(size, bool),
        )

    def _learned_head(self, lam: Any) -> Classifier:
        rows = lam["head"].weight.shape[0]
        if rows != self.ways:
            raise ValueError(
                f"lam's head is for {rows} classes and the learner for {self.ways}: a learned head has one number of "
                "ways; head='zero' serves any"
            )
        return lam["head"]

    def _zero_head(self, features: Any, ways: int) -> Classifier:
        size = prod(features.shape[1:])
        return Classifier(jnp.zeros((ways, size), features.dtype), jnp.zeros(ways, features.dtype))


def _stages(network: Network, which: slice) -> Callable[..., Activations]:
    return partial(through, stages_of(network)[which])


def _flat(features: Array) -> Float[Array, "images features"]:
    return features.reshape(features.shape[0], -1)


def _step_sizes(lam: Any) -> Any:
    return lam["step_sizes"]


def _rule(lam: Any) -> UpdateRule:
    return lam["rule"]
