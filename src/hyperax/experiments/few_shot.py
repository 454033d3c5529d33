"""The main job from end to end: learn a representation across tasks, choose T and the iterate on validation classes,
measure on classes never seen.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from hyperax.checkpoint import Checkpoint
from hyperax.checks import variables_of
from hyperax.experiments import environment
from hyperax.experiments.config import FewShotConfig
from hyperax.experiments.preparing import MakeNetwork, asks_for_moments, build_network, load_dataset
from hyperax.experiments.report import write_report
from hyperax.experiments.run_folder import RunFolder
from hyperax.fewshot.evaluation import (
    accuracies_by_steps,
    interval,
    nearest_and_farthest,
    nearest_neighbour_accuracies,
)
from hyperax.fewshot.image_classes import ImageClasses, MetaDataset
from hyperax.fewshot.networks import Network
from hyperax.methods import Reverse
from hyperax.minimize import Solution, minimize
from hyperax.processes import processes_of
from hyperax.stopping import Validation
from hyperax.tasks import mean_over_tasks


def run(
    config: FewShotConfig,
    out: str | Path,
    *,
    data_dir: str | None = None,
    make_network: MakeNetwork | None = None,
    optimizer: optax.GradientTransformation | None = None,
    mesh: Mesh | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Run a configuration in a new folder and return its summary.

    Arguments:
        config: a recipe, `hyperax.experiments.recipe(name, field=value)`, or your own.
        out: a folder that is empty or does not exist.
        data_dir: where the images are; else the environment variable HYPERAX_DATA.
        make_network: (image shape, key) -> your own representation, in place of the recipe's; give it again to
            `resume`.
        optimizer: any optax transformation in place of Adam with the recipe's schedule; likewise.
        mesh: devices to share the episodes of a hyperiteration over, from `hyperax.experiments.devices.start`; their
            number divides `tasks`, and `parallel` counts the episodes of one. Of several processes the first writes the
            folder; all read the images. `None`: one device.
        progress: say where the files are, and show a live bar.

    Returns: what `summary.json` holds.
    Raises: `ValueError` for a folder in use, data that cannot give the episodes, images that do not fit the network, a
    network with leaves that are no floats; all before any training and before the folder is made.
    Cost: one forward and backward pass of the network over the images of `tasks` episodes a hyperiteration.
    Reference: Franceschi et al. 2018, Sec. 4 and 5.2.
    Do not use it for another learner or another loop: `hyperax.minimize` over `mean_over_tasks` is what it is made of.

    >>> run(recipe("glyphs-5way-1shot", seed=1), "runs/glyphs")["test"]["episodes"]  # doctest: +SKIP
    600
    """
    processes = processes_of(mesh)

    def prepare() -> tuple[MetaDataset, Network]:
        RunFolder(out, processes.is_first).require_unused()
        _check_mesh(config, mesh)
        dataset = load_dataset(config, data_dir)
        network = build_network(config, dataset.train.image_shape, make_network)
        variables_of(config.training_learner.lam(network))  # refuses leaves that have no hypergradient
        return dataset, network

    dataset, network = processes.together(prepare)
    processes.agree("the run", _identity(config, dataset))
    folder = processes.together(lambda: RunFolder.create(out, config, data_dir, processes.is_first))
    return _run(config, folder, dataset, network, optimizer, mesh, resume="auto", progress=progress)


def resume(
    out: str | Path,
    *,
    data_dir: str | None = None,
    checkpoint: str | None = None,
    make_network: MakeNetwork | None = None,
    optimizer: optax.GradientTransformation | None = None,
    mesh: Mesh | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Go on with the run in a folder, from its newest checkpoint or from the named one, and return its summary.

    The result is the same, bit for bit, as that of a run that was never interrupted (on the same machine).

    Arguments:
        out: the run's folder.
        data_dir: where the images are; by default where they were when the run began.
        checkpoint: a file of the run's `checkpoints/`; by default the newest.
        make_network, optimizer: those given to `run`.
        mesh: as in `run`, the same or another (which changes last digits); all processes read the run's folder.
        progress: say where the files are, and show a live bar.

    Returns: what `summary.json` holds.
    Raises: `ValueError` for a folder that holds no run, a damaged or foreign checkpoint (and names the good one before
    it), and whatever `run` raises.
    Cost: what is left of the run.
    Do not use it to train longer: the configuration is part of the checkpoint, so another one is another run.

    >>> resume("runs/glyphs", checkpoint="step-00000200.ckpt")["stopped"]  # doctest: +SKIP
    'completed 300 hyperiterations'
    """
    processes = processes_of(mesh)

    def prepare() -> tuple[RunFolder, FewShotConfig, str, MetaDataset, Network]:
        folder, config = RunFolder.open(out, writes=processes.is_first)
        _check_mesh(config, mesh)
        name = "auto" if checkpoint is None else folder.checkpoint(checkpoint)
        dataset = load_dataset(config, data_dir or folder.data_dir())
        return folder, config, name, dataset, build_network(config, dataset.train.image_shape, make_network)

    folder, config, name, dataset, network = processes.together(prepare)
    processes.agree("the run", _identity(config, dataset) | {"checkpoint": name})
    with folder.advice_as_commands():
        return _run(config, folder, dataset, network, optimizer, mesh, resume=name, progress=progress)


def load(out: str | Path, image_shape: tuple[int, int, int], make_network: MakeNetwork | None = None) -> Any:
    """The learner that was tested and the best lam of a finished run.

    Arguments:
        out: the run's folder.
        image_shape: (height, width, channels) of the run's images.
        make_network: the one given to `run`, if any.

    Returns: a learner of the meta-test's ways and step size, and lam.
    Raises: `ValueError` if the run has not finished, or for another network than the run's.
    Cost: reading one file.

    >>> learner, lam = load("runs/omniglot", (28, 28, 1))  # doctest: +SKIP
    >>> learner.accuracies(lam, episode, steps=10)  # doctest: +SKIP
    """
    folder, config = RunFolder.open(out)
    if not folder.representation.exists():
        raise ValueError(f"{folder.path} has no representation.eqx, so the run has not finished: `hyperax resume` it")
    learner = config.test_learner
    lam = learner.lam(build_network(config, image_shape, make_network))
    try:
        return learner, eqx.tree_deserialise_leaves(folder.representation, lam)
    except Exception as error:  # equinox's own, from NumPy, of many types
        raise ValueError(
            f"{folder.representation} does not hold this network for images of {image_shape}: give the run's image "
            f"shape and, if it had one, its make_network ({str(error).splitlines()[0]})"
        ) from error


def _check_mesh(config: FewShotConfig, mesh: Mesh | None) -> None:
    devices = 1 if mesh is None else mesh.size
    if config.tasks % devices:
        raise ValueError(
            f"the {config.tasks} tasks of a hyperiteration cannot be shared by {devices} devices: use a multiple, such "
            f"as --tasks {devices * max(1, round(config.tasks / devices))}, or another --mesh"
        )
    if config.parallel is not None and (config.tasks // devices) % min(config.parallel, config.tasks // devices):
        raise ValueError(
            f"{config.tasks // devices} tasks a device cannot be run {config.parallel} at a time: let --parallel "
            "divide them"
        )
    if devices > 1 and config.statistics == "batch":
        raise ValueError(
            "statistics of the whole mini-batch would be those of one device's share: leave --mesh out, or use other "
            "--statistics"
        )


def _identity(config: FewShotConfig, dataset: MetaDataset) -> dict[str, Any]:
    return {"config": config.to_json(), "data": dataset.provenance.get("arrays")}


def _run(
    config: FewShotConfig,
    folder: RunFolder,
    dataset: MetaDataset,
    network: Network,
    optimizer: optax.GradientTransformation | None,
    mesh: Mesh | None,
    *,
    resume: str,
    progress: bool,
) -> dict[str, Any]:
    begin = time.perf_counter()
    if progress and folder.writes:
        print(f"run folder: {folder.path}", file=sys.stderr, flush=True)
    # Now, because files may change while a long run is on.
    where = {"commit": environment.commit(), "versions": environment.versions(), "machine": environment.machine()}
    train, validation = (_on_device(part) for part in (dataset.train, dataset.validation))
    learner, tested = config.training_learner, config.test_learner
    episodes, most = config.episodes, config.most_inner_steps

    def validate(lam: Any) -> tuple[float, dict[str, float]]:
        found = accuracies_by_steps(
            tested, lam, episodes, validation, config.key("validation"), config.validation_episodes, most
        )
        best = int(np.argmax(found.mean(0)))
        at_best = interval(found[:, best])
        more = {"step_size": float(lam["step_size"])} if config.learn_step_size else {}
        scores = {"accuracy": at_best["accuracy"], "ci95": at_best["ci95"], "steps": best + 1} | more
        return 1 - at_best["accuracy"], scores

    parallel = config.parallel or (  # of one device
        1 if jax.default_backend() == "cpu" and config.statistics != "batch" else config.tasks
    )
    training = config.training_episodes
    folder.begin_session()
    solution = minimize(
        mean_over_tasks(learner.hypergradient(Reverse(config.inner_steps)), parallel=parallel, mesh=mesh),
        learner.lam(network),
        data=train,
        sample=lambda key, classes: training.sample_many(key, classes, config.tasks),
        key=config.key("training"),
        optimizer=optimizer or config.optimizer(),
        steps=config.hyperiterations,
        constraint=learner.constraint(),
        validation=Validation(validate, every=config.validate_every, patience=config.patience),
        callbacks=folder.note,
        checkpoint=Checkpoint(
            folder.checkpoints,
            every=config.checkpoint_every,
            identity=_identity(config, dataset),
        ),
        resume=resume,
        dispatch=config.dispatch,
        record_every=config.record_every,
        progress=progress,
    )
    folder.write_records(solution.history)
    folder.write_representation(solution.lam)
    pairs = nearest_and_farthest(solution.lam["network"], _on_device(dataset.test), config.key("pairs"))
    if folder.writes:
        np.savez_compressed(folder.path / "pairs.npz", **pairs)  # pyright: ignore[reportArgumentType]
    summary = _measure(config, dataset, network, solution, validation)
    summary["network"] = {
        "type": type(network).__name__,
        "numbers": sum(x.size for x in jax.tree.leaves(eqx.filter(network, eqx.is_inexact_array))),
    }
    summary["optimizer"] = "Adam with the schedule of the configuration" if optimizer is None else "given in Python"
    summary |= where
    summary["devices"] = {"tasks_over": 1 if mesh is None else mesh.size, "processes": processes_of(mesh).count}
    summary["timing"] = {
        "seconds": round(folder.seconds(time.perf_counter() - begin), 1),
        "hyperiterations_per_second": _rate(solution),
    }
    folder.write_json("summary.json", summary)
    if folder.writes:
        write_report(folder.path)
    return summary


def _measure(
    config: FewShotConfig,
    dataset: MetaDataset,
    network: Network,
    solution: Solution,
    validation: ImageClasses,
) -> dict[str, Any]:
    """Choose T on validation classes, then measure once on the test classes, beside the baselines."""
    test = _on_device(dataset.test)
    tested, episodes, most = config.test_learner, config.episodes, config.most_inner_steps

    def chosen_steps(lam: Any) -> tuple[int, np.ndarray]:
        # Fresh episodes: those of the training's validations have already chosen the iterate.
        found = accuracies_by_steps(
            tested, lam, episodes, validation, config.key("steps"), config.validation_episodes, most
        )
        return int(np.argmax(found.mean(0))) + 1, found

    def on_test(lam: Any, steps: int) -> dict[str, Any]:
        found = accuracies_by_steps(tested, lam, episodes, test, config.key("test"), config.test_episodes, steps)
        return interval(found[:, -1]) | {"steps": steps}

    steps, found = chosen_steps(solution.lam)
    normalised = asks_for_moments(network, dataset.train.image_shape)
    untrained = tested.lam(network)
    nearest = nearest_neighbour_accuracies(episodes, test, config.key("test"), config.test_episodes)
    summary = {
        "recipe": config.recipe,
        "title": config.title,
        "test": on_test(solution.lam, steps),
        "validation": interval(found[:, steps - 1]),
        "steps_by_validation": [{"steps": t + 1, **interval(found[:, t])} for t in range(most)],
        "steps_training": config.inner_steps,
        "baselines": {
            "nearest neighbour on pixels": interval(nearest),
            "untrained network": on_test(untrained, chosen_steps(untrained)[0]),
        },
        "paper": config.to_json()["published"],
        "protocol": {
            "ways": config.ways,
            "shots": config.shots,
            "queries": config.queries,
            "overlap": config.overlap,
            "statistics": tested.statistics if normalised else "none",
            "training_statistics": config.statistics if normalised else "none",
            "transductive": normalised and tested.statistics != "support",
            "training_ways": config.training_episodes.ways,
            "training_step_size": "learned" if config.learn_step_size else config.step_size,
            "step_size": "learned" if config.learn_step_size else tested.step_size,
            "training_queries": config.training_episodes.queries,
            "data": dataset.provenance,
        },
        "best": solution.best,
        "stopped": solution.stopped,
        "hyperiterations": solution.steps,
        "seed": config.seed,
    }
    if config.learn_step_size:
        summary["step_size"] = float(solution.lam["step_size"])
    return summary


def _on_device(classes: ImageClasses) -> ImageClasses:
    return jax.tree.map(jnp.asarray, classes)


def _rate(solution: Solution) -> float | None:
    """Hyperiterations per second between the first dispatch, which compiles, and the last, validations included."""
    if len(solution.timings) < 2:
        return None
    first, last = solution.timings[0], solution.timings[-1]
    return round((last["step"] - first["step"]) / max(last["seconds"] - first["seconds"], 1e-9), 3)
