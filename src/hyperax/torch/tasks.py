"""The mean over tasks, for meta-learning in PyTorch: one inner run after the other."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import torch

from hyperax.checks import leaf_name
from hyperax.problem import Hypergradient, is_shared
from hyperax.tasks import one_task, split_tasks
from hyperax.torch.crossing import is_traced, to_jax
from hyperax.torch.hypergradient import TorchHypergradient


class TorchMeanOverTasks:
    """What `hyperax.torch.mean_over_tasks` returns: call it with (lam, data), data stacked over tasks."""

    def __init__(self, hypergradient: TorchHypergradient):
        self.hypergradient = hypergradient

    def __call__(self, lam: Any, data: Any = None, carry: Any = None) -> Hypergradient:
        """The mean hypergradient; `state`, `carry` and `info` have a leading task axis."""
        count = _count(data)
        if is_traced((lam, data, carry)):
            return self._in_a_program(lam, data, self.init(lam, data) if carry is None else carry)
        total, rest = None, []
        for j in range(count):
            h = self.hypergradient(lam, _task(data, j), None if carry is None else _task(carry, j))
            mean = jax.tree.map(lambda x: x / count, (h.value, h.grad))
            total = mean if total is None else jax.tree.map(lambda a, b: a + b, total, mean)
            rest.append((h.state, h.info, h.carry))
        assert total is not None
        return Hypergradient(*total, *jax.tree.map(_stacked, *rest))

    def init(self, lam: Any, data: Any = None) -> Any:
        """The first carry, one a task."""
        count = _count(data)
        if is_traced((lam, data)):
            return self._scanned(lambda task, _: self.hypergradient.init(lam, task), data, None)
        return jax.tree.map(_stacked, *(self.hypergradient.init(lam, _task(data, j)) for j in range(count)))

    def value(self, lam: Any, data: Any = None) -> torch.Tensor:
        """The mean of f_T(lam) by plain steps: no derivative, no memory for the past."""
        values = [self.hypergradient.value(lam, _task(data, j)) for j in range(_count(data))]
        return torch.stack(values).mean()

    def loss(self, lam: Any, data: Any = None) -> torch.Tensor:
        """The mean of f_T(lam) as a scalar of the autograd graph of lam: see `TorchHypergradient.loss`."""
        losses = [self.hypergradient.loss(lam, _task(data, j)) for j in range(_count(data))]
        return torch.stack(losses).mean()

    @property
    def remembers_tasks(self) -> bool:
        """Whether a carry belongs to the tasks of the call it came from."""
        return self.hypergradient.remembers_tasks

    def _in_a_program(self, lam: Any, data: Any, carry: Any) -> Hypergradient:
        def of_task(task: Any, carry: Any) -> Any:
            h = self.hypergradient(lam, task, carry)
            return h.value, h.grad, h.info, h.carry

        values, gradients, info, carry = self._scanned(of_task, data, carry)
        mean = lambda tree: jax.tree.map(lambda x: jnp.mean(x, axis=0), tree)
        return Hypergradient(mean(values), mean(gradients), None, info, carry)

    def _scanned(self, function: Any, data: Any, carry: Any) -> Any:
        """function(task, its carry) of every task, in a loop of JAX: calls back must not run side by side."""
        arrays, rest = split_tasks(to_jax(data))

        def one(_: None, task: Any) -> tuple[None, Any]:
            arrays, carry = task
            return None, function(one_task(arrays, rest), carry)

        return jax.lax.scan(one, None, (arrays, carry))[1]


def mean_over_tasks(hypergradient: TorchHypergradient) -> TorchMeanOverTasks:
    """The mean of a hypergradient over tasks (episodes, folds) stacked on the leading axis of data.

        f_T(lam) = (1 / N) sum over j of E^j(s_T^j, lam),   each s_T^j from its own inner run

    Arguments:
        hypergradient: what `hyperax.torch.hypergradient` returned, for one task.

    In data, what is `hyperax.Shared` has no task axis: every task sees all of it. `hyperax.sample_tasks` draws tasks in
    `hyperax.minimize`; there data are JAX arrays (`hyperax.torch.to_jax`), and labels, which JAX holds in 32 bits,
    become `labels.long()` in your step.

    Returns: a function (lam, data, carry=None) like the one given; `value` and `grad` are means, `state`, `info` and
    `carry` have a leading axis of N.
    Raises: `ValueError` if the tensors of data disagree about N.
    Cost: N hypergradients one after the other, the memory of one.
    Reference: Franceschi et al. 2018, eq. 3-4; Finn et al. 2017, Algorithm 1 (with lam the initial weights).
    Do not use it for many tiny tasks of one shape: a step that maps over tasks itself (`torch.func.vmap` over states
    with a leading axis, and E their mean) makes one operation of N; or write the problem in JAX.

    >>> import hyperax as hx
    >>> from hyperax.torch import Problem, hypergradient
    >>> problem = Problem(
    ...     lambda t, w, lam, d: w - 0.5 * (w - d), lambda w, lam, d: (w - d) ** 2, init=lambda lam, d: lam
    ... )
    >>> maml = mean_over_tasks(hypergradient(problem, hx.Reverse(1)))
    >>> maml(torch.tensor(2.0), torch.tensor([0.0, 1.0, 5.0])).grad.item()
    0.0
    """
    if not isinstance(hypergradient, TorchHypergradient):
        raise ValueError(
            f"mean_over_tasks needs what hyperax.torch.hypergradient returns, not {type(hypergradient).__name__}"
        )
    return TorchMeanOverTasks(hypergradient)


def _mapped(x: Any) -> bool:
    return not is_shared(x) and (isinstance(x, torch.Tensor) or eqx.is_array(x))


def _task(data: Any, j: int) -> Any:
    """The data of one task."""
    of_task = lambda x: x.value if is_shared(x) else x[j] if _mapped(x) else x
    return jax.tree.map(of_task, data, is_leaf=is_shared)


def _count(data: Any) -> int:
    """N, the length of the leading axis of all tensors."""
    leaves = jax.tree_util.tree_leaves_with_path(data, is_leaf=is_shared)
    lengths = {leaf_name("data", path): tuple(x.shape)[:1] for path, x in leaves if _mapped(x)}
    if len(set(lengths.values())) != 1 or lengths[next(iter(lengths))] in ((), (0,)):
        found = ", ".join(f"{name}: {length[0] if length else 'no axis'}" for name, length in lengths.items())
        raise ValueError(
            "every tensor of data must have the tasks on its leading axis, at least one, or be hyperax.Shared; "
            f"there are {found or 'no tensors'}"
        )
    return next(iter(lengths.values()))[0]


def _stacked(*leaves: Any) -> Any:
    """One leaf of all tasks."""
    return torch.stack(leaves) if isinstance(leaves[0], torch.Tensor) else jnp.stack(leaves)
