"""A run that survives being killed: one file per checkpoint, complete or absent, and never mistaken for another run's.

hyperax checkpoint 1 <sha256 of the next line>
{"step": ..., "identity": ..., "leaves": ..., "history": ..., "sha256": <of the rest>}
<the arrays, written by equinox.tree_serialise_leaves>
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

_MAGIC = b"hyperax checkpoint "
_VERSION = b"1"


class _DamagedError(Exception):
    pass


@dataclass(frozen=True)
class Checkpoint:
    """Where and how often `minimize` saves what it needs to go on, bit for bit, after being killed.

    Arguments:
        directory: made if it is not there; one run per directory.
        every: hyperiterations between checkpoints (there is one more at the end of the run).
        keep: how many to keep; an old one is removed only after the new one is on disk.
        identity: what makes this run this run (seed, data, configuration, commit): JSON values, compared at a resume.

    Raises: ValueError if `every` or `keep` is below 1, or `identity` is not JSON.
    Cost: three copies of lam (current, last good, best), the optimizer's state and the method's carry on disk per
        checkpoint, and a wait for the disk.
    After a divergence the newest one may already hold the lam that fails; resume from the one before it, by name, with
    gentler settings.
    Do not use it for models to share (write `solution.lam` with `equinox.tree_serialise_leaves`), nor from two
    runs in one directory (the processes of one run share it: the first writes, all read).

    >>> Checkpoint("runs/seed-0", every=100, identity={"seed": 0}).path(500).name
    'step-00000500.ckpt'
    """

    directory: str | Path
    every: int
    keep: int = 2
    identity: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep < 1:
            raise ValueError(f"Checkpoint(every={self.every}, keep={self.keep}): both count from 1.")
        try:
            json.dumps(dict(self.identity))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"Checkpoint's identity must be a dict of JSON values: {error}; convert what is not, e.g. by str."
            ) from None

    def path(self, step: int) -> Path:
        """The file of one step."""
        return Path(self.directory) / f"step-{step:08d}.ckpt"

    def files(self) -> list[Path]:
        """The checkpoints on disk, oldest first."""
        return sorted(Path(self.directory).glob("step-*.ckpt"))

    def save(self, arrays: PyTree, record: dict[str, Any]) -> Path:
        """Write a checkpoint and then remove what is no longer needed.

        Arguments:
            arrays: any pytree of arrays (typed PRNG keys included).
            record: JSON values, of which `step` names the file.

        A file of a later step belongs to a run that was resumed from before it, and is removed too.
        """
        buffer = io.BytesIO()
        eqx.tree_serialise_leaves(buffer, jax.tree.map(_plain, arrays))
        payload = buffer.getvalue()
        header = {
            **record,
            "identity": dict(self.identity),
            "leaves": _leaves(arrays),
            "sha256": hashlib.sha256(payload).hexdigest(),
        }
        line = json.dumps(header).encode()
        first = b"%s%s %s" % (_MAGIC, _VERSION, hashlib.sha256(line).hexdigest().encode())

        target = self.path(record["step"])
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_suffix(".unfinished")
        with open(unfinished, "wb") as file:
            file.write(b"\n".join([first, line, payload]))
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, target)
        _sync_directory(target.parent)

        others = [file for file in self.files() if file != target]
        older, newer = [f for f in others if f < target], [f for f in others if f > target]
        leftovers = target.parent.glob("step-*.unfinished")
        for file in (*older[: max(0, len(older) - self.keep + 1)], *newer, *leftovers):
            file.unlink(missing_ok=True)
        return target

    def load(self, like: PyTree, record: dict[str, Any], name: str | None = None) -> tuple[PyTree, dict[str, Any]]:
        """Read the newest checkpoint, or the one of this name.

        Arguments:
            like: the arrays as this run would have them at its start.
            record: what must agree with the record saved, field by field.
            name: the file's name, `None` for the newest.

        Returns: the arrays, on one device, and the record saved.
        Raises: ValueError if there is none, if it is damaged (naming the good one before it), or if it belongs to
            another run (naming the first difference).
        """
        files = self.files()
        if not files:
            raise ValueError(
                f'no checkpoint in {self.directory}; start with resume=False, or use resume="auto" for both cases.'
            )
        file = files[-1] if name is None else Path(self.directory) / name
        if file not in files:
            raise ValueError(f"no checkpoint {name!r} in {self.directory}; there are {[f.name for f in files]}.")
        try:
            header, payload = _read(file)
        except _DamagedError as error:
            raise ValueError(f"{file} is damaged ({error}). {self._way_out(file, files)}") from None

        expected = {"identity": dict(self.identity), **record, "leaves": _leaves(like)}
        for key, here in expected.items():
            # Through JSON and back, so that tuples compare equal to the lists they were saved as.
            found = difference(key, header.get(key), json.loads(json.dumps(here)))
            if found is not None:
                what, there, here = found
                raise ValueError(
                    f"{file} belongs to another run: {what} is {there} there and {here} here. Resume with what it was "
                    "saved with, or start in another directory."
                )
        arrays = eqx.tree_deserialise_leaves(io.BytesIO(payload), jax.tree.map(_plain, like))
        return jax.tree.map(_restored, arrays, like), header

    def _way_out(self, damaged: Path, files: list[Path]) -> str:
        for file in reversed([f for f in files if f < damaged]):
            try:
                _read(file)
            except _DamagedError:
                continue
            return f'The checkpoint before it, {file.name}, is good: use resume="{file.name}".'
        return "No good one is left before it: remove the file and start again with resume=False."


def _read(file: Path) -> tuple[dict[str, Any], bytes]:
    content = file.read_bytes()
    if not content:
        raise _DamagedError("it is empty")
    if not content.startswith(_MAGIC):
        raise ValueError(f"{file} is not a hyperax checkpoint; move it out of the directory.")
    first, _, rest = content.partition(b"\n")
    line, _, payload = rest.partition(b"\n")
    version, _, digest = first.removeprefix(_MAGIC).partition(b" ")
    if version != _VERSION:
        raise ValueError(
            f"{file} has format version {version.decode(errors='replace')} and this hyperax reads {_VERSION.decode()}; "
            "resume with the hyperax that wrote it."
        )
    if hashlib.sha256(line).hexdigest().encode() != digest:
        raise _DamagedError("its header is cut or changed")
    header = json.loads(line)
    if hashlib.sha256(payload).hexdigest() != header["sha256"]:
        raise _DamagedError(f"its arrays are cut or changed; {len(payload)} bytes are left")
    return header, payload


def _leaves(arrays: PyTree) -> dict[str, str]:
    """The structure of a pytree for people: where each leaf is, and what it is."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): f"{leaf.dtype}{list(leaf.shape)}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(arrays)
    }


def difference(name: str, there: Any, here: Any) -> tuple[str, Any, Any] | None:
    """The first place where two JSON values differ: its name and both values."""
    if not (isinstance(there, dict) and isinstance(here, dict)):
        return None if there == here else (name, repr(there), repr(here))
    for key in [*there, *(key for key in here if key not in there)]:
        inner = f"{name}.{key}"
        if key not in there or key not in here:
            return inner, repr(there[key]) if key in there else "absent", repr(here[key]) if key in here else "absent"
        found = difference(inner, there[key], here[key])
        if found is not None:
            return found
    return None


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _plain(x: Any) -> Any:
    return jax.random.key_data(x) if _is_key(x) else x


def _restored(x: Any, like: Any) -> Any:
    return jax.random.wrap_key_data(x, impl=jax.random.key_impl(like)) if _is_key(like) else x


def _sync_directory(directory: Path) -> None:
    if os.name != "posix":  # elsewhere a directory cannot be opened; the rename is atomic all the same
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
