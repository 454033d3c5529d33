"""Glyphs: characters of many scripts, drawn from the fonts that come with matplotlib. Nothing to download."""

from __future__ import annotations

import hashlib
import unicodedata
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hyperax.fewshot.datasets.cache import cached
from hyperax.fewshot.datasets.decode import decoder_version, positive_size
from hyperax.fewshot.datasets.provenance import meta_dataset
from hyperax.fewshot.image_classes import MetaDataset

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont

_FAMILIES = ("DejaVuSans", "DejaVuSansMono", "DejaVuSerif", "STIXGeneral")
_EM = 2  # pictures: glyphs are drawn with an em of twice the picture and halved, for anti-aliasing
_SMALLEST = 0.25  # em: smaller marks are dots, and blurred when enlarged
_FACES_AT_LEAST = 4  # a class with fewer faces would be one shape and its affine images

# Scripts of each set: the first words of the Unicode name for letters, ranges of code points for symbols. The sets that
# are measured come first, because of two characters that look the same the later one is dropped.
_LETTERS = {
    "test": ("ARMENIAN", "ARABIC", "HEBREW", "OLD ITALIC"),
    "validation": ("GEORGIAN", "LAO", "COPTIC"),
    "train": ("LATIN", "GREEK", "CYRILLIC", "CANADIAN SYLLABICS", "LISU"),
}
_SYMBOLS = (
    range(0x2190, 0x2200),  # arrows
    range(0x2200, 0x2300),  # mathematical operators
    range(0x2300, 0x2400),  # technical
    range(0x2600, 0x2700),  # miscellaneous: chess, zodiac, weather, dice
    range(0x2A00, 0x2B00),  # more mathematical operators
)  # all in train

# Cosine of two upright pictures, at half resolution and in any faces, above which they count as the same
# character. Equal shapes (A, Α, А) have 1; just above 0.93 are shapes that differ by a small mark, just below are bold
# letters of one build, which a person tells apart.
_SAME = 0.93


@dataclass(frozen=True)
class Glyphs:
    """Characters as classes and faces with small random affine maps as images, split by script.

    Each character is scaled to the same longer side, so small and capital letters of one shape are one class; what
    looks the same in two faces is kept once in the whole dataset. Scripts of validation and test are unseen in
    training. Ink is 255, paper 0, one channel, anti-aliased.

    Raises: ValueError for sizes below 8 or fewer than two images per class.
    Cost: about ten seconds the first time; then from the cache.
    Do not use with `ImageClasses.rotated`: arrows and Canadian syllabics are rotations of each other.

    >>> Glyphs(images_per_class=10).size
    28
    >>> Glyphs().load().train.image_shape  # doctest: +SKIP
    (28, 28, 1)
    """

    size: int = 28
    """Side of the images, in pixels."""
    images_per_class: int = 20
    """Images of each character, shared out equally among the faces that have it."""
    seed: int = 0
    """Draws the affine maps; the classes and their split do not depend on it."""

    def __post_init__(self) -> None:
        positive_size(self.size)
        if self.size < 8:
            raise ValueError(f"size {self.size} is too small to tell characters apart: use 8 or more")
        if self.images_per_class < 2:
            raise ValueError(f"images_per_class is {self.images_per_class}: an episode needs 2 or more")

    def load(self, data_dir: str | None = None, cache_dir: str | None = None) -> MetaDataset:
        """Draw the characters.

        Arguments:
            data_dir: not used, there is nothing to read.
            cache_dir: where drawn images are kept; else the environment variable HYPERAX_CACHE, else
                `~/.cache/hyperax`.
        """
        fonts = _font_files()
        digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in fonts}

        def build(allocate):
            characters = _characters(fonts, self.size)
            for split, masks in characters.items():
                # One stream for each character: a font with one more character changes no other image.
                out = allocate(split, (len(masks) * self.images_per_class, self.size, self.size, 1))
                for index, (character, faces) in enumerate(masks.items()):
                    random = np.random.default_rng([self.seed, ord(character)])
                    first = index * self.images_per_class
                    for image, face in enumerate(_shared_out(len(faces), self.images_per_class, random)):
                        out[first + image, :, :, 0] = _draw(faces[face], self.size, _affine(random, self.size))
            return {
                split: {unicodedata.name(character): self.images_per_class for character in masks}
                for split, masks in characters.items()
            }

        parts, arrays = cached(
            "glyphs", asdict(self) | {"sources": digests, "decoder": decoder_version()}, build, cache_dir
        )
        return meta_dataset(
            "Glyphs",
            [parts["train"], parts["validation"], parts["test"]],
            config=asdict(self),
            decoder=decoder_version(),
            sources=digests,
            arrays=arrays,
        )


def _font_files() -> list[Path]:
    import matplotlib

    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    files = [path for path in sorted(folder.glob("*.ttf")) if path.stem.split("-")[0].startswith(_FAMILIES)]
    files = [path for path in files if "Display" not in path.stem]
    if not files:
        raise ValueError(f"matplotlib's fonts are not in {folder}: install matplotlib again")
    return files


def _split_of(character: str) -> str | None:
    """The split of a character by its script, or None for those that are not used."""
    name, category = unicodedata.name(character, ""), unicodedata.category(character)
    if unicodedata.decomposition(character):  # accented letters, ligatures, letters in a mathematical style
        return None
    if category in ("Lu", "Ll", "Lo"):
        for split, scripts in _LETTERS.items():
            if name.startswith(tuple(script + " " for script in scripts)):
                return split
    if category in ("Sm", "So") and any(ord(character) in symbols for symbols in _SYMBOLS):
        return "train"
    return None


def _characters(fonts: list[Path], size: int) -> dict[str, dict[str, list[Image]]]:
    """For each split the characters to be used, and each one's masks, one a face."""
    from fontTools.ttLib import TTFont
    from PIL import ImageFont

    masks: dict[str, dict[str, dict[int, Image]]] = {split: {} for split in _LETTERS}
    for face, path in enumerate(fonts):
        # The basic layout needs no shaping library, so a character looks the same on every machine.
        font = ImageFont.truetype(str(path), _EM * size, layout_engine=ImageFont.Layout.BASIC)
        with TTFont(path, lazy=True) as tables:
            codes = sorted(tables.getBestCmap() or ())  # what is not in there would be drawn as a box
        for character in map(chr, codes):
            split = _split_of(character)
            if split and (mask := _mask(font, character, size)):
                masks[split].setdefault(character, {})[face] = mask
    candidates = [
        (split, character, faces)
        for split, characters in masks.items()
        for character, faces in sorted(characters.items())
        if len(faces) >= _FACES_AT_LEAST
    ]
    chosen: dict[str, dict[str, list[Image]]] = {split: {} for split in _LETTERS}
    for index in _distinct([faces for _, _, faces in candidates], len(fonts), size):
        split, character, faces = candidates[index]
        chosen[split][character] = list(faces.values())
    return chosen


def _mask(font: FreeTypeFont, character: str, size: int) -> Image | None:
    """The ink of a character, with a pixel of margin; None for a blank or a small mark."""
    from PIL import Image, ImageDraw

    left, top, right, bottom = font.getbbox(character)
    image = Image.new("L", (int(right - left) + 4, int(bottom - top) + 4))
    ImageDraw.Draw(image).text((2 - left, 2 - top), character, font=font, fill=255)
    ink = image.getbbox()
    if ink is None or max(ink[2] - ink[0], ink[3] - ink[1]) < _SMALLEST * _EM * size:
        return None
    # Without the margin the filter that moves the picture would cut the outline's soft edge.
    return image.crop((ink[0] - 1, ink[1] - 1, ink[2] + 1, ink[3] + 1))


def _distinct(masks: list[dict[int, Image]], num_faces: int, size: int) -> list[int]:
    """Indices of the characters that look like none before them, whatever the faces."""
    pictures: list[tuple[np.ndarray, np.ndarray]] = []
    for face in range(num_faces):
        have = np.array([index for index, faces in enumerate(masks) if face in faces], int)
        upright = [_draw(masks[index][face], size, np.eye(2, 3)) for index in have]
        even = size // 2 * 2
        halves = np.reshape(upright, (-1, size, size))[:, :even, :even].astype(np.float32)
        halves = halves.reshape(-1, size // 2, 2, size // 2, 2).mean((2, 4)).reshape(len(have), (size // 2) ** 2)
        pictures.append((have, halves / np.linalg.norm(halves, axis=1, keepdims=True)))
    faces = range(num_faces)
    # Each face with itself finds nearly all; what is left is few enough to compare every face with every other.
    kept = _unlike(np.arange(len(masks)), pictures, [(face, face) for face in faces])
    return _unlike(kept, pictures, [(one, other) for one in faces for other in range(one)]).tolist()


def _unlike(
    candidates: np.ndarray, pictures: list[tuple[np.ndarray, np.ndarray]], compared: list[tuple[int, int]]
) -> np.ndarray:
    """The candidates that look like no kept one before them, in the given pairs of faces."""
    alike = np.zeros((len(candidates), len(candidates)), bool)
    for one, other in compared:
        (rows, row_vectors), (columns, column_vectors) = (
            (np.searchsorted(candidates, have[inside]), vectors[inside])
            for have, vectors in (pictures[one], pictures[other])
            for inside in [np.isin(have, candidates)]
        )
        alike[np.ix_(rows, columns)] |= row_vectors @ column_vectors.T > _SAME
    alike |= alike.T
    kept: list[int] = []
    for index in range(len(candidates)):
        if not alike[index, kept].any():
            kept.append(index)
    return candidates[kept]


def _shared_out(faces: int, images: int, random: np.random.Generator) -> np.ndarray:
    """Which face each image uses: every face as often as any other, up to one."""
    return np.concatenate([random.permutation(faces) for _ in range(-(-images // faces))])[:images]


def _affine(random: np.random.Generator, size: int) -> np.ndarray:
    """A small random affine map of the plane, [2, 3], in pixels around the centre: rotation, shear, scale, shift."""
    angle, shear = np.deg2rad(random.uniform(-12, 12)), random.uniform(-0.15, 0.15)
    scale = random.uniform(0.85, 1.1) * np.exp(random.uniform(-0.08, 0.08, 2) * [1, -1])
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    linear = rotation @ np.array([[1, shear], [0, 1]]) @ np.diag(scale)
    return np.column_stack([linear, random.uniform(-0.06, 0.06, 2) * size])


def _draw(mask: Image, size: int, affine: np.ndarray) -> np.ndarray:
    """A glyph with its longer side at 0.68 of the picture, moved by an affine map; [size, size], uint8."""
    from PIL import Image

    # Twice as large and then halved by averaging: anti-aliasing that does not depend on the map.
    canvas, glyph = 2 * size, max(mask.size)
    linear = affine[:, :2] * (0.68 * canvas / glyph)
    back = np.linalg.inv(linear)  # Pillow asks for the source of each target pixel
    centre = np.array(mask.size) / 2 - back @ (canvas / 2 + 2 * affine[:, 2])
    coefficients = tuple(np.column_stack([back, centre]).ravel())
    drawn = mask.transform((canvas, canvas), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)
    return np.asarray(drawn.reduce(2))
