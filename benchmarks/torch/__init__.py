"""Hypergradients of training steps in PyTorch beside other ways to them: time of a hyperiteration, memory of a long run."""
