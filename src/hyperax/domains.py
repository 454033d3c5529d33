"""The mean over domains: tasks of different structure, each seeing its own part of lam, in one hypergradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isfinite
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from hyperax.checks import warn_unused
from hyperax.methods.hypergradient import HypergradientFunction, call
from hyperax.problem import Data, Hypergradient, Lam
from hyperax.tasks import MeanOverTasks

DomainFunction = HypergradientFunction | MeanOverTasks
"""The hypergradient of one domain."""

View = Callable[[Lam, str], Lam]
"""(lam, domain) -> what the domain sees of lam; differentiable."""


def all_of_lam(lam: Lam, domain: str) -> Lam:
    """The view of domains that share everything."""
    return lam


class MeanOverDomains(eqx.Module):
    """What `mean_over_domains` returns: call it with (lam, {domain: its data})."""

    hypergradients: dict[str, DomainFunction]
    view: View
    shares: dict[str, float]

    def __call__(self, lam: Lam, data: Data = None, carry: Any = None) -> Hypergradient:
        """The mean hypergradient; `state`, `carry` and `info["domains"]` are dicts by domain."""
        self._check_names(data)
        return call(self, lam, data, carry)

    def init(self, lam: Lam, data: Data = None) -> dict[str, Any]:
        """The first carry of each domain."""
        self._check_names(data)
        return {name: f.init(self.view(lam, name), data[name]) for name, f in self.hypergradients.items()}

    @property
    def remembers_tasks(self) -> bool:
        """Whether a carry of any domain belongs to the tasks of the call it came from."""
        return any(f.remembers_tasks for f in self.hypergradients.values())

    @property
    def mesh(self) -> Mesh | None:
        """The devices that the tasks of every domain are shared over."""
        return next(iter(_meshes(self.hypergradients)))

    def evaluate(self, lam: Lam, data: Data, carry: Any) -> Hypergradient:
        """The mean hypergradient, unchecked and in the caller's trace."""
        variables, fixed = eqx.partition(lam, eqx.is_inexact_array)
        found: dict[str, Hypergradient] = {}
        value, grad = jnp.zeros(()), jax.tree.map(jnp.zeros_like, variables)
        for name, f in self.hypergradients.items():
            # Not one derivative of the sum: each method differentiates in its own mode, along its own part of lam.
            of_domain = lambda x, name=name: self.view(eqx.combine(x, fixed), name)
            seen, pullback = eqx.filter_vjp(of_domain, variables)
            h = found[name] = f.evaluate(seen, data[name], carry[name])
            (own,) = pullback(eqx.filter(h.grad, eqx.is_inexact_array))
            value = value + self.shares[name] * h.value
            grad = jax.tree.map(lambda total, g, share=self.shares[name]: total + share * g, grad, own)
        metrics = {
            f"{name}/{metric}": x
            for name, h in found.items()
            for metric, x in {"value": h.value, **h.info.get("metrics", {})}.items()
        }
        info = {"metrics": metrics, "domains": {name: h.info for name, h in found.items()}}
        state, carry = ({name: h[field] for name, h in found.items()} for field in (2, 4))
        return Hypergradient(value, grad, state, info, carry)

    def check(self, lam: Lam, data: Data) -> None:
        """As for each domain with its part of lam; warn of leaves of lam that no domain sees."""
        self._check_names(data)
        for name, f in self.hypergradients.items():
            try:
                f.check(self.view(lam, name), data[name])
            except ValueError as error:
                raise ValueError(f"in the domain {name!r}: {error}") from error

        def seen(lam: Lam) -> Any:
            views = [self.view(lam, name) for name in self.hypergradients]
            return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(eqx.filter(views, eqx.is_inexact_array)))

        warn_unused(seen, lam)

    def _check_names(self, data: Data) -> None:
        """Raise `ValueError` unless there are data of these domains and no others."""
        names = set(data) if isinstance(data, Mapping) else set()
        if names != set(self.hypergradients):
            what = f"those of {', '.join(sorted(names))}" if names else f"a {type(data).__name__}"
            raise ValueError(
                f"the domains are {', '.join(self.hypergradients)} and data are {what}: give a dict with the data of "
                "each domain"
            )


def mean_over_domains(
    hypergradients: Mapping[str, DomainFunction],
    view: View = all_of_lam,
    weights: Mapping[str, float] | None = None,
) -> MeanOverDomains:
    """The mean of hypergradients over domains, whose tasks differ in structure and which share a part of lam.

        f(lam) = sum over d of p_d f_d(v_d(lam)),   grad f = sum over d of p_d J_{v_d}^T grad f_d,   sum of p_d = 1

    with f_d the mean over the tasks of domain d, of any shapes, inner variables, T, dynamics and method of its own,
    and v_d(lam) what it sees of lam: what all domains share and what is the domain's own.

    Arguments:
        hypergradients: for each domain what `mean_over_tasks` (or, for a single task, `hypergradient`) returned.
        view: v, a differentiable function (lam, domain) -> the lam of that domain; by default all of it. Where it
            selects leaves, those of other domains get no gradient from this one.
        weights: positive numbers that p_d is proportional to; `None`: 1 / (number of domains) each. With the numbers
            of tasks f is the mean over all tasks.

    Returns: a function (lam, {domain: data}, carry) -> `Hypergradient`; `grad` is like lam, `state` and `carry` are
    dicts by domain, `info["metrics"]` has "domain/value", f_d, and "domain/NAME" of each metric, `info["domains"]` the
    whole info of each domain. `minimize` takes it, with a `sample` that draws a dict of tasks.
    Raises: `ValueError` for no domain, what is no hypergradient, weights that are not positive or of other domains,
    meshes that differ; when called, for data of other domains, and with the domain's name what the domain's own raises.
    Cost: the sum of the domains', one after the other in one compiled program.
    Reference: Bridge paper 2017, end of Sec. 4 (data sets with structurally different instance spaces); eq. 3.1.
    Do not use it for tasks that masks bring to one shape: those are tasks of one domain, mapped together.

    >>> import jax.numpy as jnp
    >>> from hyperax import GradientDescent, Problem, Reverse, hypergradient, mean_over_tasks
    >>> problem = Problem(
    ...     inner=lambda w, lam, d: jnp.sum((w - lam["own"]) ** 2),
    ...     outer=lambda w, lam, d: jnp.sum((lam["shared"] * w - d) ** 2),
    ...     init=lambda lam, d: jnp.zeros_like(d),
    ... )
    >>> mean = mean_over_tasks(hypergradient(problem, GradientDescent(0.5), Reverse(1)))
    >>> lam = {"shared": jnp.asarray(1.0), "own": {"line": jnp.zeros(1), "plane": jnp.ones(2)}}
    >>> f = mean_over_domains(
    ...     {"line": mean, "plane": mean}, lambda lam, d: {"shared": lam["shared"], "own": lam["own"][d]}
    ... )
    >>> h = f(lam, {"line": jnp.ones((5, 1)), "plane": jnp.zeros((3, 2))})
    >>> print(h.value, h.info["metrics"]["plane/value"], h.grad["own"]["line"], h.grad["own"]["plane"])
    1.5 2.0 [-1.] [1. 1.]
    """
    if not hypergradients:
        raise ValueError("mean_over_domains needs the hypergradient of one domain at least")
    for name, f in hypergradients.items():
        if not isinstance(f, DomainFunction):
            raise ValueError(
                f"the domain {name!r} has a {type(f).__name__}: use what mean_over_tasks(...) or hypergradient(...) "
                "returns"
            )
    weights = dict.fromkeys(hypergradients, 1.0) if weights is None else weights
    if set(weights) != set(hypergradients) or not all(isfinite(p) and p > 0 for p in weights.values()):
        raise ValueError(
            f"weights are {dict(weights)}: give a positive number for each of the domains {', '.join(hypergradients)}"
        )
    if len(_meshes(hypergradients)) > 1:
        raise ValueError("the domains' tasks are shared over different meshes: give mean_over_tasks the same for all")
    total = float(sum(weights.values()))
    # In order of name, as they are after any transformation of JAX: sums are the same everywhere.
    names = sorted(hypergradients)
    return MeanOverDomains(
        {name: hypergradients[name] for name in names}, view, {name: float(weights[name]) / total for name in names}
    )


def _meshes(hypergradients: Mapping[str, DomainFunction]) -> set[Mesh | None]:
    return {f.mesh if isinstance(f, MeanOverTasks) else None for f in hypergradients.values()}
