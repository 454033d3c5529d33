"""Hypergradients of training steps in PyTorch by unrolling, against autograd through the whole loop."""

import jax
import pytest

import hyperax as hx
from torch_problems import (
    HAND,
    PROBLEM,
    T,
    as_state,
    by_hand,
    close,
    ht,
    init,
    lam_of,
    momentum,
    outer,
    torch,
    whole_loop,
)

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
