"""Meta networks: gradients of support images are turned into fast weights, which a query image reads by attention."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple, final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from hyperax.fewshot.layers import Statistics
from hyperax.fewshot.learners.fast_weights import GradientLSTM, GradientMLP
from hyperax.fewshot.learners.learner import FeatureLearner, OnFeatures
from hyperax.fewshot.learners.similarities import cosines, features_and_key, present
from hyperax.fewshot.networks import Features, Network
from hyperax.fewshot.targets import Targets, cross_entropy
from hyperax.linear_solvers import check_positive
from hyperax.rollout import check_steps


class Layers(NamedTuple):
    """A dense ReLU layer and a linear one on top of it, without biases; fast weights have the support images first."""

    dense: Float[Array, "*images units features"]
    top: Float[Array, "*images ways units"]

    def __call__(self, features: Features) -> Float[Array, "images ways"]:
        """The logits with slow weights alone."""
        return jax.nn.relu(features @ self.dense.T) @ self.top.T


class FastWeights(NamedTuple):
    """What a task adds to the slow weights.

    Fields:
        representation: Q*, of the dense layer of u.
        memory: M, the fast weights W*_i of b from each support image.
        index: R, the representation r_i of each support image.
    """

    representation: Float[Array, "units features"]
    memory: Layers
    index: Float[Array, "NK units"]


@final
class MetaNetworks(FeatureLearner):
    """Few-shot learning by fast weights: functions of the gradients that support images have at the slow weights.

        z = h_lam(x),   u(Q, z) = relu(Q z),   u(Q, Q*, z) = relu(Q z) + relu(Q* z),
        b(W, z) = W2 relu(W1 z),
        b(W, W*, z) = W2 v + W2* v,   v = relu(W1 z) + relu(W1* z),
        Q* = d(grad_Q of cross_entropy(y_i, P u(Q, z_i)), i = 1, ..., T),        one image of each class: T = ways
        M_i = m(grad_W of cross_entropy(y_i, b(W, z_i))),   R_i = u(Q, Q*, z_i)  for all (x_i, y_i) of D_tr^j,
        logits(x) = b(W, sum over i of a_i M_i, z),   a = softmax over i of scale cos(R_i, u(Q, Q*, z)),
        w = (Q*, M, R)

    Q, P and W = (W1, W2) are slow weights; d is an LSTM over the images and m a network of two hidden layers, of their
    own for W1 and W2, that work on every weight alone, from its preprocessed gradient. E is the cross-entropy of
    the query images, L that of the support images, and L is not minimised: w is made in one go.

    Arguments:
        ways: classes an episode, fixed by W2 and P; of episodes with a varying number, the most.
        statistics: where batch normalisation takes its statistics.
        units: of the dense layers Q and W1.
        hidden: units of the LSTM d, and of each hidden layer of m, an even number.
        scale: > 0, the inverse temperature of the attention; the paper has none, that is 1.

    lam is `{"network": module, "representation": (Q, P), "base": (W1, W2), "task": d, "example": {"dense": m of W1,
    "top": m of W2}}`, for which `lam` needs `image_shape` and `key`.
    Raises: `ValueError` for settings out of range, in `lam` if shape or key are missing and for an odd `hidden`, and
    for a lam of another number of ways.
    Cost: one pass of the network over the episode; for each of units x features weights and each of `ways` images
    4 hidden^2 multiplications for d, for each support image hidden^2 for m, and in training the memory of all these
    hidden units: 100 support images of 20 classes with the default sizes take about 1 GB.
    Reference: Munkhdalai and Yu 2017, Sec. 3 and Algorithm 1. Theirs has fast weights in all layers of two
    networks of five convolutions, a dense layer of 64 units and an output layer, one for u and one for b; here one
    network h_lam without fast weights serves both, and what has them are the dense layers on top of it, Q of u and W1
    of b, and the output layer W2. The T images of d are the first of each class, not drawn; its loss is the
    cross-entropy with any number of shots, where the paper takes a contrastive loss with more than one. Gradients of
    the gradients are exact.
    Do not use it for many classes with many shots, of which every image has its own fast weights.

    >>> from hyperax.fewshot import OmniglotNet
    >>> learner = MetaNetworks(ways=5)
    >>> shape = (28, 28, 1)
    >>> lam = jax.eval_shape(lambda key: learner.lam(OmniglotNet(shape, key), shape, key), jax.random.key(0))
    >>> sorted(lam), lam["base"].dense.shape, lam["base"].top.shape
    (['base', 'example', 'network', 'representation', 'task'], (64, 256), (5, 64))
    """

    ways: int
    statistics: Statistics = "set"
    units: int = 64
    hidden: int = 20
    scale: float = 10.0

    adapts: ClassVar[bool] = False

    def __check_init__(self):
        check_steps(self.units, "units", 1)
        check_steps(self.hidden, "hidden", 1)
        check_positive("scale", self.scale)

    def lam(
        self,
        network: Network,
        image_shape: tuple[int, int, int] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> dict[str, Any]:
        """The initial outer variables around a network; slow weights are Glorot-uniform."""
        like, key = features_and_key(network, image_shape, key, "MetaNetworks", "its dense layers")
        keys, dtype, features = jax.random.split(key, 7), like.dtype, like.shape[1]
        draw = jax.nn.initializers.glorot_uniform(in_axis=1, out_axis=0)
        layers = lambda first, second: Layers(
            draw(first, (self.units, features), dtype), draw(second, (self.ways, self.units), dtype)
        )
        # In a dense layer, at first, fast weights of one sign add up to what slow weights of random sign do, not more.
        of_dense, of_top = 1 / features, 0.5 * self.units**-0.5
        return {
            "network": network,
            "representation": layers(keys[0], keys[1]),
            "base": layers(keys[2], keys[3]),
            "task": GradientLSTM(self.hidden, keys[4], of_dense, dtype),
            "example": {
                "dense": GradientMLP(self.hidden, keys[5], of_dense, dtype),
                "top": GradientMLP(self.hidden, keys[6], of_top, dtype),
            },
        }

    def init(self, lam: Any, prepared: OnFeatures) -> FastWeights:
        """The fast weights of the task and of its support images."""
        self._check_ways(lam)
        z, targets = prepared.support, prepared.support_targets
        members = (targets.one_hot.T > 0) & present(targets)
        first = jnp.argmax(members, axis=1)
        gradients = _gradients(lam["representation"], z[first], _rows(targets, first))
        representation = lam["task"](gradients.dense, jnp.any(members, axis=1))
        gradients = _gradients(lam["base"], z, targets)
        memory = Layers(lam["example"]["dense"](gradients.dense), lam["example"]["top"](gradients.top))
        return FastWeights(representation, memory, _represented(lam, representation, z))

    def inner(self, w: FastWeights, lam: Any, prepared: OnFeatures) -> Array:
        """L: the cross-entropy of the support images."""
        return cross_entropy(self._classified(w, lam, prepared.support, prepared), prepared.support_targets)

    def logits(self, w: FastWeights, lam: Any, prepared: OnFeatures) -> Float[Array, "NQ ways"]:
        """The layers b, augmented by the fast weights that each query image reads from the memory."""
        return self._classified(w, lam, prepared.query, prepared)

    def _classified(self, w: FastWeights, lam: Any, z: Features, prepared: OnFeatures) -> Float[Array, "images ways"]:
        """The logits of some images."""
        similar = self.scale * cosines(_represented(lam, w.representation, z), w.index)
        a = jax.nn.softmax(similar, axis=-1, where=present(prepared.support_targets))
        slow = lam["base"]
        # (sum over i of a_i M_i) z as the sum over i of a_i (M_i z): no weights for each image are written out.
        read = lambda weights, x: jnp.einsum("qi,iuf,qf->qu", a, weights, x)
        v = jax.nn.relu(z @ slow.dense.T) + jax.nn.relu(read(w.memory.dense, z))
        return v @ slow.top.T + read(w.memory.top, v)

    def _check_ways(self, lam: Any) -> None:
        rows = lam["base"].top.shape[0]
        if rows != self.ways:
            raise ValueError(
                f"lam's output layers are for {rows} classes and the learner for {self.ways}: their number is fixed; "
                "make lam with, and train on episodes of, as many ways as in the test, or mask what a task lacks"
            )


def _represented(lam: Any, fast: Float[Array, "units features"], z: Features) -> Float[Array, "images units"]:
    """The representation u(Q, Q*, z), a layer augmented by fast weights."""
    return jax.nn.relu(z @ lam["representation"].dense.T) + jax.nn.relu(z @ fast.T)


def _rows(targets: Targets, rows: Array) -> Targets:
    return Targets(targets.one_hot[rows], None, targets.absent)


def _gradients(slow: Layers, z: Features, targets: Targets) -> Layers:
    """The gradient of each image's cross-entropy at the slow weights, images first."""

    def loss(slow: Layers, z: Features, one_hot: Array) -> Array:
        return cross_entropy(slow(z[None]), Targets(one_hot[None], None, targets.absent))

    return jax.vmap(jax.grad(loss), in_axes=(None, 0, 0))(slow, z, targets.one_hot)
