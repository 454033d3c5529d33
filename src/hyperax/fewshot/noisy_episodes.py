"""Episodes whose support sets have wrong labels."""

from __future__ import annotations

from typing import final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from hyperax.fewshot.episodes import Episode, Episodes
from hyperax.fewshot.image_classes import ImageClasses


@final
class NoisyEpisodes(Episodes):
    """Episodes with a share of the support labels flipped to another class; the query labels stay right.

        y_i -> uniform over the other N - 1 classes with probability rho, each label by itself

    The images are those of `Episodes` with the same key. A class may lose all its labels, and is asked about in the
    query set all the same.

    Arguments:
        ways, shots, queries, overlap, held_out: as in `Episodes`. With `held_out=False` the query set is the support
            set with its right labels.
        share: rho, from 0 to below 1; at (N - 1) / N labels say nothing.

    Raises: `ValueError` for other shares, and for episodes of varying size.
    Cost: two random numbers for each support image.
    Reference: Natarajan et al. 2013, Sec. 1.1 (labels flipped independently, classes alike).
    Do not use it to say how a learner does on clean data: nobody flips labels there.

    >>> classes = ImageClasses.from_lists({name: [[[0]]] * 8 for name in "abc"})
    >>> noisy = NoisyEpisodes(ways=3, shots=5, queries=2, share=0.4)
    >>> episode = noisy.sample(jax.random.key(1), classes)
    >>> episode.support_labels.tolist(), episode.query_labels.tolist()
    ([0, 0, 0, 2, 0, 2, 1, 1, 0, 2, 2, 0, 0, 2, 2], [0, 0, 1, 1, 2, 2])
    """

    share: float = 0.3

    def __check_init__(self):
        if isinstance(self.share, bool) or not isinstance(self.share, int | float) or not 0 <= self.share < 1:
            raise ValueError(f"share is {self.share!r}; it is the share of flipped labels, from 0 to below 1")
        if self.fewest_ways is not None or self.fewest_shots is not None:
            raise ValueError(
                "in episodes of varying size a class without labels counts as absent, and flipping may leave it "
                "without: use a fixed number of ways and shots"
            )

    def sample(self, key: Key[Array, ""], classes: ImageClasses) -> Episode:
        """One episode, a pure function of the key."""
        episode = super().sample(key, classes)
        for_which, for_class = jax.random.split(jax.random.fold_in(key, 4))
        labels = episode.support_labels
        flipped = jax.random.uniform(for_which, labels.shape, jnp.float32) < self.share
        other = (labels + jax.random.randint(for_class, labels.shape, 1, self.ways, labels.dtype)) % self.ways
        return episode._replace(support_labels=jnp.where(flipped, other, labels))
