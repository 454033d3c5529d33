"""One side of the data hyper-cleaning benchmark, in a process of its own: a hypergradient through T steps.

    python -m benchmarks.peers.cleaning higher 100 problem.npz gradient.npy

The problem of Franceschi et al. 2017 (ICML), Sec. 5.1, float32: w = (W, b) = 0 at the start,

    L = (1 / N) sum_i lam_i CE_i,   E = mean CE on the validation set,   step 0.1 N / R,   lam_i = R / N

The first call is made at once and its gradient saved; then each line on stdin asks for one more. A reply is a line of
JSON: {"seconds", "peak_memory_mb"}, the most memory the process has held so far.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, Any]
THREADS = int(os.environ.get("OMP_NUM_THREADS", "2"))


def of_higher(data: Arrays, steps: int) -> Callable[[], np.ndarray]:
    """innerloop_ctx over torch.optim.SGD."""
    import higher
    import torch

    torch.set_num_threads(THREADS)
    tensors = {name: torch.tensor(array) for name, array in data.items()}
    x, y, x_val, y_val = (tensors[name] for name in ("x", "y", "x_val", "y_val"))
    model = torch.nn.Linear(x.shape[1], y.shape[1])
    torch.nn.init.zeros_(model.weight)
    torch.nn.init.zeros_(model.bias)
    sgd = torch.optim.SGD(model.parameters(), lr=float(data["step_size"]))
    lam = tensors["lam"].requires_grad_()
    losses = lambda z, y: torch.logsumexp(z, 1) - torch.sum(z * y, 1)

    def run() -> np.ndarray:
        with higher.innerloop_ctx(model, sgd) as (patched, optimizer):
            for _ in range(steps):
                optimizer.step(torch.mean(lam * losses(patched(x), y)))
            value = torch.mean(losses(patched(x_val), y_val))
            return torch.autograd.grad(value, lam)[0].numpy()

    return run


def of_hyperax(data: Arrays, steps: int, segment: Any = None) -> Callable[[], np.ndarray]:
    """`Reverse`, with or without checkpoints."""
    import jax
    import jax.numpy as jnp

    import hyperax as hx

    losses = lambda w, x, y: jax.nn.logsumexp(x @ w[0] + w[1], 1) - jnp.sum((x @ w[0] + w[1]) * y, 1)
    problem = hx.Problem(
        inner=lambda w, lam, d: jnp.mean(lam * losses(w, d["x"], d["y"])),
        outer=lambda w, lam, d: jnp.mean(losses(w, d["x_val"], d["y_val"])),
        init=lambda lam, d: (jnp.zeros((d["x"].shape[1], d["y"].shape[1])), jnp.zeros(d["y"].shape[1])),
    )
    method = hx.Reverse(steps, segment=segment)
    hypergradient = hx.hypergradient(problem, hx.GradientDescent(float(data["step_size"])), method)
    arrays = {name: jnp.asarray(array) for name, array in data.items()}
    lam = arrays.pop("lam")
    return lambda: np.asarray(hypergradient(lam, arrays).grad)


SIDES: dict[str, Callable[[Arrays, int], Callable[[], np.ndarray]]] = {
    "higher": of_higher,
    "hyperax Reverse": of_hyperax,
    'hyperax Reverse(segment="sqrt")': lambda data, steps: of_hyperax(data, steps, "sqrt"),
}


def peak_memory_mb() -> int:
    """The most memory held since the start of this program; `getrusage` counts the parent's before it, on Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) // 2**10


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")  # libraries may print
    os.dup2(2, 1)
    side, steps, problem, gradient = sys.argv[1:]
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    run = SIDES[side](dict(np.load(problem)), int(steps))
    asked = iter(sys.stdin)
    first = True
    while first or next(asked, None) is not None:
        begin = time.perf_counter()
        found = run()
        reply = {"seconds": time.perf_counter() - begin}
        reply["peak_memory_mb"] = peak_memory_mb()
        if first:
            np.save(gradient, found)
        first = False
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
