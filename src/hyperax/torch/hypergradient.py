"""The verb for PyTorch: a problem and a method make a function (lam, data) -> Hypergradient."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import jax
import torch
from torch.autograd.function import once_differentiable

from hyperax.checks import variables_of as jax_variables_of
from hyperax.methods import Method
from hyperax.problem import Hypergradient
from hyperax.torch import evolution, forward, implicit  # noqa: F401  (each adds its methods to `solve`)
from hyperax.torch.checks import check_reached, check_step, variables_of
from hyperax.torch.compiled import Waiting, called_back, first_carry_called_back
from hyperax.torch.crossing import is_torch, is_traced, shapes_of, to_jax, to_torch
from hyperax.torch.forward import pushed_run
from hyperax.torch.objective import differentiated, objective
from hyperax.torch.problem import Inner, Problem, floats_of
from hyperax.torch.reverse import first_carry, shortened, solve
from hyperax.torch.runs import Gradients, added, begin, engine, plain, zeros_where_none


class Known(NamedTuple):
    """What the first look at a problem told, for lam and data of these shapes.

    Fields:
        quiet: whether a step works without a graph.
        state, carry, value, metrics: shapes and types in JAX.
        types: those of the carry in PyTorch.
    """

    quiet: bool
    state: Any
    carry: Any
    value: Any
    metrics: Any
    types: Any


class TorchHypergradient:
    """What `hyperax.torch.hypergradient` returns: call it with (lam, data) for a `Hypergradient`.

    With tensors for lam it gives tensors, with JAX arrays JAX arrays. Inside `jax.jit` (as in `minimize`) the inner run
    is one call back to Python per hypergradient (two for an outer objective in JAX), `state` is `None`, and of `info`
    there are the metrics.
    """

    def __init__(self, problem: Problem, method: Method):
        self.problem, self.method = problem, method
        self._known: dict[Any, Known] = {}
        self.waiting = Waiting()

    def __call__(self, lam: Any, data: Any = None, carry: Any = None) -> Hypergradient:
        """The hypergradient at lam on `data`; `carry` is the `carry` of the last call, for methods that use one."""
        if is_traced((lam, data, carry)):
            return called_back(self, lam, data, carry)
        if is_torch(lam):
            return _finite(self.evaluated(variables_of(lam), data, carry))
        lam, data = self.given(jax_variables_of(lam), data)
        known = self.look(lam, data)
        return to_jax(_finite(self.evaluated(lam, data, None if carry is None else self.carried(carry, known))))

    def init(self, lam: Any, data: Any = None) -> Any:
        """The first carry: `()` for methods that remember nothing."""
        if is_traced((lam, data)):
            return first_carry_called_back(self, lam, data)
        if is_torch(lam):
            return self.first_carry(variables_of(lam), data)
        return to_jax(self.first_carry(*self.given(jax_variables_of(lam), data)))

    def loss(self, lam: Any, data: Any = None) -> torch.Tensor:
        """f_T(lam) as a scalar of the autograd graph of lam, for an outer loop of your own with `torch.optim`.

            loss.backward()  adds the hypergradient to `.grad` of the leaves of lam (it is computed already here)

        Arguments:
            lam: a pytree of tensors, such as {"decay": nn.Parameter(...)} or dict(module.named_parameters()).
            data: as in a call.

        Raises: `ValueError` for an online method (`RealTime`), which goes on from its carry: call with that.
        Do not use it for derivatives of the hypergradient: it has none.

        >>> import hyperax as hx
        >>> from hyperax.torch import Problem, hypergradient
        >>> problem = Problem(
        ...     lambda t, w, lam, batch: w - 0.5 * (w - lam), lambda w, lam, data: w**2, lambda lam, data: 0 * lam
        ... )
        >>> lam = torch.tensor(2.0, requires_grad=True)
        >>> hypergradient(problem, hx.Reverse(2)).loss(lam).backward()
        >>> lam.grad.item()
        2.25
        """
        if self.method.differentiates == "online":
            raise ValueError(
                f"{type(self.method).__name__} goes on from the carry of the last call: h = f(lam, data, carry), and "
                "set .grad of your tensors to h.grad"
            )
        if not any(isinstance(x, torch.Tensor) and x.requires_grad for x in jax.tree.leaves(lam)):
            raise ValueError("lam has no tensor that requires a gradient: use torch.tensor(..., requires_grad=True)")
        function = lambda floats: self(jax.tree.unflatten(jax.tree.structure(lam), floats), data)
        return _Attached.apply(function, *jax.tree.leaves(lam))  # pyright: ignore[reportReturnType]

    def value(self, lam: Any, data: Any = None) -> torch.Tensor:
        """f_T(lam) by plain steps: no derivative, no memory for the past."""
        lam, data = self._tensors(lam, data)
        steps = getattr(self.method, "steps", None)
        if steps is None:
            raise ValueError(f"{type(self.method).__name__} without steps has no f_T")
        inner = self.inner(lam, data, self.look(lam, data).quiet)
        with engine():
            return objective(inner, plain(inner, begin(inner, lam)[0], lam, range(1, steps + 1)), lam)[0]

    def along(self, lam: Any, direction: Any, data: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        """(f_T(lam), its derivative along a direction like lam), in forward mode: one run, no memory for the past."""
        lam, data = self._tensors(lam, data)
        inner = self.inner(lam, data)
        z = [x.detach()[None] for x in floats_of(self.given(direction)[0])]
        with engine():
            state, tangents = pushed_run(inner, lam, z, self.method.steps)  # pyright: ignore[reportAttributeAccessIssue]
            value, _, of_state, of_lam = differentiated(inner, state, lam)
        pairs = zip([*of_state, *of_lam], [*tangents, *z], strict=True)
        return value, sum((g * x[0]).sum() for g, x in pairs if g is not None)  # pyright: ignore[reportReturnType]

    @property
    def remembers_tasks(self) -> bool:
        """Whether a carry belongs to the data of the call it came from."""
        return self.method.remembers_tasks

    def inner(self, lam: Any, data: Any, quiet: bool = False) -> Inner:
        """The problem on these data."""
        device = self.problem.device
        return Inner(self.problem, data, floats_of(lam)[0].device if device is None else torch.device(device), quiet)

    def given(self, *trees: Any) -> tuple[Any, ...]:
        """What came from JAX or NumPy, in PyTorch."""
        return tuple(to_torch(tree, self.problem.device) for tree in trees)

    def carried(self, carry: Any, known: Known) -> Any:
        """A carry from JAX, in the types it had here."""
        return jax.tree.map(lambda x, dtype: x.to(dtype), to_torch(carry, self.problem.device), known.types)

    def first_carry(self, lam: Any, data: Any) -> Any:
        """The first carry, in tensors."""
        with engine():
            return first_carry(self.method, self.inner(lam, data), lam)

    def evaluated(self, lam: Any, data: Any, carry: Any) -> Hypergradient:
        """The hypergradient, of tensors and in tensors."""
        inner = self.inner(lam, data, self.look(lam, data).quiet)
        with engine():
            carry = first_carry(self.method, inner, lam) if carry is None else carry
            return self._whole(self.method, inner, lam, carry)[0]

    def _tensors(self, lam: Any, data: Any) -> tuple[Any, Any]:
        return (variables_of(lam), data) if is_torch(lam) else self.given(jax_variables_of(lam), data)

    def _whole(self, method: Method, inner: Inner, lam: Any, carry: Any) -> tuple[Hypergradient, Gradients]:
        """(the hypergradient, its leaves with `None` where nothing arrives)."""
        solved = solve(method, inner, lam, carry)
        value, metrics, of_state, of_lam = differentiated(inner, solved.state, lam)
        pulled = solved.pull(of_state)
        found = pulled.gradient if pulled.whole else added(of_lam, pulled.gradient)
        gradient = jax.tree.unflatten(jax.tree.structure(lam), zeros_where_none(found, floats_of(lam)))
        info = {"metrics": metrics, **pulled.info}
        return Hypergradient(value, gradient, solved.state, info, pulled.carry), found  # pyright: ignore[reportArgumentType]

    def look(self, lam: Any, data: Any) -> Known:
        """Check the problem once for lam and data of these shapes; remember what it looks like."""
        described = lambda x: (tuple(x.shape), x.dtype, x.device) if isinstance(x, torch.Tensor) else type(x)
        leaves = jax.tree.leaves((lam, data))
        key = (jax.tree.structure((lam, data)), tuple(described(x) for x in leaves))
        if key not in self._known:
            # Values are looked at also while a program around this is being traced.
            with engine(), jax.ensure_compile_time_eval():
                self._known[key] = self._looked(lam, data)
        return self._known[key]

    def _looked(self, lam: Any, data: Any) -> Known:
        inner = self.inner(lam, data)
        steps = getattr(self.method, "steps", 1)
        steps = 1 if steps is None else steps
        quiet = check_step(inner, lam, steps)
        inner = inner._replace(quiet=quiet)
        carry = first_carry(self.method, inner, lam)
        state = inner.start(lam)
        value, metrics, _, _ = differentiated(inner, state, lam)
        gradient = lambda method: self._whole(method, inner, lam, first_carry(method, inner, lam))[1]
        check_reached(inner, lam, self.method, gradient, shortened)
        return Known(
            quiet,
            shapes_of(state),
            shapes_of(carry),
            shapes_of(value),
            shapes_of(metrics),
            jax.tree.map(lambda x: x.dtype, carry),
        )


class _Attached(torch.autograd.Function):
    """f_T with its hypergradient as the derivative."""

    @staticmethod
    def forward(ctx: Any, function: Any, *floats: torch.Tensor) -> torch.Tensor:
        h = function(floats)
        pairs = zip(floats_of(h.grad), floats, strict=True)
        ctx.gradient = [g if isinstance(x, torch.Tensor) else None for g, x in pairs]
        return h.value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: torch.Tensor) -> Any:
        return (None, *(None if g is None else slopes[0] * g for g in ctx.gradient))


def _finite(h: Hypergradient) -> Hypergradient:
    """The same; said if it is no number."""
    if not all(bool(torch.isfinite(x).all()) for x in floats_of((h.value, h.grad))):
        what = "f_T" if not bool(torch.isfinite(torch.as_tensor(h.value))) else "the hypergradient"
        warnings.warn(
            f"{what} is not finite: the inner run overflows (use a smaller step size), or its derivative does where "
            "gradients vanish (Adam and RMSprop: a larger eps), or something in it has none (a square root or norm at "
            "0, a logarithm of 0)",
            RuntimeWarning,
            stacklevel=3,
        )
    return h


def hypergradient(problem: Problem, method: Method) -> TorchHypergradient:
    """A function (lam, data) -> `Hypergradient` of a training step in PyTorch, for `hyperax.minimize` or by itself.

        f_T(lam) = E(s_T(lam), lam),   s_0 = Phi_0(lam),   s_t = Phi_t(s_{t-1}, lam)

    Arguments:
        problem: a `hyperax.torch.Problem`, or the `problem` of `from_module`; its step is the dynamics.
        method: exact for f_T `Reverse` (with `segment` or `memory`), `Forward`; exact for f `Implicit`; approximate
            `Truncated`, `FirstOrder`, `EvolutionStrategy`; online `RealTime`. All with the arguments they have in JAX.

    Returns: `h = f(lam, data=None, carry=None)`: `h.value`, `h.grad` (a pytree like lam), `h.state` (s_T), `h.info`,
    `h.carry`; tensors if lam has tensors, else JAX arrays, which share the memory of the tensors where they can.
    Raises: `ValueError` for what cannot work here (`Reversible`, `Doubling`, `ClosedForm`, `FiniteDifference`), and, at
    the first call for given shapes, after one step was tried: for lam with integers or nothing that reaches
    f_T, tensors changed in place, states that change shape, type, device or structure or hold something else than
    tensors, steps that draw other random numbers when they run again, and an outer objective that is not a scalar.
    `UnusedLeafWarning` names leaves of lam that do not reach f_T; `DetachedWarning` a first step whose derivative is
    not that of its values, and module parameters that take part but are not in the state. `RuntimeWarning` for a
    hypergradient that is not finite.
    Cost: see the method. `Reverse` without segments keeps the graph of all steps; with them, states at their ends. The
    first look costs some tens of steps, and a whole hypergradient more if a leaf of lam is not reached by two steps.
    Reference: Franceschi et al. 2018, eq. 5-6; Algorithm 1.
    Do not use it for derivatives of hypergradients, in `jax.vmap`, or for steps much shorter than 0.1 ms: PyTorch
    spends as long on calling its operations there, and JAX compiles them away.

    >>> import hyperax as hx
    >>> def step(t, w, lam, batch):
    ...     return w - 0.25 * inner_gradient(lambda w: (w - lam) ** 2, w)
    >>> from hyperax.torch.problem import Problem, inner_gradient
    >>> problem = Problem(step, outer=lambda w, lam, data: w**2, init=lambda lam, data: torch.zeros(()))
    >>> h = hypergradient(problem, hx.Reverse(steps=2))(torch.tensor(2.0))
    >>> h.value.item(), h.grad.item()
    (2.25, 2.25)
    """
    if not isinstance(problem, Problem):
        hint = "; give its .problem" if hasattr(problem, "problem") else ""
        raise ValueError(f"problem must be a hyperax.torch.Problem, not {type(problem).__name__}{hint}")
    if solve.dispatch(type(method)) is solve.dispatch(object):
        solve(method, None, None, None)
    steps = getattr(method, "steps", None)
    if problem.steps is not None and steps is not None and steps != problem.steps:
        warnings.warn(
            f"the method runs {steps} steps, and the problem is made for {problem.steps} (from_module's steps=): its "
            "schedules would be cut off, or stay at their last value",
            UserWarning,
            stacklevel=2,
        )
    return TorchHypergradient(problem, method)
