"""Runs of one study that measured different parts, made one."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hyperax.experiments.run_folder import RunFolder
from hyperax.experiments.study import Opened, Part, Study, finished_parts, measure_parts


def join(
    kind: type[Study],
    out: str | Path,
    folders: Sequence[str | Path],
    *,
    replace: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Make one run of several that measured different parts (on several machines, say), and return its summary.

    Arguments:
        kind: the class of their configurations.
        out: a folder that is empty or does not exist.
        folders: run folders whose configurations differ in what `Study.united` puts together only. Of one that has not
            ended its finished parts count.
        replace: whether of a part that was measured twice the later run's counts (in the order of `folders`).
        progress: as in `run`.

    Returns: what `summary.json` holds: that of one run that measured all parts.
    Raises: `ValueError` for configurations or data that do not go together, or runs without a finished part.
    Cost: copying files.
    """
    RunFolder(out).require_unused()
    opened = [RunFolder.open(folder, kind.from_json) for folder in folders]
    source = opened[0][0].read_json("source.json")
    ended: dict[str, dict[str, Any]] = {}
    measured: dict[str, Part] = {}
    kept: dict[str, Path] = {}
    for folder, of_folder in opened:
        if folder.read_json("source.json") != source:
            raise ValueError(f"{folder.path} and {opened[0][0].path} are of different data: join runs of the same")
        found, lines = finished_parts(of_folder, folder)
        if not found:
            raise ValueError(f"{folder.path} has no finished part yet: `hyperax resume {folder.path}` goes on with it")
        twice = sorted(set(found) & set(measured))
        if twice and not replace:
            raise ValueError(
                f"{folder.path} measured {twice[0]}, and so did a run before it: join runs of other parts, or use "
                "--replace to take the later one's"
            )
        measured |= found
        ended |= {line["part"]: line for line in lines}
        kept |= {name: folder.path / "parts" / name for name in found}
    config = kind.united([config for _, config in opened], list(measured))
    joined = RunFolder.create(out, config, opened[0][0].data_dir())
    joined.write_json("source.json", source)
    parts = [name for name in config.parts() if name in measured]
    for name in parts:
        if measured[name].arrays:
            joined.write_arrays(name, measured[name].arrays)
        if kept[name].exists():
            shutil.copytree(kept[name], joined.path / "parts" / name)
    joined.replace_lines("records.jsonl", [dict(record) for name in parts for record in measured[name].records])
    joined.replace_lines("parts.jsonl", [ended[name] for name in parts])
    times = [line for folder, _ in opened for line in _last_times(folder)]
    joined.replace_lines("timings.jsonl", [line | {"session": i + 1} for i, line in enumerate(times)])
    summaries = [folder.read_json("summary.json") or folder.read_json("environment.json") or {} for folder, _ in opened]
    # Where they were measured, not where they are joined.
    said = lambda name: list(dict.fromkeys(str(summary.get(name, "unknown")) for summary in summaries))
    versions = [summary.get("versions", {}) for summary in summaries]
    names = dict.fromkeys(name for found in versions for name in found)
    where: dict[str, Any] = {name: ", ".join(said(name)) for name in ("commit", "machine")}
    where["versions"] = {name: ", ".join(dict.fromkeys(str(found.get(name)) for found in versions)) for name in names}
    return measure_parts(config, joined, Opened(None, source), None, progress, where)


def _last_times(folder: RunFolder) -> list[dict[str, Any]]:
    """The last line of each session."""
    return list({line["session"]: line for line in folder.lines("timings.jsonl")}.values())
