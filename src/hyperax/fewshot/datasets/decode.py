"""Encoded images to arrays of one size."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Literal

import numpy as np

from hyperax.fewshot.datasets.sources import Archive

if TYPE_CHECKING:
    from PIL.Image import Image

_CHUNK = 128  # images per piece of work: enough that handing it over costs nothing, few enough that an error is early


def decoder_version() -> str:
    """Name and version of the decoder, part of every cache key: another version may round otherwise."""
    import PIL

    return f"pillow {PIL.__version__}"


def decode(archive: Archive, files: Sequence[str], convert: Callable[[Image], Image], out: np.ndarray) -> None:
    """Fill `out` with the decoded files, in order, on a few threads.

    Arguments:
        archive: where the files are.
        files: M paths.
        convert: brings an opened image to the mode and size of `out`.
        out: [M, H, W, C], uint8.

    Raises: ValueError that names the first file that is not a readable image.
    Cost: 0.1 to 0.5 ms an image; memory for a few images only.
    """
    from PIL import Image

    def piece(first: int) -> None:
        for index in range(first, min(first + _CHUNK, len(files))):
            data = archive.read(files[index])
            try:
                with Image.open(io.BytesIO(data)) as image:
                    pixels = np.asarray(convert(image))
            except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, EOFError, ...
                raise ValueError(
                    f"{files[index]} in {archive.path} is not a readable image ({error}): replace or remove it"
                ) from error
            out[index] = pixels.reshape(out.shape[1:])

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for _ in pool.map(piece, range(0, len(files), _CHUNK)):
            pass


def eight_bits(image: Image, mode: Literal["RGB", "L"]) -> Image:
    """Any image, upright and opaque, with 8 bits a channel.

    The camera's orientation is applied, transparency is laid over white, and 16-bit and palette images are converted.

    Raises: ValueError for floating-point images, whose range is unknown.
    """
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        # `convert` would clip 16 bits at 255 instead of scaling them.
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range; save it with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def positive_size(size: int) -> None:
    """Refuse an image size that is not a positive integer."""
    if size < 1:
        raise ValueError(f"size is the side of the images in pixels, at least 1, not {size}")


def choice(name: str, value: str, allowed: Sequence[str]) -> None:
    """Refuse a value outside a list of alternatives."""
    if value not in allowed:
        raise ValueError(f"{name} is one of {', '.join(map(repr, allowed))}, not {value!r}")
