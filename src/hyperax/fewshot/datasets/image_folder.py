"""Any folder of class folders with images."""

from __future__ import annotations

import logging
import math
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from hyperax.fewshot.datasets import sources
from hyperax.fewshot.datasets.cache import cached
from hyperax.fewshot.datasets.decode import choice, decode, decoder_version, eight_bits, positive_size
from hyperax.fewshot.datasets.provenance import meta_dataset
from hyperax.fewshot.image_classes import ImageClasses, MetaDataset

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

_SUBFOLDERS = {"train": ("train",), "validation": ("val", "validation"), "test": ("test",)}


@dataclass(frozen=True)
class ImageFolder:
    """Your own images: one folder per class, images of any sizes, modes and formats that Pillow reads.

    An image is turned upright (EXIF), laid over white where transparent, converted to `mode`, scaled so that its
    shorter side is `size`, with anti-aliasing, and cropped to the centre.

    Raises: ValueError for a folder that is missing or holds fewer than three classes, an empty class, an image that
        cannot be read, a class in two splits, or fractions that do not sum to 1.
    Cost: the first load decodes everything; afterwards the cache is used until a file is added, removed or changed.
    Do not use `fractions` where classes come in families (one bird in several folders): keep a family in one part, by
    the subfolders train, val and test.

    >>> ImageFolder("birds", mode="L").fractions
    (0.64, 0.16, 0.2)
    >>> ImageFolder().load("birds").train.num_classes  # doctest: +SKIP
    32
    """

    path: str = ""
    """The folder of class folders; empty: the data folder itself (--data-dir or HYPERAX_DATA). A relative one is looked
    for in --data-dir if that is given, then from here, then in HYPERAX_DATA."""
    size: int = 84
    """Side of the images, in pixels."""
    mode: Literal["RGB", "L"] = "RGB"
    """Colour (three channels) or grey (one)."""
    split: Literal["auto", "fractions", "folders"] = "auto"
    """fractions: classes are drawn by the seed. folders: the class folders are in train/, val/ (or validation/) and
    test/. auto: folders where these three exist, else fractions."""
    fractions: tuple[float, float, float] = (0.64, 0.16, 0.2)
    """Parts of the classes for training, validation and test; each gets one class at least."""
    seed: int = 0
    """Draws the classes of each part."""

    def __post_init__(self) -> None:
        choice("mode", self.mode, ("RGB", "L"))
        choice("split", self.split, ("auto", "fractions", "folders"))
        positive_size(self.size)
        if (
            len(self.fractions) != 3
            or min(self.fractions) <= 0
            or not math.isclose(sum(self.fractions), 1, abs_tol=1e-6)
        ):
            raise ValueError(
                "fractions are three positive numbers (train, validation, test) that sum to 1, "
                f"not {self.fractions} with the sum {sum(self.fractions):g}"
            )

    def load(self, data_dir: str | None = None, cache_dir: str | None = None) -> MetaDataset:
        """Read the folder.

        Arguments:
            data_dir: the folder, or what a relative `path` starts from; else the environment variable HYPERAX_DATA.
            cache_dir: where decoded images are kept; else the environment variable HYPERAX_CACHE, else
                `~/.cache/hyperax`.
        """
        folder = self._folder(data_dir)
        subfolders = self._subfolders(folder)
        with sources.Archive(folder) as archive:
            found = {split: _classes(archive, name) for split, name in subfolders.items()}
            if "all" in found and len(found["all"]) < 3:
                raise ValueError(
                    f"{folder} has {len(found['all'])} class folder(s) with images, and three sets of classes need "
                    "three at least: add classes, one folder each"
                )
            repeated = [name for name, times in Counter(n for c in found.values() for n in c).items() if times > 1]
            if repeated:
                raise ValueError(
                    f"the class(es) {', '.join(sorted(repeated)[:3])} are in two of the splits in {folder}: "
                    "validation and test need classes that training does not see, so keep each class in one split"
                )

            def build(allocate):
                for split, classes in found.items():
                    files = [file for images in classes.values() for file in images]
                    decode(archive, files, self._convert, allocate(split, (len(files), *self._image_shape)))
                return {split: {name: len(images) for name, images in c.items()} for split, c in found.items()}

            key = {"sources": archive.digest, "shape": self._image_shape, "splits": subfolders}
            parts, arrays = cached("folder", key | {"decoder": decoder_version()}, build, cache_dir)
            digest = archive.digest
        splits = self._by_fractions(parts["all"]) if "all" in parts else [parts[split] for split in _SUBFOLDERS]
        return meta_dataset(
            folder.name,
            splits,
            config=asdict(self) | {"fractions": list(self.fractions)},
            split="fractions" if "all" in parts else "folders",
            decoder=decoder_version(),
            sources={"files": digest},
            arrays=arrays,
        )

    @property
    def _image_shape(self) -> tuple[int, int, int]:
        return self.size, self.size, 3 if self.mode == "RGB" else 1

    def _folder(self, data_dir: str | None) -> Path:
        named, given = sources.named_folder(data_dir), Path(self.path).expanduser()
        if self.path:
            places = [given, sources.data_folder(data_dir) / given]
            places = places[::-1] if data_dir else places  # what was said outright comes before where we happen to be
        elif named is not None:
            places = [named]
        else:
            raise ValueError("name your folder of class folders: --data-dir DIR or HYPERAX_DATA")
        for folder in places:
            if folder.is_dir():
                return folder.absolute()
        raise ValueError(f"{' or '.join(map(str, places))} is not a folder: check the path, --data-dir or HYPERAX_DATA")

    def _subfolders(self, folder: Path) -> dict[str, str]:
        """The subfolder of each split, or "all" for the folder itself."""
        if self.split == "fractions":
            return {"all": ""}
        found = {
            split: next((name for name in names if (folder / name).is_dir()), "")
            for split, names in _SUBFOLDERS.items()
        }
        if all(found.values()):
            return found
        if self.split == "auto":
            return {"all": ""}
        absent = [" or ".join(_SUBFOLDERS[split]) for split, name in found.items() if not name]
        raise ValueError(f"split 'folders' needs the subfolder(s) {', '.join(absent)} in {folder}")

    def _convert(self, image: Image) -> Image:
        from PIL import Image, ImageOps

        # `fit` crops to the centred square first and scales it then: the same picture, less work.
        return ImageOps.fit(eight_bits(image, self.mode), (self.size, self.size), Image.Resampling.LANCZOS)

    def _by_fractions(self, classes: ImageClasses) -> list[ImageClasses]:
        edges = np.rint(np.cumsum(self.fractions)[:2] * classes.num_classes).astype(int)
        first = int(np.clip(edges[0], 1, classes.num_classes - 2))
        second = int(np.clip(edges[1], first + 1, classes.num_classes - 1))
        order = np.random.default_rng(self.seed).permutation(classes.num_classes)
        return [classes.subset(chosen) for chosen in np.split(order, [first, second])]


def _classes(archive: sources.Archive, subfolder: str) -> dict[str, list[str]]:
    """The image files of each class folder, in order of name."""
    from PIL import Image

    Image.init()
    suffixes = set(Image.registered_extensions())
    root = archive.path / subfolder
    classes: dict[str, list[str]] = {
        folder.name: [] for folder in sorted(root.iterdir()) if folder.is_dir() and not folder.name.startswith(".")
    }
    prefix = f"{subfolder}/" if subfolder else ""
    ignored = []
    for file in archive.files:
        if file.startswith(prefix):
            inside = file[len(prefix) :].split("/")
            if len(inside) == 2 and Path(file).suffix.lower() in suffixes:
                classes[inside[0]].append(file)
            else:
                ignored.append(file)
    if ignored:
        log.warning("%d file(s) in %s are not <class>/<image> and were left out: %s", len(ignored), root, ignored[:3])
    if empty := [name for name, files in classes.items() if not files]:
        raise ValueError(
            f"the class folder(s) {', '.join(empty[:3])} in {root} hold no image: fill or remove them "
            "(subfolders of a class are not searched)"
        )
    if not classes:
        raise ValueError(f"{root} holds no class folder: put the images of each class into a folder of its own")
    return classes
