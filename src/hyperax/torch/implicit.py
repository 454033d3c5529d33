"""`Implicit` on torch tensors: an inner run without derivatives, and a linear system by vector-Jacobian products."""

from __future__ import annotations

from typing import Any

import torch

from hyperax.linear_solvers import ConjugateGradient, FixedPoint, Neumann, Nystrom
from hyperax.methods import Implicit, Method
from hyperax.methods.implicit import Memory
from hyperax.torch.linear_systems import Vector, add, linear_solve, norm
from hyperax.torch.problem import Inner, floats_of, mode, w_of, with_w
from hyperax.torch.reverse import _shortened, first_carry, solve
from hyperax.torch.runs import Gradients, Pulled, Solved, backward, begin, constant, plain, variable, zeros_where_none


@_shortened.register
def _(method: Implicit, steps: int) -> Method:
    of_step = isinstance(method.solver, FixedPoint)
    return Implicit(min(method.steps, steps), FixedPoint(1) if of_step else Neumann(1, 1.0))


@first_carry.register
def _(method: Implicit, inner: Inner, lam: Any) -> Any:
    if not method.warm_start and method.tolerance is None:
        return ()
    memory = Memory(k=None if method.tolerance is None else torch.tensor(0, dtype=torch.int32))
    if not method.warm_start:
        return memory
    state, _ = begin(inner, lam)
    unknown = state if isinstance(method.solver, FixedPoint) else w_of(state)
    return memory._replace(w=w_of(state), q=[torch.zeros_like(x) for x in floats_of(unknown)])


@solve.register
def _(method: Implicit, inner: Inner, lam: Any, carry: Any) -> Solved:
    of_step = isinstance(method.solver, FixedPoint)
    _check(method, inner)
    _check_no_noise(inner, lam)
    memory = carry if isinstance(carry, Memory) else Memory()
    epsilon = None
    if method.tolerance is not None:
        epsilon = float(method.tolerance(int(memory.k)))  # pyright: ignore[reportArgumentType]
    state, done = _inner_run(method, inner, lam, memory, epsilon)
    info: dict[str, Any] = {"inner_steps": torch.tensor(done, dtype=torch.int32)}
    if inner.problem.inner is not None:
        info["inner_gradient"] = norm([x.detach() for x in _slope(inner, state, lam)[0]])
    at = variable(lam)

    def pull(alpha: Gradients) -> Pulled:
        # Phi_t at s_T for the fixed point of the steps, grad_w L at w_T for the Hessian; q depends on E.
        if of_step:
            point = variable(state)
            with mode("graph"):
                outputs = floats_of(inner.step(max(done, 1), point, at))
            unknown = floats_of(point)
        else:
            outputs, unknown = _slope(inner, state, at)
            alpha = _of_w(state, alpha)
        product = lambda q: zeros_where_none(backward(outputs, unknown, q, again=True), unknown)
        operator = (lambda q: add(q, -1.0, product(q))) if of_step else product
        g = zeros_where_none(alpha, unknown)
        q, taken = linear_solve(method.solver, operator, g, memory.q, epsilon)
        size = norm(g)
        info["residual"] = norm(add(operator(q), -1.0, g)) / torch.where(size > 0, size, 1.0)
        if taken is not None:
            info["linear_steps"] = torch.tensor(taken, dtype=torch.int32)
        found = backward(outputs, floats_of(at), q if of_step else [-x for x in q])
        return Pulled(found, info, _next(method, memory, state, q))

    return Solved(state, pull)


def _next(method: Implicit, memory: Memory, state: Any, q: Vector) -> Any:
    if not method.warm_start and method.tolerance is None:
        return ()
    k = None if memory.k is None else (memory.k + 1).to(torch.int32)
    return Memory(w_of(state), q, k) if method.warm_start else Memory(k=k)


def _check(method: Implicit, inner: Inner) -> None:
    of_step = isinstance(method.solver, FixedPoint)
    if not isinstance(method.solver, ConjugateGradient | FixedPoint | Neumann | Nystrom):
        raise ValueError(
            f"{type(method.solver).__name__} traces its operator in JAX, and here it is PyTorch's: use "
            "hyperax.ConjugateGradient(), Neumann(...), FixedPoint(...) or Nystrom(...)"
        )
    if inner.problem.batch is not None:
        raise ValueError(
            "with mini-batches there is no single inner objective, so w_lam is not defined: use Reverse or Truncated, "
            "or leave batch out"
        )
    if inner.problem.inner is None and not (of_step and method.tolerance is None):
        what = "a tolerance compares" if of_step else "the Hessian is made of"
        raise ValueError(
            f"{what} derivatives of the training loss, which Problem.inner is to give: pass inner=(state, lam, batch) "
            "-> scalar, or use Implicit(steps, solver=hyperax.FixedPoint(...)), which needs the step alone. "
            "from_module has no such loss where weight decay stands beside the gradient (adamw) or is a schedule"
        )


def _check_no_noise(inner: Inner, lam: Any) -> None:
    if inner.problem.inner is None or inner.problem.seed is None:
        return
    state, lam = begin(inner, lam)[0], constant(lam)
    if not torch.allclose(*(inner.loss(state, lam, w_of(state), t).detach() for t in (1, 2)), equal_nan=True):
        raise ValueError(
            "the training loss draws random numbers (dropout), other ones in each step, so there is no single inner "
            "objective and w_lam is not defined: use Reverse or Truncated, or leave them out"
        )


def _inner_run(method: Implicit, inner: Inner, lam: Any, memory: Memory, epsilon: float | None) -> tuple[Any, int]:
    """(s_T, the steps done)."""
    state, _ = begin(inner, lam)
    if memory.w is not None:
        state = with_w(state, memory.w)
    if epsilon is None:
        return plain(inner, state, lam, range(1, method.steps + 1)), method.steps
    for t in range(1, method.steps + 1):
        if norm([x.detach() for x in _slope(inner, state, constant(lam))[0]]) <= epsilon:
            return state, t - 1
        state = plain(inner, state, lam, [t])
    return state, method.steps


def _slope(inner: Inner, state: Any, lam: Any) -> tuple[Vector, Vector]:
    """(grad_w L with its graph, the w of that graph)."""
    w = variable(w_of(state))
    at = floats_of(w)
    found = torch.autograd.grad(inner.loss(state, lam, w), at, create_graph=True, allow_unused=True)
    return zeros_where_none(list(found), at), at


def _of_w(state: Any, alpha: Gradients) -> Gradients:
    """Of the gradients in a state those in w; tensors are known by what they are, for a state has no fixed order."""
    of_w = {id(x) for x in floats_of(w_of(state))}
    pairs = list(zip(floats_of(state), alpha, strict=True))
    if any(a is not None and id(x) not in of_w and bool(a.any()) for x, a in pairs):
        raise ValueError(
            "E depends on auxiliary variables of the state (running statistics), which the Hessian of L does not see: "
            'use Implicit(steps, solver=hyperax.FixedPoint(...)), frozen statistics (buffers="frozen"), or Reverse'
        )
    return [a for x, a in pairs if id(x) in of_w]
