"""Doctests of what needs PyTorch are left out where it is missing."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("torch") else ["torch", "experiments/torch_mnist/training.py"]
