"""higher: the unroll of a patched module, an episode after the other."""

from __future__ import annotations

import higher
import torch
import torch.nn.functional as F

from benchmarks.few_shot.problems import MAML, REPRESENTATION, STEP_SIZE, Numbers
from benchmarks.few_shot.side import Made, Row
from benchmarks.few_shot.torch_network import Network, Weights, episodes, to_vector, weights, zero_head

PACKAGES = ("higher", "torch")


def maml(numbers: Numbers) -> Made:
    """innerloop_ctx(copy_initial_weights=False), each episode's gradient added by backward()."""
    lam = weights(numbers, head=True)
    network, data = Network(lam).to(lam[0].dtype), episodes(numbers)
    sgd = torch.optim.SGD(network.parameters(), lr=STEP_SIZE[MAML])

    def run() -> Weights:
        network.zero_grad()
        for j in range(numbers.tasks):
            episode = data.one(j)
            with higher.innerloop_ctx(network, sgd, copy_initial_weights=False) as (patched, optimizer):
                for _ in range(numbers.steps):
                    optimizer.step(F.cross_entropy(patched(episode.support), episode.support_labels))
                (F.cross_entropy(patched(episode.query), episode.query_labels) / numbers.tasks).backward()
        return tuple(parameter.grad for parameter in network.parameters())

    return Made(run, to_vector)


def representation(numbers: Numbers) -> Made:
    """The head is patched; the features are computed once an episode."""
    lam = weights(numbers, head=False)
    network, data = Network(lam).to(lam[0].dtype), episodes(numbers)
    head = zero_head(lam[0].new_zeros(256))
    sgd = torch.optim.SGD(head.parameters(), lr=STEP_SIZE[REPRESENTATION])

    def run() -> Weights:
        network.zero_grad()
        for j in range(numbers.tasks):
            episode = data.one(j)
            support, query = network(episode.support), network(episode.query)
            with higher.innerloop_ctx(head, sgd) as (patched, optimizer):
                for _ in range(numbers.steps):
                    optimizer.step(F.cross_entropy(patched(support), episode.support_labels))
                (F.cross_entropy(patched(query), episode.query_labels) / numbers.tasks).backward()
        return tuple(parameter.grad for parameter in network.parameters())

    return Made(run, to_vector)


ROWS = {"higher": Row(MAML, maml), "higher, features once": Row(REPRESENTATION, representation)}
