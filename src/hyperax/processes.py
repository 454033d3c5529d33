"""Processes that compute one run together: what only the first of them does, and what all must agree on.

Arrays over all devices are computed by all processes, each calling the same programs in the same order; a process that
calls one more waits for ever. So whatever decides what is called next (a file found, a score, a stop) is exchanged
here first, and is then the same everywhere.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from jaxtyping import PyTree

from hyperax.checkpoint import difference

Result = TypeVar("Result")

_LEAST_BYTES = 256  # messages are padded to powers of two from here on, so that few lengths are compiled


@dataclass(frozen=True)
class Processes:
    """The processes of a run; alone, nothing is exchanged and nothing is called.

    Arguments:
        count: how many there are.

    Cost: alone none; else a message of some bytes to all, some milliseconds between processes of one machine.

    >>> Processes().is_first, Processes().of_first("text"), Processes().together(lambda: 3)
    (True, 'text', 3)
    """

    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes and prints."""
        return self.count == 1 or jax.process_index() == 0

    def of_all(self, value: Any) -> list[Any]:
        """The JSON values of all processes, in their order."""
        if self.count == 1:
            return [value]
        text = np.frombuffer(json.dumps(value).encode(), np.uint8)
        sizes = multihost_utils.process_allgather(np.asarray(text.size, np.int32)).reshape(-1)
        padded = np.zeros(max(_LEAST_BYTES, 1 << int(sizes.max() - 1).bit_length()), np.uint8)
        padded[: text.size] = text
        texts = multihost_utils.process_allgather(padded)
        return [json.loads(text[:size].tobytes()) for text, size in zip(texts, sizes, strict=True)]

    def of_first(self, value: Any) -> Any:
        """The JSON value of the first process."""
        return self.of_all(value)[0]

    def agree(self, name: str, value: Any) -> None:
        """Raise `ValueError`, on all processes, if this JSON value is not the same on all."""
        first, *others = self.of_all(value)
        for process, other in enumerate(others, 1):
            found = difference(name, first, other)
            if found is not None:
                where, there, here = found
                raise ValueError(
                    f"{where} is {there} in process 0 and {here} in process {process}: start all processes with the "
                    "same options, on the same data and on a file system that they share"
                )

    def together(self, work: Callable[[], Result]) -> Result:
        """work(), which calls nothing over all devices; what it raises on one process is raised on all.

        Raises: what `work` raised, if alone; else `ValueError` that names the process.
        """
        if self.count == 1:
            return work()
        result, error = None, None
        try:
            result = work()
        except Exception as caught:
            error = caught
        words = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        for process, said in enumerate(self.of_all(None if error is None else words)):
            if said is not None:
                raise ValueError(f"process {process}: {said}") from error
        return result  # pyright: ignore[reportReturnType]

    def arrays_of_first(self, arrays: PyTree) -> PyTree:
        """The first process's arrays, which have the same shapes on all."""
        return arrays if self.count == 1 else multihost_utils.broadcast_one_to_all(arrays)

    def whole(self, arrays: PyTree) -> PyTree:
        """The arrays, each of which every process can read."""
        return arrays if self.count == 1 else jax.tree.map(_replicated, arrays)


def processes_of(mesh: Mesh | None) -> Processes:
    """The processes whose devices are in a mesh: alone without one.

    Raises: `ValueError` for a mesh with devices of some processes only.

    >>> processes_of(None).count
    1
    """
    count = 1 if mesh is None else len({device.process_index for device in mesh.devices.flat})
    if 1 < count < jax.process_count():
        raise ValueError(
            f"the mesh has devices of {count} of the {jax.process_count()} processes: make it of jax.devices(), or of "
            "jax.local_devices() for a run of one process"
        )
    return Processes(count)


def placed(x: Any, sharding: Sharding) -> jax.Array:
    """An array, which every process has, on the devices of a sharding; one on several devices stays where it is."""
    if isinstance(x, jax.Array) and len(x.sharding.device_set) > 1:
        return x
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(placed(jax.random.key_data(x), sharding), impl=jax.random.key_impl(x))
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def _replicated(x: jax.Array) -> jax.Array:
    if x.is_fully_addressable or x.is_fully_replicated:
        return x
    assert isinstance(x.sharding, NamedSharding)
    return jax.device_put(x, NamedSharding(x.sharding.mesh, PartitionSpec()))
