"""hyperax, as a user calls it."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import hyperax as hx
from benchmarks.few_shot.problems import FILTERS, MAML, REPRESENTATION, SIDE, STEP_SIZE, WAYS, Numbers, vector
from benchmarks.few_shot.side import THREADS, Made, Row
from hyperax.fewshot.episodes import Episode
from hyperax.fewshot.learners.hyper_representation import Classifier, HyperRepresentation
from hyperax.fewshot.learners.maml import maml
from hyperax.fewshot.networks import OmniglotNet

PACKAGES = ("jax", "jaxlib", "equinox", "optax", "lineax", "numpy")


def network(numbers: Numbers) -> OmniglotNet:
    """The network with the weights of the problem."""
    empty = OmniglotNet((SIDE, SIDE, 1), jax.random.key(0), FILTERS)
    where = lambda net: [c.weight for c in net.convolutions] + [n.beta for n in net.normalisations]
    return eqx.tree_at(where, empty, [jnp.asarray(x) for x in (*numbers.convolutions, *numbers.shifts)])


def to_vector(gradient: Any) -> np.ndarray:
    """A gradient as the vector of problems.py."""
    net = gradient["network"]
    parts = [c.weight for c in net.convolutions], [n.beta for n in net.normalisations]
    return vector(*parts, tuple(gradient["head"]) if "head" in gradient else None)


def episodes(numbers: Numbers) -> Episode:
    """The images as they are drawn: uint8."""
    images = [jnp.asarray(np.round(255 * x).astype(np.uint8)) for x in (numbers.support, numbers.query)]
    return Episode(images[0], jnp.asarray(numbers.support_labels), images[1], jnp.asarray(numbers.query_labels))


def of_maml(numbers: Numbers, parallel: int = 1, mesh: Mesh | None = None) -> Made:
    """`mean_over_tasks` of the learner's hypergradient."""
    learner = maml(WAYS, STEP_SIZE[MAML], head="learned")
    lam = {"network": network(numbers), "head": Classifier(*map(jnp.asarray, numbers.head))}
    return made(learner, lam, numbers, parallel, mesh)


def of_representation(numbers: Numbers, parallel: int = 1, mesh: Mesh | None = None) -> Made:
    """The same of the learner of the papers."""
    learner = HyperRepresentation(ways=WAYS, step_size=STEP_SIZE[REPRESENTATION])
    return made(learner, learner.lam(network(numbers)), numbers, parallel, mesh)


def made(learner: Any, lam: Any, numbers: Numbers, parallel: int, mesh: Mesh | None) -> Made:
    """Called with the episodes on the device."""
    hypergradient = learner.hypergradient(hx.Reverse(numbers.steps))
    function, data = hx.mean_over_tasks(hypergradient, parallel=parallel, mesh=mesh), episodes(numbers)
    return Made(lambda: jax.block_until_ready(function(lam, data).grad), to_vector)


def devices() -> Mesh:
    """A CPU device for each thread, to share the episodes."""
    return jax.make_mesh((THREADS,), ("devices",))


ROWS = {
    "hyperax": Row(MAML, of_maml),
    "hyperax, 8 together": Row(MAML, lambda numbers: of_maml(numbers, 8), most_tasks=8),
    "hyperax, a device a core": Row(MAML, lambda numbers: of_maml(numbers, mesh=devices())),
    "hyperax, features once": Row(REPRESENTATION, of_representation),
    "hyperax, features once, a device a core": Row(
        REPRESENTATION, lambda numbers: of_representation(numbers, mesh=devices())
    ),
}
