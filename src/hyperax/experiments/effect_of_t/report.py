"""Numbers, figures and report of a run of `effect-of-t`, from what its folder holds."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from hyperax.experiments import report
from hyperax.experiments.effect_of_t.figures import EXACT, PAPER, accuracies, milliseconds, name_of, objectives, times
from hyperax.experiments.figures import save
from hyperax.experiments.run_folder import RunFolder

_SCORES = ("value", "exact", "train", "validation", "test")

_CAPTIONS = {  # figure: (alternative text, caption)
    "objective": (
        "Curves of the outer objective by hyperiteration, one for each T",
        "<strong>The outer objective</strong> (ICML 2018, Figure 3): above, f<sub>T</sub>(H) for every T and f(H) for "
        "the exact solution, each along its own optimization of H, from the same H = I with the same step size and "
        "momentum. Below, f<sub>T</sub>(H) − f(H) at the same H: how far T inner steps are from the exact "
        "solution, in the outer objective. {band}",
    ),
    "accuracy": (
        "Curves of test accuracy by hyperiteration, one for each T",
        "<strong>Accuracy on test images</strong> (ICML 2018, Figure 4) of the classifier w<sub>T</sub> during the "
        "optimization of H. A dot marks the highest point of the mean. {band}",
    ),
    "seconds": (
        "Time of a hypergradient by T",
        "<strong>Time of one hypergradient</strong> (ICML 2018, Table 2) by T. Reverse mode takes all T steps, as the "
        "paper's Algorithm 1; doubling takes log<sub>2</sub> T products of matrices and gives the same hypergradient. "
        "Grey: the paper's times of whole runs, scaled to meet ours of reverse mode at T = {first}.",
    ),
}


def statistics(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and standard deviation (of one draw from another; `None` for a single one).

    >>> statistics([1.0, 3.0])
    {'mean': 2.0, 'sd': 1.4142135623730951}
    """
    return {"mean": float(np.mean(values)), "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None}


def summarise(config: dict[str, Any], records: list[dict[str, Any]], curves: list[dict[str, Any]]) -> dict[str, Any]:
    """What `summary.json` says of the curves.

    Arguments:
        config: contents of `config.json`.
        records: {"steps", "draw", "step", "value", "exact", "train", "validation", "test"}, by curve.
        curves: {"steps", "draw", "stopped"}, one a curve.
    """
    rows, accuracies_of = [], {}
    for T in [*config["step_counts"], EXACT]:
        by_draw = [[r for r in records if (r["steps"], r["draw"]) == (T, draw)] for draw in range(config["draws"])]
        best = [max(curve, key=lambda record: record["test"]) for curve in by_draw]
        accuracies_of[T] = {"best": [x["test"] for x in best], "final": [curve[-1]["test"] for curve in by_draw]}
        rows.append(
            {
                "steps": T,
                "start": {name: statistics([curve[0][name] for curve in by_draw]) for name in _SCORES},
                "final": {name: statistics([curve[-1][name] for curve in by_draw]) for name in _SCORES},
                "best": {
                    "test": statistics(accuracies_of[T]["best"]),
                    "hyperiteration": statistics([x["step"] for x in best]),
                },
            }
        )
    last = config["step_counts"][-1]
    leaders = {which: _leader(which, accuracies_of, (last, EXACT)) for which in ("final", "best")}
    diverged = [x for x in curves if x["stopped"].startswith("diverged")]
    return {
        "kind": config["kind"],
        "recipe": config["recipe"],
        "title": config["title"],
        "curves": rows,
        "leaders": leaders,
        "paper": PAPER,
        "protocol": {
            "classes": config["classes"],
            "split": config["split"],
            "images_per_class": [config[f"{part}_per_class"] for part in ("train", "validation", "test")],
            "draws": config["draws"],
            "sets": "disjoint",
            "batch_normalisation": "statistics of the training images for all three sets; not transductive",
            "features": "minus their mean over the training images, divided by one number",
        },
        "diverged": diverged,
        "stopped": f"diverged: T = {diverged[0]['steps']}: {diverged[0]['stopped']}"
        if diverged
        else f"completed {len(curves)} curves of {config['hyperiterations']} hyperiterations",
        "hyperiterations": config["hyperiterations"],
        "seed": config["seed"],
    }


def _leader(which: str, accuracies_of: dict[Any, Any], others: Sequence[int | str]) -> dict[str, Any]:
    """The T of the highest mean test accuracy, at the end or at the best record, and by how much it leads."""
    steps = max(accuracies_of, key=lambda T: np.mean(accuracies_of[T][which]))
    lead = lambda T: statistics(np.subtract(accuracies_of[steps][which], accuracies_of[T][which]).tolist())
    leads = [{"over": T, "points": lead(T)} for T in others if steps != T]
    return {"steps": steps, "test": statistics(accuracies_of[steps][which]), "leads": leads}


def write_report(folder: str | Path) -> Path:
    """Write `report.html` and `figures/*.png` into a run folder; a run that has not ended shows its finished curves.

    Raises: `ValueError` for a folder that holds no run of this kind.
    """
    run = RunFolder(folder)
    try:
        config, summary = run.read_json("config.json"), run.read_json("summary.json")
    except ValueError as error:
        raise ValueError(f"a file of {run.path} is damaged ({error}): run the recipe again") from None
    if config is None or config.get("kind") != "effect-of-t":
        raise ValueError(f"{run.path} holds no run of effect-of-t: give the folder that `hyperax run` wrote")
    records, band = run.lines("records.jsonl"), ""
    if config["draws"] > 1:
        band = f"Lines are means over {config['draws']} draws of classes and images, bands one standard deviation."
    drawn = [("objective", objectives), ("accuracy", accuracies)] if records else []
    figures = {name: draw(records) for name, draw in drawn} | ({"seconds": times(summary)} if summary else {})
    shown = []
    for name, figure in figures.items():
        alternative, caption = _CAPTIONS[name]
        path = save(figure, run.path / "figures" / f"{name}.png")
        shown.append(report.embedded(path, alternative, caption.format(band=band, first=config["step_counts"][0])))
    name = run.path.resolve().name
    so_far = f"{len(run.lines('curves.jsonl'))} curves are finished."
    text = report.page(
        title=config["title"],
        result=_result(summary) if summary else report.unfinished(so_far, name),
        figures=shown or ["<p class=soft>No curves: none has been finished.</p>"],
        again=report.again(config["recipe"], config["seed"]),
        name=name,
        environment=report.where_measured(summary or {}),
        data=(summary or {}).get("source"),
        config=config,
    )
    path = run.path / "report.html"
    path.write_text(text, "utf-8")
    return path


def format_table(summary: dict[str, Any], report: str | Path | None = None) -> str:
    """The end of a run as a few lines of text: objective, accuracy and time by T.

    Arguments:
        summary: contents of `summary.json`.
        report: where the report is, if it is to be said.
    """
    rows = [("T", "f_T", "f", "test %, end", "test %, best", "at", "ms, reverse", "ms, doubling"), *_rows(summary)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  " + "  ".join(f"{x:>{width}}" for x, width in zip(row, widths, strict=True)) for row in rows]
    title = f"{summary['recipe']}: means over {summary['protocol']['draws']} draws"
    return "\n".join([title, *lines, *([f"report: {report}"] if report else [])])


def _rows(summary: dict[str, Any]) -> list[tuple[str, ...]]:
    timed = summary["timing"]["seconds_per_hypergradient"]
    reverse, doubling = milliseconds(timed, "Reverse"), milliseconds(timed, "Doubling")
    closed = milliseconds(timed, "ClosedForm")
    rows = []
    for row in summary["curves"]:
        T, final, best = row["steps"], row["final"], row["best"]
        other = [f"{of[T]:.1f}" if T in of else "" for of in (reverse, {**doubling, **closed})]
        scores = [f"{final[name]['mean']:.4f}" for name in ("value", "exact")]
        step = f"{best['hyperiteration']['mean']:,.0f}"
        rows.append((str(T), *scores, _percent(final["test"]), _percent(best["test"]), step, *other))
    return rows


def _result(summary: dict[str, Any]) -> str:
    timed = {str(T): x for T, x in milliseconds(summary["timing"]["seconds_per_hypergradient"], "Reverse").items()}
    paper, leaders, protocol = PAPER["seconds"], summary["leaders"], summary["protocol"]
    first = next(iter(timed))
    cells = []
    for row in _rows(summary):
        T, *scores, reverse, other = row
        ratio = f"{timed[T] / timed[first]:.1f}" if T in timed else ""
        theirs = f"{paper[T]:,}" if T in paper else ""
        theirs_ratio = f"{paper[T] / paper['1']:.1f}" if T in paper else ""
        numbers = (*scores, reverse, ratio, other, theirs, theirs_ratio)
        cells.append(f"<tr><td>{T}</td>{''.join(f'<td class=numeric>{x}</td>' for x in numbers)}</tr>")
    heads = ("T", "f<sub>T</sub>, end", "f at the same H", "test %, end", "test %, best", "at hyperiteration")
    heads += ("reverse, ms", "relative", "doubling or exact, ms", "paper, s", "relative")
    worst = max(x["relative"] for x in summary["disagreement"])
    low, middle, high = protocol["images_per_class"]
    notes = [
        f"{protocol['classes']} classes of the {escape(protocol['split'])} split, not used to train the network; "
        f"{protocol['draws']} draws, the same for every T. ± is the standard deviation over draws.",
        f"Images a class, <strong>disjoint</strong>: {low} training, {middle} validation, {high} test. The paper says "
        "3, 3 and 15, and a character of Omniglot has 20 drawings: <strong>not all of them fit</strong>.",
        f"Batch normalisation: {escape(protocol['batch_normalisation'])}. Features: {escape(protocol['features'])}.",
        "The best hyperiteration is chosen by the test accuracy itself, as Figure 4 is read: it compares curves and is "
        "no estimate of how a chosen iterate would do.",
        f"Curves by doubling (T) and by the closed form (exact). After the first hyperiterations H by reverse mode "
        f"differs by {worst:.1e} of its change at most.",
        f"Paper: {escape(PAPER['source'])}, {escape(PAPER['machine'])}, {escape(PAPER['what'])}. It publishes neither "
        "rho, eta, outer step size and momentum nor accuracies as numbers, so shapes are compared, not values.",
        escape(summary["stopped"]) + ".",
    ]
    said = f"{_percent(leaders['best']['test'])} % for {name_of(leaders['best']['steps'])}{_leads(leaders['best'])}"
    return f"""<p class=number>{_percent(leaders["final"]["test"])} %</p>
<p>is the highest mean test accuracy after all hyperiterations, that of {name_of(leaders["final"]["steps"])}\
{_leads(leaders["final"])}. At the best hyperiteration of each curve it is {said}.</p>
<ul>{"".join(f"<li>{note}</li>" for note in notes)}</ul>
<div class=scroll><table>
<tr>{"".join(f"<th class=numeric>{head}</th>" for head in heads)}</tr>
{"".join(cells)}</table></div>"""


def _leads(leader: dict[str, Any]) -> str:
    leads = [f"{_points(x['points'])} points over {name_of(x['over'])}" for x in leader["leads"]]
    return f" ({', '.join(leads)}, draw by draw)" if leads else ""


def _percent(score: dict[str, Any]) -> str:
    return f"{100 * score['mean']:.1f}" + ("" if score["sd"] is None else f" ± {100 * score['sd']:.1f}")


def _points(score: dict[str, Any]) -> str:
    spread = "" if score["sd"] is None else f" ± {100 * score['sd']:.1f}"
    return f"{100 * score['mean']:+.1f}{spread}".replace("-", "−")
