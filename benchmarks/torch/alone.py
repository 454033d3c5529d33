"""One long run in a process of its own: its gradient, its time and the most memory it held.

python -m benchmarks.torch.alone hyperax 2000 64MB 17179869184
"""

from __future__ import annotations

import json
import resource
import sys
import time

import numpy as np
import torch

import hyperax as hx
from benchmarks.costs import peak_bytes
from benchmarks.torch.problems import of_long_runs
from benchmarks.torch.rows import of_higher, ours


def main() -> None:
    way, T, budget, limit = sys.argv[1:]
    resource.setrlimit(resource.RLIMIT_AS, (int(limit), int(limit)))
    torch.set_num_threads(1)
    setting, steps = of_long_runs(), int(T)
    if way == "hyperax":
        make = lambda steps: ours(setting, steps, hx.Reverse(steps, memory=budget))
    else:
        make = lambda steps: of_higher(setting, steps)
    make(1)()  # what PyTorch loads for the first step is not theirs
    before, begin = peak_bytes(), time.perf_counter()
    gradient = make(steps)()
    seconds = time.perf_counter() - begin
    row = {"seconds": round(seconds, 2), "peak_bytes": peak_bytes(), "added_bytes": peak_bytes() - before}
    print(json.dumps(row | {"gradient": np.asarray(gradient, float).tolist()}))


if __name__ == "__main__":
    main()
