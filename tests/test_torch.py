"""Hypergradients of training steps in PyTorch, against autograd through the whole loop, and what is refused."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
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


EXACT = [
    hx.Reverse(T),
    hx.Reverse(T, segment=1),
    hx.Reverse(T, segment=3),
    hx.Reverse(T, segment="sqrt"),
    hx.Reverse(T, memory=700),
    hx.Truncated(T, T),
    hx.Forward(T, chunk=1),
    hx.Forward(T),
    hx.Forward(T, chunk=2),
    hx.RealTime(T, every=T),
    hx.RealTime(T, every=T, window=T),
]


@pytest.mark.parametrize("method", EXACT, ids=str)
def test_exact_methods_equal_autograd_through_the_whole_loop(method):
    expected = whole_loop(momentum, outer, init, lam_of(), T)
    close(ht.hypergradient(PROBLEM, method)(lam_of()), *expected)


@pytest.mark.parametrize("method", EXACT[:7], ids=str)
def test_a_step_that_calls_autograd_itself(method):
    close(ht.hypergradient(HAND, method)(lam_of()), *whole_loop(by_hand, outer, init, lam_of(), T))


def test_forward_along_several_directions_needs_inner_gradient():
    with pytest.raises(ValueError, match="inner_gradient"):
        ht.hypergradient(HAND, hx.Forward(T))(lam_of())


@pytest.mark.parametrize("window", [0, 1, 3])
def test_truncated(window):
    with pytest.warns(hx.UnusedLeafWarning, match=r"lam\['start'\]"):
        h = ht.hypergradient(PROBLEM, hx.Truncated(T, window))(lam_of())
    close(h, *whole_loop(momentum, outer, init, lam_of(), T, detached=T - window))
    if window:
        with pytest.warns(hx.UnusedLeafWarning, match=r"lam\['start'\]"):
            live = ht.hypergradient(PROBLEM, hx.RealTime(T, every=T, window=window))(lam_of())
        close(live, float(h.value), jax.tree.leaves(h.grad))


def test_first_order_holds_inner_gradients_constant():
    def constant(t, state, lam, data):
        return momentum(t, state, lam, data, lambda f, w: ht.inner_gradient(f, w).detach())

    h = ht.hypergradient(PROBLEM, hx.FirstOrder(T))(lam_of())
    close(h, *whole_loop(constant, outer, init, lam_of(), T))
    with pytest.raises(ValueError, match="FirstOrder treats inner gradients as constants"):
        ht.hypergradient(HAND, hx.FirstOrder(T))(lam_of())


def test_no_steps():
    with pytest.warns(hx.UnusedLeafWarning, match="momentum"):
        h = ht.hypergradient(PROBLEM, hx.Reverse(0))(lam_of())
    close(h, *whole_loop(momentum, outer, init, lam_of(), 0))


def test_segments_of_segments_and_a_budget():
    expected = whole_loop(momentum, outer, init, lam_of(), 40)
    whole = ht.hypergradient(PROBLEM, hx.Reverse(40, memory="1GB"))(lam_of())
    bytes_of_step = float(whole.info["schedule"]["bytes"]) / 40
    h = ht.hypergradient(PROBLEM, hx.Reverse(40, memory=int(2.2 * bytes_of_step + 10 * 80)))(lam_of())
    assert int(h.info["schedule"]["extra_runs"]) > 1
    close(h, *expected)
    with pytest.raises(ValueError, match="bytes at least"):
        ht.hypergradient(PROBLEM, hx.Reverse(40, memory=100))(lam_of())


def test_segments_keep_less_than_the_whole_graph():
    """What is saved for the way back, counted as it is saved."""

    def saved(method):
        held, most = [0], [0]

        class Counted:
            def __init__(self, x):
                self.x, self.size = x, x.nbytes
                held[0] += self.size
                most[0] = max(most[0], held[0])

            def __del__(self):
                held[0] -= self.size

        with torch.autograd.graph.saved_tensors_hooks(Counted, lambda counted: counted.x):
            ht.hypergradient(PROBLEM, method)(lam_of())
        return most[0]

    assert saved(hx.Reverse(64, segment="sqrt")) < saved(hx.Reverse(64)) / 4


def test_real_time_goes_on_and_begins_again():
    """At one lam, the hypergradients of a run in pieces are those of f_t, and a new run begins where the last ended."""
    lam = lam_of()
    for window in (None, 2):
        f = ht.hypergradient(PROBLEM, hx.RealTime(4, every=2, window=window))
        first = f(lam)
        second = f(lam, carry=first.carry)
        again = f(lam, carry=second.carry)
        close(first, *whole_loop(momentum, outer, init, lam, 2))
        reference = whole_loop(momentum, outer, init, lam, 4, detached=0 if window is None else 2)
        close(second, *reference)
        close(again, float(first.value), jax.tree.leaves(first.grad))
        assert int(second.info["step"]) == 4


def test_a_warm_restart_keeps_w_alone():
    lam = lam_of()
    problem = ht.Problem(as_state(momentum), lambda s, lam, d: outer({"w": s.w}, lam, d), as_state(init))
    f = ht.hypergradient(problem, hx.RealTime(2, every=2, warm_restart=True))
    first = f(lam)
    second = f(lam, carry=first.carry)
    from_last = lambda lam, data: init(lam, data) | {"w": first.state.w}
    close(second, *whole_loop(momentum, outer, from_last, lam, 2))


def as_state(function):
    """The step or init with a `State(w, auxiliary)` in place of a dict."""

    def with_state(*arguments):
        plain = lambda s: {"t": s.auxiliary[0], "v": s.auxiliary[1], "w": s.w}
        found = function(*(plain(x) if isinstance(x, hx.State) else x for x in arguments))
        return hx.State(found["w"], (found["t"], found["v"]))

    return with_state


SOLVERS = [
    hx.ConjugateGradient(1e-14),
    hx.Neumann(600, 0.3),
    hx.FixedPoint(800),
    hx.Nystrom(5, 1e-11),
]


def plain_descent(t, w, lam, data):
    return w - 0.2 * ht.inner_gradient(lambda w: loss(w, lam), w)


DESCENT = ht.Problem(
    plain_descent,
    lambda w, lam, data: ((w - 1) ** 2).sum() + lam["decay"],
    lambda lam, data: torch.zeros(5, dtype=F64),
    inner=lambda w, lam, data: loss(w, lam),
)


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_implicit_equals_the_implicit_function_theorem(solver):
    lam = {"decay": torch.tensor(-1.0, dtype=F64)}
    h = ht.hypergradient(DESCENT, hx.Implicit(400, solver))(lam)
    w, at = h.state, lam["decay"].clone().requires_grad_()
    hessian = torch.autograd.functional.hessian(lambda w: loss(w, lam), w)
    slope = torch.func.jacrev(lambda a: torch.func.grad(lambda w: loss(w, {"decay": a}))(w))(at.detach())
    expected = 1 - 2 * (w - 1) @ torch.linalg.solve(hessian, slope)
    assert abs(h.grad["decay"] - expected) < 1e-9
    assert h.info["residual"] < 1e-8
    assert h.info["inner_gradient"] < 1e-8


def test_implicit_warm_start_and_tolerance():
    lam = {"decay": torch.tensor(-1.0, dtype=F64)}
    f = ht.hypergradient(DESCENT, hx.Implicit(500, warm_start=True, tolerance=hx.ExponentialTolerance(1e-3, 0.1)))
    first = f(lam)
    second = f(lam, carry=first.carry)
    assert 0 < int(first.info["inner_steps"]) < 500
    assert int(second.info["inner_steps"]) < int(first.info["inner_steps"])
    assert int(second.carry.k) == 2
    exact = ht.hypergradient(DESCENT, hx.Implicit(400))(lam).grad["decay"]
    assert abs(second.grad["decay"] - exact) < 1e-3


def test_implicit_refuses_what_it_cannot_see():
    lam = lam_of()
    inner = {"inner": lambda state, lam, data: loss(state["w"], lam)}
    with pytest.raises(ValueError, match="inner"):
        ht.hypergradient(PROBLEM, hx.Implicit(5))(lam)
    solved = ht.Problem(
        as_state(momentum),
        lambda s, lam, d: (s.w**2).sum(),
        as_state(init),
        inner=lambda s, lam, d: loss(s.w, lam),
    )
    with pytest.raises(ValueError, match=r"lam\['momentum'\], lam\['start'\], lam\['step'\] can be felt"):
        ht.hypergradient(solved, hx.Implicit(5))(lam)
    batched = ht.Problem(momentum, outer, init, batch=lambda data, t: None, **inner)
    with pytest.raises(ValueError, match="mini-batches"):
        ht.hypergradient(batched, hx.Implicit(5))(lam)
    import lineax

    with pytest.raises(ValueError, match="traces its operator"):
        ht.hypergradient(DESCENT, hx.Implicit(5, lineax.LU()))({"decay": lam["decay"]})


def test_evolution_strategy_of_a_linear_function():
    slope = torch.tensor([1.0, -2.0, 0.5], dtype=F64)
    problem = ht.Problem(
        lambda t, w, lam, d: w + 0 * lam.sum(), lambda w, lam, d: (slope * lam).sum(), lambda lam, d: lam.sum()
    )
    f = ht.hypergradient(problem, hx.EvolutionStrategy(1, pairs=2000, sigma=0.1))
    h = f(torch.zeros(3, dtype=F64))
    np.testing.assert_allclose(h.grad, slope, atol=0.3)
    assert not torch.equal(f(torch.zeros(3, dtype=F64), carry=h.carry).grad, h.grad)


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        (hx.Reversible(3), "rounded away"),
        (hx.Doubling(3), "quadratic"),
        (hx.ClosedForm(lambda lam, d: lam), "formula"),
        (hx.FiniteDifference(3), "apart from the step"),
        ("reverse", "use hyperax.Reverse"),
    ],
)
def test_methods_that_cannot_work_are_refused(method, reason):
    with pytest.raises(ValueError, match=reason):
        ht.hypergradient(PROBLEM, method)


# ----------------------------------------------------------------------------------------------- JAX around PyTorch


def in_jax(lam):
    return jax.tree.map(lambda x: jnp.asarray(x.numpy()), lam)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("method", [hx.Reverse(T), hx.Forward(T), hx.RealTime(T, every=T)], ids=str)
def test_jax_arrays_give_jax_arrays(method, compiled):
    f = ht.hypergradient(PROBLEM, method)
    h = (jax.jit(f) if compiled else f)(in_jax(lam_of()))
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves((h.value, h.grad, h.carry)))
    close(h, *whole_loop(momentum, outer, init, lam_of(), T))


def test_arrays_cross_without_a_copy():
    from hyperax.torch.crossing import to_jax, to_torch

    x = jnp.arange(1000.0)
    there = to_torch({"x": x})["x"]
    assert there.data_ptr() == x.unsafe_buffer_pointer()
    back = to_jax({"x": torch.ones(1024, dtype=F64)})["x"]
    assert back.dtype == jnp.float64


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("method", [hx.Reverse(T, segment=2), hx.RealTime(T, every=T)], ids=str)
def test_an_outer_objective_in_jax(method, compiled):
    def objective(state, lam, data):
        value = jnp.sum((state["w"] - 1) ** 2) + jnp.sum(lam["step"]) * lam["decay"]
        return value, {"size": jnp.sum(state["w"] ** 2)}

    problem = ht.Problem(momentum, ht.JaxObjective(objective), init, has_metrics=True)
    f = ht.hypergradient(problem, method)
    h = (jax.jit(f) if compiled else f)(in_jax(lam_of()))
    close(h, *whole_loop(momentum, outer, init, lam_of(), T))
    assert h.info["metrics"]["size"] > 0
    in_torch = ht.hypergradient(problem, method)(lam_of())
    assert isinstance(in_torch.grad["decay"], torch.Tensor)
    close(in_torch, float(h.value), jax.tree.leaves(h.grad))


@pytest.mark.parametrize("method", [hx.Reverse(4), hx.RealTime(8, every=2)], ids=str)
def test_minimize_and_resume(method, tmp_path):
    """Constraint, samples, validation and checkpoints; a resumed run ends at the same bits."""

    def with_metrics(state, lam, data):
        return outer(state, lam, data), {"size": (state["w"] ** 2).sum()}

    f = ht.hypergradient(ht.Problem(momentum, with_metrics, init, has_metrics=True), method)
    constraint = {"decay": None, "momentum": hx.UnitInterval(), "start": None, "step": hx.Logarithmic()}
    score = ht.hypergradient(PROBLEM, hx.Reverse(4))

    def run(steps, folder, resume=False):
        return hx.minimize(
            f,
            in_jax(lam_of()),
            constraint=constraint,
            optimizer=optax.adam(0.02),
            steps=steps,
            validation=hx.Validation(lambda lam: float(score(lam).value), every=4),
            checkpoint=hx.Checkpoint(tmp_path / folder, every=4),
            resume=resume,
            dispatch=3,
        )

    whole = run(8, "whole")
    if isinstance(method, hx.Reverse):
        assert whole.history[-1]["value"] < whole.history[0]["value"]
    assert whole.history[0]["metrics"]["size"] > 0
    assert whole.best is not None
    run(4, "parts")
    resumed = run(8, "parts", resume=True)
    assert resumed.history == whole.history
    for a, b in zip(jax.tree.leaves(resumed.last_lam), jax.tree.leaves(whole.last_lam), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_carry_keeps_its_types():
    """Counters are int64 in PyTorch and int32 in JAX; float64 does not become float32 without a word."""
    f = ht.hypergradient(PROBLEM, hx.RealTime(8, every=2))
    with jax.enable_x64(False):
        with pytest.raises(ValueError, match="JAX is in float32"):
            jax.eval_shape(f, jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), in_jax(lam_of())))
        single = ht.Problem(
            lambda t, s, lam, d: {
                "t": s["t"] + torch.tensor(1),
                "w": s["w"] - lam * ht.inner_gradient(torch.square, s["w"]),
            },
            lambda s, lam, d: (s["w"] - 1) ** 2,
            lambda lam, d: {"t": torch.tensor(0), "w": torch.tensor(3.0)},
        )
        g = jax.jit(ht.hypergradient(single, hx.RealTime(8, every=2)))
        second = g(jnp.float32(0.1), None, g(jnp.float32(0.1)).carry)
        assert int(second.carry.state["t"]) == 4
        assert abs(float(second.value) - (3 * 0.8**4 - 1) ** 2) < 1e-5


def test_minimize_draws_data():
    def step(t, w, lam, batch):
        return w - 0.2 * ht.inner_gradient(lambda w: ((w - lam * batch) ** 2).sum(), w)

    problem = ht.Problem(step, lambda w, lam, d: (w - 3).pow(2).sum(), lambda lam, d: torch.zeros(2, dtype=F64))
    found = hx.minimize(
        ht.hypergradient(problem, hx.Reverse(5)),
        jnp.asarray(1.0),
        data=jnp.ones(2),
        sample=lambda key, data: data + 0.01 * jax.random.normal(key, (2,)),
        key=jax.random.key(0),
        optimizer=optax.adam(0.3),
        steps=60,
    )
    # w_5 = lam (1 - 0.6^5), which is to be 3
    assert abs(found.lam - 3 / (1 - 0.6**5)) < 0.1
    with pytest.raises(ValueError, match="key of JAX"):
        ht.hypergradient(problem, hx.Reverse(5))(jnp.asarray(1.0), jax.random.key(0))


def test_certify():
    good = ht.certify(ht.hypergradient(PROBLEM, hx.Reverse(T)), lam_of())
    assert good.advice == ()
    assert good.verdict.startswith("The gradient of f_T to")
    assert {row.along for row in good.leaves} == {f"lam['{name}']" for name in lam_of()}
    assert "nothing looks wrong" in str(good)

    def cut(t, state, lam, data):  # the decay reaches f_T, but not through the steps
        return momentum(t, state, lam | {"decay": lam["decay"].detach()}, data)

    bad = ht.certify(ht.hypergradient(ht.Problem(cut, outer, init), hx.Reverse(T)), in_jax(lam_of()))
    # forward mode is blind to it as well; finite differences are not
    assert bad.verdict.startswith("Wrong")
    assert "lam['decay']" in bad.verdict
    without_start = ht.Problem(momentum, outer, lambda lam, data: init({"start": 0.3}, data))
    lam = {name: x for name, x in lam_of().items() if name != "start"}
    kink = lambda w, lam, d: (w - 0.25).abs() + 0 * lam
    rough = ht.Problem(
        lambda t, w, lam, d: w - 0.5 * ht.inner_gradient(torch.square, w) * lam, kink, lambda lam, d: lam / lam
    )
    seen = ht.certify(ht.hypergradient(rough, hx.Reverse(1)), torch.tensor(0.75, dtype=F64))
    assert "kinks" in seen.verdict
    near = ht.certify(ht.hypergradient(without_start, hx.Truncated(T, 4)), lam, directions=1)
    assert "by design" in near.verdict
    far = ht.certify(ht.hypergradient(DESCENT, hx.Implicit(2)), {"decay": torch.tensor(-1.0, dtype=F64)})
    assert "use more steps" in far.advice[0]
    with pytest.raises(ValueError, match="certify Reverse"):
        ht.certify(ht.hypergradient(PROBLEM, hx.RealTime(T)), lam_of())
    with pytest.raises(ValueError, match=r"hyperax\.torch\.hypergradient"):
        ht.certify(hx.Reverse(2), lam_of())
    with pytest.raises(ValueError, match=r"use hyperax\.torch\.certify"):
        hx.certify(ht.hypergradient(PROBLEM, hx.Reverse(2)), lam_of())


# ----------------------------------------------------------------------------------------------------- bad input


def changed(**new):
    return {"step": momentum, "outer": outer, "init": init} | new


def in_place_lam(t, state, lam, data):
    lam["step"].mul_(0.9)
    return momentum(t, state, lam, data)


def in_place_lam_unseen(t, state, lam, data):
    with torch.no_grad():
        lam["step"].mul_(0.9)
    return momentum(t, state, lam, data)


def in_place_state(t, state, lam, data):
    after = momentum(t, state, lam, data)
    with torch.no_grad():
        state["w"] -= 0.1
    return after


def detached(t, state, lam, data):
    with torch.no_grad():
        return momentum(t, state, lam, data)


def grows(t, state, lam, data):
    return momentum(t, state, lam, data) | {"v": torch.zeros(6, dtype=F64)}


def single(t, state, lam, data):
    return momentum(t, state, lam, data) | {"v": state["v"].float()}


def loses(t, state, lam, data):
    return {"w": momentum(t, state, lam, data)["w"]}


def number(t, state, lam, data):
    return momentum(t, state, lam, data) | {"t": 1}


def random(t, state, lam, data):
    return momentum(t, state, lam, data) | {"v": state["v"] + torch.rand(5)}


@pytest.mark.parametrize(
    ("problem", "advice"),
    [
        (changed(step=in_place_lam), "in place.*return a new tensor"),
        (changed(step=in_place_lam_unseen), r"changes lam\['step'\] in place"),
        (changed(step=in_place_state), r"changes state\['w'\] in place"),
        (changed(step=detached), "depends neither on the state nor on lam"),
        (changed(step=grows), r"state\['v'\] is torch.float64\[5\].*torch.float64\[6\]"),
        (changed(step=single), r"state\['v'\] is torch.float64\[5\].*torch.float32"),
        (changed(step=loses), "changes the structure of the state"),
        (changed(step=number), r"state\['t'\] is a int after a step"),
        (changed(step=random), r"gives another state\['v'\].*seed=0"),
        (changed(init=lambda lam, d: init(lam, d) | {"name": "a"}), r"state\['name'\] is a str"),
        (changed(init=lambda lam, d: {"t": torch.tensor(0)}), "no floating-point tensor"),
        (
            changed(init=lambda lam, d: init(lam, d) | {"v": torch.zeros(5, device="meta")}),
            r"state\['w'\] is on cpu and state\['v'\] on meta",
        ),
        (changed(outer=lambda s, lam, d: s["w"]), r"must be a floating-point scalar tensor; it is torch.float64\[5\]"),
        (changed(outer=lambda s, lam, d: (s["w"].sum(), {})), "set has_metrics=True"),
        (changed(has_metrics=True), "must return a pair"),
    ],
)
def test_bad_problems_are_refused_with_advice(problem, advice):
    with pytest.raises(ValueError, match=advice):
        ht.hypergradient(ht.Problem(**problem), hx.Reverse(3))(lam_of())


def test_bad_problems_are_refused_before_a_compiled_run():
    f = ht.hypergradient(ht.Problem(**changed(step=grows)), hx.Reverse(3))
    with pytest.raises(ValueError, match=r"state\['v'\] is"):
        hx.minimize(f, in_jax(lam_of()), optimizer=optax.sgd(0.1), steps=3)


@pytest.mark.parametrize(
    ("lam", "advice"),
    [
        (lam_of() | {"decay": torch.tensor(1)}, r"lam\['decay'\] has type torch.int64"),
        (lam_of() | {"decay": "large"}, r"lam\['decay'\] has type str"),
        (lam_of() | {"decay": 1}, r"lam\['decay'\] has type int"),
        (lam_of() | {"step": torch.ones(2, device="meta")}, "is on meta"),
    ],
)
def test_bad_lam_is_refused(lam, advice):
    with pytest.raises(ValueError, match=advice):
        ht.hypergradient(PROBLEM, hx.Reverse(3))(lam)


def test_nothing_that_reaches_f():
    problem = ht.Problem(lambda t, w, lam, d: 0.5 * w, lambda w, lam, d: (w**2).sum(), lambda lam, d: torch.ones(2))
    with pytest.raises(ValueError, match=r"nothing of lam reaches f_T \(lam"):
        ht.hypergradient(problem, hx.Reverse(3))(torch.tensor(1.0))


def test_a_detached_leaf_is_named():
    def step(t, state, lam, data):
        return momentum(t, state, lam | {"momentum": lam["momentum"].item()}, data)

    f = ht.hypergradient(ht.Problem(step, outer, init), hx.Reverse(3))
    with pytest.warns(hx.UnusedLeafWarning, match=r"lam\['momentum'\] does not reach f_T"):
        f(lam_of())
    with pytest.warns(hx.UnusedLeafWarning, match=r"lam\['momentum'\] does not reach f_T"):
        jax.eval_shape(ht.hypergradient(ht.Problem(step, outer, init), hx.Reverse(3)), in_jax(lam_of()))


def test_a_leaf_for_a_late_step_is_not_called_unused():
    def step(t, w, lam, data):
        return w - lam[t - 1] * ht.inner_gradient(lambda w: (w - 1) ** 2, w)

    problem = ht.Problem(step, lambda w, lam, d: w**2, lambda lam, d: torch.zeros((), dtype=F64))
    lam = [torch.tensor(0.1, dtype=F64) for _ in range(5)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        h = ht.hypergradient(problem, hx.Reverse(5))(lam)
    assert all(g != 0 for g in h.grad)


def test_bad_definitions():
    with pytest.raises(ValueError, match="outer is None"):
        ht.Problem(momentum, None, init)
    with pytest.raises(ValueError, match="step is a module"):
        ht.Problem(torch.nn.Linear(1, 1), outer, init)
    with pytest.raises(ValueError, match="seed must be a whole number"):
        ht.Problem(momentum, outer, init, seed=-1)
    with pytest.raises(ValueError, match=r"must be a hyperax\.torch\.Problem"):
        ht.hypergradient(hx.GradientDescent(0.1), hx.Reverse(3))
