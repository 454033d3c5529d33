"""Decoded images on disk: decode once, then map the arrays into memory.

An entry is a folder `<cache>/<dataset>-<key>/` with one `.npy` per array and an `entry.json` that holds the key, the
class tables and the sha256 of every array. It is written under another name and renamed when complete, so that what
has the final name is whole, whoever else is writing and whenever the process dies.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hyperax.fewshot.image_classes import ImageClasses

log = logging.getLogger(__name__)

FORMAT = 1
"""Version of the layout and of the decoding: one more for any change that alters the arrays."""

Allocate = Callable[[str, tuple[int, int, int, int]], np.ndarray]
"""allocate(part, [M, H, W, C]) -> a uint8 array on disk to be filled."""

_BUILDING = ".building-"
_ABANDONED_AFTER = (
    24 * 3600.0
)  # seconds; no decoding takes a day, so an older unfinished entry belongs to a dead process


def cache_folder(cache_dir: str | None = None) -> Path:
    """The cache: `cache_dir`, else the environment variable HYPERAX_CACHE, else `~/.cache/hyperax`."""
    fallback = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "hyperax")
    return Path(cache_dir or os.environ.get("HYPERAX_CACHE") or fallback).expanduser().absolute()


def cached(
    name: str,
    key: Mapping[str, Any],
    build: Callable[[Allocate], Mapping[str, Mapping[str, int]]],
    cache_dir: str | None = None,
) -> tuple[dict[str, ImageClasses], dict[str, str]]:
    """The parts of a dataset from the cache, decoded first where they are not there or damaged.

    Arguments:
        name: prefix of the entry.
        key: everything that determines the arrays (source digests, parameters, decoder version), in JSON types.
        build: fills the arrays that it gets from `allocate`; returns, for each part, the images of each class in order.
        cache_dir: see `cache_folder`.

    Returns: the parts, memory-mapped read-only, and the sha256 of each part's array file.
    Raises: ValueError when the cache cannot be written.
    Cost: a hit reads every byte once to check its digest (about a second per gigabyte).
    """
    key = json.loads(json.dumps({**key, "format": FORMAT}))
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    folder = cache_folder(cache_dir)
    entry = folder / f"{name}-{digest[:20]}"
    if entry.exists():
        try:
            return _read(entry, key)
        except _Damaged as damage:
            log.warning("the cache entry %s is damaged (%s): decoding again", entry, damage)
    else:
        log.info("decoding %s once; the arrays will be kept in %s", name, entry)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder)
        unfinished = Path(tempfile.mkdtemp(prefix=f"{_BUILDING}{name}-", dir=folder))
    except OSError as error:
        raise ValueError(
            f"the cache folder {folder} cannot be written ({error.strerror}): choose another one with --cache-dir or "
            "the environment variable HYPERAX_CACHE"
        ) from error
    try:
        _write(unfinished, key, build)
        _install(unfinished, entry, key)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return _read(entry, key)


class _Damaged(Exception):
    pass


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(entry: Path, key: Mapping[str, Any]) -> tuple[dict[str, ImageClasses], dict[str, str]]:
    try:
        record = json.loads((entry / "entry.json").read_text("utf-8"))
        if record["key"] != key:
            raise _Damaged("it belongs to other images")
        parts, digests = {}, {}
        for part, table in record["parts"].items():
            path = entry / f"{part}.npy"
            if (actual := _sha256(path)) != table["sha256"]:
                raise _Damaged(f"{path.name} does not have its digest")
            # A plain array that views the map: JAX and tree functions know np.ndarray, not np.memmap.
            images = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
            parts[part], digests[part] = ImageClasses.from_counts(images, table["counts"]), actual
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _Damaged(str(error)) from error
    return parts, digests


def _write(folder: Path, key: Mapping[str, Any], build: Callable[[Allocate], Mapping[str, Mapping[str, int]]]) -> None:
    arrays: dict[str, np.memmap] = {}

    def allocate(part: str, shape: tuple[int, int, int, int]) -> np.ndarray:
        needed, free = int(np.prod(shape)), shutil.disk_usage(folder).free
        if needed > free:  # a memory map on a full disk ends the process with SIGBUS, so this is asked before
            raise ValueError(
                f"the decoded images take {needed / 1e9:.2f} GB and {folder.parent} has {free / 1e9:.2f} GB left: "
                "choose another place with --cache-dir or the environment variable HYPERAX_CACHE"
            )
        arrays[part] = np.lib.format.open_memmap(folder / f"{part}.npy", mode="w+", dtype=np.uint8, shape=shape)
        return arrays[part]

    counts = build(allocate)
    for array in arrays.values():
        array.flush()
    arrays.clear()
    parts = {part: {"sha256": _sha256(folder / f"{part}.npy"), "counts": dict(counts[part])} for part in counts}
    (folder / "entry.json").write_text(json.dumps({"key": key, "parts": parts}, indent=1), "utf-8")


def _install(unfinished: Path, entry: Path, key: Mapping[str, Any]) -> None:
    """Give the finished entry its name, unless another process was faster."""
    for _ in range(3):
        try:
            os.rename(unfinished, entry)  # atomic, and it fails where a folder that is not empty has the name
            return
        except OSError:
            try:
                _read(entry, key)
                return
            except _Damaged:
                aside = Path(tempfile.mkdtemp(prefix=_BUILDING, dir=entry.parent))
                try:
                    os.rename(entry, aside / "damaged")
                except OSError as error:
                    log.debug("another process moved %s first: %s", entry, error)
                shutil.rmtree(aside, ignore_errors=True)
    raise ValueError(f"the cache entry {entry} cannot be replaced: delete it and try again")


def _remove_abandoned(folder: Path) -> None:
    for path in folder.glob(f"{_BUILDING}*"):
        try:
            if time.time() - path.stat().st_mtime > _ABANDONED_AFTER:
                shutil.rmtree(path, ignore_errors=True)
        except OSError:  # its owner finished in this moment
            continue
