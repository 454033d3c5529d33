"""MNIST as arrays, from its four original files."""

from __future__ import annotations

import gzip
import hashlib
from typing import Any, NamedTuple

import numpy as np

from hyperax.fewshot.datasets.sources import find

_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_ADVICE = "get the four files of MNIST, such as train-images-idx3-ubyte.gz, and put them into a folder mnist/"


class Digits(NamedTuple):
    """Images, uint8 [n, height, width], ink 255; labels, uint8 [n]."""

    images: np.ndarray
    labels: np.ndarray


class Mnist(NamedTuple):
    """The two sets, and what determines them."""

    train: Digits
    test: Digits
    provenance: dict[str, Any]


def load_mnist(data_dir: str | None = None) -> Mnist:
    """The training and the test set.

    Arguments:
        data_dir: the folder that holds `mnist/`, or the files themselves; else the environment variable HYPERAX_DATA.

    Returns: `Mnist`; its provenance has the SHA-256 of each file.
    Raises: `ValueError` if a file is missing, damaged, or does not fit the others.
    Cost: half a second, 55 MB.
    """
    digests: dict[str, str] = {}
    sets = []
    for images, labels in _FILES.values():
        sets.append(Digits(_read(images, 3, data_dir, digests), _read(labels, 1, data_dir, digests)))
    for side, (images, labels) in zip(_FILES, sets, strict=True):
        if len(images) != len(labels):
            raise ValueError(f"MNIST has {len(images)} {side} images and {len(labels)} labels: {_ADVICE}")
    train, test = sets
    return Mnist(train, test, {"dataset": "MNIST", "sha256": digests})


def _read(name: str, ndim: int, data_dir: str | None, digests: dict[str, str]) -> np.ndarray:
    """The array of one file in the idx format: 0, 0, type 8 (unsigned byte), dimensions; their sizes; the bytes."""
    path = find("mnist", [f"{name}.gz", name], data_dir, _ADVICE)
    raw = path.read_bytes()
    digests[name] = hashlib.sha256(raw).hexdigest()
    try:
        content = gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (OSError, EOFError) as error:
        raise ValueError(f"{path} is damaged ({error}): {_ADVICE}") from None
    shape = np.frombuffer(content, ">u4", ndim, 4) if len(content) >= 4 + 4 * ndim else ()
    if content[:4] != bytes((0, 0, 8, ndim)) or len(content) != 4 + 4 * ndim + np.prod(shape, dtype=int):
        raise ValueError(f"{path} is not an idx file of unsigned bytes in {ndim} dimensions: {_ADVICE}")
    return np.frombuffer(content, np.uint8, offset=4 + 4 * ndim).reshape(shape)
