"""Mini-batches of single images with the number of their class: what a standard multiclass network is trained on."""

from __future__ import annotations

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key, UInt8

from hyperax.fewshot.image_classes import ImageClasses
from hyperax.rollout import check_steps


class ImageBatch(NamedTuple):
    """Images and their classes.

    Fields:
        images: uint8 [images, height, width, channels], 0 to 255.
        labels: int32 [images], the index of the class among all classes.
        mask: which images count in a mean, bool [images]; `None`: all.

    >>> ImageBatch(jnp.zeros((2, 4, 4, 1), jnp.uint8), jnp.arange(2)).images.shape
    (2, 4, 4, 1)
    """

    images: UInt8[Array, "images height width channels"]
    labels: Int[Array, " images"]
    mask: Bool[Array, " images"] | None = None


class ImageBatches(eqx.Module):
    """A distribution over mini-batches: images drawn uniformly, with replacement, from those of all classes.

        (x, y) uniform over {(image i of class c, c) : i < n_c - held_out},   n_c the images of class c

    Arguments:
        size: images a batch.
        held_out: the last so many images of every class are never drawn by `sample`; `held_out_batches` has them. Data
            sets whose images are sorted within a class (by drawer, say) are to be shuffled before.

    Raises: `ValueError` for a size below 1 or a negative `held_out`; `check` for classes too small for it.
    Cost: of a draw, one gather of `size` images and a search in the cumulative counts of the classes.
    Reference: Bridge paper 2017, App. A (60 of the 600 images of each of the 64 classes held out, 3840 in all; there
    drawn uniformly, here as many of each class).
    Do not use it for few-shot tasks: `Episodes` draws them.

    >>> classes = ImageClasses.from_lists({name: [[[0]]] * 4 for name in "abc"})
    >>> batches = ImageBatches(size=5, held_out=1)
    >>> batch = batches.sample(jax.random.key(0), classes)
    >>> batch.images.shape, sorted(batches.held_out_batches(jax.random.key(1), classes).labels[0, :3].tolist())
    ((5, 1, 1, 1), [0, 1, 2])
    """

    size: int
    held_out: int = 0

    def __check_init__(self):
        check_steps(self.size, "size", 1)
        check_steps(self.held_out, "held_out")

    def check(self, classes: ImageClasses, where: str = "this set") -> None:
        """Raise `ValueError` if a class of these has no images but those held out."""
        fewest = int(classes.count.argmin())
        if classes.count[fewest] <= self.held_out:
            raise ValueError(
                f"class {classes.names[fewest]!r} of {where} has {int(classes.count[fewest])} images and "
                f"{self.held_out} of them are held out: hold out fewer, or remove the class"
            )

    def sample(self, key: Key[Array, ""], classes: ImageClasses) -> ImageBatch:
        """One mini-batch, a pure function of the key; traceable, so it can be drawn inside a compiled step."""
        images, start, count = (jnp.asarray(x) for x in (classes.images, classes.start, classes.count))
        drawn = count - self.held_out
        ends = jnp.cumsum(drawn)
        position = jax.random.randint(key, (self.size,), 0, ends[-1])
        label = jnp.searchsorted(ends, position, side="right").astype(jnp.int32)
        return ImageBatch(images[start[label] + position - (ends - drawn)[label]], label)

    def held_out_batches(self, key: Key[Array, ""], classes: ImageClasses) -> ImageBatch:
        """All held-out images once, in random order, as batches of `size` on a leading axis.

        The order matters where a network normalises by the statistics of a batch. The last batch is filled with images
        of the first ones, which its mask leaves out.

        Raises: `ValueError` if no images are held out.
        """
        if self.held_out == 0:
            raise ValueError("no images are held out, so there are none to measure on: give ImageBatches held_out=...")
        images, start, count = (jnp.asarray(x) for x in (classes.images, classes.start, classes.count))
        total = len(start) * self.held_out
        batches = -(-total // self.size)
        places = jnp.arange(batches * self.size).reshape(batches, self.size)
        chosen = jax.random.permutation(key, total)[places % total]
        label = (chosen // self.held_out).astype(jnp.int32)
        index = start[label] + count[label] - 1 - chosen % self.held_out
        return ImageBatch(images[index], label, places < total)
