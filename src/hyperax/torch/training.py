"""A module's training run as a function of lam: its steps, its validation loss, and the trained module."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hyperax.dynamics.dynamics import State, arity
from hyperax.rollout import check_steps
from hyperax.torch.crossing import is_torch, to_torch
from hyperax.torch.normalisation import tracking, with_statistics_in_state
from hyperax.torch.optimizers import Optimizer
from hyperax.torch.problem import Inner, Problem, inner_gradient
from hyperax.torch.runs import begin, engine, plain
from hyperax.torch.seeds import seeded
from hyperax.torch.settings import Setting

Tensors = dict[str, torch.Tensor]


class Model:
    """What a loss receives: call it as the module; it computes with the parameters and buffers of now."""

    def __init__(self, module: nn.Module, tensors: dict[str, torch.Tensor]):
        self.module, self.tensors = module, tensors

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """The module's output; a buffer that it assigns or changes is kept for the next call."""
        return torch.func.functional_call(self.module, self.tensors, arguments, named)


class ModuleRun:
    """The pieces of a `Problem` made of a module: Phi_0, one training step, and the training loss.

    Arguments:
        module: copied once to compute with and once to be given back.
        loss: L.
        optimizer, settings: how w moves; `forms` read the settings at step t, from lam or from `settings`.
        in_w, in_lam: the names of the parameters that are trained, and of those that are part of lam.
        starting: of the former, those whose first values are in lam.
        weighted: whether a batch is (indices, batch), for weights of examples.
    """

    def __init__(
        self,
        module: nn.Module,
        loss: Callable[..., Any],
        optimizer: Optimizer,
        forms: dict[str, Setting],
        settings: dict[str, Any],
        in_w: list[str],
        in_lam: list[str],
        starting: list[str],
        weighted: bool,
    ):
        self.module, self.skeleton = copy.deepcopy(module), copy.deepcopy(module)
        self.loss, self.optimizer, self.forms, self.settings = loss, optimizer, forms, settings
        self.in_lam, self.starting, self.weighted = in_lam, starting, weighted
        own = dict(self.module.named_parameters())
        self.first = {name: own[name].detach() for name in in_w}
        self.types = {name: own[name].dtype for name in in_lam}
        self.device = next(iter(self.first.values())).device
        self.everything: Any = None  # the batch of every step, if all see the same
        self.buffers: Tensors = {}  # those that are part of the state, at the start
        self.changing: Tensors = {}  # those that a call of the module would overwrite, and must not
        self.still: list[nn.Module] = []  # layers that stay in evaluation mode
        self.skeleton.train()

    def keep_buffers(self, choice: str | None, lam: Any, batch: Any) -> None:
        """See which buffers change in training, and make them part of the state or keep them as they are."""
        layers = tracking(self.skeleton)
        if choice == "state":
            with_statistics_in_state(self.skeleton)
        if choice == "frozen":
            self.still = list(layers)
            self._train(True)
        every = {name: x.detach() for name, x in self.module.named_buffers()}
        tried = {name: x.clone() for name, x in every.items()}
        with engine(), seeded(0, self.device):
            self._losses(Model(self.skeleton, tensors := {**self.first, **self.part_in_lam(lam), **tried}), batch, lam)
        moved = {name: x for name, x in every.items() if not torch.equal(tensors[name].detach(), x)}
        if moved and choice is None:
            raise ValueError(
                f'a training step changes the buffers {", ".join(moved)} (batch normalisation?): pass buffers="state" '
                'to carry them along and differentiate through them, or buffers="frozen" to keep them as they are'
            )
        self.buffers, self.changing = (moved, {}) if choice == "state" else ({}, moved)

    def part_in_lam(self, lam: Any) -> Tensors:
        """The parameters of the module that are in lam."""
        return {name: lam["parameters"][name].to(self.types[name]) for name in self.in_lam}

    def init(self, lam: Any, run: Any) -> State:
        """Phi_0: the module's parameters, or those of lam, and moments of zero."""
        start = {name: lam["init"][name].to(self.first[name]) for name in self.starting}
        w = {name: start.get(name, x) for name, x in self.first.items()}
        moments = {name: (torch.zeros_like(x),) * self.optimizer.moments for name, x in self.first.items()}
        auxiliary: dict[str, Any] = {"moments": moments} if self.optimizer.moments else {}
        return State(w, auxiliary | ({"buffers": dict(self.buffers)} if self.buffers else {}))

    def step(self, t: int, state: State, lam: Any, batch: Any) -> State:
        """Phi_t: one step of the optimizer."""
        self._train(True)
        g, buffers = inner_gradient(lambda w: self._total(w, state, lam, batch), state.w, has_aux=True)
        rates = {name: form.at(lam.get(name, self.settings[name]), t, state.w) for name, form in self.forms.items()}
        w, moments = {}, {}
        for name, x in state.w.items():
            own = {setting: values[name] for setting, values in rates.items()}
            before = state.auxiliary["moments"][name] if self.optimizer.moments else ()
            w[name], moments[name] = self.optimizer.update(x, g[name], before, own, t)
        auxiliary: dict[str, Any] = {"moments": moments} if moments and self.optimizer.moments else {}
        return State(w, auxiliary | ({"buffers": buffers} if self.buffers else {}))

    def inner(self, state: State, lam: Any, batch: Any) -> torch.Tensor:
        """L(w, lam)."""
        self._train(True)
        return self._total(state.w, state, lam, batch)[0]

    def evaluated(self, state: State, lam: Any) -> Model:
        """The module in evaluation mode, at a state."""
        self._train(False)
        return self._model(state.w, state, lam)

    def _model(self, w: Tensors, state: State, lam: Any) -> Model:
        # Copies of what the module itself may overwrite: a state is not changed in place.
        carried = state.auxiliary["buffers"] if self.buffers else {}
        copies = {name: x.clone() for name, x in {**self.changing, **carried}.items()}
        return Model(self.skeleton, {**w, **self.part_in_lam(lam), **copies})

    def _total(self, w: Tensors, state: State, lam: Any, batch: Any) -> tuple[torch.Tensor, Tensors]:
        """(L, the buffers after it)."""
        model = self._model(w, state, lam)
        value = self._losses(model, batch if self.everything is None else self.everything, lam)
        return value, {name: model.tensors[name] for name in self.buffers}

    def _losses(self, model: Model, batch: Any, lam: Any) -> torch.Tensor:
        weights = None
        if self.weighted:
            index, batch = batch
            weights = lam["example_weights"][index.to(self.device)]
        return total(called(self.loss, model, batch, lam), lam.get("loss_weights", {}), weights)

    def _train(self, training: bool) -> None:
        if self.skeleton.training != training or self.still:
            self.skeleton.train(training)
            for layer in self.still:
                layer.eval()


class Validation:
    """E: a loss of the module in evaluation mode, on the validation examples."""

    def __init__(self, run: ModuleRun, loss: Callable[..., Any], is_training_loss: bool, examples: Any):
        self.run, self.loss, self.is_training_loss, self.examples = run, loss, is_training_loss, examples

    def __call__(self, state: State, lam: Any, run: Any) -> Any:
        """E(w, lam)."""
        found = called(self.loss, self.run.evaluated(state, lam), self.examples, lam)
        return total(found, {}, None) if self.is_training_loss else found


def called(loss: Callable[..., Any], model: Model, batch: Any, lam: Any) -> Any:
    """loss(model, batch) or loss(model, batch, lam)."""
    return loss(model, batch, lam) if arity(loss) == 3 else loss(model, batch)


def total(found: Any, loss_weights: dict[str, torch.Tensor], weights: torch.Tensor | None) -> torch.Tensor:
    """Sum over terms k of weight_k mean over examples i of weight_i l_ki."""
    terms = found if isinstance(found, dict) else {"": found}
    unknown = [name for name in loss_weights if name not in terms]
    if unknown:
        raise ValueError(
            f"loss_weights has {', '.join(unknown)}, and the loss returned {', '.join(terms) or 'a number'}: let it "
            "return a dict of terms with these names"
        )
    for term in terms.values():
        if not isinstance(term, torch.Tensor) or term.dim() > 1:
            raise ValueError(f"the loss returned {getattr(term, 'shape', type(term))}; return a scalar, or one [B]")
    if weights is not None and not any(term.shape == weights.shape for term in terms.values()):
        raise ValueError(
            f"example_weights need the losses of single examples, of shape {list(weights.shape)}, and the loss "
            f'returned {[list(term.shape) for term in terms.values()]}: use reduction="none"'
        )
    means = []
    for name, term in terms.items():
        if term.dim():
            term = (term if weights is None else weights.to(term) * term).mean()
        means.append(loss_weights[name].to(term) * term if name in loss_weights else term)
    return sum(means[1:], means[0])


@dataclass(frozen=True, eq=False)
class Training:
    """A module's training run as a function of lam: what `from_module` returns.

    Fields:
        problem: for `hyperax.torch.hypergradient`. The state is `State(w, {"moments": ..., "buffers": ...})`, w a dict
            of parameters by name. Its data is the number of the run (`None`: 0), which draws mini-batches and masks.
        lam: the initial lam, a dict of JAX arrays like `tune`.
        constraint: the sets of `tune`, for `hyperax.minimize`.
        module: a copy of the module as it was given.

    Do not use it to reach into a run: `hyperax.torch.Problem` with a step of your own does.

    >>> from hyperax.torch import from_module
    >>> training = from_module(nn.Linear(2, 1), lambda model, batch: model(batch).pow(2).mean(), data=torch.ones(4, 2),
    ...                        validation=torch.ones(3, 2), tune={"step_size": 0.1})
    >>> trained = training.trained(training.lam, steps=5)
    >>> trained.weight.shape
    torch.Size([1, 2])
    """

    problem: Problem
    lam: Any
    constraint: Any
    module: nn.Module
    own: Callable[[Any], Tensors]  # the part of the module that is in lam

    def trained(self, lam: Any, *, steps: int, run: int | None = None) -> nn.Module:
        """A copy of the module after training with lam.

        Arguments:
            lam: like `Training.lam`; tensors or JAX arrays.
            steps: T.
            run: which mini-batches and masks.
        """
        check_steps(steps)
        lam = lam if is_torch(lam) else to_torch(lam, self.problem.device)
        assert self.problem.device is not None
        inner = Inner(self.problem, run, torch.device(self.problem.device))
        with engine():
            state = plain(inner, begin(inner, lam)[0], lam, range(1, steps + 1))
        module = copy.deepcopy(self.module)
        tensors = self.own(lam) | state.w | state.auxiliary.get("buffers", {})
        with torch.no_grad():
            places = dict([*module.named_parameters(), *module.named_buffers()])
            for name, x in tensors.items():
                places[name].copy_(x)
        return module
