"""The command line: `hyperax list | run RECIPE | resume DIR | join DIR RUNS | report DIR | data fetch | data show`."""

from __future__ import annotations

import dataclasses
import io
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

_USAGE = """\
usage: hyperax COMMAND ...

  hyperax list                     the recipes, with the numbers of the papers
  hyperax run RECIPE [options]     run one; `hyperax run RECIPE --help` lists every field of its configuration
  hyperax resume DIR [options]     go on with an interrupted run
  hyperax join DIR RUN RUN ...     one run of several that trained different learners of a comparison; with --replace
                                   the last run's count of learners that were trained twice
  hyperax report DIR               write a run's report again from its files
  hyperax data fetch NAME          download a data set (omniglot)
  hyperax data show NAME           how many classes and images a recipe's data set has
"""


@dataclasses.dataclass(frozen=True)
class Where:
    """Where a run reads and writes."""

    out: str | None = None
    """Folder of the run; by default a new one under runs/."""
    data_dir: str | None = None
    """Folder with the images; else the environment variable HYPERAX_DATA."""
    progress: bool = True
    """Show how far the run is."""


@dataclasses.dataclass(frozen=True)
class Again:
    """How to go on with a run."""

    data_dir: str | None = None
    """Folder with the images; else the environment variable HYPERAX_DATA."""
    checkpoint: str | None = None
    """A file of the run's checkpoints/, such as step-00000500.ckpt; by default the newest."""
    progress: bool = True
    """Show how far the run is."""


@dataclasses.dataclass(frozen=True)
class Download:
    """Where a download goes."""

    data_dir: str | None = None
    """Folder for the data; else HYPERAX_DATA, else hyperax's cache."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0; 1: the run diverged; 2: wrong input; 130: interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    commands = {"list": _list, "run": _run, "resume": _resume, "join": _join, "report": _report, "data": _data}
    asked = ("-h", "--help", "help")
    if not words or words[0] in asked or (words[0] in commands and words[1:2] and words[1] in asked):
        print(_USAGE, end="")
        return 0
    if words[0] not in commands:
        return _refuse(f"there is no command {words[0]!r}: use {', '.join(commands)}")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal or file without ± or … shows ? in its place
    try:
        return commands[words[0]](words[1:])
    except ValueError as error:
        return _refuse(str(error))
    except ModuleNotFoundError as error:
        return _refuse(
            f"{error.name} is not installed: pip install 'hyperax[run]' (from a clone: pip install -e '.[run]')"
        )
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _refuse(str(error))


def _refuse(message: str) -> int:
    print(f"hyperax: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _list(words: list[str]) -> int:
    from hyperax.experiments import kind_of, recipes

    if words:
        raise ValueError(f"hyperax list takes nothing else, not {' '.join(words)}")
    for name, config in recipes().items():
        number = kind_of(config).published(config)
        print(f"{name:27} {config.title}{f'   {number}' if number else ''}")
    return 0


def _run(words: list[str]) -> int:
    from hyperax import experiments
    from hyperax.experiments.devices import Devices, start

    name, words = _first(words, "hyperax run RECIPE (see `hyperax list`)")
    where, devices, config = _parse(
        words, f"hyperax run {name}", where=Where(), devices=Devices(), config=experiments.recipe(name)
    )
    experiments.kind_of(config).check_mesh(devices.asked)
    out, mesh = where.out or _new_folder(name), start(devices) if devices.asked else None
    return _finish(
        out, lambda: experiments.run(config, out, data_dir=where.data_dir, mesh=mesh, progress=where.progress), mesh
    )


def _resume(words: list[str]) -> int:
    from hyperax import experiments
    from hyperax.experiments.devices import Devices, start

    out, words = _first(words, "hyperax resume DIR")
    again, devices = _parse(words, "hyperax resume DIR", again=Again(), devices=Devices())
    experiments.kind_in(out).check_mesh(devices.asked)
    mesh = start(devices) if devices.asked else None
    options = {"data_dir": again.data_dir, "checkpoint": again.checkpoint, "progress": again.progress}
    return _finish(out, lambda: experiments.resume(out, mesh=mesh, **options), mesh)


def _finish(out: str, work: Any, mesh: Any) -> int:
    import warnings
    from pathlib import Path

    from hyperax.experiments import format_table
    from hyperax.processes import processes_of
    from hyperax.stopping import DivergenceWarning

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DivergenceWarning)  # said below, in the summary's words
            summary = work()
    except KeyboardInterrupt:
        begun = (Path(out) / "config.json").exists()
        what = f"interrupted; go on with: hyperax resume {out}" if begun else "interrupted before the run began"
        print(f"\nhyperax: {what}", file=sys.stderr)
        return 130
    diverged = summary["stopped"].startswith("diverged")
    if processes_of(mesh).is_first:
        print(format_table(summary, f"{out}/report.html"))
        if diverged:
            print(f"hyperax: {summary['stopped']}", file=sys.stderr)
    return 1 if diverged else 0


def _join(words: list[str]) -> int:
    from hyperax import experiments

    replace = "--replace" in words
    out, runs = _first([word for word in words if word != "--replace"], "hyperax join DIR RUN RUN ...")
    print(experiments.format_table(experiments.join(out, runs, replace=replace), f"{out}/report.html"))
    return 0


def _report(words: list[str]) -> int:
    from hyperax.experiments import write_report

    out, words = _first(words, "hyperax report DIR")
    if words:
        raise ValueError(f"hyperax report takes a folder and nothing else, not {' '.join(words)}")
    print(write_report(out))
    return 0


def _data(words: list[str]) -> int:
    from hyperax.experiments import FewShotConfig, recipes
    from hyperax.fewshot.datasets import describe, fetch

    action, words = _first(words, "hyperax data fetch NAME, or hyperax data show NAME")
    name, words = _first(words, f"hyperax data {action} NAME")
    if action not in ("fetch", "show"):
        raise ValueError(f"there is no `hyperax data {action}`: use fetch or show")
    if action == "fetch":
        (download,) = _parse(words, f"hyperax data fetch {name}", download=Download())
        for path in fetch(name, download.data_dir):
            print(path)
        return 0
    datasets = [config.dataset for config in recipes().values() if isinstance(config, FewShotConfig)]
    configs = {type(dataset).__name__.lower(): dataset for dataset in datasets}
    if name.lower() not in configs:
        raise ValueError(f"there is no data set {name!r}: use {', '.join(configs)}")
    download, dataset = _parse(words, f"hyperax data show {name}", download=Download(), dataset=configs[name.lower()])
    print(describe(dataset.load(download.data_dir)))
    return 0


def _first(words: list[str], usage: str) -> tuple[str, list[str]]:
    if not words or words[0].startswith("-"):
        raise ValueError(f"something is missing: {usage}")
    return words[0], words[1:]


def _parse(words: list[str], program: str, **defaults: Any) -> tuple[Any, ...]:
    """Options from dataclasses, whose fields are named without prefixes."""
    import tyro

    fields = [
        (name, Annotated[type(default), tyro.conf.arg(name="")], dataclasses.field(default=default))
        for name, default in defaults.items()
    ]
    options = dataclasses.make_dataclass("Options", fields, frozen=True)
    config = (tyro.conf.AvoidSubcommands, tyro.conf.SuppressFixed)
    parsed = tyro.cli(options, args=words, prog=program, description="", config=config)
    return tuple(getattr(parsed, name) for name in defaults)


def _new_folder(name: str) -> str:
    import datetime
    from pathlib import Path

    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return str(Path("runs") / f"{name}-{stamp}")
