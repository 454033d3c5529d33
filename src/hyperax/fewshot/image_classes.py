"""Images grouped by class: what episodes are drawn from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import equinox as eqx
import numpy as np
from jaxtyping import Array, Int32, UInt8


class ImageClasses(eqx.Module):
    """All the images of some classes in one array, class after class.

    The images of class c are `images[start[c] : start[c] + count[c]]`, so drawing an episode is integer arithmetic
    and one gather. The arrays are NumPy's until the caller moves them: `jax.device_put(classes)` (uint8, a quarter of
    the float size; divide by 255 after the gather).

    Arguments:
        images: [M, H, W, C], 0 to 255.
        start: [classes], index of the first image of each class.
        count: [classes], number of images of each class, at least one.
        names: the name of each class. They are static, so two sets with different names are two compilations.

    Raises: ValueError for shapes, dtypes or ranges that do not fit together.

    >>> classes = ImageClasses.from_lists({"a": np.zeros((2, 4, 4)), "b": np.ones((3, 4, 4))})
    >>> classes.num_classes, classes.image_shape, classes.start.tolist(), classes.count.tolist()
    (2, (4, 4, 1), [0, 2], [2, 3])
    >>> classes.rotated().names
    ('a', 'b', 'a@90', 'b@90', 'a@180', 'b@180', 'a@270', 'b@270')
    """

    images: UInt8[Array | np.ndarray, "images height width channels"]
    start: Int32[Array | np.ndarray, " classes"]
    count: Int32[Array | np.ndarray, " classes"]
    names: tuple[str, ...] = eqx.field(static=True)
    largest: int = eqx.field(static=True, init=False)

    def __post_init__(self) -> None:
        # Static, because inside a compiled step the counts are not known and a draw needs a bound on them.
        self.largest = int(np.max(np.asarray(self.count), initial=0))

    def __check_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype != np.uint8:
            raise ValueError(
                f"images are uint8 of shape [M, H, W, C], not {self.images.dtype} of shape {self.images.shape}: "
                "scale them to 0..255 and add the channel axis"
            )
        start, count = np.asarray(self.start), np.asarray(self.count)
        if start.shape != (len(self.names),) or count.shape != (len(self.names),) or not self.names:
            raise ValueError(
                f"start and count have one entry for each of the {len(self.names)} class names (at least one), "
                f"not shapes {start.shape} and {count.shape}"
            )
        if count.min() < 1 or start.min() < 0 or (start + count).max() > len(self.images):
            worst = self.names[int(np.argmin(count))]
            raise ValueError(
                f"every class has at least one image, inside the array of {len(self.images)} images; "
                f"the smallest class, {worst!r}, has {count.min()}"
            )

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of every image."""
        _, height, width, channels = self.images.shape
        return height, width, channels

    @classmethod
    def from_counts(cls, images: np.ndarray, counts: Mapping[str, int]) -> ImageClasses:
        """Wrap an array in which the classes follow each other.

        Arguments:
            images: [M, H, W, C], uint8; kept as it is (no copy, so a memory map stays one).
            counts: images of each class, in the order of the array; they sum to M.

        Raises: ValueError when the counts do not sum to M.
        """
        count = np.array(list(counts.values()), np.int32)
        if count.sum() != len(images):
            raise ValueError(f"the counts sum to {count.sum()} but there are {len(images)} images")
        return cls(images, np.cumsum(count, dtype=np.int32) - count, count, tuple(counts))

    @classmethod
    def from_lists(cls, classes: Mapping[str, Sequence[Any] | np.ndarray]) -> ImageClasses:
        """Build from the images of each class.

        Arguments:
            classes: for each name its images [H, W] or [H, W, C], all of one shape, with integer values 0 to 255.

        Raises: ValueError for an empty class, different shapes, or values that are not integers 0 to 255.
        Cost: one copy of the images.
        """
        blocks = []
        for name, images in classes.items():
            shapes = {np.shape(image) for image in images}
            if len(shapes) != 1:
                raise ValueError(f"class {name!r} needs images, all of one shape, not the shapes {sorted(shapes)}")
            block = np.stack([np.asarray(image) for image in images])
            block = block[..., None] if block.ndim == 3 else block
            eight_bits = block.astype(np.uint8)
            if not np.array_equal(eight_bits, block):
                raise ValueError(f"class {name!r} has values that are not integers from 0 to 255: scale and round them")
            if blocks and blocks[0].shape[1:] != block.shape[1:]:
                raise ValueError(f"class {name!r} has images of {block.shape[1:]}, others of {blocks[0].shape[1:]}")
            blocks.append(eight_bits)
        if not blocks:
            raise ValueError("there is no class: give at least one")
        counts = {name: len(block) for name, block in zip(classes, blocks, strict=True)}
        return cls.from_counts(np.concatenate(blocks), counts)

    @staticmethod
    def join(*parts: ImageClasses) -> ImageClasses:
        """The classes of all the parts, one part after the other (one copy of the images)."""
        offsets = np.cumsum([0] + [len(part.images) for part in parts[:-1]])
        return ImageClasses(
            np.concatenate([np.asarray(part.images) for part in parts]),
            np.concatenate([part.start + offset for part, offset in zip(parts, offsets, strict=True)]).astype(np.int32),
            np.concatenate([part.count for part in parts]).astype(np.int32),
            tuple(name for part in parts for name in part.names),
        )

    def rotated(self) -> ImageClasses:
        """Four times the classes: each as it is, then all of them rotated by 90, 180 and 270 degrees.

        Rotations are counterclockwise, and a rotated class is a new class, named "name@90" and so on.

        Raises: ValueError for images that are not square.
        Cost: four times the memory.
        Reference: Santoro et al. 2016; Franceschi et al. 2018, Sec. 5.2.
        Do not use where a rotated class is another class already (arrows, Canadian syllabics).
        """
        height, width, _ = self.image_shape
        if height != width:
            raise ValueError(f"rotation needs square images, not {height} x {width}: crop or resize them first")
        turns = [
            ImageClasses(
                np.rot90(self.images, quarter, axes=(1, 2)),
                self.start,
                self.count,
                tuple(f"{name}@{90 * quarter}" for name in self.names),
            )
            for quarter in (1, 2, 3)
        ]
        return ImageClasses.join(self, *turns)

    def subset(self, class_indices: Sequence[int] | np.ndarray) -> ImageClasses:
        """Only some classes, in the given order.

        Arguments:
            class_indices: which classes, 0 to num_classes - 1.

        Raises: ValueError for an index outside, a class named twice, or none.
        Cost: a view where the images lie side by side in the given order (a memory map stays one), else one copy.
        """
        chosen = np.asarray(class_indices, np.int64)
        if chosen.ndim != 1 or not len(chosen) or chosen.min() < 0 or chosen.max() >= self.num_classes:
            raise ValueError(f"class indices go from 0 to {self.num_classes - 1}, at least one, not {class_indices!r}")
        if len(np.unique(chosen)) != len(chosen):
            raise ValueError("a class is named twice in the subset: name each class once")
        start, count = np.asarray(self.start)[chosen], np.asarray(self.count)[chosen]
        images = np.asarray(self.images)
        if np.array_equal(start[1:], (start + count)[:-1]):
            images = images[start[0] : start[-1] + count[-1]]
        else:
            images = images[np.concatenate([np.arange(s, s + c) for s, c in zip(start, count, strict=True)])]
        return ImageClasses.from_counts(images, {self.names[c]: int(n) for c, n in zip(chosen, count, strict=True)})


@dataclass(frozen=True)
class MetaDataset:
    """Classes for meta-training, meta-validation and meta-test, and where they come from.

    Arguments:
        name: what a report calls it.
        train: the classes that hyperparameters are fitted on.
        validation: the classes that choose when to stop and among settings.
        test: the classes that a number is reported on.
        provenance: everything that determines the arrays, in JSON types: configuration, source digests, digests of
            the decoded arrays, number of classes and images of each split.

    >>> one = ImageClasses.from_lists({"a": np.zeros((2, 4, 4)), "b": np.ones((3, 4, 4))})
    >>> list(MetaDataset("Tiny", one, one, one, {}).splits)
    ['train', 'validation', 'test']
    """

    name: str
    train: ImageClasses
    validation: ImageClasses
    test: ImageClasses
    provenance: dict[str, Any]

    @property
    def splits(self) -> dict[str, ImageClasses]:
        """The three sets by name, in the order train, validation, test."""
        return {"train": self.train, "validation": self.validation, "test": self.test}
