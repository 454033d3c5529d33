"""One training on some domains: what is shared and what is a domain's own, and accuracy on its tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from hyperax.checkpoint import Checkpoint
from hyperax.domains import MeanOverDomains, View, all_of_lam, mean_over_domains
from hyperax.experiments.mixed_domains.data import DOMAINS, Splits
from hyperax.experiments.study import Place
from hyperax.fewshot.domains import DomainEpisodes, DomainNet, DomainNets, FirstStages, Resized, own_key, own_stem
from hyperax.fewshot.evaluation import accuracies_by_steps
from hyperax.fewshot.image_classes import ImageClasses
from hyperax.fewshot.learners.hyper_representation import HyperRepresentation
from hyperax.fewshot.learners.initialisation import Initialisation
from hyperax.fewshot.learners.learner import Learner
from hyperax.fewshot.networks import OmniglotNet
from hyperax.minimize import Solution, minimize
from hyperax.stopping import Validation
from hyperax.tasks import mean_over_tasks

if TYPE_CHECKING:
    from hyperax.experiments.mixed_domains.study import MixedDomains

Kind = Literal["own stems", "one stem", "stems in w", "new stem"]
"""Which part of the network is a domain's own, and whether it is learned across tasks or in each of them."""

_PIXELS = 28  # the size that all images are brought to where there is one stem
_PURPOSES = ("initialisation", "training", "validation", "test")


class AfterNewStem(eqx.Module):
    """The view of a domain whose stem is all there is to learn: lam = {"stem"}, the layers after it stay."""

    shared: tuple[Any, ...]

    def __call__(self, lam: Any, domain: str) -> Any:
        """The lam of a learner."""
        return {"network": DomainNet(lam["stem"], self.shared)}


@dataclass(frozen=True)
class Meta:
    """A meta-learner before or after training: what it is, where its lam starts or has come to, how domains see it."""

    kind: Kind
    lam: Any
    view: View


def start(config: MixedDomains, draw: int, kind: Kind, classes: Mapping[str, Splits], shared: Any = None) -> Meta:
    """A meta-learner of these domains before training; `shared` are layers from elsewhere, for new stems."""
    key = key_for(config, draw, "initialisation")
    shapes = {name: splits["train"].image_shape for name, splits in classes.items()}
    if kind == "one stem":
        network = OmniglotNet((_PIXELS, _PIXELS, 1), key, config.filters)
        return Meta(kind, {"network": Resized(network, _PIXELS)}, all_of_lam)
    nets = DomainNets(shapes, key, config.filters)
    if kind == "new stem":
        (stem,) = nets.stems.values()
        return Meta(kind, {"stem": stem}, AfterNewStem(shared))
    if shared is not None:
        nets = eqx.tree_at(lambda nets: nets.shared, nets, shared)
    return Meta(kind, {"network": nets}, own_stem)


def train(
    config: MixedDomains,
    draw: int,
    meta: Meta,
    classes: Mapping[str, Splits],
    place: Place,
    name: str,
    hyperiterations: int,
) -> tuple[Meta, Solution]:
    """Train on the training classes of all these domains; validation classes choose the iterate."""

    def validate(lam: Any) -> tuple[float, dict[str, float]]:
        now = Meta(meta.kind, lam, meta.view)
        found = {
            domain: float(np.mean(accuracies(config, draw, now, domain, splits, "validation")))
            for domain, splits in classes.items()
        }
        return 1 - float(np.mean(list(found.values()))), found

    every = max(1, -(-hyperiterations // config.validations))
    solution = minimize(
        _hypergradient(config, meta.kind, tuple(classes), meta.view),
        meta.lam,
        data={domain: on_device(splits["train"]) for domain, splits in classes.items()},
        sample=DomainEpisodes({domain: config.training_episodes(domain) for domain in classes}, config.tasks),
        key=key_for(config, draw, "training"),
        optimizer=_optimizer(config.learning_rate, hyperiterations),
        steps=hyperiterations,
        validation=Validation(validate, every=every),
        checkpoint=Checkpoint(
            place.folder / name / "checkpoints",
            every=every,
            keep=1,
            identity={"training": name, "draw": draw, **config.to_json()},
        ),
        resume="auto",
        record_every=every,
        progress=place.progress,
    )
    return Meta(meta.kind, solution.lam, meta.view), solution


def accuracies(
    config: MixedDomains, draw: int, meta: Meta, domain: str, splits: Splits, purpose: Literal["validation", "test"]
) -> np.ndarray:
    """Accuracy after T inner steps on the episodes of a purpose, which are the same for every meta-learner."""
    classes = on_device(splits[purpose])
    episodes = config.episodes(domain, classes)
    count = config.test_episodes if purpose == "test" else config.validation_episodes
    return accuracies_by_steps(
        _learner(meta.kind, episodes.ways, config.inner_steps, config.step_size),
        meta.view(meta.lam, domain),
        episodes,
        classes,
        own_key(key_for(config, draw, purpose), domain),
        count,
        config.inner_steps,
    )[:, -1]


def shared_arrays(meta: Meta) -> dict[str, np.ndarray]:
    """The layers that domains share, as arrays to be kept."""
    return {f"shared-{i}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(meta.lam["network"].shared))}


def shared_layers(config: MixedDomains, arrays: Mapping[str, np.ndarray]) -> tuple[Any, ...]:
    """The layers that were kept."""
    like = DomainNets({"any": (_PIXELS, _PIXELS, 1)}, jax.random.key(0), config.filters).shared
    leaves, structure = jax.tree.flatten(like)
    return jax.tree.unflatten(structure, [jnp.asarray(arrays[f"shared-{i}"]) for i in range(len(leaves))])


def key_for(config: MixedDomains, draw: int, purpose: str) -> jax.Array:
    """The random key of a purpose in a draw: the same for every meta-learner."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), draw), _PURPOSES.index(purpose))


def on_device(classes: ImageClasses) -> ImageClasses:
    """The same with JAX's arrays."""
    return jax.tree.map(jnp.asarray, classes)


# The same functions for every draw, because others are other programs to be compiled.
@cache
def _learner(kind: Kind, ways: int, steps: int, step_size: float) -> Learner:
    if kind == "stems in w":
        return Initialisation(ways, step_size=step_size, adapted=FirstStages(1))
    return HyperRepresentation(ways, step_size=step_size)


def _hypergradient(config: MixedDomains, kind: Kind, domains: Sequence[str], view: View) -> MeanOverDomains:
    # One episode at a time: on a CPU that keeps its activations in the cache.
    parallel = 1 if jax.default_backend() == "cpu" else None
    functions = {}
    for domain in domains:
        learner = _learner(kind, DOMAINS[domain].ways, config.inner_steps, config.step_size)
        method = learner.method(config.inner_steps)
        functions[domain] = mean_over_tasks(learner.hypergradient(method), parallel=parallel)
    return mean_over_domains(functions, view)


@cache
def _optimizer(learning_rate: float, steps: int) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(learning_rate, steps))
