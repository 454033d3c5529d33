"""The features of a learned network, drawn into three sets."""

from __future__ import annotations

import hashlib
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from hyperax.experiments.effect_of_t.config import EffectOfTConfig
from hyperax.experiments.effect_of_t.problem import Sets
from hyperax.experiments.few_shot import load
from hyperax.experiments.run_folder import RunFolder
from hyperax.fewshot.image_classes import ImageClasses, MetaDataset
from hyperax.fewshot.networks import Network, encode


def draw_sets(config: EffectOfTConfig, network: Network, classes: ImageClasses, draw: int) -> Sets:
    """Draw classes and disjoint images, and compute their features; labels enter nowhere.

    Batch normalisation takes its statistics from the training images for all three sets, and so do the mean that is
    subtracted from the features (the linear model has no intercept) and the number that they are divided by, so that
    the mean squared norm of a training image is 1. A test image is classified on its own.
    """
    random = np.random.default_rng([config.seed, draw])
    sizes = (config.train_per_class, config.validation_per_class, config.test_per_class)
    edges = np.cumsum((0, *sizes))
    chosen = random.choice(classes.num_classes, config.classes, replace=False)
    start, count = np.asarray(classes.start), np.asarray(classes.count)
    index = np.stack([start[c] + random.permutation(count[c])[: edges[-1]] for c in chosen])
    parts = [np.asarray(classes.images)[index[:, a:b].ravel()] for a, b in pairwise(edges)]
    images = [jnp.asarray(part, jnp.float32) / 255 for part in parts]
    train, others = eqx.filter_jit(encode)(network, images[0], jnp.concatenate(images[1:]), "support")
    x = np.concatenate([train, others]).astype(jnp.result_type(float))
    x = x - np.mean(x[: len(images[0])], 0)
    x = jnp.asarray(x / np.sqrt(np.mean(np.sum(x[: len(images[0])] ** 2, 1))))
    features = jnp.split(x, np.cumsum([len(part) for part in images])[:-1])
    targets = [jnp.repeat(jnp.eye(config.classes, dtype=x.dtype), size, axis=0) for size in sizes]
    return Sets(*(part for pair in zip(features, targets, strict=True) for part in pair))


class Source(NamedTuple):
    """Where the features come from: the learned network, the images, and what determines both."""

    network: Network
    dataset: MetaDataset
    provenance: dict[str, Any]


def open_source(config: EffectOfTConfig, data_dir: str | None) -> Source:
    """The network and the images of the few-shot run; `ValueError`, with what to do, if they cannot give the sets."""
    folder = Path(config.representation)
    if not ((folder / "config.json").is_file() and (folder / "representation.eqx").is_file()):
        raise ValueError(
            f"there is no learned representation in {folder} (a run folder with config.json and representation.eqx): "
            "run `hyperax run omniglot-5way-1shot --out DIR` and give --representation DIR"
        )
    few_shot = RunFolder.open(folder)[1]
    dataset = few_shot.dataset.load(data_dir)
    classes = dataset.splits[config.split]
    needed = config.train_per_class + config.validation_per_class + config.test_per_class
    if classes.num_classes < config.classes:
        raise ValueError(f"the {config.split} split has {classes.num_classes} classes: use --classes, at most as many")
    if int(np.min(classes.count)) < needed:
        raise ValueError(
            f"a class has {int(np.min(classes.count))} images, and disjoint sets need {needed} "
            f"({config.train_per_class} + {config.validation_per_class} + {config.test_per_class}): use a smaller "
            "--test-per-class"
        )
    _, lam = load(folder, dataset.train.image_shape)
    digest = hashlib.sha256((folder / "representation.eqx").read_bytes()).hexdigest()
    trained = {"recipe": few_shot.recipe, "seed": few_shot.seed, "sha256": digest}
    return Source(lam["network"], dataset, {"representation": trained, "data": dataset.provenance})
