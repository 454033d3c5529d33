"""Episodes: N-way K-shot classification tasks drawn on the device from a key."""

from __future__ import annotations

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key, UInt8

from hyperax.fewshot.image_classes import ImageClasses


class Episode(NamedTuple):
    """One few-shot task (several of them with a leading task axis).

    Fields:
        support: images to learn from (D_tr), uint8 [N K, height, width, channels], class by class.
        support_labels: int32 [N K], 0, ..., N - 1.
        query: images to be classified (D_val), uint8 [N Q, height, width, channels].
        query_labels: int32 [N Q].

    >>> images = jnp.zeros((2, 4, 4, 1), jnp.uint8)
    >>> Episode(images, jnp.arange(2), images, jnp.arange(2)).support.shape
    (2, 4, 4, 1)
    """

    support: UInt8[Array, "NK height width channels"]
    support_labels: Int[Array, " NK"]
    query: UInt8[Array, "NQ height width channels"]
    query_labels: Int[Array, " NQ"]


class Episodes(eqx.Module):
    """A distribution over N-way K-shot episodes: N classes without replacement, K + Q images from each.

    Arguments:
        ways: N, classes an episode.
        shots: K, support images a class.
        queries: Q, query images a class.
        overlap: `False`: support and query images are disjoint. `True`: both are drawn independently, as in the
            papers' code, so that a query image may be among the support images (K / n of them on average, n the
            images of the class); results obtained so are to be labelled.

    Raises: `ValueError` for counts below 1; `check` for classes that cannot give such episodes.
    Cost: of a draw, one gather of N (K + Q) images, and random numbers for every class and for the images of N classes.
    Reference: Franceschi et al. 2018, Sec. 5.2 (D_tr and D_val of an episode).
    Do not use `overlap` for numbers of your own: it makes the test easier, the more so the fewer images a class has.

    >>> classes = ImageClasses.from_lists({name: [[[0]]] * 4 for name in "abc"})
    >>> episode = Episodes(ways=2, shots=1, queries=3).sample(jax.random.key(0), classes)
    >>> episode.support.shape, episode.query_labels.tolist()
    ((2, 1, 1, 1), [0, 0, 0, 1, 1, 1])
    """

    ways: int
    shots: int
    queries: int
    overlap: bool = False

    def __check_init__(self):
        for name in ("ways", "shots", "queries"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < (2 if name == "ways" else 1):
                raise ValueError(
                    f"{name} must be a whole number, at least {2 if name == 'ways' else 1}; it is {value!r}"
                )

    def check(self, classes: ImageClasses, where: str = "this set") -> None:
        """Raise `ValueError` if these classes cannot give such episodes: too few classes, or images in a class."""
        count = len(classes.names)
        if count < self.ways:
            raise ValueError(
                f"{self.ways}-way episodes need {self.ways} classes and {where} has {count}: use fewer ways or more "
                "classes"
            )
        needed = max(self.shots, self.queries) if self.overlap else self.shots + self.queries
        fewest = int(classes.count.argmin())
        if classes.count[fewest] < needed:
            raise ValueError(
                f"class {classes.names[fewest]!r} of {where} has {int(classes.count[fewest])} images and an episode "
                f"needs {needed} ({self.shots} shots, {self.queries} queries): use fewer, or remove the class"
            )

    def sample(self, key: Key[Array, ""], classes: ImageClasses) -> Episode:
        """One episode, a pure function of the key; traceable, so it can be drawn inside a compiled step."""
        for_classes, for_support, for_query = jax.random.split(key, 3)
        # NumPy's arrays, as they are before a device_put, cannot be indexed by what is traced.
        all_images, start, count = (jnp.asarray(x) for x in (classes.images, classes.start, classes.count))
        chosen = _choose(for_classes, len(start), self.ways)
        most = self.shots + self.queries
        limit = count[chosen]
        if self.overlap:
            support = _choose_below(for_support, limit, self.shots, classes.largest)
            query = _choose_below(for_query, limit, self.queries, classes.largest)
        else:
            both = _choose_below(for_support, limit, most, classes.largest)
            support, query = both[:, : self.shots], both[:, self.shots :]

        def images(index: Array) -> Array:
            return all_images[(start[chosen][:, None] + index).reshape(-1)]

        labels = jnp.arange(self.ways, dtype=jnp.int32)
        return Episode(images(support), jnp.repeat(labels, self.shots), images(query), jnp.repeat(labels, self.queries))

    def sample_many(self, key: Key[Array, ""], classes: ImageClasses, count: int) -> Episode:
        """`count` episodes, stacked on a leading task axis."""
        return jax.vmap(lambda k: self.sample(k, classes))(jax.random.split(key, count))


def _choose(key: Key[Array, ""], count: int, size: int) -> Array:
    # The positions of the largest of `count` uniform numbers are a uniform draw without replacement; on a CPU this is
    # much faster than sorting a permutation of thousands of classes.
    return jax.lax.top_k(jax.random.uniform(key, (count,)), size)[1]


def _choose_below(key: Key[Array, ""], limit: Array, size: int, largest: int) -> Array:
    """For each class `size` different indices below its own limit; `largest` bounds all limits."""
    score = jax.random.uniform(key, (limit.shape[0], largest))
    score = jnp.where(jnp.arange(largest) < limit[:, None], score, -1.0)
    return jax.lax.top_k(score, size)[1]
