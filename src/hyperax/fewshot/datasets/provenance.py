"""What determines a dataset, and how it is shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hyperax.fewshot.image_classes import ImageClasses, MetaDataset


def meta_dataset(name: str, splits: Sequence[ImageClasses], **determined_by: Any) -> MetaDataset:
    """A dataset with its provenance.

    Arguments:
        name: what a report calls it.
        splits: training, validation and test classes.
        determined_by: configuration, digests and versions, in JSON types.
    """
    train, validation, test = splits
    named = {"train": train, "validation": validation, "test": test}
    provenance = {
        "dataset": name,
        **determined_by,
        "classes": {split: classes.num_classes for split, classes in named.items()},
        "images": {split: int(classes.count.sum()) for split, classes in named.items()},
        "image_shape": list(train.image_shape),
    }
    return MetaDataset(name, train, validation, test, provenance)


def describe(dataset: MetaDataset) -> str:
    """A short table of a dataset: classes, images and image size of each split, then the options that made it.

    Arguments:
        dataset: as a data set's `load` returns it.

    Returns: lines for people, without a last line break.

    >>> import numpy as np
    >>> one = ImageClasses.from_lists({"a": np.zeros((2, 4, 4)), "b": np.zeros((3, 4, 4))})
    >>> print(describe(MetaDataset("Tiny", one, one, one, {"config": {"seed": 0}})))
    Tiny
    split       classes  images  per class  image
    train             2       5        2-3  4 x 4 x 1
    validation        2       5        2-3  4 x 4 x 1
    test              2       5        2-3  4 x 4 x 1
    seed=0
    """
    lines = [dataset.name, f"{'split':<10}  {'classes':>7}  {'images':>6}  {'per class':>9}  image"]
    for name, classes in dataset.splits.items():
        low, high = int(classes.count.min()), int(classes.count.max())
        each = f"{low}" if low == high else f"{low}-{high}"
        shape = " x ".join(map(str, classes.image_shape))
        lines.append(f"{name:<10}  {classes.num_classes:>7}  {int(classes.count.sum()):>6}  {each:>9}  {shape}")
    options = dataset.provenance.get("config", {})
    return "\n".join([*lines, ", ".join(f"{option}={value}" for option, value in options.items())])
