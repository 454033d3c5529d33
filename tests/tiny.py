"""Runs small enough for tests: noisy images, a network of one layer, processes, the command line with a bomb in it."""

import importlib
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from hyperax.experiments import recipe
from hyperax.experiments.run_folder import RunFolder
from hyperax.fewshot.datasets import ImageFolder
from hyperax.fewshot.layers import BatchNorm

SIDE = 12
# Checkpoints fall between records and between validations, so that a resume finds half-done means.
FIELDS = {
    "ways": 2,
    "queries": 2,
    "tasks": 2,
    "inner_steps": 2,
    "most_inner_steps": 3,
    "learning_rate": 0.01,
    "hyperiterations": 12,
    "validate_every": 4,
    "record_every": 2,
    "checkpoint_every": 3,
    "dispatch": 2,
    "validation_episodes": 8,
    "test_episodes": 8,
}


# Most of a short process is imports: each begins as the copy of one that has imported much and computed nothing.
COPIES = multiprocessing.get_context("forkserver")
COPIES.set_forkserver_preload(["hyperax.cli", "hyperax.experiments.few_shot", "matplotlib.pyplot", "tyro", "pytest"])


def begin(log, folder, function, *arguments):
    """A process that calls a function: its exit code is the answer, or -9 if it was killed.

    What it says goes to the file `log`; data sets and programs are cached in the folder.
    """
    process = COPIES.Process(target=_call, args=(log, folder, function, arguments))
    process.start()
    return process


def _call(log, folder, function, arguments):
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ["HYPERAX_CACHE"] = str(folder / "cache")
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))  # its own: a kill may damage it
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    sys.exit(function(*arguments))


def write_images(folder, classes=(4, 3, 3), images=6, side=SIDE, seed=0):
    """Grey images of train / val / test classes: one pattern a class, drowned in noise."""
    from PIL import Image

    random = np.random.default_rng(seed)
    for split, count in zip(("train", "val", "test"), classes, strict=True):
        for name in (f"{split}{index}" for index in range(count)):
            place = Path(folder) / split / name
            place.mkdir(parents=True)
            pattern = random.integers(0, 56, (side, side))
            for image in range(images):
                pixels = pattern + random.integers(0, 200, (side, side))
                Image.fromarray(pixels.astype(np.uint8)).save(place / f"{image}.png")
    return Path(folder)


def config(images, **changes):
    """A run of some seconds on these images."""
    dataset = ImageFolder(str(images), size=SIDE, mode="L")
    return recipe("folder-5way-1shot", **{"dataset": dataset, **FIELDS, **changes})


def options(images, **changes):
    """The same as options of `hyperax run folder-5way-1shot`."""
    fields = {"dataset.path": images, "dataset.size": SIDE, "dataset.mode": "L", **FIELDS, **changes}
    words = [word for name, x in fields.items() for word in (f"--{name.replace('_', '-')}", str(x))]
    return ["folder-5way-1shot", *words, "--no-progress"]


class Network(eqx.Module):
    """A linear map with batch normalisation."""

    weight: jax.Array
    norm: BatchNorm

    def __init__(self, image_shape, key, features=6):
        size = int(np.prod(image_shape))
        self.weight = jax.random.normal(key, (size, features), jnp.float32) / size**0.5
        self.norm = BatchNorm(jnp.zeros(features, jnp.float32))

    def __call__(self, images, moments):
        features = images.reshape(images.shape[0], 1, 1, -1) @ self.weight
        return jax.nn.leaky_relu(self.norm(features, moments))[:, 0, 0]


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def write_half_a_record(folder, name, entries):
    """In place of `RunFolder._append`: a kill in the middle of a line."""
    if name == "records.jsonl" and entries:
        with (folder.path / name).open("a") as file:
            file.write('{"step": 4, "val')
            file.flush()
            die()


def put_bomb(target, count):
    """Die when the function "module:name" is called for the count-th time."""
    module_name, _, name = target.partition(":")
    module, calls = importlib.import_module(module_name), []
    function = getattr(module, name)

    def bomb(*arguments, **options):
        calls.append(name)
        return die() if len(calls) == count else function(*arguments, **options)

    setattr(module, name, bomb)


def main(target, count, *arguments):
    """`hyperax ARGUMENTS...` with the small network, killed as "module:name" is called for the count-th time.

    With the target "-" it is not killed.
    """
    from hyperax import cli
    from hyperax.experiments import preparing

    preparing._NETWORKS["omniglot"] = Network
    if target == "half a record":
        RunFolder._append = write_half_a_record
    elif target != "-":
        put_bomb(target, int(count))
    return cli.main(arguments)


def middle(x, weight, stride):
    """A convolution by the middle of each filter alone, because most of the time would be compilation."""
    return x[:, ::stride, ::stride] @ weight[1, 1]
