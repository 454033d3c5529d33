"""The files of a run: complete or absent, in step with the last checkpoint, readable by people."""

from __future__ import annotations

import contextlib
import json
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import equinox as eqx
import numpy as np

from hyperax.experiments.config import config_from_json
from hyperax.fewshot.datasets.sources import named_folder
from hyperax.stopping import Progress

Config = TypeVar("Config")


class HasJson(Protocol):
    """A configuration of any kind."""

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON types."""
        ...


class RunFolder:
    """A folder with `config.json`, `where.json`, `records.jsonl`, `timings.jsonl`, `checkpoints/`, at the end
    `summary.json`.

    Records follow the checkpoints: after a resume they are rewritten from the history that the checkpoint holds, so a
    line that a kill cut in two, or that later steps would contradict, does not survive. Times depend on the machine
    and go to a file of their own, and so does the place of the images, which is no part of what a run is.

    Of several processes that compute a run together only the first `writes`; in the others nothing is written and no
    folder is asked for.
    """

    def __init__(self, path: str | Path, writes: bool = True):
        self.path = Path(path)
        self.writes = writes
        self.checkpoints = self.path / "checkpoints"
        self.representation = self.path / "representation.eqx"
        self._records_written = -1
        self._seconds_before = 0.0

    @classmethod
    def create(cls, path: str | Path, config: HasJson, data_dir: str | None = None, writes: bool = True) -> RunFolder:
        """A new run, on images in `data_dir`, in an empty or missing folder."""
        folder = cls(path, writes)
        folder.require_unused()
        try:
            if writes:
                folder.path.mkdir(parents=True, exist_ok=True)
            folder.write_json("config.json", config.to_json())
            folder.write_json("where.json", {"data_dir": str(named_folder(data_dir)) if data_dir else None})
        except OSError as error:
            raise ValueError(f"{folder.path} cannot be written ({error.strerror}): choose another folder") from None
        return folder

    def require_unused(self) -> None:
        """Raise `ValueError` unless the folder is empty or missing."""
        if not self.writes or not self.path.exists():
            return
        if not self.path.is_dir():
            raise ValueError(f"{self.path} is a file: --out names a folder that is empty or does not exist")
        if (self.path / "config.json").exists():
            raise ValueError(
                f"{self.path} holds a run: `hyperax resume {self.path}` goes on with it, --out names another folder "
                "for a new one"
            )
        if any(self.path.iterdir()):
            raise ValueError(f"{self.path} is not empty: --out names a folder that is empty or does not exist")

    @classmethod
    def open(
        cls, path: str | Path, from_json: Callable[[dict[str, Any]], Config] = config_from_json, writes: bool = True
    ) -> tuple[RunFolder, Config]:
        """An existing run and its configuration, read as that of a few-shot run or of another kind."""
        folder = cls(path, writes)
        try:
            config = json.loads((folder.path / "config.json").read_text())
        except OSError:
            raise ValueError(
                f"{folder.path} is not a run folder (it has no readable config.json): name the folder that "
                "`hyperax run` printed"
            ) from None
        except ValueError as error:  # not JSON, or not even text
            raise ValueError(f"{folder.path / 'config.json'} is damaged ({error}): start the run again") from None
        return folder, from_json(config)

    def data_dir(self) -> str | None:
        """Where the images were when the run began, if that was said."""
        try:
            return (self.read_json("where.json") or {}).get("data_dir")
        except (ValueError, AttributeError):
            raise ValueError(f"{self.path / 'where.json'} is damaged: remove it and give --data-dir") from None

    def checkpoint(self, name: str) -> str:
        """The name of a checkpoint that is there; a path is taken by its name."""
        names = sorted(file.name for file in self.checkpoints.glob("step-*.ckpt"))
        if Path(name).name not in names:
            there = f"there are {', '.join(names)}" if names else "there is none yet: resume without --checkpoint"
            raise ValueError(f"no checkpoint {name!r} in {self.checkpoints}; {there}")
        return Path(name).name

    @contextlib.contextmanager
    def advice_as_commands(self) -> Iterator[None]:
        """Say what to do about a checkpoint in the words of the command line, not in those of `minimize`."""
        again = f"`hyperax resume {self.path}"
        try:
            yield
        except ValueError as error:
            words = re.sub(r'use resume="(step-\d+\.ckpt)"', rf"{again} --checkpoint \1` goes on from it", str(error))
            words = words.replace("start again with resume=False", f"{again}` starts from the beginning")
            raise ValueError(words) from error

    def write_json(self, name: str, value: Any) -> None:
        """Replace a file by this value, in one move."""
        self._replace(name, json.dumps(value, indent=1) + "\n")

    def read_json(self, name: str) -> Any:
        """The value of a file, `None` if there is no such file."""
        file = self.path / name
        return json.loads(file.read_text()) if file.exists() else None

    def write_arrays(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Replace `arrays/NAME.npz` by these arrays, in one move."""
        if not self.writes:
            return
        folder = self.path / "arrays"
        folder.mkdir(exist_ok=True)
        temporary = folder / f".{name}.npz.new"
        with temporary.open("wb") as file:
            np.savez_compressed(file, **dict[str, Any](arrays))
        os.replace(temporary, folder / f"{name}.npz")

    def read_arrays(self, name: str) -> dict[str, np.ndarray]:
        """The arrays of `arrays/NAME.npz`, none if there is no such file."""
        path = self.path / "arrays" / f"{name}.npz"
        if not path.exists():
            return {}
        try:
            with np.load(path) as arrays:
                return dict(arrays)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is damaged ({error}): run the recipe again in another folder") from None

    def write_representation(self, lam: Any) -> None:
        """Replace `representation.eqx` by this lam, in one move."""
        if not self.writes:
            return
        temporary = self.path / ".representation.eqx.new"
        with temporary.open("wb") as file:
            eqx.tree_serialise_leaves(file, lam)
        os.replace(temporary, self.representation)

    def begin_session(self) -> None:
        """Note how many seconds earlier sessions of this run took."""
        lines = self.lines("timings.jsonl")
        ends = {line["session"]: line["seconds"] for line in lines}
        self._session = max(ends, default=0) + 1
        self._seconds_before = sum(ends.values())
        self.replace_lines("timings.jsonl", lines)

    def seconds(self, this_session: float) -> float:
        """Seconds of all sessions."""
        return self._seconds_before + this_session

    def note(self, progress: Progress) -> None:
        """A callback of `minimize`: append the new record and the time."""
        self.write_records(progress.history)
        self.note_seconds(progress.step, progress.seconds)

    def note_seconds(self, step: int, seconds: float) -> None:
        """Append the time at which this session came so far."""
        self._append("timings.jsonl", [{"step": step, "seconds": round(seconds, 3), "session": self._session}])

    def write_records(self, history: Sequence[dict[str, Any]]) -> None:
        """Bring `records.jsonl` up to this history."""
        if self._records_written < 0:
            self.replace_lines("records.jsonl", history)
        else:
            self._append("records.jsonl", history[self._records_written :])
        self._records_written = len(history)

    def _append(self, name: str, entries: Sequence[dict[str, Any]]) -> None:
        if not self.writes:
            return
        with (self.path / name).open("a") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in entries)

    def replace_lines(self, name: str, entries: Sequence[dict[str, Any]]) -> None:
        """Replace a file by these entries, one a line, in one move."""
        self._replace(name, "".join(json.dumps(entry) + "\n" for entry in entries))

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The entries of a file, up to the first that is damaged; none if there is no such file."""
        file = self.path / name
        lines = []
        for text in file.read_text().splitlines() if file.exists() else []:
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break  # the line that a kill cut in two is the last
        return lines

    def _replace(self, name: str, text: str) -> None:
        if not self.writes:
            return
        temporary = self.path / f".{name}.new"
        temporary.write_text(text)
        os.replace(temporary, self.path / name)
