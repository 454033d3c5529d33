"""Gradients are compared in float64; programs are compiled fast; nothing a test does touches the user's caches."""

import os

import hypothesis
import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_num_cpu_devices", 2)  # for the tests that shard tasks over devices

# Most of the suite's time is the compilation of small programs: without these options it is three times as long.
# What XLA_FLAGS already says comes last, and wins; `problems.OPTIMISED` compiles one program as outside of the tests.
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if jax.__version_info__ < (0, 11, 1):  # later ones do not know it, and an unknown flag ends the process
    QUICK += " --xla_cpu_use_fusion_emitters=false"
if QUICK not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{QUICK} {os.environ.get('XLA_FLAGS', '')}"

# The same examples on every machine; a first example compiles, so that it has no deadline.
hypothesis.settings.register_profile("suite", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("suite")


@pytest.fixture(scope="session", autouse=True)
def _private_cache(tmp_path_factory):
    os.environ.setdefault("HYPERAX_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session", autouse=True)
def _compiled_once(tmp_path_factory):
    """A program that a test of this run has compiled, in whichever process, is read by the others.

    With JAX_COMPILATION_CACHE_DIR also by later runs.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    compilation_cache.reset_cache()  # it may have found, before, that there is none
