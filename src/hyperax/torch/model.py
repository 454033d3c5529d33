"""What a loss receives: a module that computes with the parameters and buffers of now."""

from __future__ import annotations

from collections.abc import Callable, ItemsView, Iterator, KeysView, ValuesView
from types import FunctionType
from typing import Any

import torch
from torch import nn

Tensors = dict[str, torch.Tensor]
Part = Callable[[nn.Module], Any]
"""How something is found from the module: an attribute, an item, what a method returns; looked up at each use."""

_CHANGES = (
    "add_module apply bfloat16 compile cpu cuda double float half ipu load_state_dict mtia register_buffer "
    "register_module register_parameter requires_grad_ set_extra_state set_submodule share_memory to to_empty type xpu "
    "zero_grad"
)
"""Methods of a module that change it."""


class _Around(nn.Module):
    """A module whose call is any function of the one inside."""

    def __init__(self, inside: nn.Module):
        super().__init__()
        self.inside = inside

    def forward(self, function: Part) -> Any:
        return function(self.inside)


class _Path(tuple):
    """The submodule of these names: a part that is the same whatever the tensors are."""

    __slots__ = ()

    def __call__(self, module: nn.Module) -> nn.Module:
        for name in self:
            module = getattr(module, name)
        return module


class _Now:
    """A module with tensors in the place of its own, for as long as a call takes."""

    def __init__(self, module: nn.Module, tensors: Tensors):
        self.module, self.tensors = module, tensors
        self.around: nn.Module | None = None
        self.inside = False  # whether the tensors are in their place already

    def call(self, arguments: tuple, named: dict[str, Any]) -> Any:
        """The module's output; a buffer that it assigns or changes is kept in `tensors`."""
        if self.inside:
            return self.module(*arguments, **named)
        self.inside = True
        try:
            return torch.func.functional_call(self.module, self.tensors, arguments, named)
        finally:
            self.inside = False

    def within(self, part: Part) -> Any:
        """What a part is with the tensors of now."""
        if self.inside:
            return _listed(part(self.module))
        self.around = _Around(self.module) if self.around is None else self.around
        tensors = {f"inside.{name}": x for name, x in self.tensors.items()}
        self.inside = True
        try:
            found = torch.func.functional_call(self.around, tensors, (lambda module: _listed(part(module)),))
        finally:
            self.inside = False
        for name in self.tensors:
            self.tensors[name] = tensors[f"inside.{name}"]
        return found


class Model:
    """A module that computes with the parameters and buffers of now: what a loss of `from_module` receives.

        model(x) = module(x) with w_t (and what is in lam) in the place of its parameters

    Calls, methods, submodules, parameters, buffers and `state_dict()` are those of the module, with the tensors of now,
    attached to lam: `model.features(x)`, `model.encoder.layer(x)`, `model.blocks[0](x)`, `sum(p.square().sum() for p
    in model.parameters())`. A part of it is a `Model` as well, for `isinstance` also of the part's class. `tensors`
    has what changes from step to step, by name: parameters, and buffers that are part of the state.

    Raises: `ValueError` for what would change the module: assigning to it, `to`, `load_state_dict`, another mode than
    it is in.
    Cost: a call costs what `torch.func.functional_call` does. So does every use of a part (a method, a call of a
    submodule, `parameters()`), which grows with the parameters of the whole module: a loss that calls a large module
    layer by layer is better a method of the module.
    Do not use it after the loss has returned: the tensors are those of one step.

    >>> model = Model(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), {"0.weight": torch.eye(2), "0.bias": torch.zeros(2)})
    >>> model[0](torch.tensor([[3.0, -4.0]]))
    tensor([[ 3., -4.]])
    """

    __slots__ = ("__kind", "__now", "__part")

    def __init__(self, module: nn.Module, tensors: Tensors):
        _fill(self, _Now(module, tensors), _Path(), type(module))

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """The output; a buffer that is assigned or changed on the way is kept for the next call."""
        part = self.__part
        if part == ():
            return self.__now.call(arguments, named)
        return _seen(self.__now, lambda module: part(module)(*arguments, **named))

    @property
    def tensors(self) -> Tensors:
        """Parameters and buffers of now, of the whole module."""
        return self.__now.tensors

    def state_dict(self, *, prefix: str = "") -> dict[str, torch.Tensor]:
        """Parameters and buffers of now by name, attached to lam (`keep_vars=True`)."""
        part = self.__part
        return self.__now.within(lambda module: part(module).state_dict(prefix=prefix, keep_vars=True))

    def train(self, mode: bool = True) -> Model:
        """Itself, where the mode is this one already; else a `ValueError`."""
        if self.training != mode:
            raise ValueError(
                f"{self!r} is in {'training' if self.training else 'evaluation'} mode: a loss is computed in training "
                "mode, the validation loss in evaluation mode. For a layer that is to stay in evaluation mode in "
                "training call its eval() before from_module"
            )
        return self

    def eval(self) -> Model:
        """Itself, where it is in evaluation mode already; else a `ValueError`."""
        return self.train(False)

    def __getattr__(self, name: str) -> Any:
        if (name.startswith("__") and name.endswith("__")) or name in ("_parameters", "_buffers"):
            raise AttributeError(
                f"{self!r} has no {name}: its tensors change from step to step. Call it as it is, model(x), and read "
                "named_parameters(), named_buffers() or state_dict()"
            )
        if name in _CHANGES.split() and getattr(self.__kind, name, None) is getattr(nn.Module, name, None):
            raise ValueError(
                f"{name}() of {self!r} would change the module, and a loss only computes with it: call it on the "
                "module before from_module"
            )
        now, part = self.__now, self.__part
        if isinstance(part, _Path):
            child = part(now.module)._modules.get(name)
            if child is not None:
                return _fill(object.__new__(Model), now, _Path([*part, name]), type(child))
        found = lambda module: getattr(part(module), name)
        # A method is not looked at before it is called: that would take as long again.
        is_method = isinstance(getattr(self.__kind, name, None), FunctionType)
        return _calling(now, found) if is_method else _seen(now, found)

    def __setattr__(self, name: str, value: Any) -> None:
        raise ValueError(
            f"{name} of {self!r} cannot be set: a loss only computes with the module. What is to be kept from step to "
            'step is a buffer that the module assigns itself, with buffers="state"'
        )

    def __getitem__(self, key: Any) -> Any:
        part = self.__part
        return _seen(self.__now, lambda module: part(module)[key])

    def __iter__(self) -> Iterator[Any]:
        part = self.__part
        return iter(_seen(self.__now, lambda module: list(part(module))))

    def __len__(self) -> int:
        part = self.__part
        return self.__now.within(lambda module: len(part(module)))

    def __contains__(self, key: Any) -> bool:
        part = self.__part
        return self.__now.within(lambda module: key in part(module))

    def __bool__(self) -> bool:
        return True

    def __reduce__(self) -> Any:
        raise ValueError(
            f"{self!r} cannot be copied or saved: it is of one step. Training.module_at(state) is a module"
        )

    def __repr__(self) -> str:
        return f"the model ({self.__kind.__name__})" if self.__part == () else f"its part ({self.__kind.__name__})"

    @property
    def __class__(self) -> type:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.__kind  # so that `isinstance(part, nn.Linear)` is what it is for the module


def _fill(model: Model, now: _Now, part: Part, kind: type) -> Model:
    for name, value in (("now", now), ("part", part), ("kind", kind)):
        object.__setattr__(model, f"_Model__{name}", value)
    return model


def _seen(now: _Now, part: Part) -> Any:
    """What a part is now: a module as a `Model`, a function as one that computes with the tensors of now."""
    found = now.within(part)
    if isinstance(found, _List):
        return iter(_models(now, list(found), part))
    return _models(now, found, part)


def _models(now: _Now, found: Any, part: Part) -> Any:
    if isinstance(found, nn.Module):
        return _fill(object.__new__(Model), now, part, type(found))
    if isinstance(found, list | tuple | dict) and _has_modules(found):
        keys = list(found) if isinstance(found, dict) else range(len(found))
        parts = {key: _models(now, found[key], lambda module, key=key: _listed(part(module))[key]) for key in keys}
        return parts if isinstance(found, dict) else (list if isinstance(found, list) else tuple)(parts.values())
    if callable(found) and not isinstance(found, type | torch.Tensor):
        return _calling(now, part)
    return found


def _calling(now: _Now, part: Part) -> Callable[..., Any]:
    """A function of the module that computes with the tensors of now."""
    return lambda *arguments, **named: _seen(now, lambda module: part(module)(*arguments, **named))


def _has_modules(found: Any) -> bool:
    inside = found.values() if isinstance(found, dict) else found if isinstance(found, list | tuple) else ()
    return isinstance(found, nn.Module) or any(_has_modules(one) for one in inside)


class _List(list):
    """What an iterator gave: it must not be asked for more when the tensors are in their place no longer."""


def _listed(found: Any) -> Any:
    return _List(found) if isinstance(found, Iterator | KeysView | ValuesView | ItemsView) else found
