"""The problems that optimizers are compared on: random quadratics, and digits read by a softmax model or a network."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key, UInt8

from hyperax.experiments.mnist import Digits, load_mnist
from hyperax.problem import Data, Problem, Shared, W
from hyperax.rollout import check_steps

DataName = Literal["mnist", "digits"]


@dataclass(frozen=True)
class Family:
    """A distribution of inner problems.

    Fields:
        problem: L of a step, with its mini-batch, and E, the loss that an optimizer is judged by.
        own: key -> what one problem has for itself, a dict.
        pool: what all its problems share: images and labels, or `None`.
        parallel: how many of its inner runs are mapped together; `None`: all.
    """

    problem: Problem
    own: Callable[[Key[Array, ""]], Data]
    pool: Data = None
    parallel: int | None = None

    def draw(self, key: Key[Array, ""], pool: Data) -> Data:
        """The data of one problem; `pool` is an argument, so that compiled programs do not hold a copy of it."""
        return {"own": self.own(key), "pool": pool}

    def tasks(self, key: Key[Array, ""], count: int) -> Data:
        """So many problems, with a task axis on what is their own; the same ones for the same key."""
        own = jax.jit(lambda key: jax.vmap(self.own)(jax.random.split(key, count)))
        return {"own": own(key), "pool": Shared(self.pool)}

    def start(self, key: Key[Array, ""]) -> W:
        """w_0 of one problem, which does not depend on the pool."""
        return jax.jit(lambda key: self.problem.start(None, self.draw(key, None)))(key)


def quadratics(dimensions: int, start: float) -> Family:
    """Random quadratics with a minimum of zero.

        L(w) = |A w - b|^2,   A [n, n] and b [n] standard Gaussian,   w_0 Gaussian of standard deviation `start`

    Arguments:
        dimensions: n.
        start: 0 begins at the origin.

    Reference: Andrychowicz et al. 2016, Sec. 3.1, with n = 10.

    >>> family = quadratics(10, 0.0)
    >>> family.tasks(jax.random.key(0), 3)["own"]["A"].shape
    (3, 10, 10)
    """

    def own(key: Key[Array, ""]) -> Data:
        normal = lambda key, *shape: jax.random.normal(key, shape, jnp.float32)
        matrix, target, w = jax.random.split(key, 3)
        n = dimensions
        return {"A": normal(matrix, n, n), "b": normal(target, n), "w": np.float32(start) * normal(w, n)}

    def loss(w: Float[Array, " n"], lam: Any, d: Data) -> Float[Array, ""]:
        return jnp.sum((d["own"]["A"] @ w - d["own"]["b"]) ** 2)

    return Family(Problem(inner=loss, outer=loss, init=lambda lam, d: d["own"]["w"]), own)


class Images(NamedTuple):
    """Images as rows of pixels, and their labels, on the device."""

    pixels: UInt8[Array, "n pixels"]
    labels: Int[Array, " n"]


def classification(images: Images, hidden: int, batch_size: int, measured: int, block: int = 1) -> Family:
    """Models of ten classes on mini-batches of these images, from random weights.

        z = W x + c   (softmax regression),   or   z = W sigmoid(V x + a) + c   with `hidden` units
        L_t(w) = mean over B_t of - log softmax(z)_y,   E(w) = the same over the images that are measured

    B_t is drawn with replacement from all images, by the key of the problem and t. Weights begin as Gaussians of
    standard deviation 1 / sqrt(inputs), biases at zero.

    With a `block` b > 1 the pixels of each b x b block share their weights: a cheaper problem, with b^2 times fewer
    coordinates in the first layer, on which a coordinatewise rule learns steps that are right for single pixels. For
    that x are the sums of blocks, L_t is divided by b^2, so that gradients are the means over blocks of those of single
    pixels, and weights begin as the means of b^2 Gaussians.

    Arguments:
        images: all images of the family.
        hidden: units of the hidden layer; 0 for softmax regression.
        batch_size: images in B_t.
        measured: images that E is a mean over; each problem draws its own, without repetition.
        block: b, a divisor of the side of the images, which are square then.

    Raises: `ValueError` for more measured images than there are, counts that are none, or a block that does not fit.
    Reference: Andrychowicz et al. 2016, Sec. 3.2: 20 sigmoid units, mini-batches of 128.

    >>> images = Images(jnp.zeros((30, 4), jnp.uint8), jnp.zeros(30, jnp.int32))
    >>> own = classification(images, 3, 8, 5).tasks(jax.random.key(0), 2)["own"]
    >>> own["w"]["hidden"]["weight"].shape, own["measured"].shape
    ((2, 4, 3), (2, 5))
    """
    for name, value, least in (("hidden", hidden, 0), ("batch_size", batch_size, 1), ("measured_images", measured, 1)):
        check_steps(value, name, least)
    count, pixels = images.pixels.shape
    blocks = in_blocks(pixels, block)
    inputs = pixels // block**2
    if measured > count:
        raise ValueError(f"measured_images is {measured}, and a side has {count} images here: use at most so many")
    sizes = {"hidden": (inputs, hidden), "output": (hidden, 10)} if hidden else {"output": (inputs, 10)}
    first = next(iter(sizes))

    def own(key: Key[Array, ""]) -> Data:
        weights, batches, chosen = jax.random.split(key, 3)
        keys = dict(zip(sizes, jax.random.split(weights, len(sizes)), strict=True))
        w = {name: _layer(keys[name], *size) for name, size in sizes.items()}
        # From Gaussians of 1 / sqrt(blocks) to means of b^2 Gaussians of 1 / sqrt(pixels).
        w[first]["weight"] = w[first]["weight"] / np.float32(block**2)
        return {"w": w, "key": batches, "measured": jax.random.permutation(chosen, count)[:measured]}

    def chosen(pool: Images, index: Int[Array, " k"]) -> tuple[Array, Array]:
        x, y = _chosen(pool, index)
        return blocks(x), y

    def batch(d: Data, t: Int[Array, ""]) -> Data:
        return chosen(d["pool"], jax.random.randint(jax.random.fold_in(d["own"]["key"], t), (batch_size,), 0, count))

    problem = Problem(
        inner=lambda w, lam, examples: _cross_entropy(w, *examples) / block**2,
        outer=lambda w, lam, d: _cross_entropy(w, *chosen(d["pool"], d["own"]["measured"])),
        init=lambda lam, d: d["own"]["w"],
        batch=batch,
    )
    # What a processor computes for one problem stays in its cache; an accelerator wants them all.
    return Family(problem, own, images, 1 if jax.default_backend() == "cpu" else None)


def in_blocks(pixels: int, block: int) -> Callable[[Float[Array, "k pixels"]], Float[Array, "k blocks"]]:
    """Sums over square blocks of pixels of square images; with blocks of one pixel, the pixels.

    Raises: `ValueError` for a block whose side does not divide that of the images.

    >>> in_blocks(16, 2)(jnp.arange(16.0)[None]).tolist()
    [[10.0, 18.0, 42.0, 50.0]]
    """
    check_steps(block, "block", 1)
    side = math.isqrt(pixels)
    if block > 1 and (side**2 != pixels or side % block):
        raise ValueError(f"block is {block}; images of {pixels} pixels are not made of such squares: use 1")
    n = side // block
    return lambda x: x if block == 1 else x.reshape(-1, n, block, n, block).sum((2, 4)).reshape(-1, n**2)


def _layer(key: Key[Array, ""], inputs: int, outputs: int) -> dict[str, Array]:
    weight = jax.random.normal(key, (inputs, outputs), jnp.float32) / np.float32(inputs**0.5)
    return {"weight": weight, "bias": jnp.zeros(outputs, jnp.float32)}


def _chosen(images: Images, index: Int[Array, " k"]) -> tuple[Array, Array]:
    """Pixels in [0, 1] and labels of these images: only they are ever held as numbers of four bytes."""
    return images.pixels[index].astype(jnp.float32) / 255, images.labels[index]


def _cross_entropy(w: Any, x: Float[Array, "k pixels"], y: Int[Array, " k"]) -> Float[Array, ""]:
    affine = lambda layer, x: x @ layer["weight"] + layer["bias"]
    features = jax.nn.sigmoid(affine(w["hidden"], x)) if "hidden" in w else x
    return optax.softmax_cross_entropy_with_integer_labels(affine(w["output"], features), y).mean()


class Sides(NamedTuple):
    """The images that optimizers are trained and tuned on, and those of the problems that test them."""

    training: Images
    test: Images
    provenance: dict[str, Any]


def load_sides(name: DataName, data_dir: str | None) -> Sides:
    """MNIST, whose test set is the test side, or the digits of scikit-learn, every other one of which is.

    Raises: `ValueError` for files of MNIST that are not there.

    >>> [len(side.labels) for side in load_sides("digits", None)[:2]]
    [899, 898]
    """
    if name == "mnist":
        mnist = load_mnist(data_dir)
        return Sides(_images(mnist.train), _images(mnist.test), mnist.provenance)
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    # 0 to 16 there; of each two images in a row one is on either side.
    images, labels = np.round(found.images * (255 / 16)).astype(np.uint8), found.target.astype(np.uint8)
    half = lambda side: _images(Digits(images[side::2], labels[side::2]))
    return Sides(half(0), half(1), {"dataset": "digits of scikit-learn"})


def _images(digits: Digits) -> Images:
    flat = digits.images.reshape(len(digits.images), -1)
    return Images(jnp.asarray(flat), jnp.asarray(digits.labels, jnp.int32))
