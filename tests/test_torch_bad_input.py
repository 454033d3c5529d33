"""What is refused of a training step in PyTorch, and with what advice."""

import warnings

import jax
import optax
import pytest

import hyperax as hx
from torch_problems import F64, PROBLEM, ht, in_jax, init, lam_of, momentum, outer, torch


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
