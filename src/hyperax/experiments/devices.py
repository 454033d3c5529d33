"""The devices of a run: options of the command line, and the mesh that they ask for."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, PartitionSpec

_AXIS = "devices"


@dataclass(frozen=True)
class Devices:
    """Devices that the tasks of a mini-batch are shared over.

    Raises: `ValueError` for numbers that make no sense.

    >>> Devices(mesh=8).asked, Devices().asked
    (True, False)
    """

    mesh: int | None = None
    """Share the tasks over so many devices, 0: over all there are; the number must divide the tasks of a mini-batch.
    None: one device or, with a coordinator, those of all processes."""
    coordinator: str | None = None
    """Several processes, each with its devices, on one machine or more: HOST:PORT of the first, the same for all; or
    auto, where SLURM, Open MPI or a Cloud TPU tells JAX who is who."""
    processes: int | None = None
    """How many processes; None: as the cluster says."""
    process: int | None = None
    """Which of them this is, from 0; the first writes the run folder. None: as the cluster says."""
    coordinator_timeout: int = 300
    """Seconds to wait for the other processes at the beginning."""

    def __post_init__(self) -> None:
        if self.mesh is not None and self.mesh < 0:
            raise ValueError(f"mesh is {self.mesh}: give a number of devices, or 0 for all")
        if self.coordinator is None and not (self.processes is None and self.process is None):
            raise ValueError(
                "processes and process are of no use without a coordinator: give --coordinator HOST:PORT, or "
                "--coordinator auto in a cluster"
            )
        if self.coordinator not in (None, "auto"):
            host, _, port = str(self.coordinator).rpartition(":")
            if not host or not port.isdigit() or not 0 < int(port) < 2**16:
                raise ValueError(
                    f"coordinator is {self.coordinator!r}: give HOST:PORT of the first process, such as "
                    "10.0.0.1:1234, or auto in a cluster"
                )
        if self.processes is not None and self.processes < 1:
            raise ValueError(f"processes is {self.processes}: it must be at least 1")
        if self.process is not None and not 0 <= self.process < (self.processes or self.process + 1):
            raise ValueError(f"process is {self.process} of {self.processes}: processes are counted from 0")
        if self.coordinator_timeout < 1:
            raise ValueError(f"coordinator_timeout is {self.coordinator_timeout}: it must be at least 1 second")

    @property
    def asked(self) -> bool:
        """Whether there is anything to start."""
        return self.mesh is not None or self.coordinator is not None


def start(devices: Devices) -> Mesh | None:
    """Join the other processes, if there are any, and return the mesh of one axis over the devices.

    Arguments:
        devices: which; with a coordinator, called before anything is computed, as `jax.distributed.initialize` must
            be. A second call in a process joins nothing and returns the same mesh.

    Returns: the mesh, for `run(..., mesh=mesh)` or `mean_over_tasks(..., mesh=mesh)`; `None` where a single device is
    asked for.
    Raises: `ValueError` for too few devices, a cluster that is none, a port in use. Where the other processes do not
    come within `coordinator_timeout` it says so and ends the process with status 2: JAX would abort it.
    Cost: with a coordinator the wait for the slowest process.
    Do not use it for more devices than there are tasks in a mini-batch, nor, on a CPU, instead of threads: XLA already
    uses all cores.

    >>> start(Devices()) is None, start(Devices(mesh=1)) is None
    (True, True)
    """
    if devices.coordinator is not None and not jax.distributed.is_initialized():
        _join(devices)
    there = jax.devices()
    several = jax.process_count() > 1
    count = devices.mesh if devices.mesh is not None else len(there) if several else 1
    count = count or len(there)
    if count > len(there):
        raise ValueError(
            f"mesh is {count} and there are {len(there)} devices ({there[0].platform}): give --mesh {len(there)}; for "
            f"virtual devices on a CPU set XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    if several and count < len(there):
        raise ValueError(
            f"mesh is {count}, and the {jax.process_count()} processes have {len(there)} devices, which all take part: "
            "leave --mesh out, or hide devices (CUDA_VISIBLE_DEVICES)"
        )
    if count == 1:
        return None
    mesh = Mesh(np.array(there[:count]), (_AXIS,))
    if several:
        _connect(mesh)
    return mesh


def _join(devices: Devices) -> None:
    automatic = devices.coordinator == "auto"
    if devices.process == 0 and not automatic:
        _check_port(str(devices.coordinator))
    with _ends_after(devices):
        try:
            jax.distributed.initialize(
                None if automatic else devices.coordinator,
                devices.processes,
                devices.process,
                # Later than ours, because JAX then aborts the process.
                initialization_timeout=devices.coordinator_timeout + 60,
            )
        except ValueError as error:
            missing = {"coordinator_address": "who the coordinator is", "Number of": "how many processes there are"}
            what = next((words for name, words in missing.items() if name in str(error)), "which process this is")
            raise ValueError(
                f"no cluster (SLURM, Open MPI, Cloud TPU, Kubernetes) says {what}: give --coordinator HOST:PORT, "
                "--processes and --process"
            ) from error
        except RuntimeError as error:
            raise ValueError(
                f"the processes cannot be joined, which comes before any computation: {str(error).splitlines()[0]}"
            ) from error


def _check_port(coordinator: str) -> None:
    """Raise `ValueError` if the coordinator cannot listen; at a port in use JAX itself ends in a segmentation fault."""
    port = coordinator.rpartition(":")[2]
    try:
        socket.create_server(("", int(port))).close()
    except OSError as error:
        raise ValueError(
            f"process 0 cannot be the coordinator at port {port} of this machine ({os.strerror(error.errno or 0)}): "
            "choose a free port, the same for all processes"
        ) from error


@contextlib.contextmanager
def _ends_after(devices: Devices) -> Iterator[None]:
    """End this process, with a sentence, if what is done in here takes longer than the timeout."""
    who = "this process" if devices.process is None else f"process {devices.process}"
    said = (
        f"hyperax: {who} has not met {'all' if devices.processes is None else f'the {devices.processes}'} processes at "
        f"the coordinator {devices.coordinator} in {devices.coordinator_timeout} s: see that each is running, with the "
        "same --coordinator and --processes and a --process of its own, and that the port can be reached"
    )

    def end() -> None:
        print(said, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2)

    timer = threading.Timer(devices.coordinator_timeout, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _connect(mesh: Mesh) -> None:
    """Open the connections that a run needs while all processes are here.

    On CPUs they wait 30 s for each other the first time, and longer (100 s were tried) later, while data are read.
    """
    multihost_utils.sync_global_devices("hyperax")
    mean = jax.shard_map(
        lambda: jax.lax.pmean(jnp.ones(()), _AXIS), mesh=mesh, in_specs=(), out_specs=PartitionSpec(), check_vma=False
    )
    jax.block_until_ready(jax.jit(mean)())
