"""A run killed by SIGKILL at any moment and resumed ends as an uninterrupted one."""

import json
import random
import signal
import time

import pytest

import tiny
from hyperax.cli import main

pytest.importorskip("tyro")
pytest.importorskip("PIL")
pytest.importorskip("matplotlib")

FEW_SHOT = "hyperax.experiments.few_shot"


def start(folder, *words, bomb=("-", 0)):
    log = folder / f"{len(list(folder.glob('*.log')))}.log"
    log.touch()
    return tiny.begin(log, folder, tiny.main, *bomb, *map(str, words)), log


def finish(process, log, *statuses):
    process.join(120)
    assert process.exitcode in statuses, log.read_text()


def results(out):
    """What has to be identical: records, lam, and the summary but for times."""
    summary = json.loads((out / "summary.json").read_text())
    del summary["timing"]
    return (out / "records.jsonl").read_bytes(), (out / "representation.eqx").read_bytes(), summary


MOMENTS = {
    "as the first checkpoint is written": ("os:fsync", 1),
    "in the middle of a record, before any checkpoint": ("half a record", 0),
    "in the first validation, after the first checkpoint": (f"{FEW_SHOT}:accuracies_by_steps", 1),
    "in the final measurement": (f"{FEW_SHOT}:nearest_neighbour_accuracies", 1),
    "after the summary, before the report": (f"{FEW_SHOT}:write_report", 1),
}


def killed_at_chosen_moments(folder, images, out):
    for index, bomb in enumerate(MOMENTS.values()):
        words = ("resume", out, "--no-progress") if index else ("run", *tiny.options(images), "--out", out)
        finish(*start(folder, *words, bomb=bomb), -signal.SIGKILL)
    finish(*start(folder, "resume", out, "--no-progress"), 0)


def killed_at_a_random_moment(folder, images, out, delay):
    """Kill from outside, so long after the run began; then let it end."""
    process, log = start(folder, "run", *tiny.options(images), "--out", out)
    while process.is_alive() and not (out / "timings.jsonl").exists():
        time.sleep(0.01)
    time.sleep(delay)
    process.kill()
    finish(process, log, -signal.SIGKILL, 0)
    finish(*start(folder, "resume", out, "--no-progress"), 0)


def test_killed_runs_end_as_uninterrupted_ones(tmp_path, capsys):
    images, begin = tiny.write_images(tmp_path / "images"), time.perf_counter()
    whole, chosen, chance = (tmp_path / name for name in ("uninterrupted", "chosen", "random"))
    finish(*start(tmp_path, "run", *tiny.options(images), "--out", whole), 0)
    delay = random.uniform(0, (time.perf_counter() - begin) / 3)
    killed_at_chosen_moments(tmp_path, images, chosen)
    killed_at_a_random_moment(tmp_path, images, chance, delay)
    assert results(chosen) == results(whole)
    assert results(chance) == results(whole), delay
    for out in (chosen, chance):
        assert (out / "report.html").exists()
        left = [path for path in out.rglob("*") if path.suffix in (".new", ".unfinished")]
        assert not left
        assert json.loads((out / "summary.json").read_text())["timing"]["seconds"] > 0
    sessions = {json.loads(line)["session"] for line in (chosen / "timings.jsonl").read_text().splitlines()}
    assert len(sessions) >= 4
    assert main(["report", str(chosen)]) == 0
    assert capsys.readouterr().out.strip() == str(chosen / "report.html")
