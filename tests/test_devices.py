"""More than one device, and more than one process, give what one gives, write one folder, and say what is wrong."""

import json
import logging
import os
import socket
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hyperax as hx
import tiny
from hyperax import cli
from hyperax.experiments import few_shot, recipe, study
from hyperax.experiments.devices import Devices, start
from hyperax.processes import processes_of
from test_comparison import SMALL, Tiny, tiny_world

pytest.importorskip("tyro")
pytest.importorskip("PIL")

FIELDS = {"tasks": 8, "test_episodes": 2, "validation_episodes": 4, "most_inner_steps": 1}
CLUSTERS = ("SLURM", "OMPI", "KUBERNETES", "JAX_COORDINATOR")


# In processes of their own


def started(folder, function, argument):
    answer = folder / f"{function.__name__}-{len(list(folder.iterdir()))}.json"
    answer.touch()
    return tiny.begin(answer.with_suffix(".log"), folder, answered, answer, function, argument), answer


def answered(answer, function, argument):
    """In the process that was started: write the answer, or return the status."""
    for name in [name for name in os.environ if name.startswith(CLUSTERS)]:
        del os.environ[name]
    said = function(argument)
    if isinstance(said, int):
        return said
    answer.write_text(json.dumps(said))
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()
    return 0


def finished(*all_started, status=0):
    """Their answers; what hangs is killed."""
    try:
        for process, answer in all_started:
            process.join(240)
            assert process.exitcode == status, answer.with_suffix(".log").read_text()
    finally:
        for process, _ in all_started:
            process.kill()
            process.join()
    return [json.loads(answer.read_text() or "null") for _, answer in all_started]


def commands(all_words):
    """Their statuses and what they say."""
    # Slow, and no device has a part in them: figures and what they show, and a baseline.
    few_shot.write_report = few_shot.nearest_and_farthest = lambda *_: {}
    few_shot.nearest_neighbour_accuracies = lambda *_: np.zeros(2)
    said = []
    cli._refuse = lambda message: said.append(message) or 2
    return [[tiny.main("-", 0, *words) for words in all_words], said]


def small_problem(mesh, folder):
    """A method that remembers: its carry lies a task on each device, and in the checkpoint as a whole."""
    problem = hx.Problem(
        inner=lambda w, lam, d: 0.5 * jnp.sum(lam * (w - d) ** 2),
        outer=lambda w, lam, d: 0.5 * jnp.sum((w - 1) ** 2),
        init=lambda lam, d: jnp.zeros_like(d),
    )
    h = hx.hypergradient(problem, hx.GradientDescent(jnp.float32(0.3)), hx.Implicit(2, warm_start=True))
    solve = lambda steps: hx.minimize(
        hx.mean_over_tasks(h, mesh=mesh),
        jnp.float32(0.5) + jax.process_index() if mesh is not None else jnp.float32(0.5),  # the first one's is used
        data=jnp.arange(24, dtype=jnp.float32).reshape(8, 3) / 24,
        optimizer=optax.adam(0.05),
        steps=steps,
        dispatch=2,
        validation=hx.Validation(lambda lam: float(lam) + jax.process_index(), every=2),
        callbacks=lambda progress: "enough" if progress.step >= 6 and jax.process_index() == 0 else None,
        checkpoint=hx.Checkpoint(folder, every=2),
        resume="auto",
    )
    solve(3)
    solution = solve(8)
    assert len(solution.lam.sharding.device_set) == 1
    return [solution.history, float(solution.lam), solution.stopped]


def one_process(folder):
    """One device and a mesh of eight, in turn."""
    jax.config.update("jax_num_cpu_devices", 8)
    words = tiny.options(Path(folder) / "images", **FIELDS)
    run = lambda name, *more: ["run", *words, "--out", f"{folder}/{name}", *more]
    statuses = commands([run("one"), run("eight", "--mesh", "8")])
    small = [small_problem(mesh, Path(folder) / name) for name, mesh in (("a", None), ("b", start(Devices(mesh=8))))]
    return [statuses, small]


def small_comparison(mesh, folder):
    """The rows of a table of one learner, after a run and after a resume."""
    study.write_report = lambda kind, folder: (folder / "report.html").touch()
    with tiny_world():
        config = Tiny(**SMALL, learners=("ours",))
        table = study.run(config, folder, mesh=mesh)["table"]["rows"]
        return [table, study.resume(Tiny, folder, mesh=mesh)["table"]["rows"]]


def one_of_two(argument):
    folder, port, process = argument
    join = ["--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--process", str(process)]
    words = tiny.options(Path(folder) / "images", **FIELDS)
    run = lambda name, *more: ["run", *words, "--out", f"{folder}/{name}", *more, *join]
    resume = ["resume", f"{folder}/two", "--checkpoint", "step-00000009.ckpt", "--no-progress", *join]
    statuses = commands(
        [
            run("two" if process == 0 else "nobody's"),
            resume,
            run("two"),
            run("other", "--seed", str(process)),
            [*resume[:1], f"{folder}/{'two' if process == 0 else 'elsewhere'}", *resume[2:]],
        ]
    )
    mesh = start(Devices(coordinator="auto"))  # joined long ago
    return [statuses, small_problem(mesh, Path(folder) / "c"), small_comparison(mesh, Path(folder) / "compared")]


def not_joined(port):
    run = ["run", "glyphs-5way-1shot", "--coordinator"]
    here = f"127.0.0.1:{port}"
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        said = commands(
            [
                [*run, "auto"],
                [*run, here, "--processes", "2"],
                [*run, f"127.0.0.1:{taken.getsockname()[1]}", "--processes", "2", "--process", "0"],
            ]
        )
    print(*said[1], sep="\n")
    assert said[0] == [2, 2, 2]
    return cli.main([*run, here, "--processes", "2", "--process", "1", "--coordinator-timeout", "1"])


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("devices")
    tiny.write_images(place / "images")
    return place


@pytest.fixture(scope="module")
def answers(folder):
    port = free_port()
    alone = started(folder, one_process, str(folder))
    return finished(alone, *(started(folder, one_of_two, [str(folder), port, process]) for process in (0, 1)))


def read(out):
    records = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    _, lam = few_shot.load(out, (tiny.SIDE, tiny.SIDE, 1), tiny.Network)
    return records, lam, json.loads((out / "summary.json").read_text())


@pytest.mark.parametrize(("name", "devices", "processes"), [("eight", 8, 1), ("two", 2, 2)])
def test_the_trajectory_is_that_of_one_device(answers, folder, name, devices, processes):
    """Two processes: after a resume from the checkpoint before the last, so that of both its sessions."""
    (records, lam, one), (found, found_lam, several) = (read(folder / out) for out in ("one", name))
    assert [record["step"] for record in found] == [2, 4, 6, 8, 10, 12]
    for field in ("value", "gradient_norm"):
        np.testing.assert_allclose([r[field] for r in found], [r[field] for r in records], rtol=2e-5)
    assert [record.get("score") for record in found] == [record.get("score") for record in records]
    moved = jax.tree.leaves(jax.tree.map(lambda a, b: float(abs(a - b).max()), found_lam, lam))
    assert max(moved) < 1e-5
    assert one["devices"] == {"tasks_over": 1, "processes": 1}
    assert several["devices"] == {"tasks_over": devices, "processes": processes}
    assert several["test"] == one["test"]


def test_a_carry_and_decisions_of_two_processes(answers):
    """The first one's lam, score and rules count; the carry of all is saved, and found again by each."""
    (_, (history, lam, stopped)), other = answers[0][1], answers[1:]
    assert history[-1]["step"] == 6
    np.testing.assert_allclose(answers[0][1][0][1], lam, rtol=1e-6)
    for _, small, _ in other:
        assert small[2] == stopped == "enough"
        np.testing.assert_allclose(small[1], lam, rtol=1e-6)
        for field in ("value", "gradient_norm", "score"):
            at = [field in record for record in history]
            assert [field in record for record in small[0]] == at
            found = [[record[field] for record in records if field in record] for records in (small[0], history)]
            np.testing.assert_allclose(*found, rtol=1e-5)


def test_only_the_first_process_writes_and_all_refuse_together(answers, folder):
    assert answers[0][0] == [[0, 0], []]
    for statuses, said in (answer[0] for answer in answers[1:]):
        assert statuses == [0, 0, 2, 2, 2]
        assert f"process 0: {folder}/two holds a run: `hyperax resume" in said[0]
        assert "the run.config.seed is 0 in process 0 and 1 in process 1: start all processes with" in said[1]
        assert f"process 1: {folder}/elsewhere is not a run folder" in said[2]
    names = {path.name for path in folder.iterdir() if path.is_dir()}
    assert names == {"images", "cache", "compiled", "one", "eight", "two", "a", "b", "c", "compared"}
    outputs = [(folder / name).read_text() for name in sorted(p.name for p in folder.glob("one_of_two*.log"))]
    assert ["accuracy on unseen classes" in output for output in outputs] == [True, False]
    assert not [path for path in (folder / "two").rglob("*") if path.suffix in (".new", ".unfinished")]


def test_a_comparison_over_two_processes_is_one_comparison(answers, folder):
    (table, resumed), other = (answer[2] for answer in answers[1:])
    assert table == resumed == other[0] == other[1]
    assert len(table) == 1
    assert (folder / "compared" / "report.html").exists()


def test_processes_that_do_not_meet_end_with_a_sentence(tmp_path):
    process, answer = started(tmp_path, not_joined, free_port())
    finished((process, answer), status=2)
    *_, cluster, which, taken, late = answer.with_suffix(".log").read_text().splitlines()
    assert "says who the coordinator is: give --coordinator HOST:PORT" in cluster
    assert "says which process this is" in which
    assert "process 0 cannot be the coordinator at port" in taken
    assert "in use): choose a free port" in taken
    assert late.startswith("hyperax: process 1 has not met the 2 processes at the coordinator 127.0.0.1:")
    assert "in 1 s: see that each is running" in late


# In this process, which has two devices


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mesh": -1}, "mesh is -1"),
        ({"process": 0}, "of no use without a coordinator"),
        ({"processes": 2}, "of no use without a coordinator"),
        ({"coordinator": "here"}, "give HOST:PORT of the first process"),
        ({"coordinator": "here:1", "processes": 0}, "processes is 0"),
        ({"coordinator": "here:1", "processes": 2, "process": 2}, "process is 2 of 2"),
        ({"coordinator": "here:1", "process": -1}, "process is -1"),
        ({"coordinator": "here:1", "coordinator_timeout": 0}, "coordinator_timeout is 0"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        Devices(**options)


def test_the_mesh_of_one_process():
    assert start(Devices()) is None
    assert start(Devices(mesh=1)) is None
    assert start(Devices(mesh=0)) == start(Devices(mesh=2)) == jax.sharding.Mesh(jax.devices(), ("devices",))
    with pytest.raises(ValueError, match=r"there are 2 devices .*xla_force_host_platform_device_count=3"):
        start(Devices(mesh=3))
    with pytest.raises(ValueError, match="joined, which comes before any computation"):
        start(Devices(coordinator="127.0.0.1:1", processes=1, process=0))


def test_a_mesh_of_some_processes_is_refused(monkeypatch):
    mesh = start(Devices(mesh=2))
    assert processes_of(mesh).count == 1

    class Elsewhere:
        devices = np.array([type("Device", (), {"process_index": index}) for index in (0, 1)])

    monkeypatch.setattr(jax, "process_count", lambda: 3)
    with pytest.raises(ValueError, match="devices of 2 of the 3 processes"):
        processes_of(Elsewhere)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tasks": 5}, "5 tasks of a hyperiteration cannot be shared by 2 devices: use a multiple, such as --tasks 4"),
        ({"tasks": 6, "parallel": 2}, "3 tasks a device cannot be run 2 at a time"),
        ({"statistics": "batch"}, "would be those of one device's share"),
    ],
)
def test_runs_that_cannot_be_shared(tmp_path, fields, message):
    config = recipe("glyphs-5way-1shot", **fields)
    with pytest.raises(ValueError, match=message):
        few_shot.run(config, tmp_path / "run", mesh=start(Devices(mesh=2)))
    assert not list(tmp_path.iterdir())


def test_kinds_without_tasks_refuse(tmp_path, capsys):
    words = ["--mesh", "2"]
    (tmp_path / "config.json").write_text('{"kind": "ridge-table5"}')
    for command in (["run", "ridge-table5", *words], ["resume", str(tmp_path), *words]):
        assert cli.main(command) == 2
        assert "RidgeTable5 have no mini-batch of tasks to share over devices: leave out" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no mini-batch of tasks"):
        hx.experiments.run(recipe("ridge-table5"), tmp_path / "run", mesh=start(Devices(mesh=2)))


def test_one_compilation_for_all_dispatches(caplog):
    problem = hx.Problem(
        inner=lambda w, lam, d: (w - lam * d) ** 2, outer=lambda w, lam, d: (w - 1) ** 2, init=lambda lam, d: 0.0 * d
    )
    h = hx.hypergradient(problem, hx.GradientDescent(0.1), hx.Implicit(3, warm_start=True))
    mean = hx.mean_over_tasks(h, mesh=start(Devices(mesh=2)))
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        hx.minimize(mean, 0.5, data=jnp.arange(4.0), optimizer=optax.adam(0.1), steps=6, dispatch=2)
    compiled = [line for line in caplog.messages if line.startswith("Compiling") and "hyperiterations" in line]
    assert len(compiled) == 1, compiled
