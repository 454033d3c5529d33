"""The domains: their images, and classes for training, validation and test that no other domain shows elsewhere."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hyperax.experiments.mnist import load_mnist
from hyperax.experiments.study import Opened
from hyperax.fewshot.datasets import Glyphs, Omniglot
from hyperax.fewshot.image_classes import ImageClasses

SPLITS = ("train", "validation", "test")
DIGITS_SPLIT = (5, 2)
"""How many of the ten digits are for training and for validation; the other three are the test."""

Splits = dict[str, ImageClasses]
"""For each of `SPLITS` its classes."""


@dataclass(frozen=True)
class Domain:
    """A data set as a domain.

    Fields:
        ways: classes of its tasks, in training and test; in validation the same, or as many as there are.
        load: from the data folder to (classes, provenance): `Splits`, or `ImageClasses` of the ten digits, which
            each draw splits anew.
    """

    ways: int
    load: Callable[[str | None], tuple[Splits | ImageClasses, dict[str, Any]]]


def _characters(dataset: Glyphs | Omniglot, data_dir: str | None) -> tuple[Splits, dict[str, Any]]:
    loaded = dataset.load(data_dir)
    return loaded.splits, loaded.provenance


def _digits(data_dir: str | None) -> tuple[ImageClasses, dict[str, Any]]:
    """The 8 x 8 digits that come with scikit-learn; ink 255."""
    from sklearn.datasets import load_digits

    bundled: Any = load_digits()
    images = np.round(bundled.images * (255 / 16)).astype(np.uint8)  # of 0, ..., 16
    return _ten_digits(images, bundled.target), {"dataset": "digits", "sha256": hashlib.sha256(images).hexdigest()}


def _mnist(data_dir: str | None) -> tuple[ImageClasses, dict[str, Any]]:
    """The training set of MNIST; its test set is not used."""
    mnist = load_mnist(data_dir)
    return _ten_digits(mnist.train.images, mnist.train.labels), mnist.provenance


def _ten_digits(images: np.ndarray, labels: np.ndarray) -> ImageClasses:
    # As many images of each: then the sets of all draws have one shape, and one compiled program serves them.
    most = int(np.bincount(labels).min())
    return ImageClasses.from_lists({f"digit {digit}": images[labels == digit][:most] for digit in range(10)})


DOMAINS = {
    "omniglot": Domain(20, lambda data_dir: _characters(Omniglot(), data_dir)),
    "glyphs": Domain(5, lambda data_dir: _characters(Glyphs(), data_dir)),
    "mnist": Domain(3, _mnist),
    "digits": Domain(3, _digits),
}
"""Their names are those of the option `domains`."""


def open_domains(names: tuple[str, ...], data_dir: str | None) -> Opened:
    """The images of these domains; `ValueError` where they are not there."""
    loaded = {name: DOMAINS[name].load(data_dir) for name in names}
    provenance = {name: found[1] for name, found in loaded.items()}
    return Opened({name: found[0] for name, found in loaded.items()}, provenance)


def split(loaded: Mapping[str, Any], seed: int) -> dict[str, Splits]:
    """The classes of each domain in one draw: the same digits for the same purpose in every domain that has digits."""
    first, second = DIGITS_SPLIT[0], sum(DIGITS_SPLIT)
    of_split = np.split(np.random.default_rng(seed).permutation(10), [first, second])

    def of_domain(classes: Any) -> Splits:
        if not isinstance(classes, ImageClasses):
            return classes
        return {name: _unnamed(classes.subset(chosen)) for name, chosen in zip(SPLITS, of_split, strict=True)}

    return {name: of_domain(classes) for name, classes in loaded.items()}


def _unnamed(classes: ImageClasses) -> ImageClasses:
    """Numbers in the place of names, which are static: other digits are to be no other program."""
    return ImageClasses(classes.images, classes.start, classes.count, tuple(map(str, range(classes.num_classes))))
