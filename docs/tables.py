"""Write the numbers of README.md and docs/ from the committed records, or check that they are up to date.

python docs/tables.py            # rewrite the blocks between <!-- name --> and <!-- end -->
python docs/tables.py --check    # exit 1 if a block differs from the records
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # for benchmarks.tables

from benchmarks.few_shot_tables import hyper_representation_peers, maml_peers  # noqa: E402
from benchmarks.hyperparameter_tables import data_cleaning_peers, estimators  # noqa: E402
from benchmarks.tables import costs, methods, peers, peers_steps  # noqa: E402
from benchmarks.torch_tables import torch_memory, torch_steps  # noqa: E402

from hyperax.experiments import recipe  # noqa: E402

PAGES = (
    "README.md",
    "docs/methods.md",
    "docs/theory.md",
    "docs/hyperparameters.md",
    "docs/learners.md",
    "docs/comparisons.md",
    "docs/patterns.md",
    "docs/pytorch.md",
)
"""The pages with blocks between <!-- name --> and <!-- end -->."""


def results() -> str:
    """Accuracy of every committed run beside its baselines and the papers."""
    lines = [
        "| run (unseen classes, disjoint sets) | accuracy | nearest neighbour, pixels | untrained | paper¹ |",
        "|---|---|---|---|---|",
    ]
    for path, run in _few_shot_runs():
        test, baselines = run["test"], run["baselines"]
        paper = f"{100 * run['paper']['accuracy']:.1f}" if run["paper"] else ""
        lines.append(
            f"| [`{run['recipe']}`](results/{path.parent.name}/summary.json) | **{_percent(test)}** "
            f"| {_percent(baselines['nearest neighbour on pixels'])} | {_percent(baselines['untrained network'])} "
            f"| {paper} |"
        )
    return "\n".join(lines)


def runs() -> str:
    """Where and how each number was measured."""
    lines = []
    for path, run in _few_shot_runs():
        validated = json.loads((path.parent / "config.json").read_text())["validation_episodes"]
        options = "" if validated == 600 else f" --validation-episodes {validated}"  # 600 is the recipes'
        lines.append(
            f"- `hyperax run {run['recipe']} --seed {run['seed']}{options}`: {run['hyperiterations']} hyperiterations "
            f"in {run['timing']['seconds'] / 60:.0f} minutes, T = {run['test']['steps']} chosen on validation classes, "
            f"{run['test']['episodes']} test episodes, {run['machine']}, commit {run['commit']}."
        )
    return "\n".join(lines)


def hyperiteration() -> str:
    """Time of a hyperiteration by T."""
    record = json.loads((ROOT / "benchmarks/records/hyperiteration.json").read_text())
    steps = " | ".join(str(row["steps"]) for row in record["table"])
    times = " | ".join(f"{1000 * row['seconds']:.0f} ms" for row in record["table"])
    ratios = " | ".join(f"{row['ratio']:.2f}" for row in record["table"])
    head = f"| T | {steps} |\n|---{'|---' * len(record['table'])}|\n"
    where = f"{record['machine']}, commit {record['commit']}"
    note = f"\n\n{record['data']}, 5-way 1-shot, {record['tasks']} episodes, {where}."
    return f"{head}| one hyperiteration | {times} |\n| relative to T = 1 | {ratios} |{note}"


def miniimagenet() -> str:
    """The rate of a short run on the real images."""
    run = json.loads((ROOT / "benchmarks/records/miniimagenet-c4l-1shot.json").read_text())
    rate = run["timing"]["hyperiterations_per_second"]
    return (
        f"miniImageNet, C4L, 1-shot, 4 episodes: {rate:.2f} hyperiterations a second over the first "
        f"{run['hyperiterations']} ({run['machine']}, commit {run['commit']}); the full training of "
        f"{run['recipe']} has not been run: it is for an accelerator."
    )


def _few_shot_runs() -> list[tuple[Path, dict]]:
    """The committed summaries of this kind; those of other kinds name theirs."""
    return [(path, run) for path, run in _summaries() if "kind" not in run]


def _summaries() -> list[tuple[Path, dict]]:
    return [(path, json.loads(path.read_text())) for path in sorted((ROOT / "results").glob("*/summary.json"))]


def _percent(score: dict[str, float]) -> str:
    return f"{100 * score['accuracy']:.2f} ± {100 * score['ci95']:.2f}"


def effect_of_t() -> str:
    """Objective, accuracies and times by T, beside the paper's times."""
    run = json.loads((ROOT / "results/effect-of-t/summary.json").read_text())
    times = {(row["method"], row["steps"]): row["seconds"] for row in run["timing"]["seconds_per_hypergradient"]}
    cell = lambda method, T: f"{1000 * times[method, T]:.0f}" if (method, T) in times else ""
    paper = run["paper"]
    lines = [
        "| T | f_T, end | test accuracy, end | best | at hyperiteration | `Reverse`, ms | `Doubling`, ms | paper, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for curve in run["curves"]:
        T, final, best = curve["steps"], curve["final"], curve["best"]
        doubling = f"{cell('ClosedForm', T)} (`ClosedForm`)" if T == "exact" else cell("Doubling", T)
        lines.append(
            f"| {T} | {final['value']['mean']:.3f} | {_spread(final['test'])} | {_spread(best['test'])} "
            f"| {best['hyperiteration']['mean']:.0f} | {cell('Reverse', T)} | {doubling} | {paper['seconds'][str(T)]} |"
        )
    note = (
        f"`hyperax run {run['recipe']} --seed {run['seed']}`: {run['hyperiterations']} hyperiterations, means and "
        f"standard deviations over {run['protocol']['draws']} draws of {run['protocol']['classes']} classes that the "
        f"network has not seen, {run['machine']}, commit {run['commit']}. Milliseconds are of one hyperiteration. "
        f"Paper: {paper['source']}, {paper['what']} ({paper['machine']})."
    )
    return "\n".join([*lines, "", note])


def study(folder: Path, run: dict[str, Any]) -> str:
    """Table and notes of a study, as in its report."""
    table, recipe_name, options = run["table"], run["recipe"], _options(folder)
    lines = [f"| {' | '.join(table['columns'])} |", f"|{'---|' * len(table['columns'])}"]
    lines += [f"| {' | '.join(row)} |" for row in table["rows"]]
    where = f"`hyperax run {recipe_name}{options}`: {_where(run)}."
    return "\n".join([*lines, "", where, "", *(f"- {note}" for note in run["notes"])])


def _options(folder: Path) -> str:
    """What a run was told beside the defaults of its recipe, as the command line has it."""
    config = json.loads((folder / "config.json").read_text())
    usual = json.loads(json.dumps(recipe(config["recipe"]).to_json()))
    told = {"seed": config["seed"]}
    told |= {name: value for name, value in config.items() if name in usual and value != usual[name]}
    words = lambda value: " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return "".join(f" --{name.replace('_', '-')} {words(value)}" for name, value in told.items())


def studies() -> str:
    """The headline of each study, and where it was measured."""
    return _headlines(lambda run: "differences" not in run)


def comparisons() -> str:
    """The headline of each comparison of few-shot learners."""
    return _headlines(lambda run: "differences" in run)


def _headlines(wanted: Callable[[dict[str, Any]], bool]) -> str:
    lines = []
    for path, run in _summaries():
        if "headline" in run and wanted(run):
            said = f"**{run['headline']['number']}** {run['headline']['text'].rstrip('.')}"
            lines.append(f"- [`{run['recipe']}`](results/{path.parent.name}/summary.json): {said} ({_where(run)}).")
    return "\n".join(lines)


def _where(run: dict[str, Any]) -> str:
    seconds = run["timing"]["seconds"]
    time = f"{seconds:.0f} seconds" if seconds < 100 else f"{seconds / 60:.0f} minutes"
    return f"{time}, seed {run['seed']}, {run['machine']}, commit {run['commit']}"


def _spread(score: dict[str, float]) -> str:
    return f"{100 * score['mean']:.1f} ± {100 * score['sd']:.1f}"


BLOCKS = {block.__name__: block for block in (results, runs, hyperiteration, miniimagenet, effect_of_t)}
BLOCKS |= {block.__name__: block for block in (studies, comparisons, maml_peers, hyper_representation_peers)}
BLOCKS |= {block.__name__: block for block in (costs, methods, peers, peers_steps, estimators, data_cleaning_peers)}
BLOCKS |= {block.__name__: block for block in (torch_steps, torch_memory)}
BLOCKS |= {
    path.parent.name.replace("-", "_"): partial(study, path.parent, run)
    for path, run in _summaries()
    if "headline" in run
}


def updated(text: str) -> str:
    """The text with every block written again."""
    for name in re.findall(r"<!-- (\w+) -->\n", text):
        if name in BLOCKS:
            block = BLOCKS[name]()
            pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
            text = re.sub(pattern, lambda found, block=block: f"{found[1]}{block}\n{found[2]}", text, flags=re.DOTALL)
    return text


def main() -> int:
    """Rewrite or check the pages."""
    stale = 0
    for name in PAGES:
        page = ROOT / name
        text = page.read_text()
        new = updated(text)
        stale += new != text
        if "--check" not in sys.argv[1:]:
            page.write_text(new)
    return int(bool(stale)) if "--check" in sys.argv[1:] else 0


if __name__ == "__main__":
    sys.exit(main())
