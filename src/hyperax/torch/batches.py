"""Mini-batches as a pure function of the step, from tensors, data sets and loaders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
)

from hyperax.rollout import check_steps
from hyperax.torch.crossing import to_torch
from hyperax.torch.problem import names_of
from hyperax.torch.seeds import mixed


class Batches:
    """Mini-batches B_t, the same whenever step t is run: the `batch` of a `Problem`.

        epoch e = (t - 1) // n,   B_t = the ((t - 1) mod n)-th batch of permutation e, which (seed, run, e) decide

    n batches make an epoch; every epoch is a new permutation of the examples.

    Arguments:
        data: a pytree of tensors with the examples on the leading axis, such as (inputs, targets), or of NumPy arrays,
            which become tensors of their type (float64 mostly); a map-style `Dataset`; or a `DataLoader`, of which data
            set, batch size, `drop_last` and `collate_fn` are taken. Its shuffling and workers are not: the order of
            examples is ours, so that a replay sees the same.
        size: examples a batch; `None` is a loader's own, or all of the data (then there is no permutation).
        seed: decides all permutations.
        drop_last: whether the last batch of an epoch is left out where it is not full; `None` is a loader's own, or
            True.
        collate: a list of examples of a data set -> batch; `None` is a loader's own, or PyTorch's.
        with_index: whether a batch is (indices, batch), for weights of single examples.

    `batches(run, t)` is B_t; `run` is a whole number (or `None`, for 0) that draws other permutations, such as the data
    of a hyperiteration. A data set that draws random augmentations from torch is replayed too, with `Problem.seed`.
    Raises: `ValueError` for data without a length, leading axes that differ, a sampler that chooses among the examples,
    or a batch larger than the data.
    Cost: one permutation an epoch, and of tensors one gather a step; they may lie on a GPU.
    Reference: Bridge paper 2017, eq. 2.1 (B_t).
    Do not use it with a data set that reads files slowly: every replay reads again; load it into tensors.

    >>> batches = Batches((torch.arange(6.0),), size=2)
    >>> sorted(x for t in (1, 2, 3) for x in batches(None, t)[0].tolist())
    [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    """

    def __init__(
        self,
        data: Any,
        size: int | None = None,
        *,
        seed: int = 0,
        drop_last: bool | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
        with_index: bool = False,
    ):
        check_steps(seed, "seed")
        if isinstance(data, DataLoader):
            if data.batch_size is None and size is None:
                raise ValueError(
                    "the loader has no batch_size (it is off, or a batch_sampler has it): pass size=..., and the "
                    "mini-batches are drawn here"
                )
            if not isinstance(data.dataset, IterableDataset):
                check_sampler(data)
            size = data.batch_size if size is None else size
            drop_last = data.drop_last if drop_last is None else drop_last
            collate = data.collate_fn if collate is None else collate
            data = data.dataset
        is_stream = isinstance(data, IterableDataset | Iterator)
        data = data if is_stream else _with_tensors(data)
        if is_stream or not (_is_tensors(data) or hasattr(data, "__getitem__")):
            raise ValueError(
                f"data is {type(data).__name__}, which has no example number i: a step could not see the same batch "
                "again. Use tensors, a map-style Dataset, or a DataLoader of one"
            )
        self.data, self.seed, self.with_index = data, seed, with_index
        self.collate = default_collate if collate is None else collate
        self.of_tensors = _is_tensors(data)
        self.count = _count(data) if self.of_tensors else len(data)
        self.size = size
        if size is not None:
            check_steps(size, "size", 1)
            if size > self.count:
                raise ValueError(
                    f"a mini-batch of {size} cannot be drawn from {self.count} examples: use 1 <= size <= count"
                )
        drop = True if drop_last is None else drop_last
        self.in_epoch = 1 if size is None else self.count // size if drop else -(-self.count // size)
        self._epoch: tuple[Any, np.ndarray] | None = None

    def __call__(self, run: Any, t: int) -> Any:
        """B_t."""
        if self.size is None:
            index = torch.arange(self.count)
            batch = self.data if self.of_tensors else self._gathered(index)
        else:
            index = self.indices(run, t)
            batch = self._gathered(index)
        return (index, batch) if self.with_index else batch

    def indices(self, run: Any, t: int) -> torch.Tensor:
        """The examples of B_t."""
        assert self.size is not None
        key = (0 if run is None else int(run), (t - 1) // self.in_epoch)
        if self._epoch is None or self._epoch[0] != key:
            # Kept as an array: a tensor made inside a transformation of torch.func must not be used after it.
            self._epoch = key, np.random.default_rng(mixed(self.seed, *key)).permutation(self.count)
        first = (t - 1) % self.in_epoch * self.size
        return torch.tensor(self._epoch[1][first : first + self.size])

    def _gathered(self, index: torch.Tensor) -> Any:
        if self.of_tensors:
            return jax.tree.map(lambda x: x[index.to(x.device)], self.data)
        return self.collate([self.data[i] for i in index.tolist()])


def _with_tensors(data: Any) -> Any:
    """Arrays of NumPy and JAX as tensors; data sets as they are."""
    if _is_tensors(data):
        return data
    is_array = lambda x: (
        isinstance(x, torch.Tensor | jax.Array) or (isinstance(x, np.ndarray) and x.dtype.kind in "biufc")
    )
    others = [f"{name} is a {type(x).__name__}" for name, x in names_of("data", data) if not is_array(x)]
    if not others and jax.tree.leaves(data):
        return to_torch(data)
    if isinstance(data, dict) or (isinstance(data, tuple) and any(is_array(x) for x in data)):  # else a data set
        raise ValueError(
            f"data has other things than tensors and arrays in it ({others[0] if others else 'nothing'}): convert them "
            "by torch.tensor, with the examples on the leading axis"
        )
    return data


def check_sampler(loader: DataLoader) -> None:
    """`ValueError` for a sampler that chooses among the examples: only the order of examples is ours."""
    sampler = loader.sampler
    every = type(sampler) is SequentialSampler or (
        type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == len(loader.dataset)  # pyright: ignore[reportArgumentType]
    )
    batches = loader.batch_sampler
    if not every or not (batches is None or (type(batches) is BatchSampler and batches.sampler is sampler)):
        raise ValueError(
            "the loader has a sampler of its own, which says what examples there are, and is not followed here: pass "
            "torch.utils.data.Subset(dataset, indices) in place of the dataset; weights of examples go into the loss"
        )


def _is_tensors(data: Any) -> bool:
    """Whether this is a pytree of tensors; a list of tuples, (input, target) each, is a data set."""
    if isinstance(data, list) and data and isinstance(data[0], tuple | list | dict):
        return False
    leaves = jax.tree.leaves(data)
    return bool(leaves) and all(isinstance(x, torch.Tensor) for x in leaves)


def _count(data: Any) -> int:
    for name, x in names_of("data", data):
        if not x.dim():
            raise ValueError(f"{name} is a number; examples are on the leading axis")
    counts = {name: len(x) for name, x in names_of("data", data)}
    if len(set(counts.values())) > 1:
        raise ValueError(f"the leading axes of data differ, and each is the axis of examples: {counts}")
    return next(iter(counts.values()))
