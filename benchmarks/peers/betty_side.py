"""Betty: two problems and an engine; T steps of the lower one, then one hypergradient of the upper one."""

from __future__ import annotations

import betty.engine
import torch
from betty.configs import Config, EngineConfig
from betty.problems import ImplicitProblem
from torch import Tensor

from benchmarks.peers.problems import Numbers
from benchmarks.peers.side import CG_STEPS, CONVEX, Row, Run
from benchmarks.peers.torch_objectives import Data, features, inner, outer, tensors
from benchmarks.peers.torch_side import objectives as objectives
from benchmarks.peers.torch_side import to_numpy as to_numpy

PACKAGES = ("betty-ml", "torch")


class Holder(torch.nn.Module):
    """A module with one parameter, which it returns."""

    def __init__(self, value: Tensor):
        super().__init__()
        self.value = torch.nn.Parameter(value.detach().clone())

    def forward(self) -> Tensor:
        """The parameter."""
        return self.value


def implicit(numbers: Numbers, kind: str) -> Run:
    """Neumann series or CG, as its configuration names them. The steps compute the features anew: it has no prepare."""
    lam, w, data = tensors(numbers)
    eta = numbers.step_size
    assert eta is not None
    seen: list[Tensor] = []

    class Upper(ImplicitProblem):
        def training_step(self, batch: Data) -> Tensor:
            return outer(numbers.name, [self.lower()], self(), features(numbers.name, self(), batch))

        def grad_callback(self) -> None:
            seen[:] = [self.module.value.grad.clone()]

    class Lower(ImplicitProblem):
        def training_step(self, batch: Data) -> Tensor:
            return inner(numbers.name, [self()], self.upper(), features(numbers.name, self.upper(), batch))

        def on_inner_loop_start(self) -> None:
            with torch.no_grad():
                self.module.value.copy_(w[0])

    settings = {"neumann_iterations": numbers.steps, "neumann_alpha": eta, "cg_iterations": min(CG_STEPS, w[0].numel())}
    up, low = Holder(lam), Holder(w[0])
    # E sees lam directly too, and Betty goes back through its graph twice.
    upper = Upper(
        "upper", Config(retain_graph=True), up, torch.optim.SGD(up.parameters(), lr=0.0), train_data_loader=[data]
    )
    config = Config(type=kind, unroll_steps=numbers.steps, **settings)
    lower = Lower("lower", config, low, torch.optim.SGD(low.parameters(), lr=eta), train_data_loader=[data])
    dependencies = {"u2l": {upper: [lower]}, "l2u": {lower: [upper]}}
    options = EngineConfig(train_iters=numbers.steps, valid_step=10**9)
    engine = betty.engine.Engine([upper, lower], config=options, dependencies=dependencies)

    def run() -> Tensor:
        engine.run()
        return seen[0]

    return run


ROWS = {
    "Betty Neumann": Row("implicit", CONVEX, lambda numbers: implicit(numbers, "neumann")),
    "Betty CG": Row("implicit", CONVEX, lambda numbers: implicit(numbers, "cg")),
}
