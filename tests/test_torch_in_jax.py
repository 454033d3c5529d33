"""PyTorch inside JAX: arrays that cross, objectives in JAX, the outer loop, the certificate."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import hyperax as hx
from torch_problems import DESCENT, F64, PROBLEM, T, close, ht, in_jax, init, lam_of, momentum, outer, torch, whole_loop


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

    with pytest.warns(ht.DetachedWarning, match="with respect to lam"):
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
    waves = ht.Problem(lambda t, w, lam, d: w * lam, lambda w, lam, d: (1e6 * w).sin(), lambda lam, d: lam / lam)
    bent = ht.certify(ht.hypergradient(waves, hx.Reverse(1)), torch.tensor(0.75, dtype=F64))
    assert bent.verdict == "The gradient of f_T to 3 digits.", "a smaller epsilon than the default, where it is needed"
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
