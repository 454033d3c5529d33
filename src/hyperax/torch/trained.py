"""What `from_module` returns: a training run as a bilevel problem, and the modules that come out of it."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import torch
from torch import nn

from hyperax.constraints import Constraint
from hyperax.dynamics.dynamics import State
from hyperax.rollout import check_steps
from hyperax.torch.checks import variables_of
from hyperax.torch.crossing import is_torch, to_torch
from hyperax.torch.model import Tensors
from hyperax.torch.problem import Inner, Problem, names_of
from hyperax.torch.runs import begin, engine, plain
from hyperax.torch.values import shown


@dataclass(frozen=True, eq=False)
class Training:
    """A module's training run as a function of lam: what `from_module` returns.

    Fields:
        problem: for `hyperax.torch.hypergradient`. The state is `State(w, {"moments": ..., "buffers": ...})`, w a dict
            of parameters by name. Its data is the number of the run (`None`: 0), which draws mini-batches and masks.
        lam: the initial lam, a dict of JAX arrays like `tune`.
        constraint: the sets of `tune`, for `hyperax.minimize`.
        module: a copy of the module as it was given.
        steps: T, where `from_module` was told.

    Do not use it to reach into a run: `hyperax.torch.Problem` with a step of your own does.

    >>> from hyperax.torch import from_module
    >>> training = from_module(nn.Linear(2, 1), lambda model, batch: model(batch).pow(2).mean(), data=torch.ones(4, 2),
    ...                        validation=torch.ones(3, 2), tune={"step_size": 0.1}, steps=5)
    >>> trained = training.trained(training.lam)
    >>> trained.weight.shape
    torch.Size([1, 2])
    """

    problem: Problem
    lam: Any
    constraint: Any
    module: nn.Module
    steps: int | None
    own: Callable[[Any], Tensors]  # the part of the module that is in lam
    made: dict[str, Any]  # of what, for `identity`

    def trained(self, lam: Any, *, steps: int | None = None, run: int | None = None) -> nn.Module:
        """A copy of the module after training with lam.

        Arguments:
            lam: like `Training.lam`; tensors or JAX arrays.
            steps: T; `None` is that of `from_module`.
            run: which mini-batches and masks.

        Raises: `ValueError` where neither says how many steps.
        Cost: T plain steps.
        """
        steps = self.steps if steps is None else steps
        if steps is None:
            raise ValueError("say how many steps to train: trained(lam, steps=T), or from_module(..., steps=T)")
        check_steps(steps)
        lam = variables_of(self._here(lam))
        assert self.problem.device is not None
        inner = Inner(self.problem, run, torch.device(self.problem.device))
        with engine():
            state = plain(inner, begin(inner, lam)[0], lam, range(1, steps + 1))
        return self.module_at(state, lam)

    def module_at(self, state: Any, lam: Any = None) -> nn.Module:
        """A copy of the module with the parameters and buffers of a state.

        Arguments:
            state: of this problem: `h.state`, or `solution.carry.state` after `RealTime`; tensors or JAX arrays.
            lam: needed where parameters are in lam (`tune={"parameters": ...}`).

        Raises: `ValueError` for something else than a state of this module, or without the lam that is needed.
        Cost: one copy of the module.
        """
        if not isinstance(state, State):
            what = "None, as in a compiled run; trained(lam) trains the module" if state is None else shown(state)
            hint = ": give its .state" if hasattr(state, "state") else ""
            raise ValueError(f"state is {what}{hint}; use h.state of a hypergradient, or the carry's state of RealTime")
        if lam is None and "parameters" in self.lam:
            raise ValueError("a part of the parameters is in lam: module_at(state, lam)")
        found = self._here(state)
        tensors = found.w | (found.auxiliary.get("buffers", {}) if isinstance(found.auxiliary, dict) else {})
        tensors |= {} if lam is None else self.own(self._here(lam))
        module = copy.deepcopy(self.module)
        places = dict([*module.named_parameters(), *module.named_buffers()])
        strange = [name for name, x in tensors.items() if name not in places or x.shape != places[name].shape]
        if strange:
            raise ValueError(f"{', '.join(strange)} of the state is not of this module: use a state of its own problem")
        with torch.no_grad():
            for name, x in tensors.items():
                places[name].copy_(x)
        return module

    @property
    def identity(self) -> dict[str, Any]:
        """What makes this training this one, for `hyperax.Checkpoint(folder, identity=training.identity)`.

        A dict of JSON values: a hash of the initial parameters and buffers, the optimizer, fixed settings, what is
        tuned (from which values, in which sets), seed, batch size, number of examples, steps, buffers. A resume where
        one of them differs is refused, by name. The losses and the contents of the data are not in it: add what tells
        them, {**training.identity, "data": "digits, first 300"}.
        """
        tensors = [*self.module.named_parameters(), *self.module.named_buffers()]
        modes = "".join("01"[one.training] for one in self.module.modules())
        return {"module": _digest([modes, *(part for name, x in tensors for part in (name, x))]), **self.made}

    def _here(self, tree: Any) -> Any:
        return tree if is_torch(tree) else to_torch(tree, self.problem.device)


def described(name: str, tree: Any) -> dict[str, str]:
    """What each leaf is, by name: a number, or type, shape and a hash."""
    show = lambda x: f"{x.dtype}{list(x.shape)} {_digest([x])}" if x.ndim else f"{x.dtype} {x.item()!r}"
    return {leaf: show(np.asarray(x)) for leaf, x in names_of(name, tree)}


def named_sets(constraint: Any) -> dict[str, str]:
    """What the sets are, by name: their kind, and a hash of the numbers in them."""
    is_set = lambda x: isinstance(x, Constraint)
    leaves = jax.tree_util.tree_leaves_with_path(constraint, is_leaf=is_set)
    numbers = lambda one: [np.asarray(x) for x in jax.tree.leaves(one)]
    return {
        f"set of {jax.tree_util.keystr(path)}": f"{one!r} {_digest(numbers(one))}"
        for path, one in leaves
        if is_set(one)
    }


def _digest(parts: list[Any]) -> str:
    """A hash of strings and arrays."""
    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, torch.Tensor):
            # NumPy has no bfloat16 of its own; bytes are enough.
            x = part.detach().cpu().contiguous()
            found.update(f"{x.dtype}{list(x.shape)}".encode())
            found.update(x.flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(part, np.ndarray):
            found.update(part.tobytes())
        else:
            found.update(str(part).encode())
    return found.hexdigest()[:16]
