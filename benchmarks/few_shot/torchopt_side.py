"""TorchOpt: its differentiable SGD, an episode after the other."""

from __future__ import annotations

import torch.nn.functional as F
import torchopt

from benchmarks.few_shot.problems import MAML, REPRESENTATION, STEP_SIZE, Numbers
from benchmarks.few_shot.side import Made, Row
from benchmarks.few_shot.torch_network import Network, Weights, episodes, to_vector, weights, zero_head

PACKAGES = ("torchopt", "optree", "torch")


def maml(numbers: Numbers) -> Made:
    """MetaSGD on the network, put back to lam before each episode."""
    lam = weights(numbers, head=True)
    network, data = Network(lam).to(lam[0].dtype), episodes(numbers)
    parameters = tuple(network.parameters())
    optimizer = torchopt.MetaSGD(network, lr=STEP_SIZE[MAML])

    def run() -> Weights:
        for parameter in parameters:
            parameter.grad = None
        start = [torchopt.extract_state_dict(node, by="reference") for node in (network, optimizer)]
        for j in range(numbers.tasks):
            episode = data.one(j)
            for _ in range(numbers.steps):
                optimizer.step(F.cross_entropy(network(episode.support), episode.support_labels))
            (F.cross_entropy(network(episode.query), episode.query_labels) / numbers.tasks).backward()
            for node, state in zip((network, optimizer), start, strict=True):
                torchopt.recover_state_dict(node, state)
        return tuple(parameter.grad for parameter in parameters)

    return Made(run, to_vector)


def representation(numbers: Numbers) -> Made:
    """MetaSGD on the head; the features are computed once an episode."""
    lam = weights(numbers, head=False)
    network, data = Network(lam).to(lam[0].dtype), episodes(numbers)
    head = zero_head(lam[0].new_zeros(256))
    optimizer = torchopt.MetaSGD(head, lr=STEP_SIZE[REPRESENTATION])

    def run() -> Weights:
        network.zero_grad()
        start = [torchopt.extract_state_dict(node, by="reference") for node in (head, optimizer)]
        for j in range(numbers.tasks):
            episode = data.one(j)
            support, query = network(episode.support), network(episode.query)
            for _ in range(numbers.steps):
                optimizer.step(F.cross_entropy(head(support), episode.support_labels))
            (F.cross_entropy(head(query), episode.query_labels) / numbers.tasks).backward()
            for node, state in zip((head, optimizer), start, strict=True):
                torchopt.recover_state_dict(node, state)
        return tuple(parameter.grad for parameter in network.parameters())

    return Made(run, to_vector)


ROWS = {"TorchOpt": Row(MAML, maml), "TorchOpt, features once": Row(REPRESENTATION, representation)}
