"""Pretrained representations: a network trained on all classes at once, read out at one of three depths."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from hyperax.dynamics import GradientDescent
from hyperax.fewshot.image_batches import ImageBatch, ImageBatches
from hyperax.fewshot.image_classes import ImageClasses
from hyperax.fewshot.layers import Activations, Moments, own_moments
from hyperax.fewshot.learners.hyper_representation import Classifier
from hyperax.fewshot.learners.initialisation import Initialisation
from hyperax.fewshot.learners.learner import unit
from hyperax.fewshot.learners.partition import LastStages
from hyperax.fewshot.learners.similarities import features_like
from hyperax.fewshot.networks import Features, Network
from hyperax.fewshot.targets import Targets, accuracy, cross_entropy
from hyperax.methods import Reverse, hypergradient
from hyperax.methods.hypergradient import HypergradientFunction
from hyperax.problem import Problem
from hyperax.rollout import check_steps


class OnBatch(NamedTuple):
    """A mini-batch seen through the network."""

    features: Features
    targets: Targets


class Multiclass(eqx.Module):
    """A standard network for all training classes: a representation and a linear head, trained by cross-entropy.

        f(lam) = mean over the batch of cross_entropy(y, head . h(x)),   lam = (h, head)

    As a bilevel problem it has no inner steps: Phi_0(lam) = head, T = 0, and f_0 is the loss of the batch. Batch
    normalisation takes the statistics of the batch.

    Arguments:
        classes: how many, of all images together.

    lam is `{"network": module, "head": Classifier}`. Train it with
    `minimize(learner.hypergradient(), lam, data=classes, sample=ImageBatches(64).sample, key=key, ...)`, stop it by
    `held_out_accuracy` or by the accuracy of `NearestNeighbour` on validation episodes, and use it as a `Readout`.

    Raises: `ValueError` for fewer than two classes, and for no image shape in `lam`.
    Cost: of a hyperiteration, a forward and a backward pass of the network over the batch.
    Reference: Franceschi et al. 2018, Sec. 5.3 (Multiclass); Bridge paper 2017, App. A and Table 2 (NN, Multiclass).
    Do not use it to learn from few images a class: its classes are all there from the beginning.

    >>> from hyperax.fewshot import PerImage
    >>> learner = Multiclass(classes=3)
    >>> lam = learner.lam(PerImage(jnp.ravel), (4, 4, 1), jax.random.key(0))
    >>> batch = ImageBatch(jnp.zeros((6, 4, 4, 1), jnp.uint8), jnp.arange(6) % 3)
    >>> print(learner.hypergradient()(lam, batch).value)
    1.098
    """

    classes: int

    def __check_init__(self):
        check_steps(self.classes, "classes", 2)

    def lam(self, network: Network, image_shape: tuple[int, int, int] | None, key: Key[Array, ""]) -> dict[str, Any]:
        """The initial outer variables around a network, for images of this shape; the head is Glorot-uniform."""
        features = features_like(network, image_shape, "Multiclass", "its head")
        weight = jax.nn.initializers.glorot_uniform()(key, (self.classes, features.shape[1]), features.dtype)
        return {"network": network, "head": Classifier(weight, jnp.zeros(self.classes, features.dtype))}

    @property
    def problem(self) -> Problem:
        """The problem of one batch."""
        return Problem(self._loss, self._outer, lambda lam, on_batch: lam["head"], self.prepare, has_metrics=True)

    def hypergradient(self) -> HypergradientFunction:
        """The gradient of the loss of a batch in all of lam."""
        return hypergradient(self.problem, GradientDescent(0.0), Reverse(0))

    def prepare(self, lam: Any, batch: ImageBatch) -> OnBatch:
        """h(x), and what the images are to be classified as."""
        features = lam["network"](unit(batch.images), own_moments)
        one_hot = jax.nn.one_hot(batch.labels, self.classes, dtype=features.dtype)
        mask = None if batch.mask is None else batch.mask.astype(features.dtype)
        return OnBatch(features, Targets(one_hot, None if mask is None else mask / jnp.sum(mask)))

    def _loss(self, head: Classifier, lam: Any, on_batch: OnBatch) -> Array:
        return cross_entropy(head(on_batch.features), on_batch.targets)

    def _outer(self, head: Classifier, lam: Any, on_batch: OnBatch) -> tuple[Array, dict[str, Array]]:
        logits = head(on_batch.features)
        return cross_entropy(logits, on_batch.targets), {"accuracy": accuracy(logits, on_batch.targets)}

    def held_out_accuracy(self, lam: Any, batches: ImageBatches, classes: ImageClasses, key: Key[Array, ""]) -> float:
        """The accuracy on the images that training never drew, each once: the Bridge paper's test accuracy.

        Arguments:
            lam: the outer variables.
            batches: those of the training, with `held_out` of at least 1.
            classes: those of the training.
            key: shuffles the images into batches, whose statistics the network takes.

        Raises: `ValueError` if no images are held out.
        Cost: one forward pass over them, a batch after the other.
        """
        return float(_held_out_accuracy(self, lam, batches, classes, key))


@eqx.filter_jit
def _held_out_accuracy(
    learner: Multiclass, lam: Any, batches: ImageBatches, classes: ImageClasses, key: Array
) -> Array:
    held_out = batches.held_out_batches(key, classes)

    def right(batch: ImageBatch) -> Array:
        on_batch = learner.prepare(lam, batch)
        return accuracy(lam["head"](on_batch.features), on_batch.targets)

    assert held_out.mask is not None
    return jnp.average(jax.lax.map(right, held_out), weights=jnp.sum(held_out.mask, 1))


Layer: TypeAlias = Literal["conv", "linear", "softmax"]
"""A depth at which a pretrained network is read out."""


class Readout(eqx.Module):
    """A trained multiclass network as a representation, read out at one of three depths.

        conv: h(x),   linear: z - mean over classes of z,   softmax: softmax(z),   z = head . h(x)

    A shift that all logits of an image share is left out of "linear": the softmax that z was trained with does not see
    it, so training leaves it anywhere (Adam pushes the logits of the many classes that a batch lacks down, step after
    step), and in distances and in softmax regression it would outweigh the rest.

    Arguments:
        network: h, for instance `lam["network"]` of `Multiclass`.
        head: `lam["head"]`; [classes, features] and [classes].
        layer: "conv", the last convolution's output; "linear", the logits, centred; "softmax", the probabilities.

    It is a network like others: `{"network": Readout(...)}` is a lam of `HyperRepresentation` (softmax regression on
    the readout; the scales of the three differ by orders, and so do good inner step sizes) or `NearestNeighbour`.

    Raises: `ValueError` for another layer.
    Cost: the network's, and the product with the head.
    Reference: Bridge paper 2017, App. A (conv, linear, softmax) and Table 2; Franceschi et al. 2018, Table 4.
    Do not use a network for its training classes' episodes: it has seen their labels.

    >>> from hyperax.fewshot import PerImage
    >>> head = Classifier(jnp.eye(3, 16), jnp.zeros(3))
    >>> Readout(PerImage(jnp.ravel), head, "softmax")(jnp.zeros((2, 4, 4, 1))).shape
    (2, 3)
    """

    network: Network
    head: Classifier
    layer: Layer = eqx.field(static=True)

    def __check_init__(self):
        if self.layer not in get_args(Layer):
            raise ValueError(f"there is no layer {self.layer!r}: use one of {', '.join(map(repr, get_args(Layer)))}")

    def __call__(self, images: Activations, moments: Moments = own_moments) -> Features:
        """[images, height, width, channels] in [0, 1] -> [images, features or classes]."""
        features = self.network(images, moments)
        if self.layer == "conv":
            return features
        z = self.head(features)
        return z - jnp.mean(z, axis=1, keepdims=True) if self.layer == "linear" else jax.nn.softmax(z)


def fine_tuning(ways: int, step_size: float, stages: int | None = None, **settings: Any) -> Initialisation:
    """Fine-tuning: a pretrained network and a new head are trained on the support set.

        w = (h, head),   w_0 = (the pretrained h, 0),   w_t = w_{t-1} - eta grad L(w_{t-1}),   L on D_tr

    Arguments:
        ways: classes an episode; of episodes with a varying number, the most.
        step_size: eta.
        stages: how many of the last stages of the network are trained; `None`: all.
        settings: other arguments of `Initialisation`.

    It is the inner problem of MAML where lam = `{"network": lam["network"]}` of `Multiclass` is not meta-learned: use
    its `accuracies`, `adapt` and `predict`. With no stage trained it is `HyperRepresentation` on "conv" features.

    Returns: the learner, an `Initialisation`.
    Raises: `ValueError` for fewer than one stage, or more than the network has when it is used.
    Cost: each inner step a forward and a backward pass of the trained stages over the support images.
    Reference: Franceschi et al. 2018, Sec. 5.3 (transferred representations); Finn et al. 2017, Sec. 5.1 (pretrained
    and fine-tuned).
    Do not use it with many steps on one image a class: all the weights fit few images in any way.

    >>> fine_tuning(5, step_size=0.1, stages=2).adapted
    LastStages(count=2)
    """
    adapted = True if stages is None else LastStages(stages)
    return Initialisation(ways, step_size=step_size, adapted=adapted, **settings)
