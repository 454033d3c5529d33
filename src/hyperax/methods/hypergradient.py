"""The verb: a problem, a dynamics and a method make a function (lam, data) -> Hypergradient."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax

from hyperax.checks import check_problem, variables_of, warn_unused
from hyperax.dynamics.dynamics import Dynamics
from hyperax.dynamics.gradient_descent import GradientDescent
from hyperax.methods.method import Method, Outcome
from hyperax.problem import Data, Hypergradient, Lam, Problem, Scalar, is_shared


class HypergradientFunction(eqx.Module):
    """What `hypergradient` returns: call it with (lam, data) for a `Hypergradient`.

    The call is compiled at its first use for these shapes and pure, so `jit`, `vmap` and `lax.scan` apply to it.
    """

    problem: Problem
    dynamics: Dynamics
    method: Method

    def __call__(self, lam: Lam, data: Data = None, carry: Any = None) -> Hypergradient:
        """The hypergradient at lam on `data`; `carry` is the `carry` of the last call, for methods that use one."""
        return call(self, lam, data, carry)

    def init(self, lam: Lam, data: Data = None) -> Any:
        """The first carry: `()` for methods that remember nothing."""
        return self.method.init(self.problem, self.dynamics, lam, data)

    def value(self, lam: Lam, data: Data, carry: Any) -> tuple[Scalar, Outcome]:
        """f_T(lam) and what comes with it, differentiable as the method says."""
        return self.method.value(self.problem, self.dynamics, lam, data, carry)

    def evaluate(self, lam: Lam, data: Data, carry: Any) -> Hypergradient:
        """The hypergradient, unchecked and in the caller's trace."""
        (value, outcome), grad = self.method.differentiate(lambda x: self.value(x, data, carry), lam)
        return Hypergradient(value, grad, outcome.state, outcome.info, outcome.carry)

    def check(self, lam: Lam, data: Data) -> None:
        """Raise `ValueError` for a problem that cannot be differentiated; warn of leaves of lam that nothing uses."""
        if any(is_shared(node) for node in jax.tree.leaves(data, is_leaf=is_shared)):
            raise ValueError(
                "data has `Shared` in it, which is for tasks: use mean_over_tasks(hypergradient), or give its value"
            )
        check_problem(self.problem, lam, data)
        self.method.check(self.problem, self.dynamics, lam, data)
        warn_unused(lambda x: self.method.reached(self.problem, self.dynamics, x, data), lam)

    @property
    def remembers_tasks(self) -> bool:
        """Whether a carry belongs to the data of the call it came from."""
        return self.method.remembers_tasks


def hypergradient(problem: Problem, dynamics: Dynamics | None, method: Method) -> HypergradientFunction:
    """A function (lam, data) -> `Hypergradient`: f_T(lam) and its (approximate) gradient.

        f_T(lam) = E(w_T(lam), lam),   w_0 = Phi_0(lam),   w_t = Phi_t(w_{t-1}, lam)

    Arguments:
        problem: L, E, Phi_0 and `prepare`.
        dynamics: Phi_t; `GradientDescent`, `HeavyBall`, `Adam`, `Optax`, `LearnedOptimizer`. `None` for a method that
            follows none (`ClosedForm`).
        method: exact for f_T `Reverse`, `Forward`, `Reversible`, `Doubling`; exact for f `ClosedForm`, `Implicit`;
            approximate `Truncated`, `FirstOrder`, `FiniteDifference`, `EvolutionStrategy`; online `RealTime`.

    Returns: a pure function `h = f(lam, data, carry=None)`; `h.value` a scalar, `h.grad` a pytree like lam, `h.state`
    the last state (`h.state.w` is w_T), `h.info["metrics"]` the outer objective's metrics, `h.carry`.
    Raises: `ValueError` when called with lam that has integer leaves or no floats, an inner or outer objective that is
    not a scalar, a state that changes shape, or what the method cannot differentiate; `UnusedLeafWarning` names leaves
    of lam that cannot reach f_T.
    Cost: see the method. The first call compiles; later calls with the same shapes do not trace again.
    Reference: Franceschi et al. 2018, eq. 5-6; Algorithm 1.

    >>> import jax.numpy as jnp
    >>> from hyperax import GradientDescent, Problem, Reverse
    >>> problem = Problem(
    ...     inner=lambda w, lam, d: (w - d) ** 2 + lam * w**2,
    ...     outer=lambda w, lam, d: (w - 1.0) ** 2,
    ...     init=lambda lam, d: jnp.zeros(()),
    ... )
    >>> h = hypergradient(problem, GradientDescent(0.1), Reverse(steps=100))(jnp.asarray(0.5), jnp.asarray(3.0))
    >>> print(f"{h.state.w:.3f} {h.value:.3f} {h.grad:.3f}")
    2.000 1.000 -2.667
    """
    if dynamics is None and isinstance(method, Method) and not method.needs_dynamics:
        dynamics = GradientDescent(0.0)  # w stays at w_0: the method does not move it
    for name, noun, kind in (
        ("problem", problem, Problem),
        ("dynamics", dynamics, Dynamics),
        ("method", method, Method),
    ):
        if not isinstance(noun, kind):
            raise ValueError(
                f"{name} must be a {kind.__name__}, not {type(noun).__name__}: hypergradient(problem, dynamics, method)"
            )
    assert dynamics is not None
    return HypergradientFunction(problem, dynamics, method)


def call(function: Any, lam: Lam, data: Data, carry: Any) -> Hypergradient:
    """Check, compile and call a hypergradient function; shared by the single and the mean over tasks."""
    return compiled(function, variables_of(lam), data, carry)


@eqx.filter_jit
def compiled(function: Any, lam: Lam, data: Data, carry: Any) -> Hypergradient:
    """What a call runs; `compiled.lower` gives its program."""
    # The checks read shapes only, so they cost nothing after the first call.
    function.check(lam, data)
    return function.evaluate(lam, data, function.init(lam, data) if carry is None else carry)
