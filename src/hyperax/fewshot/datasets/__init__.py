"""Image datasets for few-shot learning: frozen options with a `load` that returns a `MetaDataset`."""

from hyperax.fewshot.datasets.fetch import fetch as fetch
from hyperax.fewshot.datasets.glyphs import Glyphs as Glyphs
from hyperax.fewshot.datasets.image_folder import ImageFolder as ImageFolder
from hyperax.fewshot.datasets.mini_imagenet import MiniImageNet as MiniImageNet
from hyperax.fewshot.datasets.omniglot import Omniglot as Omniglot
from hyperax.fewshot.datasets.provenance import describe as describe
from hyperax.fewshot.image_classes import ImageClasses as ImageClasses
from hyperax.fewshot.image_classes import MetaDataset as MetaDataset
