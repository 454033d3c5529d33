"""What is wrong with a step, a state or lam, said before the run; and which leaves of lam reach f_T."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import torch

from hyperax.checks import UnusedLeafWarning
from hyperax.methods import FirstOrder, Implicit, Method, Reverse
from hyperax.torch.detached import check_derivatives, check_strangers
from hyperax.torch.problem import Inner, floats_of, is_float, mode, names_of
from hyperax.torch.runs import Gradients, constant, live
from hyperax.torch.seeds import seeded

FEW = 2
"""Steps that tell, in nearly all problems, which leaves of lam are used."""


def variables_of(lam: Any) -> Any:
    """Lam with its hyperparameters as floating-point tensors; `ValueError` for what has no derivative."""

    def convert(name: str, x: Any) -> torch.Tensor:
        if isinstance(x, float):
            return torch.tensor(x)
        if not is_float(x):
            kind = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
            raise ValueError(
                f"{name} has type {kind}; only floating-point tensors have a hypergradient: convert it, or, if it is "
                "not to be optimised, keep it out of lam"
            )
        return x.detach()

    leaves = [convert(name, x) for name, x in names_of("lam", lam)]
    if not leaves:
        raise ValueError("lam has no leaf, so there is nothing to differentiate or optimise")
    return jax.tree.unflatten(jax.tree.structure(lam), leaves)


def check_step(inner: Inner, lam: Any, steps: int) -> bool:
    """Raise `ValueError` for a problem that cannot be run and run again; whether a step works without a graph."""
    at = jax.tree.map(lambda x: x.detach().clone().requires_grad_(), lam)  # what a bad step changes is this copy
    with _advice("init"):
        start = inner.start(at)
    _check_state(start, at)
    state = live(start)
    if not steps:
        return False
    before = constant(state)
    with mode("graph"), _advice("step"):
        after = inner.step(1, state, at)
    _check_alike(before, after)
    if not any(x.requires_grad for x in floats_of(after)):
        raise ValueError(
            "what the step returns depends neither on the state nor on lam: it was detached (torch.no_grad, .detach(), "
            ".data, .item(), a torch.optim optimizer). Take gradients by hyperax.torch.inner_gradient, and compute the "
            "next state from them by plain operations"
        )
    _check_replay(inner, state, at, after)
    if check_derivatives(inner, before, constant(at)):
        check_strangers(inner, before, constant(at))
    return _is_quiet(inner, before, at, after)


def _check_state(state: Any, lam: Any) -> None:
    if not any(is_float(x) for x in jax.tree.leaves(state)):
        raise ValueError("init returns no floating-point tensor, so there are no inner variables: let it return some")
    first, device = next((name, x.device) for name, x in names_of("state", state) if is_float(x))
    for name, x in names_of("state", state):
        if not isinstance(x, torch.Tensor):
            raise ValueError(
                f"{name} is a {type(x).__name__}; a state is made of tensors: use torch.tensor(...), or let the step "
                "close over it"
            )
        if x.is_complex():
            raise ValueError(f"{name} is complex; keep its real and imaginary parts (torch.view_as_real)")
    for name, x in [*names_of("state", state), *names_of("lam", lam)]:
        if x.device != device and x.dim():
            raise ValueError(f"{name} is on {x.device} and {first} on {device}: move one of them, x.to(device)")


def _check_alike(before: Any, after: Any) -> None:
    if jax.tree.structure(before) != jax.tree.structure(after):
        raise ValueError(
            f"a step changes the structure of the state: {jax.tree.structure(before)} before, "
            f"{jax.tree.structure(after)} after; return a state like the one received"
        )
    for (name, old), new in zip(names_of("state", before), jax.tree.leaves(after), strict=True):
        if not isinstance(new, torch.Tensor):
            raise ValueError(f"{name} is a {type(new).__name__} after a step; a state is made of tensors")
        if (old.shape, old.dtype, old.device) != (new.shape, new.dtype, new.device):
            raise ValueError(
                f"{name} is {old.dtype}{list(old.shape)} on {old.device} before a step and "
                f"{new.dtype}{list(new.shape)} on {new.device} after it; it must keep shape, type and device (a "
                "float64 lam or batch beside a float32 w is the usual cause)"
            )


class _advice:
    """Errors of PyTorch that beginners in unrolled differentiation meet, with what to do."""

    def __init__(self, where: str):
        self.where = where

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, RuntimeError) and "in-place" in str(error):
            raise ValueError(
                f"{self.where} changes a tensor of lam or of the state in place, and it is needed again: return a new "
                f"tensor, w = w - eta * g in place of w -= eta * g ({error})"
            ) from error
        if isinstance(error, RuntimeError) and ("same device" in str(error) or "meta" in str(error)):
            raise ValueError(
                f"{self.where} mixes tensors of several devices: move lam, the state and the data to one, x.to(device) "
                f"({error})"
            ) from error


def _check_replay(inner: Inner, state: Any, lam: Any, after: Any) -> None:
    """A second run of the same step must give the same state, whatever torch's random numbers are now."""
    with seeded(1, inner.device), mode("graph"):
        again = inner.step(1, state, lam)
    for (name, x), y in zip(names_of("state", after), jax.tree.leaves(again), strict=True):
        if not torch.allclose(x, y, rtol=1e-4, atol=1e-6, equal_nan=True):
            raise ValueError(
                f"the same step run twice gives another {name}: it draws random numbers (dropout, a shuffled loader), "
                "or keeps something between its calls (.grad of .backward(), a variable outside, a changed dict). "
                f"{_advice_on_randomness(inner)}; what is to be kept belongs into the state"
            )


def _advice_on_randomness(inner: Inner) -> str:
    if inner.problem.seed is None:
        return "Set seed=0 of the problem, and torch's numbers are drawn from (seed, t); draw others from t yourself"
    return "The seed of the problem replays torch's numbers alone: draw those of NumPy or random from t yourself"


def _is_quiet(inner: Inner, state: Any, lam: Any, after: Any) -> bool:
    """Whether plain steps can do without a graph: not where a step calls torch.autograd.grad itself."""
    try:
        with torch.no_grad(), mode("constant"):
            quiet = inner.step(1, state, constant(lam))
    except RuntimeError:
        return False
    pairs = zip(jax.tree.leaves(after), jax.tree.leaves(quiet), strict=True)
    return all(torch.allclose(x, y, rtol=1e-4, atol=1e-6, equal_nan=True) for x, y in pairs)


def check_reached(inner: Inner, lam: Any, method: Method, gradient: Any, shortened: Any) -> None:
    """Warn of the leaves of lam that do not reach f_T, and refuse if none does.

    `gradient(method)` is the hypergradient with `None` where nothing arrives; first by few steps, and only where those
    leave a leaf out by all of them (a leaf may be for a later step).
    """
    short = shortened(method, FEW)
    if short is None:
        return
    names = [name for name, _ in names_of("lam", lam)]
    unused = _missing(names, gradient(short))
    whole = shortened(method, 10**9)
    if unused and whole != short:
        unused = _missing(names, gradient(whole))
    if not unused:
        return
    if isinstance(method, Implicit):
        lost = [name for name in unused if name not in _missing(names, gradient(Reverse(min(method.steps, FEW))))]
        if lost:
            raise ValueError(
                f"{', '.join(lost)} can be felt in s_T only through the steps or Phi_0 (a step size, an initial "
                "point), and the inner solution does not depend on it: use Reverse, Forward or Truncated, or keep it "
                "out of lam"
            )
    cut = "FirstOrder drops what enters the training loss alone" if isinstance(method, FirstOrder) else "T = 0"
    reasons = f"a .detach(), .item(), .data or torch.no_grad on the way, torch.tensor(...) of it, or {cut}"
    if len(unused) == len(names):
        raise ValueError(f"nothing of lam reaches f_T ({', '.join(unused)}): look for {reasons}")
    one = len(unused) == 1
    warnings.warn(
        f"{', '.join(unused)} {'does' if one else 'do'} not reach f_T: the hypergradient there is zero. Remove "
        f"{'it' if one else 'them'} from lam, or look for {reasons}",
        UnusedLeafWarning,
        stacklevel=2,
    )


def _missing(names: list[str], gradient: Gradients) -> list[str]:
    return [name for name, g in zip(names, gradient, strict=True) if g is None]
