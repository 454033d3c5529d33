"""Where a number was measured: commit, versions, machine."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import jax


def commit() -> str | None:
    """The commit of this checkout, marked if files differ from it; `None` for an installed package."""
    folder = Path(__file__).parent
    git = lambda *words: subprocess.run(
        ["git", *words], cwd=folder, capture_output=True, text=True, timeout=20, check=True
    )
    try:
        if not git("ls-files", "--", __file__).stdout.strip():
            return None
        changed = git("status", "--porcelain", "--untracked-files=no").stdout.strip()
        return git("rev-parse", "--short=12", "HEAD").stdout.strip() + (" with local changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers may depend on."""
    packages = ("hyperax", "jax", "jaxlib", "equinox", "optax", "numpy", "pillow", "matplotlib", "torch")
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> str:
    """The device in words: processor and cores, or accelerators."""
    devices = jax.devices()
    if devices[0].platform != "cpu":
        return f"{len(devices)} x {devices[0].device_kind}"
    return (
        f"{_processor()}, {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores"
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
