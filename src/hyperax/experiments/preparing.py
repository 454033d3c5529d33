"""Before anything long: the data and the network of a configuration, or one sentence on why they do not fit."""

from __future__ import annotations

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp

from hyperax.experiments.config import FewShotConfig
from hyperax.fewshot.image_classes import MetaDataset
from hyperax.fewshot.layers import own_moments
from hyperax.fewshot.networks import C4L, Network, OmniglotNet, ResidualNet

MakeNetwork = Callable[[tuple[int, int, int], jax.Array], Network]
"""(image shape, key) -> a representation."""

_NETWORKS: dict[str, Callable[..., Network]] = {"omniglot": OmniglotNet, "c4l": C4L, "rn": ResidualNet}


def load_dataset(config: FewShotConfig, data_dir: str | None) -> MetaDataset:
    """The images of a configuration; `ValueError` if they cannot give its episodes."""
    loaded = config.dataset.load(data_dir)
    if loaded.provenance.get("split") == "fractions":
        _check_fractions(config, [part.num_classes for part in loaded.splits.values()])
    config.training_episodes.check(loaded.train, "the training set")
    config.episodes.check(loaded.validation, "the validation set")
    config.episodes.check(loaded.test, "the test set")
    return loaded


def _check_fractions(config: FewShotConfig, counts: list[int]) -> None:
    """Raise `ValueError`, with fractions that would do, if the drawn parts of a folder have fewer classes than ways."""
    ways, train_ways = config.ways, config.training_episodes.ways
    needed = [train_ways, ways, ways]
    if all(count >= need for count, need in zip(counts, needed, strict=True)):
        return
    spare = sum(counts) - sum(needed)
    parts = f"{ways} classes in each of the three parts" if train_ways == ways else f"{_slashes(needed)} classes"
    said = (
        f"{ways}-way episodes{'' if train_ways == ways else f', {train_ways}-way in training,'} need {parts}, so at "
        f"least {sum(needed)} in all, and this folder has {sum(counts)}, split {_slashes(counts)}"
    )
    if spare < 0:
        raise ValueError(f"{said}: add classes or use fewer ways")
    # Of n classes, rounding a fraction to so many digits moves neither edge by half a class.
    digits = len(str(2 * sum(counts)))
    later = round((ways + spare // 3) / sum(counts), digits)
    fractions = " ".join(f"{x:.{digits}f}" for x in (1 - 2 * later, later, later))
    raise ValueError(f"{said}: use --dataset.fractions {fractions} or fewer ways")


def _slashes(counts: list[int]) -> str:
    return "/".join(map(str, counts))


def make_network(name: str, image_shape: tuple[int, int, int], key: jax.Array, filters: int | None = None) -> Network:
    """The papers' network of this name; "auto" is C4L for images of 64 pixels or more, else the Omniglot network."""
    if name == "auto":
        name = "c4l" if min(image_shape[:2]) >= 64 else "omniglot"
    more = {} if filters is None else {"filters": filters}
    return _NETWORKS[name](image_shape, key, **more)


def build_network(config: FewShotConfig, image_shape: tuple[int, int, int], own: MakeNetwork | None) -> Network:
    """The initial network of a run; `ValueError` if it does not map such images to vectors."""
    key = config.key("initialisation")
    network = own(image_shape, key) if own else make_network(config.network, image_shape, key)
    # Its shapes only: a network that does not fit the images is to be refused before the first compilation.
    images = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
    shape = " x ".join(map(str, image_shape))
    words = f"the network {type(network).__name__} does not map images of {shape} to vectors"
    try:
        features = eqx.filter_eval_shape(network, images, own_moments)
    except Exception as error:  # whatever a user's module raises
        raise ValueError(f"{words}: {str(error).strip().splitlines()[0]}") from error
    if getattr(features, "ndim", None) != 2 or features.shape[0] != 2:
        raise ValueError(f"{words}: for 2 images it returns {features}; wrap a module of one image in PerImage")
    return network


def asks_for_moments(network: Network, image_shape: tuple[int, int, int]) -> bool:
    """Whether the network normalises by batch statistics at all."""
    asked = []

    def moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        asked.append(x.shape)
        return own_moments(x)

    eqx.filter_eval_shape(network, jax.ShapeDtypeStruct((2, *image_shape), jnp.float32), moments)
    return bool(asked)
