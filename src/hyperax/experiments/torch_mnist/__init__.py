"""A convolutional network in PyTorch on MNIST, with its schedules and weight decays tuned."""

from hyperax.experiments.torch_mnist.study import TorchMnist

__all__ = ["TorchMnist"]
