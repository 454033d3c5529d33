"""The memory module: a query image has the label of the nearest key of a memory that the support set has written."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple, final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from hyperax.fewshot.layers import Statistics
from hyperax.fewshot.learners.learner import FeatureLearner, OnFeatures
from hyperax.fewshot.learners.similarities import by_class, features_and_key, normalised, present
from hyperax.fewshot.networks import Features, Network
from hyperax.fewshot.targets import Targets, accuracy
from hyperax.linear_solvers import check_positive
from hyperax.rollout import check_steps


class Memory(NamedTuple):
    """What the memory module remembers of an episode.

    Fields:
        keys: K, of length 1, or zero where nothing is written, [slots, size].
        values: V, one-hot, or zero where nothing is written, [slots, ways].
        ages: A, how many images were shown since the slot was last written, [slots].
        centre: what is taken from the features before they become keys, [features].
    """

    keys: Float[Array, "slots size"]
    values: Float[Array, "slots ways"]
    ages: Float[Array, " slots"]
    centre: Float[Array, " features"]


@final
class MemoryModule(FeatureLearner):
    """Few-shot learning by a memory of keys and labels, written image by image and read by the nearest key.

        q(x) = P z / |P z|,   z = h_lam(x) - centre,   s_c(x) = max over i with V_i = c of q(x) . K_i,
        w = (K, V, A, centre), of which K, V, A are empty at first, centre = mean of h_lam over D_tr^j or 0;
            each (x, y) of D_tr^j in its order writes, with n = argmax over i of q(x) . K_i,
            K_n = (q + K_n) / |q + K_n|,   A_n = 0     if V_n = y,
            K_o = q,   V_o = y,   A_o = 0              else, with o the oldest slot (empty ones first),
            A_i = A_i + 1                              for all other i,
        E = mean over (x, y) in D_val^j of max(0, max over c != y of s_c(x) - s_y(x) + margin),
        logits_c(x) = inverse_temperature s_c(x)

    The largest logit is at the value of the nearest key, V_n, the answer of the memory. L is the loss E of the support
    images themselves, and is not minimised: w is what the memory has become after the support set.

    Arguments:
        ways: classes an episode; of episodes with a varying number, the most.
        statistics: where batch normalisation takes its statistics.
        size: numbers a key has, of a dense layer P without bias on the features (128 in the paper); `None`: the
            features themselves are the keys.
        slots: of the memory, at least `ways`; `None`: as many as support images, so that nothing is forgotten. With
            fewer, a class can be forgotten; query images of a class without a key have no loss, and are not recognised.
        centred: whether the mean of the support features is taken from all features. In the paper it is not; but then
            training starts with keys that all become equal, which brings the loss down to the margin, and it takes
            hundreds of hyperiterations to leave that.
        margin: > 0, alpha of the loss.
        inverse_temperature: > 0, t of the probabilities; without effect on loss and accuracy.

    lam is `{"network": module}`, with `size` also `"projection"`: P [size, features], for which `lam` needs
    `image_shape` and `key`. It depends on `ways` in nothing: training with more ways than at test is possible.
    Raises: `ValueError` for settings out of range, fewer slots than ways, and in `lam` if shape or key are missing.
    Cost: one pass of the network over the episode, N K writings in turn of slots x size multiplications each, and a
    product of the query images by the slots.
    Reference: Kaiser et al. 2017 (the memory, its loss and its update, with k, t and alpha as printed there). There the
    memory lives on through the whole training (8192 slots, 256 nearest keys read) and gradients reach the queries only;
    here it is that of one episode, all of it is read, and the gradient of E is exact, through the keys, their averages
    and `centre` too. Of slots of one age the first is taken, not any. `predict` is the softmax over the nearest key of
    each class, theirs over all nearest keys.
    Do not use it where the order of the support set means nothing and its images are many: the key of a class weighs
    the last image as much as all before; `Prototypical` weighs them alike.

    >>> from hyperax.fewshot import PerImage
    >>> learner, images = MemoryModule(ways=2, size=None), jnp.asarray([[255, 0], [0, 255], [51, 255]], jnp.uint8)
    >>> lam, images = learner.lam(PerImage(jnp.ravel)), images.reshape(3, 1, 2, 1)
    >>> adapted = learner.adapt(lam, images, jnp.array([0, 1, 1]), steps=0)
    >>> adapted.w.keys.round(2).tolist(), adapted.w.ages.tolist()  # the third image is averaged with the second
    ([[0.67, -0.74], [-0.65, 0.76], [0.0, 0.0]], [2.0, 0.0, 3.0])
    >>> learner.predict(lam, adapted, images).round(2).tolist()
    [[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]
    """

    ways: int
    statistics: Statistics = "set"
    size: int | None = 128
    slots: int | None = None
    centred: bool = True
    margin: float = 0.1
    inverse_temperature: float = 40.0

    adapts: ClassVar[bool] = False

    def __check_init__(self):
        for name, lowest in (("size", 1), ("slots", 1)):
            if getattr(self, name) is not None:
                check_steps(getattr(self, name), name, lowest)
        if self.slots is not None and self.slots < self.ways:
            raise ValueError(
                f"a memory of {self.slots} slots cannot have a key for each of {self.ways} classes: give slots >= "
                "ways, or None for as many as support images"
            )
        check_positive("margin", self.margin)
        check_positive("inverse_temperature", self.inverse_temperature)

    def lam(
        self,
        network: Network,
        image_shape: tuple[int, int, int] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> dict[str, Any]:
        """The initial outer variables around a network; P is Glorot-uniform."""
        if self.size is None:
            return {"network": network}
        like, key = features_and_key(
            network, image_shape, key, "MemoryModule", "the dense layer of its keys (size=None has none)"
        )
        initialise = jax.nn.initializers.glorot_uniform()
        return {"network": network, "projection": initialise(key, (self.size, like.shape[1]), like.dtype)}

    def init(self, lam: Any, prepared: OnFeatures) -> Memory:
        """The memory after the support set, shown in its order; padding is not shown."""
        there = present(prepared.support_targets)
        centre = jnp.mean(prepared.support, axis=0, where=there[:, None])
        centre = centre if self.centred else jnp.zeros_like(centre)
        q = self._keys(lam, prepared.support, centre)
        slots = q.shape[0] if self.slots is None else self.slots
        zeros = lambda *shape: jnp.zeros((slots, *shape), q.dtype)
        empty = Memory(zeros(q.shape[1]), zeros(self.ways), zeros(), centre)

        def show(memory: Memory, image: tuple[Array, Array, Bool[Array, ""]]) -> tuple[Memory, None]:
            key, value, is_there = image
            after = written(memory, key, value.astype(key.dtype))
            return jax.tree.map(lambda new, old: jnp.where(is_there, new, old), after, memory), None

        return jax.lax.scan(show, empty, (q, prepared.support_targets.one_hot, there))[0]

    def inner(self, w: Memory, lam: Any, prepared: OnFeatures) -> Array:
        """L: the loss of the memory on the support images."""
        return self._loss(self._similarities(w, lam, prepared.support), prepared.support_targets)

    def outer(self, w: Memory, lam: Any, prepared: OnFeatures) -> tuple[Array, dict[str, Array]]:
        """E: the loss of the memory on the query images, and the accuracy of the nearest key."""
        s = self._similarities(w, lam, prepared.query)
        return self._loss(s, prepared.query_targets), {"accuracy": accuracy(s, prepared.query_targets)}

    def logits(self, w: Memory, lam: Any, prepared: OnFeatures) -> Float[Array, "NQ ways"]:
        """The similarity to the nearest key of each class, over the temperature."""
        return self.inverse_temperature * self._similarities(w, lam, prepared.query)

    def _keys(self, lam: Any, features: Features, centre: Float[Array, " features"]) -> Float[Array, "images size"]:
        """The unit vectors q of some images."""
        z = features - centre
        return normalised(z if self.size is None else z @ lam["projection"].T)

    def _similarities(self, w: Memory, lam: Any, features: Features) -> Float[Array, "images ways"]:
        """The similarity s_c to the nearest key of each class; a large negative number where there is none."""
        return jnp.max(by_class(self._keys(lam, features, w.centre) @ w.keys.T, Targets(w.values)), axis=-1)

    def _loss(self, s: Float[Array, "images ways"], targets: Targets) -> Array:
        """The mean margin loss of the images whose class has a key."""
        positive = jnp.max(jnp.where(targets.one_hot > 0, s, -jnp.inf), axis=-1)
        negative = jnp.max(jnp.where(targets.one_hot > 0, -jnp.inf, s), axis=-1)
        # A cosine is at least -1: what is far below says that there is no key.
        losses = jnp.where(positive > -2, jax.nn.relu(negative - positive + self.margin), 0)
        return jnp.mean(losses) if targets.weights is None else jnp.sum(targets.weights * losses)


def written(memory: Memory, q: Float[Array, " size"], value: Float[Array, " ways"]) -> Memory:
    """The memory after one image with this key and one-hot label was shown."""
    keys, values, ages, _ = memory
    similarities = jnp.where(jnp.sum(values, axis=1) > 0, keys @ q, -jnp.inf)
    nearest = jnp.argmax(similarities)  # in an empty memory the first slot, whose value is no label
    right = values[nearest] @ value > 0
    # An empty slot has aged with every image, and so is older than all that were written.
    chosen = jnp.arange(ages.shape[0]) == jnp.where(right, nearest, jnp.argmax(ages))
    key = jnp.where(right, normalised((q + keys[nearest])[None])[0], q)
    return memory._replace(
        keys=jnp.where(chosen[:, None], key, keys),
        values=jnp.where(chosen[:, None], value, values),
        ages=jnp.where(chosen, 0, ages + 1),
    )
