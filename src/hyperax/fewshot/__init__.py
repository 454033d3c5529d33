"""Few-shot learning: data sets, episodes, networks, learners, evaluation. Needs `pip install hyperax[data]`."""

from hyperax.fewshot.datasets import Glyphs, ImageFolder, MiniImageNet, Omniglot, describe, fetch
from hyperax.fewshot.episodes import Episode, Episodes
from hyperax.fewshot.evaluation import (
    accuracies_by_steps,
    interval,
    nearest_and_farthest,
    nearest_neighbour_accuracies,
)
from hyperax.fewshot.image_classes import ImageClasses, MetaDataset
from hyperax.fewshot.learners.hyper_representation import HyperRepresentation
from hyperax.fewshot.networks import C4L, OmniglotNet, PerImage, ResidualNet, encode

__all__ = [
    "C4L",
    "Episode",
    "Episodes",
    "Glyphs",
    "HyperRepresentation",
    "ImageClasses",
    "ImageFolder",
    "MetaDataset",
    "MiniImageNet",
    "Omniglot",
    "OmniglotNet",
    "PerImage",
    "ResidualNet",
    "accuracies_by_steps",
    "describe",
    "encode",
    "fetch",
    "interval",
    "nearest_and_farthest",
    "nearest_neighbour_accuracies",
]
