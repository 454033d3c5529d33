"""hyperax without PyTorch: nothing of it is imported, and asking for it says what to install."""

import subprocess
import sys

import pytest


def test_hyperax_does_not_import_torch():
    code = "import sys, hyperax; sys.exit('torch' in sys.modules or 'hyperax.torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_missing_torch_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[:2] == ["hyperax", "torch"]]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"pip install \"hyperax\[torch\]\""):
        import hyperax.torch  # noqa: F401
