"""What is solved, in PyTorch: a training step as the dynamics, an outer objective, and what a step may ask for."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import torch

from hyperax.checks import leaf_name
from hyperax.dynamics.dynamics import State
from hyperax.rollout import check_steps
from hyperax.torch.seeds import mixed, seeded


@dataclass(frozen=True, eq=False)
class JaxObjective:
    """An outer objective written in JAX, for the `outer` of a `Problem`.

        E(s_T, lam, data), s_T and lam as JAX arrays

    Arguments:
        function: (state, lam, data) -> scalar, or (scalar, dict of arrays) with `Problem.has_metrics`.

    Cost: s_T crosses to JAX and dE/ds_T back, once a hyperiteration; without a copy where both are on one device.
    Do not use it for an objective that needs the PyTorch module itself.

    >>> import jax.numpy as jnp
    >>> objective = JaxObjective(lambda state, lam, data: jnp.sum(state["w"] ** 2))
    """

    function: Callable[..., Any]


@dataclass(frozen=True, eq=False)
class Problem:
    """A bilevel problem whose dynamics is one training step in PyTorch.

        min over lam of E(s_T, lam),   s_0 = Phi_0(lam),   s_t = Phi_t(s_{t-1}, lam, batch_t),   t = 1, ..., T

    States and lam are pytrees in the sense of JAX: tensors in dicts, lists, tuples and named tuples. A state has at
    least one floating-point tensor; whole numbers (counters) in it are carried along. Whatever lam is to be learned
    through must stay attached to it: no `.item()`, `.data`, `.detach()` or `torch.no_grad` on the way, and nothing
    is changed in place.

    Arguments:
        step: Phi, (t, state, lam, batch) -> state, t = 1, 2, ... a whole number. A gradient inside it is taken by
            `inner_gradient`, or by `torch.autograd.grad(..., create_graph=True)` on tensors of the state. A
            `torch.optim` optimizer cannot be a step: it changes parameters in place, outside the graph.
        outer: E, (state, lam, data) -> scalar tensor, or a `JaxObjective`; with `has_metrics`, (scalar, dict).
        init: Phi_0, (lam, data) -> state. A `hyperax.State(w, auxiliary)` says which part w is; else all of it is.
        batch: (data, t) -> what step t sees, a pure function (see `Batches`). `None`: every step sees data.
        inner: L, (state, lam, batch) -> scalar, the training loss that the steps minimise in w. Only `Implicit` with a
            solver of the Hessian (all but `FixedPoint`) and its `tolerance` need it.
        has_metrics: whether `outer` also returns metrics.
        seed: draws torch's random numbers (dropout) in step t from (seed, t), so that every replay of a step sees the
            same; a whole number, or a function of data that returns one. `None` leaves torch's state alone.
        device: where lam and data go when they come from JAX; `None` is the CPU.
        example: a lam to try one step with before a compiled run, where its values are not known yet; `None` is ones.
            (The data are then ones too; a call outside of `minimize` first looks at the problem with real ones.)
        steps: T, where something in the problem is made for so many (a schedule): a method with another T then warns.

    Raises: `ValueError` for what is not a function. The first call looks further: see `hypergradient`.
    Reference: Franceschi et al. 2018 (ICML), eq. 5-6; B_t as in the Bridge paper (2017), eq. 2.1.
    Do not use it for a plain module with a usual optimizer: `from_module` writes the step.

    >>> def step(t, w, lam, batch):
    ...     return w - 0.25 * inner_gradient(lambda w: (w - lam) ** 2, w)
    >>> problem = Problem(step, outer=lambda w, lam, data: w**2, init=lambda lam, data: torch.zeros(()))
    """

    step: Callable[..., Any]
    outer: Callable[..., Any] | JaxObjective
    init: Callable[..., Any]
    batch: Callable[..., Any] | None = None
    inner: Callable[..., torch.Tensor] | None = None
    has_metrics: bool = False
    seed: int | Callable[[Any], int] | None = None
    device: torch.device | str | None = None
    example: Any = None
    steps: int | None = None

    def __post_init__(self) -> None:
        for name, optional in (("step", False), ("outer", False), ("init", False), ("batch", True), ("inner", True)):
            value = getattr(self, name)
            known = callable(value) or (name == "outer" and isinstance(value, JaxObjective))
            if not known and not (optional and value is None):
                raise ValueError(f"{name} is {value!r}; use a function")
        if isinstance(self.step, torch.nn.Module):
            raise ValueError("step is a module; use from_module(module, loss, ...), or a function of one training step")
        if self.seed is not None and not callable(self.seed):
            check_steps(self.seed, "seed")
        for name, arguments in _ARGUMENTS.items():
            _check_arguments(name, getattr(self, name), arguments)


_ARGUMENTS = {
    "step": ("t", "state", "lam", "batch"),
    "outer": ("state", "lam", "data"),
    "init": ("lam", "data"),
    "batch": ("data", "t"),
    "inner": ("state", "lam", "batch"),
}


def _check_arguments(name: str, function: Any, arguments: tuple[str, ...]) -> None:
    """`ValueError` for a function that cannot be called with these."""
    if not callable(function):
        return
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of compiled functions Python does not know it
        return
    try:
        signature.bind(*arguments)
    except TypeError as error:
        raise ValueError(f"{name} is called as {name}({', '.join(arguments)}), and it takes {signature}") from error


class Mode(NamedTuple):
    """How `inner_gradient` is to be taken.

    Fields:
        kind: "graph", to be differentiated; "constant", in plain steps; "first_order", a constant among variables;
            "functional", under `torch.func`.
        calls: one entry a call: a method that changes gradients must know that there are any.
    """

    kind: str
    calls: list[int]


_MODE: ContextVar[Mode | None] = ContextVar("hyperax_torch_mode", default=None)


@contextlib.contextmanager
def mode(kind: str) -> Iterator[Mode]:
    """Let `inner_gradient` work in this way."""
    chosen = Mode(kind, [])
    token = _MODE.set(chosen)
    try:
        yield chosen
    finally:
        _MODE.reset(token)


def inner_gradient(loss: Callable[[Any], Any], w: Any, has_aux: bool = False) -> Any:
    """The gradient of a training loss in w, as the method at work needs it: differentiable, or a constant.

        g = grad_w L(w)

    Arguments:
        loss: L, a function of w alone; lam and the batch are what it closes over.
        w: a tensor or a pytree of floating-point tensors.
        has_aux: whether the loss returns (value, aux), aux a pytree of tensors that the step needs besides (new
            statistics of a normalisation). They must not leave the loss in another way.

    Returns: g, a pytree like w, with zeros where the loss does not depend on w; with `has_aux` the pair (g, aux).
    Raises: `ValueError` unless the value is a scalar.
    Cost: one gradient; with a graph of it only where the method differentiates through it.
    Reference: what `FirstOrder` counts as constant (Franceschi et al. 2018, Sec. 5.3; Finn et al. 2017, Sec. 5.2).
    Do not use it for the derivative with respect to lam: that is the method's.

    >>> inner_gradient(lambda w: w["a"] ** 2, {"a": torch.tensor(3.0)})["a"].item()
    6.0
    """
    current = _MODE.get()
    kind = "graph" if current is None else current.kind
    if current is not None:
        current.calls.append(1)
    leaves, tree = jax.tree.flatten(w)

    def value(*leaves: torch.Tensor) -> tuple[torch.Tensor, Any]:
        found = loss(jax.tree.unflatten(tree, leaves))
        found, aux = found if has_aux else (found, ())
        return checked_scalar("the training loss", found), aux

    if kind == "functional":
        found, aux = torch.func.grad(value, argnums=tuple(range(len(leaves))), has_aux=True)(*leaves)
    else:
        # A constant gradient needs no way to w, unless what comes beside it does.
        attached = kind == "graph" or (kind == "first_order" and has_aux)
        with torch.enable_grad():
            at = [x if attached and x.requires_grad else x.detach().requires_grad_() for x in leaves]
            outcome, aux = value(*at)
            found = torch.autograd.grad(
                outcome, at, create_graph=kind == "graph", retain_graph=attached, allow_unused=True
            )
        found = [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)]
    g = jax.tree.unflatten(tree, found)
    return (g, aux) if has_aux else g


def checked_scalar(name: str, value: Any) -> torch.Tensor:
    """The value, or a `ValueError` unless it is a floating-point scalar."""
    if not isinstance(value, torch.Tensor) or value.shape != () or not value.is_floating_point():
        described = f"{value.dtype}{list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
        hint = "; set has_metrics=True if it returns metrics" if isinstance(value, tuple) else ""
        raise ValueError(f"{name} must be a floating-point scalar tensor; it is {described}: take a sum or mean{hint}")
    return value


class Inner(NamedTuple):
    """A problem with its data: the steps of one inner run, seeded, as pure functions of (t, state, lam)."""

    problem: Problem
    data: Any
    device: torch.device  # whose random numbers are seeded
    quiet: bool = False  # whether a plain step may run without recording anything

    def start(self, lam: Any) -> Any:
        """s_0 = Phi_0(lam)."""
        with self._seeded(0):
            return self.problem.init(lam, self.data)

    def step(self, t: int, state: Any, lam: Any) -> Any:
        """s_t, from s_{t-1}."""
        leaves = jax.tree.leaves((state, lam))
        versions = [x._version for x in leaves]
        with self._seeded(t):
            after = self.problem.step(t, state, lam, self._batch(t))
        if [x._version for x in leaves] != versions:
            _refuse_changed(t, state, lam, leaves, versions)
        return after

    def loss(self, state: Any, lam: Any, w: Any, t: int = 1) -> torch.Tensor:
        """L at this state with w in its place, as step t sees it."""
        assert self.problem.inner is not None
        with self._seeded(t):
            return checked_scalar("inner", self.problem.inner(with_w(state, w), lam, self._batch(t)))

    def outer(self, state: Any, lam: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """(E, its metrics)."""
        assert callable(self.problem.outer)
        with self._seeded(0):
            found = self.problem.outer(state, lam, self.data)
        value, metrics = split_metrics(self.problem, found)
        return checked_scalar("the outer objective", value), jax.tree.map(torch.as_tensor, metrics)

    def _batch(self, t: int) -> Any:
        return self.data if self.problem.batch is None else self.problem.batch(self.data, t)

    def _seeded(self, t: int) -> contextlib.AbstractContextManager[None]:
        seed = self.problem.seed
        if seed is None:
            return contextlib.nullcontext()
        return seeded(mixed(seed(self.data) if callable(seed) else seed, t), self.device)


def _refuse_changed(t: int, state: Any, lam: Any, leaves: list[torch.Tensor], versions: list[int]) -> None:
    named = [*names_of("state", state), *names_of("lam", lam)]
    changed = [
        next((name for name, y in named if y is x), "a tensor of the state or of lam")
        for x, version in zip(leaves, versions, strict=True)
        if x._version != version
    ]
    raise ValueError(
        f"step {t} changes {', '.join(changed)} in place, and it is needed again: return a new tensor, "
        "w = w - eta * g in place of w -= eta * g"
    )


def split_metrics(problem: Problem, found: Any) -> tuple[Any, dict[str, Any]]:
    """(value, metrics) of what an outer objective returned."""
    if not problem.has_metrics:
        return found, {}
    if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], dict)):
        raise ValueError("with has_metrics the outer objective must return a pair (scalar, dict of tensors)")
    return found


def w_of(state: Any) -> Any:
    """The inner variables of a state: `state.w`, or all of it."""
    return state.w if isinstance(state, State) else state


def with_w(state: Any, w: Any) -> Any:
    """The state with other inner variables."""
    return state._replace(w=w) if isinstance(state, State) else w


def floats_of(tree: Any) -> list[torch.Tensor]:
    """The floating-point tensors of a pytree: what has derivatives."""
    return [x for x in jax.tree.leaves(tree) if is_float(x)]


def is_float(x: Any) -> bool:
    """Whether this is a tensor of floating-point numbers."""
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def replaced(tree: Any, floats: Any) -> Any:
    """The tree with these floating-point tensors in place of its own."""
    new = iter(floats)
    return jax.tree.map(lambda x: next(new) if is_float(x) else x, tree)


def names_of(name: str, tree: Any) -> list[tuple[str, Any]]:
    """Leaves with names such as `lam['decay']`."""
    return [(leaf_name(name, path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
