"""Omniglot: 1623 handwritten characters of 50 alphabets, 20 drawers each."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from hyperax.fewshot.datasets import sources
from hyperax.fewshot.datasets.cache import cached
from hyperax.fewshot.datasets.decode import choice, decode, decoder_version, positive_size
from hyperax.fewshot.datasets.provenance import meta_dataset
from hyperax.fewshot.image_classes import ImageClasses, MetaDataset

if TYPE_CHECKING:
    from PIL.Image import Image

_ADVICE = "run `hyperax data fetch omniglot`"
_CHARACTERS = 1623
_PAPERS = (1200, 100)  # training and validation characters; the remaining 323 are the test
# Vinyals et al. put the background alphabets before the evaluation ones, both in order of name; the first 1200
# characters are for training, and of these five whole alphabets, 172 characters, are for validation.
_VINYALS_VALIDATION = ("Armenian", "Bengali", "Early_Aramaic", "Hebrew", "Mkhedruli_(Georgian)")


@dataclass(frozen=True)
class Omniglot:
    """Omniglot, split as in the papers, by alphabets, or as in Vinyals et al.

    Pixels are ink 255, paper 0, one channel.

    Raises: ValueError for an unknown option, a missing or damaged archive, or an incomplete set of characters.
    Cost: the first load decodes 32 460 drawings (some seconds); rotations take four times the memory (100 MB at 28).
    Reference: Lake et al. 2015; the splits of Franceschi et al. 2018 (App. D) and of Vinyals et al. 2016.
    Do not use `papers` to say something about unseen alphabets: it draws characters, whatever their alphabet.

    >>> Omniglot(split="vinyals").size
    28
    >>> Omniglot().load("data").train.num_classes  # doctest: +SKIP
    4800
    """

    split: Literal["papers", "alphabets", "vinyals"] = "papers"
    """papers: 1200 / 100 / 323 characters drawn by the seed. alphabets: evaluation alphabets for test, a sixth of the
    background alphabets, drawn by the seed, for validation. vinyals: 1028 / 172 / 423 characters, no seed."""
    seed: int = 0
    """Draws the characters of `papers` and the validation alphabets of `alphabets`."""
    resize: Literal["antialias", "nearest"] = "antialias"
    """antialias: the 105 x 105 drawings as 8 bits, then Lanczos. nearest: what any filter of Pillow does to the 1-bit
    originals, hence probably what the papers' code did."""
    rotations: bool = True
    """Whether each character rotated by 90, 180 and 270 degrees is a new class, in all three sets."""
    size: int = 28
    """Side of the images, in pixels."""

    def __post_init__(self) -> None:
        choice("split", self.split, ("papers", "alphabets", "vinyals"))
        choice("resize", self.resize, ("antialias", "nearest"))
        positive_size(self.size)

    def load(self, data_dir: str | None = None, cache_dir: str | None = None) -> MetaDataset:
        """Read `images_background.zip` and `images_evaluation.zip` (or these folders, unzipped).

        Arguments:
            data_dir: the folder that holds them or that holds `omniglot/`; else the environment variable
                HYPERAX_DATA.
            cache_dir: where decoded images are kept; else the environment variable HYPERAX_CACHE, else
                `~/.cache/hyperax`.
        """
        paths = {
            part: sources.find("omniglot", [f"images_{part}.zip", f"images_{part}"], data_dir, _ADVICE)
            for part in ("background", "evaluation")
        }
        advice = f"delete it and {_ADVICE}"
        with (
            sources.Archive(paths["background"], advice) as background,
            sources.Archive(paths["evaluation"], advice) as evaluation,
        ):
            archives = {"background": background, "evaluation": evaluation}
            digests = {part: archive.digest for part, archive in archives.items()}
            characters = {part: _characters(archive) for part, archive in archives.items()}
            self._check_complete(sum(map(len, characters.values())))

            def build(allocate):
                counts = {}
                for part, archive in archives.items():
                    files = [file for drawings in characters[part].values() for file in drawings]
                    decode(archive, files, self._convert, allocate(part, (len(files), self.size, self.size, 1)))
                    counts[part] = {name: len(drawings) for name, drawings in characters[part].items()}
                return counts

            key = {"sources": digests, "size": self.size, "resize": self.resize, "decoder": decoder_version()}
            parts, arrays = cached("omniglot", key, build, cache_dir)
        every = ImageClasses.join(parts["background"], parts["evaluation"])
        splits = [every.subset(chosen) for chosen in self._split(parts["background"], parts["evaluation"])]
        if self.rotations:
            splits = [split.rotated() for split in splits]
        return meta_dataset(
            "Omniglot", splits, config=asdict(self), decoder=decoder_version(), sources=digests, arrays=arrays
        )

    def _convert(self, image: Image) -> Image:
        from PIL import Image, ImageChops

        # On 1-bit images Pillow replaces every filter by the nearest neighbour: 8 bits first.
        resampling = {"antialias": Image.Resampling.LANCZOS, "nearest": Image.Resampling.NEAREST}[self.resize]
        return ImageChops.invert(image.convert("L")).resize((self.size, self.size), resampling)

    def _check_complete(self, characters: int) -> None:
        if self.split != "alphabets" and characters != _CHARACTERS:
            raise ValueError(
                f"split {self.split!r} is defined on Omniglot's {_CHARACTERS} characters, and these archives have "
                f"{characters}: use the complete archives ({_ADVICE}) or split 'alphabets'"
            )

    def _split(self, background: ImageClasses, evaluation: ImageClasses) -> list[np.ndarray]:
        """Indices of the training, validation and test characters, background before evaluation."""
        names = background.names + evaluation.names
        alphabets = np.array([name.split("/")[0] for name in names])
        random = np.random.default_rng(self.seed)
        if self.split == "alphabets":
            ours = np.unique(alphabets[: background.num_classes])
            if len(ours) < 2:
                raise ValueError("split 'alphabets' needs two background alphabets at least: use the complete archives")
            held_out = random.choice(ours, max(1, round(len(ours) / 6)), replace=False)
            test = np.arange(len(names)) >= background.num_classes
            validation = ~test & np.isin(alphabets, held_out)
            return [np.flatnonzero(chosen) for chosen in (~test & ~validation, validation, test)]
        if self.split == "papers":
            train, validation = _PAPERS
            return np.split(random.permutation(len(names)), [train, train + validation])
        if missing := set(_VINYALS_VALIDATION) - set(alphabets):
            raise ValueError(f"split 'vinyals' needs the alphabets {', '.join(sorted(missing))}: {_ADVICE}")
        test = np.arange(len(names)) >= _PAPERS[0]
        validation = ~test & np.isin(alphabets, _VINYALS_VALIDATION)
        return [np.flatnonzero(chosen) for chosen in (~test & ~validation, validation, test)]


def _characters(archive: sources.Archive) -> dict[str, list[str]]:
    """The drawings of each "Alphabet/character01", both in order of name."""
    characters: dict[str, list[str]] = {}
    for file in archive.files:
        if file.lower().endswith(".png"):
            alphabet, character = file.split("/")[-3:-1] if file.count("/") > 1 else ("", "")
            if not alphabet:
                raise ValueError(f"{file} in {archive.path} is not <Alphabet>/<character>/<drawing>.png: {_ADVICE}")
            characters.setdefault(f"{alphabet}/{character}", []).append(file)
    if not characters:
        raise ValueError(f"{archive.path} holds no <Alphabet>/<character>/<drawing>.png: {_ADVICE}")
    return dict(sorted(characters.items()))
