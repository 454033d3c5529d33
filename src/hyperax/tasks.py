"""The mean over tasks: the only place where meta-learning differs from hyperparameter optimization."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Key

from hyperax.checks import leaf_name
from hyperax.methods.hypergradient import HypergradientFunction, call
from hyperax.methods.method import Outcome
from hyperax.problem import Data, Hypergradient, Lam, Scalar, is_shared
from hyperax.rollout import check_steps

TASKS = "tasks"
"""The name of the mapped axis: `jax.lax.pmean(x, TASKS)` inside `prepare` or E is a mean over the tasks in parallel."""


def split_tasks(data: Data) -> tuple[Data, Data]:
    """The arrays with a task axis, and what all tasks share, as two trees like `data`."""
    mapped = jax.tree.map(lambda node: not is_shared(node) and eqx.is_array(node), data, is_leaf=is_shared)
    return eqx.partition(data, mapped)


def one_task(arrays: Data, rest: Data) -> Data:
    """The data of a task as its problem sees them, from its arrays and what all tasks share."""
    whole = eqx.combine(arrays, rest)
    return jax.tree.map(lambda node: node.value if is_shared(node) else node, whole, is_leaf=is_shared)


def sample_tasks(count: int) -> Callable[[Key[Array, ""], Data], Data]:
    """Draws tasks for each hyperiteration: `minimize(..., sample=sample_tasks(2), key=key)`.

        f_T(lam) is estimated by (1 / count) sum over j in J_k of f_T^j(lam),   J_k drawn without replacement

    Arguments:
        count: tasks a hyperiteration, at most N. With N itself all are drawn, in another order.

    Returns: a pure function (key, data) -> data with `count` tasks on the leading axis; what is `Shared` stays.
    Raises: `ValueError` unless 1 <= count <= N.
    Cost: one permutation of N numbers, and a copy of the arrays of the drawn tasks.
    Reference: Franceschi et al. 2018, App. B (stochastic cross-validation) and Sec. 3 (mini-batches of episodes).
    Do not use it for a few cheap tasks: the mean over all of them has no noise, and lets line searches and tolerances
    work.

    >>> import jax, jax.numpy as jnp
    >>> from hyperax import Shared
    >>> drawn = sample_tasks(2)(jax.random.key(0), {"task": jnp.arange(5), "all": Shared(jnp.arange(3))})
    >>> len(set(drawn["task"].tolist())), drawn["all"].value.tolist()
    (2, [0, 1, 2])
    """
    check_steps(count, "count", 1)

    def sample(key: Key[Array, ""], data: Data) -> Data:
        number = count_tasks(data)
        if count > number:
            raise ValueError(f"{count} tasks cannot be drawn from {number} without repetition: use at most {number}")
        arrays, rest = split_tasks(data)
        chosen = jax.random.permutation(key, number)[:count]
        return eqx.combine(jax.tree.map(lambda x: x[chosen], arrays), rest)

    return sample


class MeanOverTasks(eqx.Module):
    """What `mean_over_tasks` returns: call it with (lam, data), the arrays of `data` stacked over tasks."""

    hypergradient: HypergradientFunction
    parallel: int | None = None
    mesh: Mesh | None = eqx.field(static=True, default=None)

    def __call__(self, lam: Lam, data: Data = None, carry: Any = None) -> Hypergradient:
        """The mean hypergradient; `state`, `carry` and the metrics have a leading task axis."""
        count_tasks(data)
        return call(self, lam, data, carry)

    def init(self, lam: Lam, data: Data = None) -> Any:
        """The first carry, one a task."""
        arrays, rest = split_tasks(data)
        of_task = lambda task: self.hypergradient.init(lam, one_task(task, rest))
        return jax.vmap(of_task, axis_name=TASKS)(arrays)

    @property
    def remembers_tasks(self) -> bool:
        """Whether a carry belongs to the tasks of the call it came from."""
        return self.hypergradient.remembers_tasks

    def value(self, lam: Lam, data: Data, carry: Any) -> tuple[Scalar, Outcome]:
        """(1 / N) sum over j of f_T^j(lam), all tasks in parallel."""
        arrays, rest = split_tasks(data)
        of_task = lambda task, carry: self.hypergradient.value(lam, one_task(task, rest), carry)
        if self.parallel == 1:
            # A mapped axis of length one makes small inner steps slower on a CPU.
            first, restored = (jax.tree.map(lambda x: x[0], part) for part in (arrays, carry))
            value, outcome = of_task(first, restored)
            return value, jax.tree.map(lambda x: jnp.asarray(x)[None], outcome)
        values, outcomes = jax.vmap(of_task, axis_name=TASKS)(arrays, carry)
        return jnp.mean(values), outcomes

    def evaluate(self, lam: Lam, data: Data, carry: Any) -> Hypergradient:
        """The mean hypergradient, unchecked and in the caller's trace."""
        if self.mesh is None:
            return Hypergradient(*self._grouped(lam, data, carry))
        axis = self.mesh.axis_names[0]
        variables, fixed = eqx.partition(lam, eqx.is_array)
        arrays, rest = split_tasks(data)

        everywhere, rest = eqx.partition(rest, eqx.is_array)

        def on_device(variables: Lam, everywhere: Data, arrays: Data, carry: Any) -> tuple[Any, ...]:
            data = eqx.combine(arrays, everywhere, rest)
            value, grad, *outcome = self._grouped(eqx.combine(variables, fixed), data, carry)
            return jax.lax.pmean((value, grad), axis), tuple(outcome)

        over_tasks = PartitionSpec(axis)
        sharded = jax.shard_map(
            on_device,
            mesh=self.mesh,
            in_specs=(PartitionSpec(), PartitionSpec(), over_tasks, over_tasks),
            out_specs=(PartitionSpec(), over_tasks),
            check_vma=False,
        )
        (value, grad), outcome = sharded(variables, everywhere, arrays, carry)
        return Hypergradient(value, grad, *outcome)

    def _grouped(self, lam: Lam, data: Data, carry: Any) -> tuple[Any, ...]:
        """The fields of the mean hypergradient over these tasks, `parallel` of them at a time."""
        count = count_tasks(data)
        together = min(self.parallel or count, count)
        arrays, rest = split_tasks(data)

        def of_group(arrays: Data, carry: Any) -> tuple[Scalar, Lam, Outcome]:
            value = lambda x: self.value(x, eqx.combine(arrays, rest), carry)
            (value, outcome), grad = self.hypergradient.method.differentiate(value, lam)
            return value, grad, outcome

        if together == count:
            value, grad, outcome = of_group(arrays, carry)
            return value, grad, *outcome

        # Groups one after the other, their gradients summed on the way: only one group's activations are alive.
        def add(total: tuple[Scalar, Lam], group: tuple[Data, Any]) -> tuple[tuple[Scalar, Lam], Outcome]:
            value, grad, outcome = of_group(*group)
            return jax.tree.map(jnp.add, total, (value, grad)), outcome

        groups = jax.tree.map(lambda x: x.reshape(count // together, together, *x.shape[1:]), (arrays, carry))
        first = jax.tree.map(lambda x: x[0], groups)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(of_group, *first)[:2])
        (value, grad), outcome = jax.lax.scan(add, zeros, groups)
        value, grad = jax.tree.map(lambda x: x * (together / count), (value, grad))
        return value, grad, *jax.tree.map(lambda x: x.reshape(count, *x.shape[2:]), outcome)

    def check(self, lam: Lam, data: Data) -> None:
        """As for one task, and the task axis."""
        count = count_tasks(data)
        devices = 1 if self.mesh is None else self.mesh.size
        if count % devices:
            raise ValueError(f"{count} tasks cannot be shared by {devices} devices: use a multiple of {devices} tasks")
        if self.parallel is not None and (count // devices) % min(self.parallel, count // devices):
            raise ValueError(
                f"{count // devices} tasks a device cannot be run {self.parallel} at a time: let `parallel` divide them"
            )
        arrays, rest = split_tasks(data)
        of_task = lambda task: self.hypergradient.check(lam, one_task(task, rest))
        if self.parallel != 1:
            # Mapped, because the objectives may use the task axis by name.
            jax.eval_shape(jax.vmap(of_task, axis_name=TASKS), arrays)
            return
        try:
            jax.eval_shape(of_task, jax.tree.map(lambda x: x[0], arrays))
        except NameError as error:
            if TASKS not in str(error):
                raise
            raise ValueError(
                f"something is computed over the axis {TASKS!r}, and with parallel=1 there is no such axis: leave "
                "`parallel` at None, so that all tasks are mapped together"
            ) from error


def mean_over_tasks(
    hypergradient: HypergradientFunction, parallel: int | None = None, mesh: Mesh | None = None
) -> MeanOverTasks:
    """The mean of a hypergradient over tasks (episodes, folds) stacked on the leading axis of `data`.

        f_T(lam) = (1 / N) sum over j of E^j(w_T^j, lam),   each w_T^j from its own inner run

    Arguments:
        hypergradient: what `hx.hypergradient` returned, for one task.
        parallel: how many tasks are mapped together (a divisor of N); the groups run one after the other and their
            gradients are summed, which bounds memory and, on a CPU, keeps a group's activations in the cache.
            `None`: all at once.
        mesh: a device mesh with one axis; N / (number of devices) tasks go to each device, and `parallel` counts those.

    In `data`, what is `Shared` has no task axis: every task sees all of it.

    Returns: a function like the one given; `value` and `grad` are means, `state`, `carry` and the metrics have a
    leading axis of N.
    Raises: `ValueError` if `parallel` or the mesh does not divide N, if the mesh has several axes, if the arrays of
    `data` disagree about N.
    Cost: one backward pass through what lam shares between the tasks of a group, not one a task.
    Reference: Franceschi et al. 2018, eq. 3-4 and 9; App. B (folds in parallel or sequentially).
    Do not use `parallel` or `mesh` with statistics shared by all tasks (`jax.lax.pmean(x, TASKS)`): they would be
    a group's or a device's.

    >>> import jax.numpy as jnp
    >>> from hyperax import GradientDescent, Problem, Reverse, hypergradient
    >>> problem = Problem(
    ...     inner=lambda w, lam, d: (w - lam) ** 2, outer=lambda w, lam, d: (w - d) ** 2, init=lambda lam, d: lam
    ... )
    >>> mean = mean_over_tasks(hypergradient(problem, GradientDescent(0.1), Reverse(5)))
    >>> print(mean(jnp.asarray(2.0), jnp.asarray([0.0, 1.0, 5.0])).grad)
    0.0
    """
    if not isinstance(hypergradient, HypergradientFunction):
        hint = (
            ": use hyperax.torch.mean_over_tasks" if type(hypergradient).__module__.startswith("hyperax.torch") else ""
        )
        raise ValueError(
            f"mean_over_tasks needs what hypergradient(...) returns, not {type(hypergradient).__name__}{hint}"
        )
    if parallel is not None:
        check_steps(parallel, "parallel", 1)
    if mesh is not None and (len(mesh.axis_names) != 1 or TASKS in mesh.axis_names):
        raise ValueError(f"the mesh must have one axis, not named {TASKS!r}; it has {mesh.axis_names}")
    if mesh is not None:
        # Axes left to the compiler, whatever kind they were made as: episodes are drawn without a sharding of theirs.
        mesh = Mesh(mesh.devices, mesh.axis_names)
    return MeanOverTasks(hypergradient, parallel, mesh)


def count_tasks(data: Data) -> int:
    """N, the length of the leading axis that all arrays of `data` share."""
    lengths = {
        leaf_name("data", path): leaf.shape[0] if leaf.ndim else None
        for path, leaf in jax.tree_util.tree_leaves_with_path(split_tasks(data)[0])
        if eqx.is_array(leaf)
    }
    if not lengths:
        raise ValueError("mean_over_tasks needs data with at least one array: its leading axis counts the tasks")
    first = next(iter(lengths))
    for name, length in lengths.items():
        if length is None or length != lengths[first] or length == 0:
            raise ValueError(
                f"{name} has {'no leading axis' if length is None else f'{length} tasks'} and {first} has "
                f"{lengths[first]}; every array of data must have the tasks on its leading axis, at least one"
            )
    return lengths[first]  # pyright: ignore[reportReturnType]
