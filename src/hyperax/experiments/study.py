"""Studies: experiments that are a list of parts, a table and some figures; their runner, their report."""

from __future__ import annotations

import abc
import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from hyperax.experiments import environment, report
from hyperax.experiments.figures import save
from hyperax.experiments.run_folder import RunFolder
from hyperax.processes import processes_of

if TYPE_CHECKING:
    from jax.sharding import Mesh
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Place:
    """Where a part is measured.

    Fields:
        say: tells a person, at a terminal, how far the part is.
        folder: for what a part keeps until it is finished (checkpoints) or for good (weights), a folder of its own
            that may not exist yet; the same after a resume.
        mesh: devices to share the tasks over; `None`: one device.
        progress: whether a live bar may be shown.
        writes: whether this process writes to the folder; of several the first does.
    """

    say: Callable[[str], None]
    folder: Path
    mesh: Mesh | None = None
    progress: bool = False
    writes: bool = True


@dataclass(frozen=True)
class Part:
    """What one part of a study measured.

    Fields:
        records: dicts of JSON types, for `records.jsonl`.
        arrays: what figures need and is too large for a record (images, weights), for `arrays/PART.npz`.
    """

    records: Sequence[Mapping[str, Any]] = ()
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Shown:
    """A figure of the report: its name as a file, what stands in its place, its caption in HTML."""

    name: str
    figure: Figure
    alternative: str
    caption: str


@dataclass(frozen=True)
class Opened:
    """The data of a study, and what determines them (digests, sizes), as a dict of JSON types."""

    data: Any
    provenance: dict[str, Any]


@dataclass(frozen=True)
class Study(abc.ABC):
    """A configuration whose parts are measured one by one, each kept when it is finished.

    A kind of study is a subclass, a frozen dataclass: its fields are the options of the command line, its methods say
    what is measured and what is shown. One more entry of `STUDIES` in `studies.py` makes it a recipe.
    """

    kind: ClassVar[str]
    """Its name in `config.json`."""
    takes_mesh: ClassVar[bool] = False
    """Whether its tasks can be shared over devices."""

    recipe: str = ""
    """Name of the recipe this configuration comes from."""
    title: str = ""
    """What a report calls the run."""
    seed: int = 0
    """Of everything that is drawn."""

    @abc.abstractmethod
    def open(self, data_dir: str | None) -> Opened:
        """The data; `ValueError`, with what to do, if they are not there. Quick: it runs before the folder is made."""

    @abc.abstractmethod
    def parts(self) -> Sequence[str]:
        """The names of the parts, in their order: file names."""

    @abc.abstractmethod
    def measure(self, part: str, data: Any, earlier: Mapping[str, Part], place: Place) -> Part:
        """Measure one part; `earlier` has those before it."""

    @abc.abstractmethod
    def summarise(self, measured: Mapping[str, Part]) -> dict[str, Any]:
        """What `summary.json` says of all parts, at least

        "headline": {"number", "text"}, "table": {"columns", "rows"} with text in the cells, "notes": sentences; and
        "stopped" if a part diverged.
        """

    @abc.abstractmethod
    def figures(self, measured: Mapping[str, Part], summary: Mapping[str, Any]) -> list[Shown]:
        """The figures of a finished run."""

    def published(self) -> str:
        """The published number in words, or nothing."""
        return ""

    @classmethod
    def united(cls, configs: Sequence[Self], parts: Sequence[str]) -> Self:
        """One configuration that has just these parts of all; `ValueError` if they do not go together."""
        raise ValueError(f"runs of the kind {cls.kind} cannot be joined")

    def check_devices(self, count: int) -> None:
        """Raise `ValueError` if its tasks cannot be shared by so many devices."""
        if count > 1 and not self.takes_mesh:
            raise ValueError(f"a run of the kind {self.kind} has no tasks to share over devices: leave the mesh out")

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON types."""
        plain = lambda x: list(x) if isinstance(x, tuple) else x
        return {"kind": self.kind} | {name: plain(x) for name, x in dataclasses.asdict(self).items()}

    @classmethod
    def from_json(cls, config: dict[str, Any]) -> Self:
        """The configuration that `to_json` wrote."""
        try:
            named: dict[str, Any] = {
                name: tuple(x) if isinstance(x, list) else x for name, x in config.items() if name != "kind"
            }
            return cls(**named)
        except (AttributeError, TypeError) as error:
            raise ValueError(f"this is not the configuration of a {cls.kind} of this version: {error}") from error


def run(
    config: Study,
    out: str | Path,
    *,
    data_dir: str | None = None,
    mesh: Mesh | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Run a study in a new folder and return its summary.

    Arguments:
        config: a recipe, with some fields changed or not.
        out: a folder that is empty or does not exist.
        data_dir: where the data are; else the environment variable HYPERAX_DATA.
        mesh: devices to share the tasks over, of a study that has tasks; `None`: one device.
        progress: say which part is being measured.

    Returns: what `summary.json` holds.
    Raises: `ValueError` for a folder in use or missing data; before any work and before the folder is made.
    """
    processes = processes_of(mesh)
    config.check_devices(1 if mesh is None else mesh.size)

    def prepare() -> Opened:
        RunFolder(out, processes.is_first).require_unused()
        return config.open(data_dir)

    opened = processes.together(prepare)
    processes.agree("the run", {"config": config.to_json(), "data": opened.provenance})
    folder = processes.together(lambda: RunFolder.create(out, config, data_dir, processes.is_first))
    folder.write_json("source.json", opened.provenance)
    return measure_parts(config, folder, opened, mesh, progress)


def resume(
    kind: type[Study],
    out: str | Path,
    *,
    data_dir: str | None = None,
    checkpoint: str | None = None,
    mesh: Mesh | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Go on with an interrupted run and return its summary: finished parts are kept, the one begun starts again, from
    its own checkpoint if it has one.

    Arguments:
        kind: the class of the configuration.
        out: the run's folder.
        data_dir: where the data are; by default where they were when the run began.
        checkpoint: to be left out, because a run of parts has no single one.
        mesh, progress: as in `run`.

    Returns: what `summary.json` holds.
    Raises: `ValueError` for other data than the run began with.
    """
    if checkpoint is not None:
        raise ValueError("a run of this kind has no checkpoints, it keeps finished parts: resume without --checkpoint")
    processes = processes_of(mesh)

    def prepare() -> tuple[RunFolder, Any, Opened]:
        folder, config = RunFolder.open(out, kind.from_json, processes.is_first)
        config.check_devices(1 if mesh is None else mesh.size)
        opened = config.open(data_dir or folder.data_dir())
        _check_source(folder, opened)
        return folder, config, opened

    folder, config, opened = processes.together(prepare)
    processes.agree("the run", {"config": config.to_json(), "parts": folder.lines("parts.jsonl")})
    return measure_parts(config, folder, opened, mesh, progress)


def _check_source(folder: RunFolder, opened: Opened) -> None:
    try:
        source = folder.read_json("source.json")
    except ValueError as error:
        raise ValueError(f"{folder.path / 'source.json'} is damaged ({error}): start the run again") from None
    if source != opened.provenance:
        raise ValueError(
            f"the data are not those that {folder.path} began with (source.json): give --data-dir, or start the run "
            "again in another folder"
        )


def measure_parts(
    config: Study,
    folder: RunFolder,
    opened: Opened,
    mesh: Mesh | None,
    progress: bool,
    where: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Measure the parts that are not finished, and write summary and report; `where`, if it was elsewhere."""
    begin = time.perf_counter()
    shown = progress and folder.writes
    say = lambda words: print(words, file=sys.stderr, flush=True) if shown else None
    say(f"run folder: {folder.path}")
    where = where or {
        "commit": environment.commit(),
        "versions": environment.versions(),
        "machine": environment.machine(),
    }
    measured, ended = finished_parts(config, folder)
    folder.begin_session()
    folder.write_json("environment.json", where)
    names = config.parts()
    for at, name in enumerate(names):
        if name in measured:
            continue
        say(f"part {at + 1} of {len(names)}: {name}")
        start = time.perf_counter()
        place = Place(say, folder.path / "parts" / name, mesh, shown, folder.writes)
        part = config.measure(name, opened.data, measured, place)
        kept = {"records": len(part.records), "arrays": len(part.arrays)}
        ended.append({"part": name, "seconds": round(time.perf_counter() - start, 3), **kept, **_memory()})
        measured[name] = Part([{"part": name, **record} for record in part.records], part.arrays)
        if part.arrays:
            folder.write_arrays(name, part.arrays)
        folder.replace_lines("records.jsonl", [dict(record) for kept in measured.values() for record in kept.records])
        folder.replace_lines("parts.jsonl", ended)  # last: it says that the part is complete
        folder.note_seconds(at + 1, time.perf_counter() - begin)
    summary = {"kind": config.kind, "recipe": config.recipe, "title": config.title, "seed": config.seed}
    summary |= config.summarise(measured)
    summary = {"stopped": f"completed {len(names)} parts"} | summary | {"source": opened.provenance, **where}
    if mesh is not None:
        summary["devices"] = {"tasks_over": mesh.size, "processes": processes_of(mesh).count}
    summary["timing"] = {"parts": ended, "seconds": round(folder.seconds(time.perf_counter() - begin), 1)}
    folder.write_json("summary.json", summary)
    if folder.writes:
        write_report(type(config), folder.path)
    return summary


def finished_parts(config: Study, folder: RunFolder) -> tuple[dict[str, Part], list[dict[str, Any]]]:
    """The finished parts, in order, and the lines that say so."""
    ended = [line for line in folder.lines("parts.jsonl") if line["part"] in config.parts()]
    records = folder.lines("records.jsonl")
    of = lambda name: [record for record in records if record["part"] == name]
    measured = {line["part"]: Part(of(line["part"]), folder.read_arrays(line["part"])) for line in ended}
    for line in ended:
        part = measured[line["part"]]
        for name, found in (("records", len(part.records)), ("arrays", len(part.arrays))):
            if line.get(name, found) != found:  # a kill cannot do this: a file was changed
                raise ValueError(
                    f"{folder.path} has {found} {name} of {line['part']}, which had {line[name]}: records.jsonl or "
                    "arrays/ is damaged, run the recipe again in another folder"
                )
    return measured, ended


def _memory() -> dict[str, int]:
    """The most memory that this process has held so far, in MB."""
    try:
        import resource
    except ModuleNotFoundError:  # not on Windows
        return {}
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, KiB on Linux
    return {"peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit // 2**20}


def write_report(kind: type[Study], folder: str | Path) -> Path:
    """Write `report.html` and `figures/*.png` into a run folder.

    Arguments:
        kind: the class of the configuration.
        folder: of a run; one that has not ended says how far it is.

    Raises: `ValueError` for a folder that holds no run of this kind, or a damaged file in it.
    """
    opened, config = RunFolder.open(folder, kind.from_json)
    try:
        summary = opened.read_json("summary.json")
    except ValueError as error:
        raise ValueError(f"a file of {opened.path} is damaged ({error}): run the recipe again") from None
    measured, ended = finished_parts(config, opened)
    shown = []
    for figure in config.figures(measured, summary) if summary else []:
        path = save(figure.figure, opened.path / "figures" / f"{figure.name}.png")
        shown.append(report.embedded(path, figure.alternative, figure.caption))
    name = opened.path.resolve().name
    text = report.page(
        title=config.title,
        result=_result(summary) if summary else report.unfinished(f"{len(ended)} parts are finished.", name),
        figures=shown or ["<p class=soft>No figures: the run has not ended.</p>"],
        again=report.again(config.recipe, config.seed),
        name=name,
        environment=report.where_measured(summary or {}),
        data=(summary or {}).get("source"),
        config=config.to_json(),
    )
    path = opened.path / "report.html"
    path.write_text(text, "utf-8")
    return path


def format_table(summary: Mapping[str, Any], report: str | Path | None = None) -> str:
    """The table of a finished run as lines of text.

    Arguments:
        summary: contents of `summary.json`.
        report: where the report is, if it is to be said.

    >>> table = {"columns": ["T", "error"], "rows": [["10", "0.5"], ["250", "0.25"]]}
    >>> print(format_table({"recipe": "ridge", "headline": {"number": "0.25", "text": "is least."}, "table": table}))
    ridge: 0.25 is least.
      T    error
      10   0.5
      250  0.25
    """
    rows = [summary["table"]["columns"], *summary["table"]["rows"]]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  " + "  ".join(f"{x:<{width}}" for x, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    headline = f"{summary['recipe']}: {summary['headline']['number']} {summary['headline']['text']}"
    return "\n".join([headline, *lines, *([f"report: {report}"] if report else [])])


def _result(summary: Mapping[str, Any]) -> str:
    headline, table = summary["headline"], summary["table"]
    heads = "".join(f"<th{' class=numeric' if i else ''}>{escape(x)}</th>" for i, x in enumerate(table["columns"]))
    cells = lambda row: "".join(f"<td{' class=numeric' if i else ''}>{escape(x)}</td>" for i, x in enumerate(row))
    rows = "".join(f"<tr>{cells(row)}</tr>\n" for row in table["rows"])
    notes = "".join(f"<li>{escape(note)}</li>" for note in summary["notes"])
    return f"""<p class=number>{escape(headline["number"])}</p>
<p>{escape(headline["text"])}</p>
<div class=scroll><table><tr>{heads}</tr>
{rows}</table></div>
<ul>{notes}</ul>"""


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % interval, by Student's t; `nan` for a single value.

    >>> mean, half = interval([1.0, 2.0, 3.0])
    >>> round(mean, 3), round(half, 3)
    (2.0, 2.484)
    """
    from scipy.stats import t

    x = np.asarray(values, float)
    half = t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)) if len(x) > 1 else np.nan
    return float(x.mean()), float(half)


def plus_minus(values: Sequence[float], digits: int, scale: float = 1.0) -> str:
    """The mean with its 95 % interval, as text.

    >>> plus_minus([0.5, 0.6], 1, scale=100)
    '55.0 ± 63.5'
    """
    mean, half = interval(np.multiply(values, scale).tolist())
    return f"{mean:.{digits}f}" + (f" ± {half:.{digits}f}" if np.isfinite(half) else "")
