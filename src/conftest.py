"""Doctests of `hyperax.torch` run where PyTorch is; the rest of the package does without it."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("torch") else ["hyperax/torch/*"]
