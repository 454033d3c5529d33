"""Where images come from: the data folder, zip archives and unzipped folders read alike."""

from __future__ import annotations

import hashlib
import os
import zipfile
from pathlib import Path

from hyperax.fewshot.datasets.cache import cache_folder


def named_folder(data_dir: str | None = None) -> Path | None:
    """The data folder that somebody named: `data_dir`, else the environment variable HYPERAX_DATA."""
    chosen = data_dir or os.environ.get("HYPERAX_DATA")
    return Path(chosen).expanduser().absolute() if chosen else None


def data_folder(data_dir: str | None = None) -> Path:
    """The data folder: `data_dir`, else the environment variable HYPERAX_DATA, else `data` in the cache folder."""
    return named_folder(data_dir) or cache_folder() / "data"


def find(dataset: str, names: list[str], data_dir: str | None, advice: str) -> Path:
    """The first of some alternative names that exists in the dataset's folder.

    Arguments:
        dataset: name of the dataset's folder inside the data folder; the data folder may also be that folder itself.
        names: alternatives, best first (an archive, the same unzipped).
        data_dir: see `data_folder`.
        advice: how to get the file, for the message.

    Raises: ValueError that says where it was looked for.
    """
    root = data_folder(data_dir)
    for folder in (root / dataset, root):
        for name in names:
            if (folder / name).exists():
                return folder / name
    wanted = " or ".join(f"{name}{'' if '.' in name else '/'}" for name in names)
    raise ValueError(
        f"there is no {wanted} in {root / dataset} nor in {root}: {advice}, or give the folder that holds it with "
        "--data-dir or the environment variable HYPERAX_DATA"
    )


class Archive:
    """The files of a zip archive or of a folder, read in the same way, from several threads if need be.

    Arguments:
        path: a zip file or a folder.
        advice: what to do when the archive is damaged, for the message.

    Attributes:
        files: the paths of its files, with "/", in order. Hidden files and the Mac's resource forks are left out.
        digest: changes with the content, and is cheap: from the names, sizes and CRCs that a zip lists, or the names,
            sizes and modification times in a folder.

    Raises: ValueError for a path that is no readable archive.
    """

    def __init__(self, path: Path, advice: str = "get it again"):
        self.path, self._advice, self._zip = path, advice, None
        if path.is_dir():
            try:
                found = {
                    file.relative_to(path).as_posix(): file.stat()
                    for file in path.rglob("*")
                    if not file.is_dir() and _visible(file.relative_to(path).as_posix())
                }
            except OSError as error:  # a link to nothing, a folder without permission
                raise ValueError(f"{error.filename} cannot be read ({error.strerror}): repair or remove it") from error
            lines = [f"{name}\t{found[name].st_size}\t{found[name].st_mtime_ns}" for name in sorted(found)]
        else:
            try:
                self._zip = zipfile.ZipFile(path)
            except (OSError, zipfile.BadZipFile) as error:
                raise ValueError(
                    f"{path} is not a readable zip archive ({error}); it is damaged or incomplete: {advice}"
                ) from error
            entries = {item.filename: item for item in self._zip.infolist() if not item.is_dir()}
            found = {name: item for name, item in entries.items() if _visible(name)}
            lines = [f"{name}\t{found[name].file_size}\t{found[name].CRC}" for name in sorted(found)]
        self.files = sorted(found)
        self.digest = hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._zip is not None:
            self._zip.close()

    def read(self, name: str) -> bytes:
        """The bytes of one file; ValueError with its name when they cannot be read."""
        try:
            return (self.path / name).read_bytes() if self._zip is None else self._zip.read(name)
        except Exception as error:  # zipfile lets zlib, struct, RuntimeError (encryption) and its own errors through
            raise ValueError(f"{name} in {self.path} cannot be read ({error}): {self._advice}") from error


def _visible(name: str) -> bool:
    return not any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))
