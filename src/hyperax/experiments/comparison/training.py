"""One part of a comparison: train a learner, choose on validation classes, test on the episodes that all share."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from hyperax.checkpoint import Checkpoint
from hyperax.experiments.comparison.entrants import Entrant, Setting, sample_many
from hyperax.experiments.preparing import make_network
from hyperax.experiments.study import Part, Place
from hyperax.fewshot.evaluation import accuracies_by_steps, interval
from hyperax.fewshot.image_classes import ImageClasses, MetaDataset
from hyperax.fewshot.learners.learner import Learner
from hyperax.minimize import Solution, minimize
from hyperax.stopping import Validation
from hyperax.tasks import mean_over_tasks

if TYPE_CHECKING:
    from hyperax.experiments.comparison.study import Comparison

_PURPOSES = ("initialisation", "training", "validation", "steps", "test", "overlapping test")


def key_for(seed: int, purpose: str) -> jax.Array:
    """The random key of a purpose: the same for all learners, so that they see the same episodes."""
    return jax.random.fold_in(jax.random.key(seed), _PURPOSES.index(purpose))


@dataclass(frozen=True)
class Tested:
    """An entrant as it is tested in a setting; its learner is made once, because another one is another program."""

    config: Comparison
    setting: Setting
    entrant: Entrant
    learner: Learner

    def accuracies(
        self,
        lam: Any,
        classes: ImageClasses,
        purpose: str,
        count: int,
        steps: int | None = None,
        overlap: bool = False,
    ) -> np.ndarray:
        """[count, steps]: of so many episodes, after each number of inner steps."""
        episodes = self.config.episodes(self.setting, overlap)
        steps = steps or self.entrant.most_steps or self.entrant.training.steps
        key = key_for(self.config.seed, purpose)
        return accuracies_by_steps(self.learner, self.entrant.view(lam), episodes, classes, key, count, steps)

    def chosen(self, found: np.ndarray) -> int:
        """The column of the T that is best on these (validation) episodes, or of the one that is given."""
        return int(np.argmax(found.mean(0))) if self.entrant.most_steps else found.shape[1] - 1

    def validate(self, lam: Any, classes: ImageClasses) -> tuple[float, dict[str, float]]:
        """Error on the episodes that choose the iterate, the same every time, and what is recorded of them."""
        found = self.accuracies(lam, classes, "validation", self.config.validation_episodes)
        at = self.chosen(found)
        scores = interval(found[:, at])
        return 1 - scores["accuracy"], {"accuracy": scores["accuracy"], "ci95": scores["ci95"], "steps": at + 1}

    def test(self, lam: Any, validation: ImageClasses, test: ImageClasses) -> tuple[dict[str, Any], np.ndarray]:
        """T is chosen on fresh validation episodes; then one look at the test classes, disjoint and overlapping."""
        found = self.accuracies(lam, validation, "steps", self.config.validation_episodes)
        at = self.chosen(found)
        last = lambda purpose, overlap: self.accuracies(lam, test, purpose, self.config.test_episodes, at + 1, overlap)[
            :, -1
        ]
        accuracies = last("test", False)
        record = {
            "what": "test",
            "setting": self.setting.name,
            "entrant": self.entrant.name,
            "training": self.entrant.training.name,
            **interval(accuracies),
            "overlapping": interval(last("overlapping test", True)),
            "validation": interval(found[:, at]),
            "steps": at + 1 if self.learner.adapts else None,
            "statistics": self.learner.statistics,
        }
        return record, accuracies


def measure(config: Comparison, setting: Setting, entrants: list[Entrant], data: MetaDataset, place: Place) -> Part:
    """Train what these entrants share, and test each of them; the first one's accuracy chooses the iterate."""
    on_device = lambda classes: jax.tree.map(jnp.asarray, classes)
    train, validation, test = (on_device(part) for part in (data.train, data.validation, data.test))
    tested = [Tested(config, setting, entrant, entrant.learner(setting.ways)) for entrant in entrants]
    begin = time.perf_counter()
    solution = _train(tested[0], train, validation, place)
    training = {
        "what": "training",
        "setting": setting.name,
        "training": entrants[0].training.name,
        "hyperiterations": solution.steps,
        "best": solution.best["step"] if solution.best else solution.steps,
        "stopped": solution.stopped,
        "seconds": round(time.perf_counter() - begin, 1),
    }
    if place.writes:
        place.folder.mkdir(parents=True, exist_ok=True)
        eqx.tree_serialise_leaves(place.folder / "lam.eqx", solution.lam)
    curve = [
        {"what": "validation", "setting": setting.name, "step": record["step"], **record["validation"]}
        for record in solution.history
        if "validation" in record
    ]
    records, arrays = [training, *curve], {}
    for one in tested:
        record, accuracies = one.test(solution.lam, validation, test)
        place.say(f"  {one.entrant.name}, {setting.words}: {100 * record['accuracy']:.2f} %")
        records.append(record)
        arrays[one.entrant.name] = accuracies
    return Part(records, arrays)


def _train(tested: Tested, train: ImageClasses, validation: ImageClasses, place: Place) -> Solution:
    config, training = tested.config, tested.entrant.training
    sampler = training.sampler(tested.setting)
    learner = training.learner(getattr(sampler, "ways", train.num_classes))
    for_network, for_learner = jax.random.split(key_for(config.seed, "initialisation"))
    network = make_network(training.network, train.image_shape, for_network, training.filters)
    steps = config.hyperiterations(training)
    every = max(1, -(-steps // config.validations))
    tasks, devices = config.tasks_of(training), 1 if place.mesh is None else place.mesh.size
    parallel = 1 if jax.default_backend() == "cpu" else tasks // devices
    return minimize(
        mean_over_tasks(training.hypergradient(learner, training.steps), parallel=parallel, mesh=place.mesh),
        learner.lam(network, train.image_shape, for_learner),
        data=train,
        sample=lambda key, classes: sample_many(sampler, key, classes, tasks),
        key=key_for(config.seed, "training"),
        optimizer=training.optimizer(optax.cosine_decay_schedule(training.learning_rate, steps)),
        steps=steps,
        constraint=learner.constraint() if isinstance(learner, Learner) else None,
        validation=Validation(lambda lam: tested.validate(lam, validation), every=every, patience=training.patience),
        checkpoint=Checkpoint(
            place.folder / "checkpoints", every=every, keep=1, identity={"training": training.name, **config.to_json()}
        ),
        resume="auto",
        record_every=max(1, steps // 100),
        progress=place.progress,
    )
