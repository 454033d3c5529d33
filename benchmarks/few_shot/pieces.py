"""What takes the time of hyperax's MAML and hyper-representation: milliseconds of its pieces, for one episode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import hyperax as hx
from benchmarks.few_shot.hyperax_side import episodes, network
from benchmarks.few_shot.problems import STEP_SIZE, WAYS, Numbers
from benchmarks.timing import in_turns
from hyperax.fewshot.layers import own_moments, patches
from hyperax.fewshot.learners.hyper_representation import Classifier
from hyperax.fewshot.learners.maml import maml
from hyperax.methods import FirstOrder


def layers(net: Any, images: jax.Array) -> tuple[list[jax.Array], list[jax.Array]]:
    """The inputs and the convolved activations of the four layers."""
    inputs, convolved = [], []
    for convolution, normalisation in zip(net.convolutions, net.normalisations, strict=True):
        inputs.append(images)
        convolved.append(convolution(images))
        images = jax.nn.relu(normalisation(convolved[-1], own_moments))
    return inputs, convolved


def products(net: Any, seen: list[jax.Array], cotangents: list[jax.Array]) -> list[Any]:
    """The matrix products of a forward and a backward pass, nothing else: patches W, patches^T dy, dy W^T."""
    found: list[Any] = []
    for convolution, p, dy in zip(net.convolutions, seen, cotangents, strict=True):
        w, p, dy = (x.reshape(-1, x.shape[-1]) for x in (convolution.weight, p, dy))
        found += [p @ w, p.T @ dy]
        if len(found) > 2:  # the images need no gradient
            found.append(dy @ w.T)
    return found


def pieces(numbers: Numbers, rounds: int) -> dict[str, float]:
    """Milliseconds of each piece, the median over rounds in which all take turns.

    "products" are those of a forward and a backward pass without anything around them: what the network costs at least.
    """
    net, first = network(numbers), jax.tree.map(lambda x: x[0], episodes(numbers))
    lam = {"network": net, "head": Classifier(*map(jnp.asarray, numbers.head))}
    learner = maml(WAYS, STEP_SIZE[numbers.name], head="learned")
    value = lambda net, images: jnp.sum(jnp.square(net(images)))
    runs: dict[str, Callable[[], Any]] = {}
    for name, images in (("query", first.query / 255), ("support", first.support / 255)):
        inputs, convolved = jax.jit(layers)(net, images)
        seen = [patches(x, 3, 2) for x in inputs]
        runs |= {
            f"{name}: patches": bound(lambda xs: [patches(x, 3, 2) for x in xs], inputs),
            f"{name}: products": bound(products, net, seen, convolved),
            f"{name}: normalisation and ReLU": bound(normalised, net, convolved),
            f"{name}: forward": bound(value, net, images),
            f"{name}: forward and backward": bound(eqx.filter_grad(value), net, images),
        }
    for name, method in (("first order", FirstOrder(numbers.steps)), ("exact", hx.Reverse(numbers.steps))):
        runs[f"MAML: {name}"] = bound(
            lambda lam, episode, f=learner.hypergradient(method): f(lam, episode).grad, lam, first
        )
    return {name: 1000 * float(np.median(seconds)) for name, seconds in in_turns(runs, rounds).items()}


def normalised(net: Any, convolved: list[jax.Array]) -> list[jax.Array]:
    return [jax.nn.relu(layer(y, own_moments)) for layer, y in zip(net.normalisations, convolved, strict=True)]


def bound(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    """The compiled function at its arguments."""
    compiled = eqx.filter_jit(function)
    return lambda: compiled(*arguments)
