"""Experiments: recipes, runs, reports. Needs `pip install hyperax[run]`.

A kind of experiment is a configuration (a frozen dataclass) and the five functions of `Kind`; the commands `hyperax
list`, `run`, `resume` and `report` need nothing else, so a new kind is one more entry of `KINDS`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hyperax.experiments import effect_of_t, few_shot, joining, report, study
from hyperax.experiments.config import FewShotConfig, Published
from hyperax.experiments.effect_of_t import EffectOfTConfig
from hyperax.experiments.few_shot import load
from hyperax.experiments.recipes import recipe, recipes
from hyperax.experiments.run_folder import RunFolder
from hyperax.experiments.studies import STUDIES

__all__ = [
    "EffectOfTConfig",
    "FewShotConfig",
    "Kind",
    "Published",
    "format_table",
    "join",
    "load",
    "recipe",
    "recipes",
    "resume",
    "run",
    "write_report",
]


@dataclass(frozen=True)
class Kind:
    """What the commands need of one kind of experiment.

    >>> KINDS["few-shot"].published(recipe("omniglot-5way-1shot"))
    '98.60 % in Franceschi et al. 2018, Table 3'
    """

    config: type
    """Its configuration, with the fields `recipe` and `title` and a method `to_json`, whose result names the kind."""
    run: Callable[..., dict[str, Any]]
    """(config, out, *, data_dir, progress) -> summary, which has "recipe", "stopped" and, of other kinds than few-shot
    runs, "kind"."""
    resume: Callable[..., dict[str, Any]]
    """(out, *, data_dir, checkpoint, progress) -> summary."""
    write_report: Callable[[str | Path], Path]
    """Run folder -> path of its report."""
    format_table: Callable[..., str]
    """(summary, path of the report) -> lines for a terminal."""
    published: Callable[[Any], str]
    """config -> the published number in words, or nothing."""
    takes_mesh: bool = False
    """Whether `run` and `resume` have an option `mesh`, devices to share tasks over."""

    def check_mesh(self, asked: bool) -> None:
        """Raise `ValueError` if several devices are asked for and the kind has no use for them."""
        if asked and not self.takes_mesh:
            raise ValueError(
                f"runs of {self.config.__name__} have no mini-batch of tasks to share over devices: leave out --mesh "
                "and --coordinator"
            )


def _published_accuracy(config: FewShotConfig) -> str:
    number = config.published
    return f"{100 * number.accuracy:.2f} % in {number.source}" if number else ""


_FEW_SHOT = "few-shot"

KINDS: dict[str, Kind] = {
    _FEW_SHOT: Kind(
        FewShotConfig,
        few_shot.run,
        few_shot.resume,
        report.write_report,
        report.format_table,
        _published_accuracy,
        takes_mesh=True,
    ),
    EffectOfTConfig.kind: Kind(
        EffectOfTConfig,
        effect_of_t.run,
        effect_of_t.resume,
        effect_of_t.write_report,
        effect_of_t.format_table,
        lambda config: f"times in {effect_of_t.PAPER['source']}",
    ),
} | {
    kind.kind: Kind(
        kind,
        study.run,
        partial(study.resume, kind),
        partial(study.write_report, kind),
        study.format_table,
        lambda config: config.published(),
        kind.takes_mesh,
    )
    for kind in STUDIES  # what they need beside their class is the same for all
}
"""The kinds by the name in `config.json` and `summary.json`; files that name none are of few-shot runs."""


def kind_of(config: Any) -> Kind:
    """The kind of a configuration; `ValueError` for what is none."""
    for kind in KINDS.values():
        if isinstance(config, kind.config):
            return kind
    raise ValueError(f"{type(config).__name__} is not a configuration: use recipe(name, field=value)")


def kind_in(folder: str | Path) -> Kind:
    """The kind of the run in a folder; that of a few-shot run where it cannot be read."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text())
    except (OSError, ValueError):
        config = None  # what is missing or damaged is said by those who read it in full
    return _named(config)


def _named(written: Any) -> Kind:
    name = written.get("kind", _FEW_SHOT) if isinstance(written, dict) else _FEW_SHOT
    if not isinstance(name, str) or name not in KINDS:
        raise ValueError(f"this version knows no runs of kind {name!r}, only {', '.join(KINDS)}")
    return KINDS[name]


def run(config: Any, out: str | Path, **options: Any) -> dict[str, Any]:
    """Run a configuration of any kind in a new folder.

    Arguments:
        config: a recipe, `recipe(name, field=value)`, or your own.
        out: a folder that is empty or does not exist.
        options: of the kind's own run: `data_dir`, `progress`; where tasks can be shared over devices also `mesh`
            (`hyperax.experiments.devices.start`); for few-shot runs also `make_network`, `optimizer`.

    Returns: what `summary.json` holds.
    Raises: `ValueError` for a folder in use, or data that do not fit; before any long work.

    >>> run(recipe("glyphs-5way-1shot", seed=1), "runs/glyphs")["test"]["episodes"]  # doctest: +SKIP
    600
    """
    kind = kind_of(config)
    return kind.run(config, out, **_of_kind(kind, options))


def resume(out: str | Path, **options: Any) -> dict[str, Any]:
    """Go on with the run in a folder, whatever its kind.

    Arguments:
        out: the run's folder.
        options: of the kind's own resume: `data_dir`, `checkpoint`, `progress`; and those of `run`.

    Returns: what `summary.json` holds.
    Raises: `ValueError` for a folder that holds no run, or other data than the run began with.

    >>> resume("runs/glyphs", checkpoint="step-00000200.ckpt")["stopped"]  # doctest: +SKIP
    'completed 300 hyperiterations'
    """
    kind = kind_in(out)
    return kind.resume(out, **_of_kind(kind, options))


def _of_kind(kind: Kind, options: dict[str, Any]) -> dict[str, Any]:
    """The options without a mesh that is none, which kinds without tasks do not know."""
    kind.check_mesh(options.get("mesh") is not None)
    return {name: x for name, x in options.items() if (name, x) != ("mesh", None)}


def join(out: str | Path, folders: Sequence[str | Path], **options: Any) -> dict[str, Any]:
    """Make one run of several that trained different learners of one comparison.

    Arguments:
        out: a folder that is empty or does not exist.
        folders: runs whose configurations are the same but for their learners and settings; of one that has not ended
            its finished learners count.
        options: `replace`, whether of a learner that was trained twice the later run's counts; `progress`.

    Returns: what `summary.json` holds: that of one run with all the learners.
    Raises: `ValueError` for runs of different kinds, configurations or data, or without a finished learner.

    >>> join("runs/table3", ["runs/maml", "runs/matching"])["kind"]  # doctest: +SKIP
    'table3'
    """
    for folder in folders:
        RunFolder.open(folder, dict)  # says what is no run folder
    kinds = [kind_in(folder) for folder in folders]
    if not kinds or any(kind is not kinds[0] for kind in kinds):
        raise ValueError("runs of one kind can be joined, at least one: name their folders")
    if not issubclass(kinds[0].config, study.Study):
        raise ValueError(f"runs of {kinds[0].config.__name__} cannot be joined")
    return joining.join(kinds[0].config, out, folders, **options)


def write_report(folder: str | Path) -> Path:
    """Write `report.html` and `figures/*.png` into a run folder, from its files alone.

    Arguments:
        folder: of a run of any kind, finished or not.

    Returns: the path of the report.
    Raises: `ValueError` for a folder that is not a run folder, or a damaged file in it.

    >>> write_report("runs/glyphs").name  # doctest: +SKIP
    'report.html'
    """
    return kind_in(folder).write_report(folder)


def format_table(summary: dict[str, Any], report: str | Path | None = None) -> str:
    """The end of a run as a few lines of text.

    Arguments:
        summary: contents of `summary.json`, of a run of any kind.
        report: where the report is, if it is to be said.

    Returns: lines without a last line break.

    >>> print(format_table({"recipe": "mine", "test": {"accuracy": 0.5, "ci95": 0.01}}))
    mine: accuracy on unseen classes in %
      this run   50.00 ± 1.00
    """
    return _named(summary).format_table(summary, report)
