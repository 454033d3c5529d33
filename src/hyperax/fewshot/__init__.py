"""Few-shot learning: data sets, episodes, networks, learners, evaluation. Needs `pip install hyperax[data]`."""

from hyperax.fewshot.datasets import Glyphs, ImageFolder, MiniImageNet, Omniglot, describe, fetch
from hyperax.fewshot.episodes import Episode, Episodes
from hyperax.fewshot.evaluation import (
    accuracies_by_steps,
    interval,
    nearest_and_farthest,
    nearest_neighbour_accuracies,
    paired_difference,
)
from hyperax.fewshot.image_batches import ImageBatch, ImageBatches
from hyperax.fewshot.image_classes import ImageClasses, MetaDataset
from hyperax.fewshot.learners.classic import Joint
from hyperax.fewshot.learners.cosine import CosineClassifier
from hyperax.fewshot.learners.hyper_representation import HyperRepresentation
from hyperax.fewshot.learners.initialisation import Initialisation
from hyperax.fewshot.learners.learner import Adapted, FeatureLearner, Learner
from hyperax.fewshot.learners.maml import anil, imaml, in_depth, in_width, maml, meta_sgd
from hyperax.fewshot.learners.matching import Matching
from hyperax.fewshot.learners.nearest_neighbour import NearestNeighbour
from hyperax.fewshot.learners.partition import LastStages, ShareOfFilters
from hyperax.fewshot.learners.pretrained import Multiclass, Readout, fine_tuning
from hyperax.fewshot.learners.prototypical import Prototypical
from hyperax.fewshot.learners.reptile import Reptile, reptile
from hyperax.fewshot.learners.ridge import RidgeClassifier
from hyperax.fewshot.learners.siamese import Siamese
from hyperax.fewshot.networks import C4L, OmniglotNet, PerImage, ResidualNet, encode

__all__ = [
    "C4L",
    "Adapted",
    "CosineClassifier",
    "Episode",
    "Episodes",
    "FeatureLearner",
    "Glyphs",
    "HyperRepresentation",
    "ImageBatch",
    "ImageBatches",
    "ImageClasses",
    "ImageFolder",
    "Initialisation",
    "Joint",
    "LastStages",
    "Learner",
    "Matching",
    "MetaDataset",
    "MiniImageNet",
    "Multiclass",
    "NearestNeighbour",
    "Omniglot",
    "OmniglotNet",
    "PerImage",
    "Prototypical",
    "Readout",
    "Reptile",
    "ResidualNet",
    "RidgeClassifier",
    "ShareOfFilters",
    "Siamese",
    "accuracies_by_steps",
    "anil",
    "describe",
    "encode",
    "fetch",
    "fine_tuning",
    "imaml",
    "in_depth",
    "in_width",
    "interval",
    "maml",
    "meta_sgd",
    "nearest_and_farthest",
    "nearest_neighbour_accuracies",
    "paired_difference",
    "reptile",
]
