"""Downloads of the datasets that may be downloaded, with checksums."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hyperax.fewshot.datasets.sources import data_folder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Release:
    """Files of a dataset's official release.

    Arguments:
        base_url: address of the folder that holds them.
        digests: "md5:..." or "sha256:..." of each file.
    """

    base_url: str
    digests: Mapping[str, str]


RELEASES = {
    # The digests are those that torchvision publishes for the author's archives.
    "omniglot": Release(
        "https://raw.githubusercontent.com/brendenlake/omniglot/master/python/",
        {
            "images_background.zip": "md5:68d2efa1b9178cc56df9314c21c6e718",
            "images_evaluation.zip": "md5:6b91aef0f799c5bb55b94e3f2daec811",
        },
    ),
}

_NOT_HERE = {
    "miniimagenet": "ImageNet's terms do not let anybody hand it on; put images.zip, train.csv, val.csv and test.csv "
    "into the folder miniimagenet of your data folder",
    "glyphs": "it is drawn from matplotlib's fonts, there is nothing to download",
}


def fetch(
    name: str,
    data_dir: str | None = None,
    *,
    base_url: str | None = None,
    digests: Mapping[str, str] | None = None,
    retries: int = 3,
    timeout: float = 30.0,
) -> list[Path]:
    """Download the official archives of a dataset into the data folder.

    A file gets its name only when it is complete and has its digest. Files that are already there are checked and not
    loaded again; one with other bytes is never overwritten.

    Arguments:
        name: "omniglot".
        data_dir: the data folder, else the environment variable HYPERAX_DATA, else `data` in the cache folder. The
            files go into its subfolder of the dataset's name, or into itself where it has that name.
        base_url: another address of the same files (a mirror).
        digests: other digests, "md5:..." or "sha256:...", for another release.
        retries: further attempts after a failed transfer, with a growing pause.
        timeout: longest silence of the server, in seconds.

    Returns: the paths of the files.
    Raises: ValueError when a file cannot be found, transferred, verified or written.
    Cost: 16 MB for Omniglot.
    Do not use it for miniImageNet, which ImageNet's terms keep from being downloaded, nor for Glyphs, which are drawn.

    >>> fetch("omniglot", "data")  # doctest: +SKIP
    [PosixPath('data/omniglot/images_background.zip'), PosixPath('data/omniglot/images_evaluation.zip')]
    """
    if name not in RELEASES:
        reason = _NOT_HERE.get(name, f"known are {', '.join(sorted(RELEASES))}")
        raise ValueError(f"{name!r} cannot be downloaded: {reason}")
    release = RELEASES[name]
    digests = dict(release.digests if digests is None else digests)
    address = (base_url or release.base_url).rstrip("/") + "/"
    root = data_folder(data_dir)
    folder = root if root.name == name else root / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"{folder} cannot be made ({error.strerror}): choose another folder with --data-dir"
        ) from error
    return [_fetch_file(address, file, digest, folder, retries, timeout) for file, digest in digests.items()]


def _fetch_file(address: str, file: str, digest: str, folder: Path, retries: int, timeout: float) -> Path:
    import pooch
    import requests

    target = folder / file
    if target.exists():
        if _has_digest(target, digest):
            log.info("%s is already there and has its digest", target)
            return target
        raise ValueError(
            f"{target} is already there with other bytes than the release ({digest}). It may be a repacked archive, "
            "which loads just as well; to have the release instead, delete it and fetch again"
        )
    with _progress(file) as bar:
        downloader: Any = pooch.HTTPDownloader(progressbar=bar, timeout=timeout)
        store = pooch.create(folder, address, registry={file: digest}, retry_if_failed=retries)
        try:
            return Path(store.fetch(file, downloader=downloader))
        except requests.HTTPError as error:
            status = error.response.status_code if error.response is not None else "an error"
            raise ValueError(f"{address}{file} answered {status}: check the address, or try later") from error
        except requests.RequestException as error:
            raise ValueError(
                f"the transfer of {address}{file} broke off after {retries + 1} attempt(s) ({error}): "
                "check the connection and fetch again"
            ) from error
        except ValueError as error:  # pooch's word for a wrong digest
            raise ValueError(
                f"{address}{file} does not have the digest {digest} and was not kept: the file at this address is "
                "another one or was altered on the way; fetch again, or give its digest if you trust it"
            ) from error
        except OSError as error:
            raise ValueError(f"{target} cannot be written ({error}): choose another folder with --data-dir") from error


def _has_digest(path: Path, digest: str) -> bool:
    algorithm, _, expected = digest.rpartition(":")
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, algorithm or "sha256").hexdigest() == expected.lower()


@contextmanager
def _progress(file: str) -> Iterator[Any]:
    """What pooch reports progress to: a bar on the error stream where `rich` is installed, else nothing."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
    except ImportError:
        yield False
        return
    with Progress(
        TextColumn(file), BarColumn(), DownloadColumn(), console=Console(stderr=True), transient=True
    ) as progress:
        yield _Bar(progress)


class _Bar:
    """The few methods of a tqdm bar that pooch calls, on a rich progress."""

    def __init__(self, progress: Any):
        self._progress, self._task, self.total = progress, progress.add_task("", total=None), 0

    def update(self, size: int) -> None:
        self._progress.update(self._task, advance=size, total=self.total or None)

    def reset(self) -> None:
        self._progress.reset(self._task)

    def close(self) -> None:
        """The context of the progress ends it."""
