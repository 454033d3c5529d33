"""Hypergradients of training steps in PyTorch beside other ways to them: time, and memory of a long run."""
