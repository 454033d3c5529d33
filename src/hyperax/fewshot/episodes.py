"""Episodes: N-way K-shot classification tasks drawn on the device from a key."""

from __future__ import annotations

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key, UInt8

from hyperax.fewshot.image_classes import ImageClasses


class Episode(NamedTuple):
    """One few-shot task (several of them with a leading task axis).

    Fields:
        support: images to learn from (D_tr), uint8 [N K, height, width, channels], class by class.
        support_labels: int32 [N K], 0, ..., N - 1.
        query: images to be classified (D_val), uint8 [N Q, height, width, channels].
        query_labels: int32 [N Q].
        support_mask: which support images are there, bool [N K]; `None`: all. The others are padding, so that tasks
            with other numbers of classes and shots have one shape; a class without support images is not in the task.
        query_mask: the same for the query images, bool [N Q].

    >>> images = jnp.zeros((2, 4, 4, 1), jnp.uint8)
    >>> Episode(images, jnp.arange(2), images, jnp.arange(2)).support.shape
    (2, 4, 4, 1)
    """

    support: UInt8[Array, "NK height width channels"]
    support_labels: Int[Array, " NK"]
    query: UInt8[Array, "NQ height width channels"]
    query_labels: Int[Array, " NQ"]
    support_mask: Bool[Array, " NK"] | None = None
    query_mask: Bool[Array, " NQ"] | None = None


class Episodes(eqx.Module):
    """A distribution over N-way K-shot episodes: N classes without replacement, K + Q images from each.

    Arguments:
        ways: N, classes an episode.
        shots: K, support images a class.
        queries: Q, query images a class.
        overlap: `False`: support and query images are disjoint. `True`: both are drawn independently, as in the
            papers' code, so that a query image may be among the support images (K / n of them on average, n the
            images of the class); results obtained so are to be labelled.
        fewest_ways: draw the number of classes of each episode from `fewest_ways`, ..., `ways`; the episode keeps its
            shape, with masks. `None`: always `ways`.
        fewest_shots: likewise for the number of support images a class.
        held_out: `False`: the query set is the support set, `queries` without effect (the papers' -train variants).

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
    fewest_ways: int | None = None
    fewest_shots: int | None = None
    held_out: bool = True

    def __check_init__(self):
        for name in ("ways", "shots", "queries"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < (2 if name == "ways" else 1):
                raise ValueError(
                    f"{name} must be a whole number, at least {2 if name == 'ways' else 1}; it is {value!r}"
                )
        if self.overlap and not self.held_out:
            raise ValueError("overlap has no effect with held_out=False, where both sets are the same: leave one out")
        for name, least, most in (("fewest_ways", 2, self.ways), ("fewest_shots", 1, self.shots)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise ValueError(f"{name} must be a whole number or None; it is {value!r}")
            if value is not None and not least <= value <= most:
                raise ValueError(f"{name} is {value}; it must be from {least} to {most}, the most that are drawn")

    def check(self, classes: ImageClasses, where: str = "this set") -> None:
        """Raise `ValueError` if these classes cannot give such episodes: too few classes, or images in a class."""
        count = len(classes.names)
        if count < self.ways:
            raise ValueError(
                f"{self.ways}-way episodes need {self.ways} classes and {where} has {count}: use fewer ways or more "
                "classes"
            )
        queries = self._queries
        needed = max(self.shots, queries) if self.overlap else self.shots + queries
        fewest = int(classes.count.argmin())
        if classes.count[fewest] < needed:
            raise ValueError(
                f"class {classes.names[fewest]!r} of {where} has {int(classes.count[fewest])} images and an episode "
                f"needs {needed} ({self.shots} shots, {queries} queries): use fewer, or remove the class"
            )

    @property
    def _queries(self) -> int:
        """Query images a class beside the support images."""
        return self.queries if self.held_out else 0

    def sample(self, key: Key[Array, ""], classes: ImageClasses) -> Episode:
        """One episode, a pure function of the key; traceable, so it can be drawn inside a compiled step."""
        for_classes, for_support, for_query = jax.random.split(key, 3)
        # NumPy's arrays, as they are before a device_put, cannot be indexed by what is traced.
        all_images, start, count = (jnp.asarray(x) for x in (classes.images, classes.start, classes.count))
        chosen = _choose(for_classes, len(start), self.ways)
        most = self.shots + self._queries
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
        shown, of_shown = images(support), jnp.repeat(labels, self.shots)
        support_mask, query_mask = self._masks(jax.random.fold_in(key, 3))
        if not self.held_out:
            return Episode(shown, of_shown, shown, of_shown, support_mask, support_mask)
        return Episode(shown, of_shown, images(query), jnp.repeat(labels, self.queries), support_mask, query_mask)

    def _masks(self, key: Key[Array, ""]) -> tuple[Array | None, Array | None]:
        """Which images of the largest episode are in one with as many classes and shots as the key says."""
        if self.fewest_ways is None and self.fewest_shots is None:
            return None, None
        for_ways, for_shots = jax.random.split(key)
        draw = lambda key, least, most: jax.random.randint(key, (), most if least is None else least, most + 1)
        in_task = jnp.arange(self.ways) < draw(for_ways, self.fewest_ways, self.ways)
        shown = jnp.arange(self.shots) < draw(for_shots, self.fewest_shots, self.shots)
        return (in_task[:, None] & shown).reshape(-1), jnp.repeat(in_task, self.queries)

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
