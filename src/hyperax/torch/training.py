"""A module's training run as a function of lam: its steps, its training loss and its validation loss."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import jax
import torch
from torch import nn

from hyperax.dynamics.dynamics import State, arity
from hyperax.torch.model import Model, Tensors
from hyperax.torch.normalisation import tracking, with_statistics_in_state
from hyperax.torch.optimizers import Optimizer, decay_loss, is_zero
from hyperax.torch.problem import inner_gradient
from hyperax.torch.runs import engine
from hyperax.torch.seeds import seeded
from hyperax.torch.settings import Setting


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
        self.first = {name: own[name].detach().clone() for name in in_w}
        with torch.no_grad():  # nobody is to compute with these: not a recomputation after the call either
            for name, p in self.skeleton.named_parameters():
                if name in in_w or name in in_lam:
                    p.fill_(torch.nan)
        self.types = {name: own[name].dtype for name in in_lam}
        self.device = next(iter(self.first.values())).device
        self.everything: Any = None  # the batch of every step, if all see the same
        self.buffers: Tensors = {}  # those that are part of the state, at the start
        self.changing: Tensors = {}  # those that a call of the module would overwrite, and must not
        self.constant: Tensors = {}  # all others
        self.structure: Any = None  # of lam
        # Layers that stay in evaluation mode: those that somebody put into it, apart from the module as a whole.
        self.still = [layer for layer in self.skeleton.modules() if self.skeleton.training and not layer.training]
        self._train(True)

    def keep_buffers(self, choice: str | None, lam: Any, batch: Any) -> None:
        """See which buffers change in training, and make them part of the state or keep them as they are."""
        if choice == "state":
            with_statistics_in_state(self.skeleton, self.still)
        if choice == "frozen":
            self.still = [*self.still, *tracking(self.skeleton)]
            self._train(True)
        every = {name: x.detach().clone() for name, x in self.module.named_buffers()}
        touched = self._touched(every, lam, batch)
        # With its neighbours: a mean that begins at the third call is beside the counter of the calls.
        layers = {name.rpartition(".")[0] for name in touched}
        moving = {name: x for name, x in every.items() if name.rpartition(".")[0] in layers}
        if moving and choice is None:
            raise ValueError(
                f"a training step changes the buffers {', '.join(moving)} (batch normalisation?): pass "
                'buffers="state" to carry them along and differentiate through them, or buffers="frozen" to keep them '
                "as they are"
            )
        self.buffers, self.changing = (moving, {}) if choice == "state" else ({}, moving)
        self.constant = {name: x for name, x in every.items() if name not in moving}

    def _touched(self, buffers: Tensors, lam: Any, batch: Any) -> list[str]:
        """The buffers that a training loss assigns or changes; it is tried with its gradient."""
        tried = {name: x.clone() for name, x in buffers.items()}
        before = {name: (x, x._version) for name, x in tried.items()}
        w = {name: x.clone().requires_grad_() for name, x in self.first.items()}
        with engine(), seeded(0, self.device):
            model = Model(self.skeleton, tensors := {**w, **self.part_in_lam(lam), **tried})
            value = self._losses(model, batch, lam)
            if not value.requires_grad:
                raise ValueError(
                    "the training loss depends on no parameter that is trained: it is detached (.item(), .detach(), "
                    "torch.no_grad), or computed with another module than the model it receives"
                )
            if bool(value.isnan()):
                raise ValueError(
                    "the training loss is not a number at the first parameters: the module computes with parameters "
                    "that it has not registered (in a plain list; use nn.ModuleList or nn.ParameterList), or the loss "
                    "is undefined there"
                )
            slopes = torch.autograd.grad(value, list(w.values()), allow_unused=True)
        if bool(torch.isfinite(value)) and any(g is not None and bool(g.isnan().any()) for g in slopes):
            raise ValueError(
                "the gradient of the training loss is not a number, while the loss is. A module that recomputes in its "
                "backward pass (torch.utils.checkpoint) cannot be used here: switch that off, Reverse(steps, "
                "memory=...) saves more; else look for a square root or norm at 0"
            )
        # PyTorch's own kernels change statistics without counting a version.
        same = lambda name, x, version: tensors[name] is x and x._version == version and torch.equal(x, buffers[name])
        return [name for name, (x, version) in before.items() if not same(name, x, version)]

    def part_in_lam(self, lam: Any) -> Tensors:
        """The parameters of the module that are in lam."""
        return {name: lam["parameters"][name].to(self.types[name]) for name in self.in_lam}

    def init(self, lam: Any, run: Any) -> State:
        """Phi_0: the module's parameters, or those of lam, and moments of zero."""
        if jax.tree.structure(lam) != self.structure:
            raise ValueError(
                f"lam is {jax.tree.structure(lam)}, and what tune named is {self.structure}: change values of "
                "Training.lam, and leave none out"
            )
        start = {name: lam["init"][name].to(self.first[name]) for name in self.starting}
        w = {name: start[name] if name in start else x.clone() for name, x in self.first.items()}
        moments = {name: (torch.zeros_like(x),) * self.optimizer.moments for name, x in self.first.items()}
        auxiliary: dict[str, Any] = {"moments": moments} if self.optimizer.moments else {}
        return State(w, auxiliary | ({"buffers": dict(self.buffers)} if self.buffers else {}))

    def step(self, t: int, state: State, lam: Any, batch: Any) -> State:
        """Phi_t: one step of the optimizer."""
        self._train(True)
        g, buffers = inner_gradient(lambda w: self._total(w, state, lam, batch), state.w, has_aux=True)
        rates = {name: self._rates(name, lam, t, state.w) for name in self.forms}
        w, moments = {}, {}
        for name, x in state.w.items():
            own = {setting: values[name] for setting, values in rates.items()}
            before = state.auxiliary["moments"][name] if self.optimizer.moments else ()
            w[name], moments[name] = self.optimizer.update(x, g[name], before, own, t)
        auxiliary: dict[str, Any] = {"moments": moments} if moments and self.optimizer.moments else {}
        return State(w, auxiliary | ({"buffers": buffers} if self.buffers else {}))

    def has_inner(self, lam: Any) -> bool:
        """Whether the steps descend one training loss: weight decay is part of it, and the same at every step."""
        decay = lam.get("weight_decay", self.settings["weight_decay"])
        none = all(is_zero(x) for x in (decay.values() if isinstance(decay, dict) else [decay]))
        return none or (self.forms["weight_decay"].is_constant(decay) and not self.optimizer.decoupled)

    def inner(self, state: State, lam: Any, batch: Any) -> torch.Tensor:
        """L(w, lam) + 1/2 sum over parameters of weight_decay |w|^2: what the steps descend."""
        self._train(True)
        decay = decay_loss(state.w, self._rates("weight_decay", lam, 1, state.w))
        return self._total(state.w, state, lam, batch)[0] + decay

    def evaluated(self, state: State, lam: Any) -> Model:
        """The module in evaluation mode, at a state."""
        self._train(False)
        return self._model(state.w, state, lam)

    def _rates(self, name: str, lam: Any, t: int, w: Tensors) -> dict[str, Any]:
        """A setting at step t, by parameter."""
        return self.forms[name].at(lam.get(name, self.settings[name]), t, w)

    def _model(self, w: Tensors, state: State, lam: Any) -> Model:
        # Copies of what the module itself may overwrite: a state is not changed in place.
        carried = state.auxiliary["buffers"] if self.buffers else {}
        copies = {name: x.clone() for name, x in {**self.changing, **carried}.items()}
        return Model(self.skeleton, {**w, **self.part_in_lam(lam), **self.constant, **copies})

    def _total(self, w: Tensors, state: State, lam: Any, batch: Any) -> tuple[torch.Tensor, Tensors]:
        """(L, the buffers after it)."""
        model = self._model(w, state, lam)
        versions = [x._version for x in self.constant.values()]
        value = self._losses(model, batch if self.everything is None else self.everything, lam)
        after = [(model.tensors[name], x) for name, x in self.constant.items()]
        if any(new is not x or x._version != old for (new, x), old in zip(after, versions, strict=True)):
            raise ValueError(
                "a training step changes a buffer that its first trial left alone: let the module change it at every "
                "call, or keep it in a layer whose other buffers change"
            )
        return value, {name: model.tensors[name] for name in self.buffers}

    def _losses(self, model: Model, batch: Any, lam: Any) -> torch.Tensor:
        weights, batch = None, moved(batch, self.device)
        if self.weighted:
            index, batch = batch
            weights = lam["example_weights"][index]
        return total(called(self.loss, model, batch, lam), lam.get("loss_weights", {}), weights)

    def _train(self, training: bool) -> None:
        if self.skeleton.training != training or self.still:
            self.skeleton.train(training)
            for layer in self.still:
                layer.eval()


def moved(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors on this device."""
    if device.type == "cpu":
        return batch
    return jax.tree.map(lambda x: x.to(device) if isinstance(x, torch.Tensor) else x, batch)


class Validation:
    """E: a loss of the module in evaluation mode, on the validation examples of a run."""

    def __init__(
        self, run: ModuleRun, loss: Callable[..., Any], is_training_loss: bool, examples: Callable[[Any], Any]
    ):
        self.run, self.loss, self.is_training_loss, self.examples = run, loss, is_training_loss, examples

    def __call__(self, state: State, lam: Any, run: Any) -> Any:
        """E(w, lam)."""
        found = called(self.loss, self.run.evaluated(state, lam), self.examples(run), lam)
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
