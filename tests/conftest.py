"""Gradients are compared in float64; nothing a test does touches the user's caches."""

import os

import jax
import pytest

jax.config.update("jax_enable_x64", True)


@pytest.fixture(scope="session", autouse=True)
def _private_cache(tmp_path_factory):
    os.environ.setdefault("HYPERAX_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
