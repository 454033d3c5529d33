"""Write the numbers of README.md from the committed records, or check that they are up to date.

python docs/tables.py            # rewrite the blocks between <!-- name --> and <!-- end -->
python docs/tables.py --check    # exit 1 if a block differs from the records
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


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
    for _, run in _few_shot_runs():
        lines.append(
            f"- `hyperax run {run['recipe']} --seed {run['seed']}`: {run['hyperiterations']} hyperiterations in "
            f"{run['timing']['seconds'] / 60:.0f} minutes, T = {run['test']['steps']} chosen on validation classes, "
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
    found = [(path, json.loads(path.read_text())) for path in sorted((ROOT / "results").glob("*/summary.json"))]
    return [(path, run) for path, run in found if "kind" not in run]


def _percent(score: dict[str, float]) -> str:
    return f"{100 * score['accuracy']:.2f} ± {100 * score['ci95']:.2f}"


def updated(text: str) -> str:
    """The text with every block written again."""
    for block in (results, runs, hyperiteration, miniimagenet):
        pattern = rf"(<!-- {block.__name__} -->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda found, block=block: f"{found[1]}{block()}\n{found[2]}", text, flags=re.DOTALL)
    return text


def main() -> int:
    """Rewrite or check README.md."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    if "--check" in sys.argv[1:]:
        return int(updated(text) != text)
    readme.write_text(updated(text))
    return 0


if __name__ == "__main__":
    sys.exit(main())
