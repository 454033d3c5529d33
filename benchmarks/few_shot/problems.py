"""The two problems of the few-shot benchmark, as plain numbers that every side reads: images, labels, weights.

    network h     four times: 3 x 3 convolution (SAME, stride 2, 64 filters, no bias), batch normalisation with the
                  statistics of the set at hand (epsilon 1e-3) and a learned shift, ReLU; 256 features
    maml          w_0 = lam = (network, head),  w_t = w_{t-1} - 0.4 grad L_support(w_{t-1}),  f_T = mean of L_query(w_T)
    representation  lam = network, w = softmax regression from zero, step 0.1, on h_lam of the support set
    episodes      5 classes, 1 support and 15 query images each, black and white; L is the mean cross-entropy

A gradient is compared as one vector: the four convolutions [3, 3, in, out], the four shifts and, for maml, the head
(weight [classes, features], features in the order height, width, channels; then the bias).
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

MAML, REPRESENTATION = "maml-omniglot", "hyper-representation-omniglot"
STEP_SIZE = {MAML: 0.4, REPRESENTATION: 0.1}
WAYS, SHOTS, QUERIES, FILTERS, SIDE, EPSILON = 5, 1, 15, 64, 28, 1e-3


class Numbers(NamedTuple):
    """One problem: a mini-batch of episodes, the point lam, and T.

    Fields:
        name: MAML or REPRESENTATION.
        steps: T.
        support, query: images in [0, 1], [tasks, images, 28, 28, 1].
        support_labels, query_labels: int32 [tasks, images].
        convolutions: four of [3, 3, in, 64].
        shifts: four of [64].
        head: weight [5, 256] and bias [5].
    """

    name: str
    steps: int
    support: np.ndarray
    query: np.ndarray
    support_labels: np.ndarray
    query_labels: np.ndarray
    convolutions: list[np.ndarray]
    shifts: list[np.ndarray]
    head: tuple[np.ndarray, np.ndarray]

    @property
    def tasks(self) -> int:
        """N."""
        return len(self.support)


def load(file: str | Path, name: str, tasks: int, steps: int, double: bool = False) -> Numbers:
    """The first episodes of what `run.export` wrote, and the weights."""
    arrays, dtype = dict(np.load(file)), np.float64 if double else np.float32
    images = {key: arrays[key][:tasks].astype(dtype) / 255 for key in ("support", "query")}
    labels = {key: arrays[key][:tasks] for key in ("support_labels", "query_labels")}
    weights = {key: array.astype(dtype) for key, array in arrays.items() if array.dtype == np.float32}
    convolutions, shifts = ([weights[f"{kind}_{i}"] for i in range(4)] for kind in ("convolution", "shift"))
    head = weights["head_weight"], weights["head_bias"]
    return Numbers(name, steps, **images, **labels, convolutions=convolutions, shifts=shifts, head=head)


def vector(convolutions: list, shifts: list, head: tuple | None) -> np.ndarray:
    """A gradient as one float64 vector; `None` for the head of REPRESENTATION."""
    parts = [*convolutions, *shifts, *(head or ())]
    return np.concatenate([np.asarray(part, np.float64).ravel() for part in parts])
