"""The part of the outer loop that runs on the device: several hyperiterations in one dispatch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, PyTree

from hyperax import free_variables
from hyperax.problem import Data, Hypergradient, Lam
from hyperax.processes import placed
from hyperax.tasks import split_tasks

HEALTHY, VALUE, GRADIENT, GROWTH, UPDATE = range(5)
"""What stopped the loop: nothing; a non-finite value or gradient; a value grown too far; a non-finite new lam."""


class OuterState(NamedTuple):
    """What the next hyperiteration needs: arrays only, so that it can be donated and saved.

    Fields:
        step: hyperiterations done.
        u: the free variables (see `free_variables`), a pytree like the arrays of lam.
        good: the last free variables at which value and gradient were finite; what is kept on divergence.
        optimizer: the optimizer's state.
        carry: the method's carry.
        first: the value of the first hyperiteration (nan before it), the measure of growth.
        trouble: one of the codes above.
    """

    step: Int[Array, ""]
    u: PyTree
    good: PyTree
    optimizer: PyTree
    carry: PyTree
    first: Float[Array, ""]
    trouble: Int[Array, ""]


class Program(eqx.Module):
    """What does not change during a run. Its arrays enter compiled code as arguments, all else as static."""

    hypergradient: Callable[..., Hypergradient]
    optimizer: optax.GradientTransformationExtraArgs
    sample: Callable[[Array, Data], Data] | None
    sets: free_variables.Sets
    fixed: PyTree  # what of lam is not an array
    divergence_factor: float

    def lam(self, u: PyTree) -> Lam:
        """The whole lam of the free variables u."""
        return eqx.combine(free_variables.constrained(self.sets, u), self.fixed)

    def task(self, data: Data, key: Array | None, step: Int[Array, ""] | int) -> Data:
        """What hyperiteration number `step` (from 0) sees: a function of the number, so the same after a resume."""
        if self.sample is None:
            return data
        assert key is not None
        return self.sample(jax.random.fold_in(key, step), data)


def start(program: Program, data: Data, key: Array | None, u: PyTree) -> OuterState:
    """The state before the first hyperiteration."""
    optimizer, carry = _initial(program, data, key, u)
    state = OuterState(
        step=jnp.asarray(0, jnp.int32),
        u=u,
        good=u,
        optimizer=optimizer,
        carry=carry,
        first=jnp.asarray(jnp.nan, jnp.result_type(float)),
        trouble=jnp.asarray(HEALTHY, jnp.int32),
    )
    return jax.tree.map(own, state)


@eqx.filter_jit
def _initial(program: Program, data: Data, key: Array | None, u: PyTree) -> tuple[PyTree, PyTree]:
    init = getattr(program.hypergradient, "init", None)  # a plain function remembers nothing
    carry = () if init is None else init(program.lam(u), program.task(data, key, 0))
    return program.optimizer.init(u), carry


def over_devices(
    mesh: Mesh, program: Program, data: Data, key: Array | None, state: OuterState
) -> tuple[Program, Data, Array | None, OuterState]:
    """All arrays on the devices of a mesh: what has a task axis is shared out, all else is on each of them.

    In its place from the beginning, because the second dispatch would compile again for arrays that moved in the first.
    """
    everywhere, over_tasks = PartitionSpec(), PartitionSpec(mesh.axis_names[0])

    def on(spec: PartitionSpec, tree: Any) -> Any:
        return jax.tree.map(lambda x: placed(x, NamedSharding(mesh, spec)) if eqx.is_array(x) else x, tree)

    if program.sample is None:
        tasks, rest = split_tasks(data)
        data = eqx.combine(on(over_tasks, tasks), on(everywhere, rest))
    carry = on(over_tasks, state.carry)
    rest = on(everywhere, state._replace(carry=()))
    return on(everywhere, program), on(everywhere, data), on(everywhere, key), rest._replace(carry=carry)


def own(x: Any) -> Array:
    """A copy in a buffer of its own (donation needs that) and of a strong type (else the second call would retrace)."""
    x = jnp.asarray(x)
    return jnp.copy(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else jnp.array(x, dtype=x.dtype, copy=True)


def _all_finite(tree: PyTree) -> Bool[Array, ""]:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def _keep(condition: Bool[Array, ""], new: PyTree, old: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def _hyperiteration(
    program: Program, data: Data, key: Array | None, state: OuterState
) -> tuple[OuterState, dict[str, Array]]:
    """u_{k+1} = project(u_k + update(grad_u f(forward(u_k)))), and what is recorded of it."""
    u = state.u
    lam, pullback = jax.vjp(lambda u: free_variables.constrained(program.sets, u), u)
    h = program.hypergradient(eqx.combine(lam, program.fixed), program.task(data, key, state.step), state.carry)
    (grad,) = pullback(_checked_gradient(h, u))
    value = h.value
    if jax.tree.structure(h.carry) != jax.tree.structure(state.carry):
        raise ValueError(
            f"the hypergradient returned a carry of structure {jax.tree.structure(h.carry)} and was given one of "
            f"structure {jax.tree.structure(state.carry)}; return one like `init`'s, or () if there is no `init`."
        )

    first = jnp.where(state.step == 0, value.astype(state.first.dtype), state.first)
    limit = program.divergence_factor * jnp.maximum(jnp.abs(first), 1.0)
    trouble = jnp.select(
        [~jnp.isfinite(value), ~_all_finite(grad), jnp.abs(value) > limit], [VALUE, GRADIENT, GROWTH], HEALTHY
    )
    evaluated = trouble == HEALTHY

    # `value` is for the optimizers that ask for it (optax.contrib.reduce_on_plateau, optax.polyak_sgd).
    updates, optimizer = program.optimizer.update(grad, state.optimizer, u, value=value)
    moved = free_variables.projected(program.sets, optax.apply_updates(u, updates))
    trouble = jnp.where(evaluated & ~_all_finite(moved), UPDATE, trouble).astype(jnp.int32)

    healthy = trouble == HEALTHY
    metrics = {f"metrics/{name}": jnp.mean(x) for name, x in h.info.get("metrics", {}).items()}  # over tasks, if any
    norm = optax.tree.norm(free_variables.residual(program.sets, u, grad))
    following = OuterState(
        step=state.step + healthy,
        u=_keep(healthy, moved, u),
        good=_keep(evaluated, u, state.good),
        optimizer=optimizer,
        carry=_keep(healthy, h.carry, state.carry),
        first=first,
        trouble=trouble,
    )
    return following, {"value": value, "gradient_norm": norm, **metrics}


def _checked_gradient(h: Hypergradient, u: PyTree) -> PyTree:
    if jnp.shape(h.value) != ():
        raise ValueError(
            f"the hypergradient's value has shape {jnp.shape(h.value)} and must be a scalar; reduce it in the outer "
            "objective, or use mean_over_tasks for a leading task axis."
        )
    grad = eqx.filter(h.grad, eqx.is_inexact_array)
    if jax.tree.structure(grad) != jax.tree.structure(u):
        raise ValueError(
            f"the hypergradient's grad must be a pytree like lam; it has structure {jax.tree.structure(grad)} and the "
            f"arrays of lam {jax.tree.structure(u)}."
        )
    return grad


# Jitted once more inside `hyperiterations`: shapes are needed before the loop, and the cache of this function's trace
# makes asking for them free, where a second trace of a large network's hypergradient takes seconds.
_traced_once = eqx.filter_jit(_hyperiteration)


# One function for all runs: a second run of the same hypergradient, optimizer and shapes does not compile again.
@eqx.filter_jit(donate="all-except-first")
def hyperiterations(
    constant: tuple[Program, Data, Array | None, Int[Array, ""]], state: OuterState, most: int
) -> tuple[OuterState, dict[str, Array]]:
    """Up to n <= `most` hyperiterations, fewer if one goes wrong.

    Arguments:
        constant: the program, the data, the key of the samples, and n; all n share one compilation.
        state: donated.
        most: the size of the buffers. With 1 there is no loop: XLA's CPU backend runs some operations (convolutions)
            slower inside a loop than outside it.

    Returns: the state and, for each recorded quantity, a buffer of shape (most,) of which the first n are filled.
    """
    program, data, key, n = constant
    if most == 1:
        state, seen = _traced_once(program, data, key, state)
        return state, jax.tree.map(lambda x: x[None], seen)

    _, shapes = eqx.filter_eval_shape(_traced_once, program, data, key, state)
    buffers = jax.tree.map(lambda x: jnp.zeros((most,), x.dtype), shapes)

    def unfinished(loop: tuple) -> Bool[Array, ""]:
        i, state, _ = loop
        return (i < n) & (state.trouble == HEALTHY)

    def body(loop: tuple) -> tuple:
        i, state, buffers = loop
        state, seen = _traced_once(program, data, key, state)
        return i + 1, state, jax.tree.map(lambda buffer, x: buffer.at[i].set(x), buffers, seen)

    _, state, buffers = jax.lax.while_loop(unfinished, body, (jnp.zeros_like(n), state, buffers))
    return state, buffers
