"""The report of a run, made from its folder alone: one HTML file to read anywhere, one table for the terminal."""

from __future__ import annotations

import base64
import json
import shlex
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from hyperax.experiments.reading import Run, best_record, compared, read_run

_STYLE = """
:root { color-scheme: light dark; --line: #d0d7de; --soft: #57606a; --note: #fff4d6; --link: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --line: #3d444d; --soft: #9da7b3; --note: #4a3a10; --link: #6cb6ff; } }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin-bottom: .3rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
.number { font-size: 2.4rem; font-weight: 650; color: var(--link); margin: .6rem 0 0; line-height: 1.2; }
.soft, figcaption, td small { color: var(--soft); } figcaption, small { font-size: .88rem; }
.note { background: var(--note); border-radius: 6px; padding: .5rem .8rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .35rem .8rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.numeric, th.numeric { text-align: right; } td.numeric { white-space: nowrap; font-variant-numeric: tabular-nums; }
.settings td:first-child { width: 38%; }
.settings td { font-family: ui-monospace, monospace; font-size: .82rem; overflow-wrap: anywhere; }
figure { margin: 1.2rem 0 1.8rem; } img { width: 100%; height: auto; background: white; border-radius: 6px; }
pre { white-space: pre-wrap; border: 1px solid var(--line); border-radius: 6px; padding: .7rem; }
summary { cursor: pointer; }
"""

_STATISTICS = {
    "set": "each set by its own statistics, support and query apart",
    "support": "support and query by the statistics of the support set",
    "episode": "support and query together by their common statistics",
    "batch": "by statistics common to all episodes that are computed together",
    "none": "none; the network has no batch normalisation",
}

_CAPTIONS = {  # figure: (alternative text, caption)
    "curves": (
        "Curves of the outer objective and of accuracy by hyperiteration",
        "<strong>Training.</strong> Above: the outer objective f<sub>T</sub>(λ), averaged over the episodes of a "
        "mini-batch (ICML 2018, eq. 9). Below: accuracy on the query images of training episodes, and on episodes of "
        "validation classes with its 95 % interval. The dashed line marks the iterate that validated best, the one "
        "that is tested. {notes}If accuracy passes 90 %, its axis is logarithmic in the "
        "error. A learned inner step size η is drawn at the bottom.",
    ),
    "comparison": (
        "Bars of accuracy on unseen classes",
        "<strong>Accuracy on episodes of unseen classes</strong> (ICML 2018, Table 3): this run, the baselines, and "
        "the published number if there is one (hatched: not measured here). Whiskers are 95 % intervals.",
    ),
    "steps": (
        "Validation accuracy by the number of inner steps",
        "<strong>Validation of T</strong> (ICML 2018, Sec. 5.2, Figure 6): accuracy on episodes of validation classes "
        "after T inner gradient steps (eq. 10) on the features of the best iterate. Whiskers are 95 % intervals; the "
        "ring marks the T used for testing, the dashed line the T of f<sub>T</sub> in training.",
    ),
    "pairs": (
        "The nearest and the farthest pair of images of two classes, with their features",
        "<strong>What h has learned</strong> (ICML 2018, Figure 5; workshop paper, Figure 2; here both classes are "
        "unseen): of all pairs of an image x of one class and x' of the other, the one with the smallest "
        "‖h(x) − h(x')‖ above and the one with the largest below. Between them, a random subset of the components of "
        "h(x), blue, and h(x'), orange.",
    ),
}


def percent(score: dict[str, Any]) -> str:
    """An accuracy in per cent, with its 95 % interval if it is known.

    >>> percent({"accuracy": 0.98, "ci95": 0.004})
    '98.00 ± 0.40'
    """
    accuracy, interval = 100 * score["accuracy"], score.get("ci95")
    return f"{accuracy:.4g}" if interval is None else f"{accuracy:.2f} ± {100 * interval:.2f}"


def format_table(summary: dict[str, Any], report: str | Path | None = None) -> str:
    """The end of a run as a few lines of text: accuracy on unseen classes beside the baselines and the paper's.

    Arguments:
        summary: contents of `summary.json`.
        report: where the report is, if it is to be said.
    """
    rows = [(name, percent(score), _remark(name, score, summary)) for name, score in compared(summary)]
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    lines = [f"  {name:<{widths[0]}}   {score:<{widths[1]}}   {remark}".rstrip() for name, score, remark in rows]
    title = f"{summary.get('recipe', 'run')}: accuracy on unseen classes in %"
    return "\n".join([title, *lines, *([f"report: {report}"] if report else [])])


def write_report(folder: str | Path) -> Path:
    """Write `report.html` and `figures/*.png` into a run folder; a run that has not ended is reported by its curves.

    Returns: the path of the report, one self-contained file without scripts.
    Raises: `ValueError` for a folder that is not a run folder, or a damaged file in it.
    """
    from hyperax.experiments.figures import save_figures, smoothing_window

    run = read_run(folder)
    name = run.folder.resolve().name
    recipe = (run.summary or run.config).get("recipe") or run.config.get("name")
    window, train_ways = smoothing_window(len(run.records)), run.config.get("train_ways")
    notes = f"Thin blue lines are records, thick ones their centred mean over {window}. " if window > 1 else ""
    if train_ways not in (None, run.config.get("ways")):
        notes += f"Training episodes are {escape(str(train_ways))}-way, those of validation not. "
    figures = []
    for path in save_figures(folder):
        alternative, caption = _CAPTIONS[path.stem]
        figures.append(embedded(path, alternative, caption.format(notes=notes)))
    if not run.records:
        figures.append("<p class=soft>No curves: no hyperiteration has been recorded.</p>")
    if run.summary and not run.pairs:
        figures.append("<p class=soft>No pair of images: this run kept none (pairs.npz).</p>")
    data = ((run.summary or {}).get("protocol") or {}).get("data")
    text = page(
        title=str((run.summary or run.config).get("title") or recipe or name),
        result=_result(run.summary) if run.summary else _unfinished(run),
        figures=figures,
        again=again(recipe, (run.summary or run.config).get("seed")),
        name=name,
        environment=_environment(run),
        data=data,
        config=run.config,
    )
    report = run.folder / "report.html"
    report.write_text(text, "utf-8")
    return report


def page(
    *,
    title: str,
    result: str,
    figures: Sequence[str],
    again: str,
    name: str,
    environment: dict[str, Any],
    data: dict[str, Any] | None,
    config: dict[str, Any],
) -> str:
    """The page of a run of any kind.

    Arguments:
        title: its headline, plain text.
        result: HTML of the numbers.
        figures: HTML, from `embedded`.
        again: the command that runs the recipe.
        name: of the run's folder.
        environment: where the numbers were measured, by name.
        data: what determines the data, if it is known.
        config: contents of `config.json`.
    """
    title = escape(title)
    of_data = f"<details><summary>Data</summary>{settings(flat(data))}</details>\n" if data else ""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{_STYLE}</style></head><body>
<h1>{title}</h1>
{result}
<h2>Figures</h2>
{"".join(figures)}
<h2>Reproduce</h2>
<pre>{escape(again)}
hyperax report {escape(shlex.quote(name))}</pre>
<p class=soft>The first command runs the recipe; where the configuration below differs from the recipe's, add its fields
as options. The second, given the folder of the run, writes this page again.</p>
<details><summary>Environment</summary>{settings(environment)}</details>
{of_data}<details><summary>Configuration</summary>{settings(flat(config))}</details>
</body></html>
"""


def again(recipe: str | None, seed: int | None) -> str:
    """The command that runs a recipe again."""
    return f"hyperax run {shlex.quote(str(recipe or 'RECIPE'))}" + ("" if seed is None else f" --seed {seed}")


def unfinished(how_far: str, name: str) -> str:
    """What the page of a run that keeps finished parts says before its end."""
    return (
        f"<p class=note><strong>This run has not ended:</strong> {how_far} "
        f"It goes on with <code>hyperax resume {escape(shlex.quote(name))}</code>.</p>"
    )


def where_measured(summary: dict[str, Any]) -> dict[str, Any]:
    """Commit, seed, machine, seconds and versions, for the page's environment."""
    rows = {
        name: summary[name] for name in ("commit", "seed", "machine", "hyperiterations", "features") if name in summary
    }
    rows["seconds"] = (summary.get("timing") or {}).get("seconds")
    rows |= summary.get("versions") or {}
    return {name: "not recorded" if value is None else value for name, value in rows.items()}


def embedded(path: Path, alternative: str, caption: str) -> str:
    """A figure of the page, with its image inside."""
    image = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<figure><img alt="{alternative}" src="data:image/png;base64,{image}">'
        f"<figcaption>{caption}</figcaption></figure>\n"
    )


def _result(summary: dict[str, Any]) -> str:
    test, protocol = summary["test"], summary.get("protocol") or {}
    episodes = f", mean over {test['episodes']:,} episodes" if "episodes" in test else ""
    interval = " with its 95 % interval" if test.get("ci95") is not None else ""
    steps = f", T = {test['steps']} inner steps" if "steps" in test else ""
    task = f"{protocol.get('ways', '?')}-way {protocol.get('shots', '?')}-shot"
    rows = [
        f"<tr><td>{escape(name)}<br><small>{escape(_remark(name, score, summary))}</small></td>"
        f"<td class=numeric>{percent(score)}</td>"
        f"<td class=numeric>{'' if score is test else _lead(test, score)}</td></tr>"
        for name, score in compared(summary)
    ]
    return f"""<p class=number>{percent(test)} %</p>
<p>accuracy on classes never seen in training: {escape(task)}{episodes}{interval}{steps}.</p>
<ul>{"".join(f"<li>{line}</li>" for line in [*_protocol(protocol), _training(summary)])}</ul>
<div class=scroll><table>
<tr><th>unseen classes</th><th class=numeric>accuracy, %</th><th class=numeric>lead of this run, points</th></tr>
{"".join(rows)}</table></div>
{_against_paper(summary)}"""


def _unfinished(run: Run) -> str:
    best = best_record(run.records)
    last = f"Its last record is of hyperiteration {run.records[-1]['step']:,}. " if run.records else ""
    score = f"Best validation so far: {_validated(best)} at hyperiteration {best['step']:,}. " if best else ""
    return (
        f"<p class=note><strong>This run has not ended:</strong> it is still running, or was interrupted. {last}{score}"
        "Nothing has been measured on unseen classes yet. An interrupted run goes on with <code>hyperax resume "
        f"{escape(shlex.quote(run.folder.resolve().name))}</code>.</p>"
    )


def _validated(record: dict[str, Any]) -> str:
    return f"{percent(record['validation'])} %" if record.get("validation") else f"score {record['score']:.4g}"


def _protocol(protocol: dict[str, Any]) -> list[str]:
    queries = f" ({escape(str(protocol['queries']))} queries a class)" if "queries" in protocol else ""
    sets = "Support and query images of an episode"
    lines = {
        None: f"{sets}: not recorded whether disjoint or overlapping{queries}.",
        False: f"{sets} are <strong>disjoint</strong>{queries}.",
        True: f"{sets} are <strong>overlapping</strong>, drawn independently, so that a query image may be among the "
        f"support images{queries}: easier than disjoint sets.",
    }
    words = [lines[protocol.get("overlap")]]
    if "statistics" in protocol:
        statistics = str(protocol["statistics"])
        words.append(f"Batch normalisation: {escape(_STATISTICS.get(statistics, statistics))}.")
    if "transductive" in protocol:
        words.append(
            "Transductive: the prediction for a query image depends on the other query images of its episode."
            if protocol["transductive"]
            else "Not transductive: every query image is classified on its own."
        )
    if protocol.get("training_ways") not in (None, protocol.get("ways")):
        words.append(f"Trained on {escape(str(protocol['training_ways']))}-way episodes.")
    data = {**(protocol.get("data") or {}), **{key: protocol[key] for key in ("split", "resize") if protocol.get(key)}}
    named = {"dataset": "", "classes": "classes: ", "image_shape": "image: ", "split": "split: ", "resize": "resize: "}
    known = [text + escape(_word(data[key])) for key, text in named.items() if data.get(key)]
    return words + ([f"Data: {'; '.join(known).rstrip('.')}."] if known else [])


def _training(summary: dict[str, Any]) -> str:
    ended = str(summary.get("stopped") or f"{summary.get('hyperiterations', 'unknown number of')} hyperiterations")
    best = summary.get("best") or {}
    tested = f" Tested: the iterate that validated best, at hyperiteration {best['step']:,}." if "step" in best else ""
    return f"Training: {escape(ended.rstrip('.'))}.{tested}"


def _word(value: Any) -> str:
    """A value as people write it: 1 / 2 / 3 (a, b, c) for a dict, 28 x 28 for a list."""
    if isinstance(value, dict):
        return f"{' / '.join(_word(x) for x in value.values())} ({', '.join(value)})"
    if isinstance(value, list):
        return " x ".join(_word(x) for x in value)
    return f"{value:,}" if type(value) is int else str(value)


def _overlaps(summary: dict[str, Any]) -> tuple[bool | None, bool | None]:
    """Whether support and query sets overlap here, and in the paper as far as its protocol says so."""
    words = str(summary["paper"].get("protocol", "")).lower()
    apart = any(word in words for word in ("disjoint", "non-overlap", "no overlap", "without overlap", "not overlap"))
    paper = summary["paper"].get("overlap", False if apart else True if "overlap" in words else None)
    return (summary.get("protocol") or {}).get("overlap"), paper


def _remark(name: str, score: dict[str, Any], summary: dict[str, Any]) -> str:
    if name == "paper" and score is summary.get("paper"):
        return "; ".join(str(score[key]) for key in ("source", "protocol") if score.get(key))
    parts = [f"{score['episodes']:,} episodes"] if "episodes" in score else []
    if score is summary["test"]:
        overlap = {True: "support and query overlapping", False: "support and query disjoint"}
        parts += [f"T = {score['steps']}"] if "steps" in score else []
        parts += [overlap[x] for x in [(summary.get("protocol") or {}).get("overlap")] if x in overlap]
    return ", ".join(parts)


def _lead(test: dict[str, Any], score: dict[str, Any]) -> str:
    return f"{100 * (test['accuracy'] - score['accuracy']):+.2f}".replace("-", "−")


def _against_paper(summary: dict[str, Any]) -> str:
    paper = summary.get("paper")
    if not paper:
        return "<p class=soft>The papers publish no number for this setting, so there is none to compare with.</p>"
    points = 100 * (summary["test"]["accuracy"] - paper["accuracy"])
    said = (
        f"Published: {percent(paper)} % ({escape(str(paper.get('source', 'source not recorded')))}). "
        f"This run is {abs(points):.2f} points {'above' if points > 0 else 'below'} that number."
    )
    here, there = _overlaps(summary)
    if here is None or there is None:
        return f"<p>{said} Whether both protocols are the same is not recorded.</p>"
    if here == there:
        return f"<p>{said} Support and query sets are {'overlapping' if here else 'disjoint'} in both protocols.</p>"
    words = {True: "overlapping (easier)", False: "disjoint"}
    return (
        f"<p class=note>{said} <strong>The protocols differ</strong>, so the two are not measurements of one quantity: "
        f"support and query sets are {words[here]} here; there: {escape(str(paper.get('protocol', words[there])))}.</p>"
    )


def _environment(run: Run) -> dict[str, Any]:
    summary = run.summary or {}
    timing = summary.get("timing") or {}
    sessions = {entry.get("session"): entry["seconds"] for entry in run.timings}  # the last entry counts
    rows = {
        "commit": summary.get("commit"),
        "seed": summary.get("seed", run.config.get("seed")),
        "hyperiterations": summary.get("hyperiterations", run.records[-1]["step"] if run.records else 0),
        "seconds": round(timing.get("seconds", sum(sessions.values())), 1),
        "hyperiterations per second": timing.get("hyperiterations_per_second"),
        "machine": summary.get("machine"),
        **(summary.get("versions") or {}),
    }
    return {name: "not recorded" if value is None else value for name, value in rows.items()}


def flat(config: Any, name: str = "") -> dict[str, Any]:
    """A nested dict as one of dotted names."""
    if not isinstance(config, dict) or not config:
        return {name: config}
    return {k: v for key, value in config.items() for k, v in flat(value, f"{name}.{key}" if name else key).items()}


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def settings(rows: dict[str, Any]) -> str:
    """A table of names and values."""
    cells = "".join(f"<tr><td>{escape(name)}</td><td>{escape(_plain(value))}</td></tr>" for name, value in rows.items())
    return f"<table class=settings>{cells}</table>"
