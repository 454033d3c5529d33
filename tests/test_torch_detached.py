"""What a step or E loses on the way is said at the first call, and operations without forward rules are followed."""

import dataclasses
import gc

import jax
import numpy as np
import pytest

import hyperax as hx
from torch_problems import F64, T, by_hand, close, ht, in_jax, init, lam_of, momentum, outer, torch

X = torch.tensor(np.random.default_rng(1).normal(size=(9, 5)))


def loss(w):
    return torch.nn.functional.mse_loss(X @ w, X.sum(1))


def descent(gradient):
    """w - rate g from w = 0.3, so that f depends on the step size alone."""
    step = lambda t, w, lam, data: w - lam["rate"] * gradient(w)
    return ht.Problem(step, lambda w, lam, data: ((w - 1) ** 2).sum(), lambda lam, data: torch.full((5,), 0.3).double())


RATE = {"rate": torch.tensor(0.1, dtype=F64)}


def other_leaf(w):
    """The usual detach and requires_grad_, which cuts a run into single steps."""
    w = w.detach().requires_grad_()
    return torch.autograd.grad(loss(w), w, create_graph=True)[0]


@pytest.mark.parametrize(
    "gradient",
    [
        lambda w: torch.autograd.grad(loss(w), w)[0],
        other_leaf,
        lambda w: torch.autograd.grad(loss(w), w, create_graph=True)[0].data,
        lambda w: ht.inner_gradient(loss, w).detach(),
    ],
    ids=["no create_graph", "a new leaf", "data", "detach"],
)
def test_a_step_that_cuts_the_way_to_the_state_before(gradient):
    with pytest.warns(ht.DetachedWarning, match=r"of a step of state with respect to the state before it"):
        ht.hypergradient(descent(gradient), hx.Reverse(3))(RATE)


def cut_decay(t, state, lam, data):
    return momentum(t, state, lam | {"decay": lam["decay"].detach()}, data)


def test_a_leaf_that_is_attached_in_e_only():
    with pytest.warns(ht.DetachedWarning, match=r"state\['v'\] with respect to lam"):
        ht.hypergradient(ht.Problem(cut_decay, outer, init), hx.Reverse(3))(lam_of())


def test_steps_with_kinks_and_dead_units_are_not_suspected():
    """No warning, which would be an error here: relu, absolute values, maxima, and Adam where a gradient is zero."""
    dtype = torch.float32
    x = torch.tensor(np.random.default_rng(2).normal(size=(20, 6)), dtype=dtype)
    x[:, 0] = 0

    def rough(w):
        hidden = torch.relu(x @ w["a"] + w["b"])
        return (torch.nn.functional.max_pool1d(hidden[None], 2)[0] @ w["c"] - x.abs().sum(1)).abs().mean()

    def adam(t, state, lam, data):
        g = ht.inner_gradient(rough, state["w"])
        m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, state["m"], g)
        v = jax.tree.map(lambda v, g: 0.99 * v + 0.01 * g**2, state["v"], g)
        scaled = lambda w, m, v: w - lam * (m / (1 - 0.9**t)) / (v / (1 - 0.99**t) + 1e-16).sqrt()
        return {"m": m, "v": v, "w": jax.tree.map(scaled, state["w"], m, v)}

    def start(lam, data):
        draw = torch.Generator().manual_seed(0)
        w = {"a": torch.randn(6, 8, generator=draw), "b": torch.zeros(8), "c": torch.randn(4, generator=draw)}
        zeros = jax.tree.map(torch.zeros_like, w)
        return {"m": zeros, "v": zeros, "w": w}

    f = ht.hypergradient(ht.Problem(adam, lambda s, lam, d: rough(s["w"]), start), hx.Reverse(5))
    assert float(f(torch.tensor(0.01)).grad) != 0


def test_parameters_that_are_not_the_state():
    net = torch.nn.Linear(5, 1).double()
    own = lambda t, s, lam, d: momentum(t, s, lam, d) | {"v": s["v"] + net(s["w"]) * lam["decay"]}
    with pytest.warns(ht.DetachedWarning, match=r"a step depends on tensors \(of shapes .*\[1, 5\]"):
        ht.hypergradient(ht.Problem(own, outer, init), hx.Reverse(2))(lam_of())
    with pytest.warns(ht.DetachedWarning, match="the outer objective depends on tensors"):
        ht.hypergradient(ht.Problem(momentum, lambda s, lam, d: net(s["w"]).sum(), init), hx.Reverse(2))(lam_of())
    net.requires_grad_(False)
    ht.hypergradient(ht.Problem(momentum, lambda s, lam, d: net(s["w"]).sum(), init), hx.Reverse(2))(lam_of())


def test_detached_leaves_are_named_with_an_objective_in_jax():
    objective = ht.JaxObjective(lambda state, lam, data: (state["w"] ** 2).sum())
    cut = lambda t, s, lam, d: momentum(t, s, lam | {"step": lam["step"].detach()}, d)
    with pytest.warns(hx.UnusedLeafWarning, match=r"lam\['step'\]"), pytest.warns(ht.DetachedWarning):
        ht.hypergradient(ht.Problem(cut, objective, init), hx.Reverse(3))(lam_of())


def test_changes_in_place_at_a_later_step_leave_the_lam_of_the_caller_alone():
    def late(t, state, lam, data):
        if t == 3:
            with torch.no_grad():
                state["w"] -= 0.1
        return momentum(t, state, lam, data)

    with pytest.raises(ValueError, match=r"step 3 changes state\['w'\] in place"):
        ht.hypergradient(ht.Problem(late, outer, init), hx.Reverse(5))(lam_of())

    def first(t, state, lam, data):
        with torch.no_grad():
            lam["step"] *= 0.5
        return momentum(t, state, lam, data)

    lam = lam_of()
    with pytest.raises(ValueError, match=r"changes lam\['step'\] in place"):
        ht.hypergradient(ht.Problem(first, outer, init), hx.Reverse(5))(lam)
    assert torch.equal(lam["step"], lam_of()["step"])


@pytest.mark.parametrize("name", ["mse_loss", "huber_loss", "smooth_l1_loss"])
def test_operations_without_a_forward_rule(name):
    """Exact all the same, by two ways back; `certify` compares with them."""
    function = getattr(torch.nn.functional, name)
    problem = descent(lambda w: torch.autograd.grad(function(X @ w, X.sum(1)), w, create_graph=True)[0])
    expected = ht.hypergradient(problem, hx.Reverse(4))(RATE)
    for method in (hx.Forward(4, chunk=1), hx.RealTime(4, every=4)):
        close(ht.hypergradient(problem, method)(RATE), float(expected.value), jax.tree.leaves(expected.grad), 1e-12)
    assert ht.certify(ht.hypergradient(problem, hx.Reverse(4)), RATE, directions=1).advice == ()
    calls = []
    counted = dataclasses.replace(problem, step=lambda t, *rest: (calls.append(t), problem.step(t, *rest))[1])
    f = ht.hypergradient(counted, hx.Forward(4, chunk=1))
    f(RATE)
    calls.clear()
    f(RATE)
    assert calls == [1, 2, 3, 4], "what has no forward rule is tried once"


class NoSecond(torch.autograd.Function):
    """A function with one derivative in reverse, and none forward."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


def test_where_there_is_no_forward_mode_finite_differences_do():
    problem = ht.Problem(lambda t, w, lam, d: w - lam * NoSecond.apply(w), outer_square, lambda lam, d: lam / lam)
    lam = torch.tensor(0.3, dtype=F64)
    with pytest.raises(ValueError, match=r"no derivative along a direction.*use Reverse"):
        ht.hypergradient(problem, hx.Forward(3))(lam)
    seen = ht.certify(ht.hypergradient(problem, hx.Reverse(3)), lam, directions=1)
    assert seen.verdict.startswith("The gradient of f_T to")
    assert len(seen.advice) == 1
    assert "nothing from forward mode" in seen.advice[0]


def outer_square(w, lam, data):
    return w**2


def test_a_hypergradient_that_is_no_number():
    problem = ht.Problem(lambda t, w, lam, d: w * lam, outer_square, lambda lam, d: lam)
    with pytest.warns(RuntimeWarning, match="f_T is not finite"):
        ht.hypergradient(problem, hx.Reverse(30))(torch.tensor(1e9))


def test_a_measured_step_and_plain_steps_free_their_graphs():
    class Kept(torch.autograd.Function):
        """The identity, which counts the graphs that are alive."""

        alive = 0

        @staticmethod
        def forward(ctx, x):
            ctx.token = Token()
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g

    class Token:
        def __init__(self):
            Kept.alive += 1

        def __del__(self):
            Kept.alive -= 1

    def step(t, state, lam, data):
        g, aux = ht.inner_gradient(lambda w: (torch.sigmoid(w * lam).sum(), Kept.apply(w)), state["w"], has_aux=True)
        return {"w": torch.tanh(state["w"] - g), "a": torch.sigmoid(0.9 * state["a"] + 0.1 * aux)}

    start = lambda lam, data: {"w": torch.ones(3), "a": torch.zeros(3)}
    problem = ht.Problem(step, lambda s, lam, d: (s["w"] + s["a"]).sum(), start)
    lam = torch.tensor(0.5)
    f = ht.hypergradient(problem, hx.Reverse(20, memory="1kB"))
    f(lam)
    gc.collect()
    assert Kept.alive == 0
    inner = f.inner(lam, None, quiet=True)
    from hyperax.torch.runs import plain

    state = plain(inner, start(lam, None), lam, range(1, 21))
    assert Kept.alive == 0, "a plain run keeps no graph of what comes beside the gradient"
    assert not any(x.requires_grad for x in state.values())


def test_functions_that_cannot_be_called():
    with pytest.raises(ValueError, match=r"step is called as step\(t, state, lam, batch\)"):
        ht.Problem(lambda t, w, lam: w, outer, init)
    with pytest.raises(ValueError, match=r"init is called as init\(lam, data\)"):
        ht.Problem(momentum, outer, lambda: None)


def test_a_method_of_another_length_than_the_problem():
    problem = ht.Problem(momentum, outer, init, steps=T)
    ht.hypergradient(problem, hx.Reverse(T))
    with pytest.warns(UserWarning, match=f"runs 3 steps, and the problem is made for {T}"):
        ht.hypergradient(problem, hx.Reverse(3))


def test_metrics_may_be_numbers():
    problem = ht.Problem(momentum, lambda s, lam, d: (outer(s, lam, d), {"size": 2.5}), init, has_metrics=True)
    f = ht.hypergradient(problem, hx.Reverse(2))
    assert float(f(lam_of()).info["metrics"]["size"]) == 2.5
    assert float(jax.jit(f)(in_jax(lam_of())).info["metrics"]["size"]) == 2.5


def test_a_problem_that_ones_cannot_show():
    """A compiled program does not know its data yet; a call before helps, and the error says so."""
    start = lambda lam, d: torch.linalg.cholesky(d.T @ d).sum() * torch.ones(5, dtype=F64)
    problem = ht.Problem(lambda t, w, lam, d: w - lam * w, lambda w, lam, d: (w**2).sum(), start)
    f = ht.hypergradient(problem, hx.Reverse(2))
    lam, data = jax.numpy.asarray(0.1), jax.numpy.asarray(X.numpy())
    with pytest.raises(RuntimeError) as caught:
        jax.eval_shape(f, lam, data)
    assert "call f(lam, data) once before" in "".join(caught.value.__notes__)
    h = f(lam, data)
    np.testing.assert_allclose(jax.jit(f)(lam, data).grad, h.grad, rtol=1e-12)


def test_a_gradient_by_hand_is_not_suspected():
    ht.hypergradient(ht.Problem(by_hand, outer, init), hx.Reverse(2))(lam_of())


@pytest.mark.parametrize("scale", [1e-10, 1e-15])
def test_small_gradients_are_not_suspected(scale):
    """In float32 the squares of their squares vanish."""
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    loss = lambda model, batch: scale * (model(batch) - 1).square().mean()
    made = ht.from_module(
        torch.nn.Linear(4, 1), loss, "adam", tune={"step_size": 0.1}, fixed={"eps": 1e-12}, data=x, validation=x
    )
    ht.hypergradient(made.problem, hx.Reverse(3))(made.lam)


def test_steps_without_a_value_beside_the_point():
    """The look must not end a run that goes well: at a bound of lam, or where a factorisation barely exists."""
    start = lambda lam, d: torch.diag(torch.tensor([1.0, 1.0, 1e-4], dtype=F64))
    step = lambda t, w, lam, d: w + lam["scale"].sum() * torch.linalg.cholesky(w)
    problem = ht.Problem(step, lambda w, lam, d: w.square().sum(), start)
    assert ht.hypergradient(problem, hx.Reverse(2))({"scale": torch.tensor([1.0, 0.0], dtype=F64)}).grad["scale"].all()

    def bounded(t, w, lam, d):
        return w - torch.distributions.Normal(0.0, lam["scale"]).variance * w

    problem = ht.Problem(bounded, lambda w, lam, d: w.square().sum(), lambda lam, d: torch.ones(3, dtype=F64))
    scale = torch.tensor([1.0, 1.0, 1e-6], dtype=F64)
    assert ht.hypergradient(problem, hx.Reverse(2))({"scale": scale}).value > 0


def test_inputs_of_a_gradient_penalty_are_no_strangers():
    x = torch.tensor(np.random.default_rng(3).normal(size=(6, 5)))

    def penalised(w):
        at = x.clone().requires_grad_()
        slope = torch.autograd.grad(torch.tanh(at @ w).sum(), at, create_graph=True)[0]
        return slope.square().sum()

    h = ht.hypergradient(descent(lambda w: ht.inner_gradient(penalised, w)), hx.Reverse(3))(RATE)
    assert float(h.grad["rate"]) != 0


def test_a_cut_among_many_tensors_is_found():
    def step(t, w, lam, data):
        g = ht.inner_gradient(lambda w: sum(((i + 1) * x - 1).square().sum() for i, x in enumerate(w)), w)
        return [x - lam * (g[i].detach() if i == 13 else g[i]) for i, x in enumerate(w)]

    start = lambda lam, data: [torch.full((2,), 0.1 * i + 0.1, dtype=F64) for i in range(20)]
    problem = ht.Problem(step, lambda w, lam, d: sum(x.sum() for x in w), start)
    with pytest.warns(ht.DetachedWarning, match=r"of a step of state\[13\] with respect to the state before it"):
        ht.hypergradient(problem, hx.Reverse(3))(torch.tensor(0.01, dtype=F64))


def test_half_precision_has_forward_mode_too():
    x = torch.linspace(-1, 1, 12).reshape(4, 3).bfloat16()
    loss = lambda w: torch.nn.functional.huber_loss(x @ w, x.sum(1))
    problem = ht.Problem(
        lambda t, w, lam, d: w - lam * ht.inner_gradient(loss, w),
        lambda w, lam, d: (w - 1).square().sum(),
        lambda lam, d: torch.full((3,), 0.5, dtype=torch.bfloat16),
    )
    lam = torch.tensor(0.1, dtype=torch.bfloat16)
    forward, reverse = (float(ht.hypergradient(problem, m)(lam).grad) for m in (hx.Forward(2, chunk=1), hx.Reverse(2)))
    assert forward == pytest.approx(reverse, rel=0.05)
