"""miniImageNet: 100 classes of ImageNet, 600 colour images each."""

from __future__ import annotations

import csv
import hashlib
import io
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hyperax.fewshot.datasets import sources
from hyperax.fewshot.datasets.cache import cached
from hyperax.fewshot.datasets.decode import decode, decoder_version, eight_bits, positive_size
from hyperax.fewshot.datasets.provenance import meta_dataset
from hyperax.fewshot.image_classes import MetaDataset

if TYPE_CHECKING:
    from PIL.Image import Image

_SPLITS = {"train": "train.csv", "validation": "val.csv", "test": "test.csv"}
_ADVICE = (
    "miniImageNet cannot be downloaded from here, for ImageNet's terms; put images.zip with train.csv, val.csv and "
    "test.csv (filename,label) into one folder"
)


@dataclass(frozen=True)
class MiniImageNet:
    """miniImageNet in the split that its csv files give: 64 / 16 / 20 classes in that of Ravi and Larochelle.

    Pixels are RGB, 0 to 255. Within a class the order is that of the csv; classes are in order of label.

    Raises: ValueError for missing files, csv files without the columns or naming absent images, a damaged image.
    Cost: the first load decodes 60 000 images (under a minute) to 1.27 GB on disk, mapped from there afterwards.
    Reference: Vinyals et al. 2016; Ravi and Larochelle 2017.
    Do not compare numbers across releases: csv files of other authors name other classes.

    >>> MiniImageNet().size
    84
    >>> MiniImageNet().load("data").test.num_classes  # doctest: +SKIP
    20
    """

    size: int = 84
    """Side of the images, in pixels. Images of other shapes are squeezed to it, with anti-aliasing."""

    def __post_init__(self) -> None:
        positive_size(self.size)

    def load(self, data_dir: str | None = None, cache_dir: str | None = None) -> MetaDataset:
        """Read `images.zip` (or the folder `images`) with `train.csv`, `val.csv` and `test.csv` beside it.

        Arguments:
            data_dir: the folder that holds them or that holds `miniimagenet/`; else the environment variable
                HYPERAX_DATA.
            cache_dir: where decoded images are kept; else the environment variable HYPERAX_CACHE, else
                `~/.cache/hyperax`.
        """
        images = sources.find("miniimagenet", ["images.zip", "images"], data_dir, _ADVICE)
        tables = {split: images.parent / name for split, name in _SPLITS.items()}
        classes = {split: _read_csv(path) for split, path in tables.items()}
        _check_disjoint(classes)
        with sources.Archive(images) as archive:
            located = {file.rsplit("/", 1)[-1]: file for file in archive.files}
            for split, labels in classes.items():
                _check_present(tables[split], labels, located, images)
            digests = {"images": archive.digest} | {
                split: hashlib.sha256(path.read_bytes()).hexdigest() for split, path in tables.items()
            }

            def build(allocate):
                for split, labels in classes.items():
                    files = [located[name] for names in labels.values() for name in names]
                    decode(archive, files, self._convert, allocate(split, (len(files), self.size, self.size, 3)))
                return {
                    split: {label: len(names) for label, names in labels.items()} for split, labels in classes.items()
                }

            key = {"sources": digests, "size": self.size, "decoder": decoder_version()}
            parts, arrays = cached("miniimagenet", key, build, cache_dir)
        return meta_dataset(
            "miniImageNet",
            [parts[split] for split in _SPLITS],
            config=asdict(self),
            decoder=decoder_version(),
            sources=digests,
            arrays=arrays,
        )

    def _convert(self, image: Image) -> Image:
        from PIL import Image

        return eight_bits(image, "RGB").resize((self.size, self.size), Image.Resampling.LANCZOS)


def _read_csv(path: Path) -> dict[str, list[str]]:
    """The file names of each label, in order of label."""
    try:
        text = path.read_text("utf-8-sig")
    except FileNotFoundError as error:
        raise ValueError(f"there is no {path}: {_ADVICE}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): it should be a text file with filename,label") from error
    rows = csv.DictReader(io.StringIO(text))
    if not {"filename", "label"} <= set(rows.fieldnames or ()):
        raise ValueError(f"{path} needs the columns filename,label, and its first line is {text.splitlines()[:1]}")
    labels: dict[str, list[str]] = {}
    for row in rows:
        if not row["filename"] or not row["label"]:
            raise ValueError(f"line {rows.line_num} of {path} has no filename or no label: complete or remove it")
        labels.setdefault(row["label"], []).append(row["filename"])
    if not labels:
        raise ValueError(f"{path} names no image: {_ADVICE}")
    return dict(sorted(labels.items()))


def _check_disjoint(classes: dict[str, dict[str, list[str]]]) -> None:
    labels = Counter(label for split in classes.values() for label in split)
    files = Counter(name for split in classes.values() for names in split.values() for name in names)
    for what, counted in (("label", labels), ("image", files)):
        if repeated := [item for item, times in counted.items() if times > 1]:
            raise ValueError(
                f"{len(repeated)} {what}(s) are named twice in train.csv, val.csv and test.csv "
                f"({_first(repeated)}): each {what} belongs to one split, once"
            )


def _check_present(table: Path, labels: dict[str, list[str]], located: dict[str, str], images: Path) -> None:
    absent = [name for names in labels.values() for name in names if name not in located]
    if absent:
        raise ValueError(
            f"{table} names {len(absent)} image(s) that {images} does not hold ({_first(absent)}): "
            "use the csv files and the images of one release"
        )


def _first(items: list[str], shown: int = 3) -> str:
    return ", ".join(items[:shown]) + (", ..." if len(items) > shown else "")
