"""The other systems that the papers' tables name: memories, sequence models, fast weights, latent variables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hyperax.experiments.comparison.entrants import DatasetName, Entrant, held_out
from hyperax.experiments.comparison.roster import trained
from hyperax.fewshot.learners.memory_augmented import MemoryAugmented
from hyperax.fewshot.learners.memory_module import MemoryModule
from hyperax.fewshot.learners.meta_lstm import meta_lstm
from hyperax.fewshot.learners.meta_networks import MetaNetworks
from hyperax.fewshot.learners.neural_statistician import NeuralStatistician
from hyperax.fewshot.learners.snail import SNAIL


def systems(dataset: DatasetName, published: Callable[[str], Any]) -> tuple[Entrant, ...]:
    """One row each; what reads labels as inputs is trained on as many classes as in the test."""
    row = lambda name, learner, most_steps=1, **options: trained(
        dataset, name, learner, published(name), most_steps=most_steps, **options
    )
    return (
        # On validation classes of Omniglot SNAIL hardly left chance with a learning rate of 2e-3.
        row("SNAIL", SNAIL, fixed_ways=True, learning_rate=5e-4, note="features standardised by the support set."),
        row(
            "Memory-augmented nets",
            MemoryAugmented,
            fixed_ways=True,
            note="on the convolutional network, features standardised by the support set; labels come with their "
            "images, not a step later; cosines multiplied by 20.",
        ),
        row(
            "Memory module",
            MemoryModule,
            learning_rate=2e-3,
            note="the memory is that of one episode, and begins empty; keys centred on the support set.",
        ),
        row(
            "Meta-networks",
            lambda ways: MetaNetworks(ways, units=32, hidden=10),
            sampler=held_out(None, 10),
            learning_rate=2e-3,
            note="fast weights in the dense layers on top of one network only.",
        ),
        row(
            "Neural statistician",
            NeuralStatistician,
            # 1-shot: sets of five images, as published.
            sampler=held_out(None if dataset == "miniimagenet" else 20, 4),
            note="beside the published bound, the cross-entropy of the query images.",
        ),
        row(
            "Meta-LSTM",
            lambda ways: meta_lstm(ways, step_size=0.1),
            fixed_ways=True,
            steps=5,
            most_steps=8,
            filters=16,
            learning_rate=3e-3,
            note="first order, as published; a network of 16 filters, for the rule costs as much as it has weights.",
        ),
    )
