"""Few-shot learning: data sets, episodes, networks, learners, evaluation. Needs `pip install hyperax[data]`."""

from hyperax.fewshot.datasets import Glyphs, ImageFolder, MiniImageNet, Omniglot, describe, fetch
from hyperax.fewshot.domains import (
    DomainEpisodes,
    DomainNet,
    DomainNets,
    FirstStages,
    MixedEpisodes,
    Resized,
    Stem,
    own_stem,
)
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
from hyperax.fewshot.learners.learned_loss import LearnedLoss
from hyperax.fewshot.learners.learner import Adapted, FeatureLearner, Learner
from hyperax.fewshot.learners.losses import CrossEntropy, GroundLoss, NetworkLoss, ParametricCrossEntropy
from hyperax.fewshot.learners.maml import anil, imaml, in_depth, in_width, maml, meta_sgd
from hyperax.fewshot.learners.matching import Matching
from hyperax.fewshot.learners.memory_augmented import MemoryAugmented
from hyperax.fewshot.learners.memory_module import MemoryModule
from hyperax.fewshot.learners.meta_lstm import meta_lstm
from hyperax.fewshot.learners.meta_networks import MetaNetworks
from hyperax.fewshot.learners.nearest_neighbour import NearestNeighbour
from hyperax.fewshot.learners.neural_statistician import NeuralStatistician
from hyperax.fewshot.learners.partition import LastStages, ShareOfFilters
from hyperax.fewshot.learners.pretrained import Multiclass, Readout, fine_tuning
from hyperax.fewshot.learners.prototypical import Prototypical
from hyperax.fewshot.learners.regularisers import LearnedL2, TowardsClassMeans
from hyperax.fewshot.learners.reptile import Reptile, reptile
from hyperax.fewshot.learners.ridge import RidgeClassifier
from hyperax.fewshot.learners.siamese import Siamese
from hyperax.fewshot.learners.snail import SNAIL
from hyperax.fewshot.networks import C4L, OmniglotNet, PerImage, ResidualNet, encode
from hyperax.fewshot.noisy_episodes import NoisyEpisodes
from hyperax.fewshot.targets import Targets

__all__ = [
    "C4L",
    "SNAIL",
    "Adapted",
    "CosineClassifier",
    "CrossEntropy",
    "DomainEpisodes",
    "DomainNet",
    "DomainNets",
    "Episode",
    "Episodes",
    "FeatureLearner",
    "FirstStages",
    "Glyphs",
    "GroundLoss",
    "HyperRepresentation",
    "ImageBatch",
    "ImageBatches",
    "ImageClasses",
    "ImageFolder",
    "Initialisation",
    "Joint",
    "LastStages",
    "LearnedL2",
    "LearnedLoss",
    "Learner",
    "Matching",
    "MemoryAugmented",
    "MemoryModule",
    "MetaDataset",
    "MetaNetworks",
    "MiniImageNet",
    "MixedEpisodes",
    "Multiclass",
    "NearestNeighbour",
    "NetworkLoss",
    "NeuralStatistician",
    "NoisyEpisodes",
    "Omniglot",
    "OmniglotNet",
    "ParametricCrossEntropy",
    "PerImage",
    "Prototypical",
    "Readout",
    "Reptile",
    "ResidualNet",
    "Resized",
    "RidgeClassifier",
    "ShareOfFilters",
    "Siamese",
    "Stem",
    "Targets",
    "TowardsClassMeans",
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
    "meta_lstm",
    "meta_sgd",
    "nearest_and_farthest",
    "nearest_neighbour_accuracies",
    "own_stem",
    "paired_difference",
    "reptile",
]
