"""A training step in PyTorch of known derivatives, and autograd through the whole loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed: the extra hyperax[torch]")

import hyperax as hx  # noqa: E402
import hyperax.torch as ht  # noqa: E402

torch.set_num_threads(1)
T = 7
F64 = torch.float64
A = torch.linalg.inv(torch.eye(5, dtype=F64) + 0.1 * torch.arange(25, dtype=F64).reshape(5, 5).sin())
A, B = A @ A.T, torch.arange(5, dtype=F64).cos()
DATA = torch.linspace(-1, 1, 5, dtype=F64)


def loss(w, lam, data=DATA):
    return 0.5 * w @ A @ w - B @ w + lam["decay"].exp() * (w * w).sum() + 0.1 * (w**4).sum() + 0.1 * (data * w).sum()


def init(lam, data):
    return {"t": torch.tensor(0), "v": torch.zeros(5, dtype=F64), "w": lam["start"] * torch.ones(5, dtype=F64)}


def momentum(t, state, lam, data, gradient=ht.inner_gradient):
    """Heavy ball; the step sizes of both halves of w differ, and change with t."""
    g = gradient(lambda w: loss(w, lam), state["w"])
    v = lam["momentum"] * state["v"] + g
    return {"t": state["t"] + 1, "v": v, "w": state["w"] - lam["step"][t % 2] * v}


def by_hand(t, state, lam, data):
    """The same, with a gradient taken in the step itself."""
    return momentum(t, state, lam, data, lambda f, w: torch.autograd.grad(f(w), w, create_graph=True)[0])


def outer(state, lam, data):
    return ((state["w"] - 1) ** 2).sum() + lam["step"].sum() * lam["decay"]


def lam_of(dtype=F64):
    values = {"decay": [-1.0], "momentum": [0.7], "start": [0.3], "step": [0.05, 0.08]}
    return {name: torch.tensor(x if len(x) > 1 else x[0], dtype=dtype) for name, x in values.items()}


PROBLEM = ht.Problem(momentum, outer, init)
HAND = ht.Problem(by_hand, outer, init)


def whole_loop(step, outer, init, lam, steps, detached=0):
    """(f_T, its gradient) by autograd through everything, or with the first steps cut off."""
    at = jax.tree.map(lambda x: x.clone().requires_grad_(), lam)
    state = init(at, None)
    for t in range(1, steps + 1):
        state = step(t, state, at, None)
        if t == detached:
            state = jax.tree.map(lambda x: x.detach().requires_grad_(x.is_floating_point()), state)
    value = outer(state, at, None)
    gradient = torch.autograd.grad(value, jax.tree.leaves(at), allow_unused=True)
    return value.item(), [
        torch.zeros_like(x) if g is None else g for g, x in zip(gradient, jax.tree.leaves(at), strict=True)
    ]


def close(h, value, gradient, tolerance=1e-10):
    assert abs(float(h.value) - value) < tolerance
    for a, b in zip(jax.tree.leaves(h.grad), gradient, strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tolerance, atol=tolerance)


def as_state(function):
    """The step or init with a `State(w, auxiliary)` in place of a dict."""

    def with_state(*arguments):
        plain = lambda s: {"t": s.auxiliary[0], "v": s.auxiliary[1], "w": s.w}
        found = function(*(plain(x) if isinstance(x, hx.State) else x for x in arguments))
        return hx.State(found["w"], (found["t"], found["v"]))

    return with_state


def plain_descent(t, w, lam, data):
    return w - 0.2 * ht.inner_gradient(lambda w: loss(w, lam), w)


DESCENT = ht.Problem(
    plain_descent,
    lambda w, lam, data: ((w - 1) ** 2).sum() + lam["decay"],
    lambda lam, data: torch.zeros(5, dtype=F64),
    inner=lambda w, lam, data: loss(w, lam),
)


def in_jax(lam):
    return jax.tree.map(lambda x: jnp.asarray(x.numpy()), lam)
