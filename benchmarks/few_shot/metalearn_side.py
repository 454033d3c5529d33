"""parallel-metalearn: its MAML learner, as its readme says; for the hyper-representation its ANIL.

ANIL adapts the head alone, from zero here, so that the network's gradient is that of the hyper-representation; it calls
the whole network at every inner step. A step of its learner also takes the outer step (SGD, a rate of 0): it is in the
row's time.
"""

from __future__ import annotations

import torch
from metalearn.algorithms import MAML as Learner
from metalearn.inner_optimizers import InnerSGD
from metalearn.loss import CategoricalAccuracy, CrossEntropy
from metalearn.model_wrappers import MAML_Model
from torch import Tensor, nn

from benchmarks.few_shot.problems import MAML, REPRESENTATION, STEP_SIZE, Numbers
from benchmarks.few_shot.side import Made, Row
from benchmarks.few_shot.torch_network import Network, Weights, episodes, to_vector, weights, zero_head

PACKAGES = ("parallel-metalearn", "torch")


class Options(nn.Module):
    """A module that is called with the wrapper's options (`training`, `num_step`), which it has no use for."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, **options: object) -> Tensor:
        """The module at x."""
        return self.module(x)


def learner(numbers: Numbers, adapted: str | None, chunk: int | None = None) -> Made:
    """One step of its learner on all episodes."""
    lam = weights(numbers, head=True)
    network, head = Network(lam[:8]).to(lam[0].dtype), zero_head(lam[8])
    if adapted is None:
        with torch.no_grad():
            head.weight.copy_(lam[8])
            head.bias.copy_(lam[9])
    model = MAML_Model(Options(network), Options(head), fast_weights_names=adapted)
    sgd = torch.optim.SGD(model.parameters(), lr=0.0)
    inner = InnerSGD(model.get_fast_weights(), inner_lr=STEP_SIZE[numbers.name], learn_lr=False).to(lam[0].dtype)
    algorithm = Learner(
        model=model,
        optimizer=sgd,
        inner_optimizer=inner,
        support_loss_fn=CrossEntropy(metric_fn=CategoricalAccuracy()),
        inner_steps=numbers.steps,
        chunk_size=chunk or numbers.tasks,
        device=torch.device("cpu"),
    )
    data = episodes(numbers)
    support_labels, query_labels = {"labels": data.support_labels}, {"labels": data.query_labels}
    parameters = [*network.parameters(), *(head.parameters() if adapted is None else ())]

    def run() -> Weights:
        batch = (data.support, support_labels, data.query, query_labels)
        algorithm.step(iter([batch]), training=True)
        return tuple(parameter.grad for parameter in parameters)

    return Made(run, to_vector)


ROWS = {
    "parallel-metalearn": Row(MAML, lambda numbers: learner(numbers, None)),
    "parallel-metalearn, ANIL, features every step": Row(
        REPRESENTATION, lambda numbers: learner(numbers, "ANIL"), longest=20
    ),
}
