"""Gradients are compared in float64; nothing a test does touches the user's caches."""

import os

import hypothesis
import jax
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_num_cpu_devices", 2)  # for the tests that shard tasks over devices

# The same examples on every machine; a first example compiles, so that it has no deadline.
hypothesis.settings.register_profile("suite", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("suite")


@pytest.fixture(scope="session", autouse=True)
def _private_cache(tmp_path_factory):
    os.environ.setdefault("HYPERAX_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
