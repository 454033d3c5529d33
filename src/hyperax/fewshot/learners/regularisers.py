"""Ground regularisers that are learned: towards what, and how strongly, the inner variables are drawn."""

from __future__ import annotations

from typing import Any, final

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from hyperax.constraints import Positive, Projected
from hyperax.fewshot.learners.losses import sets_of
from hyperax.rollout import check_steps


@final
class LearnedL2(eqx.Module):
    """A learned centre, and a learned strength for each parameter: what couples tasks that are alike.

        R(w, lam) = sum_j rho_j w_j^2 / 2 - b_j w_j = sum_j (rho_j / 2) (w_j - c_j)^2 - const,   c_j = b_j / rho_j,
        lam = (rho, b),   rho >= 0

    Arguments:
        w: an inner variable, or its shapes; rho and b are pytrees like it.

    Both start at 0, so there is no effect at first. The pull b is learned and not the centre c, which would have no
    gradient as long as rho is 0, nor rho a reason to grow as long as c is wrong. rho is kept from being negative by
    projection, which lets it start at, and return to, exactly 0.
    Cost: elementwise.
    Reference: Bridge paper 2017, Sec. 3 (a learned multitask regularizer).
    Do not use it for the rows of a softmax classifier of few-shot episodes, where one row c would have to serve every
    class: predictions and gradients see only differences of rows, and c cancels in them (`TowardsClassMeans`).

    Tasks y = a . x whose a lie around (1, -1): what one point cannot say, the centre does.

    >>> import hyperax as hx, optax
    >>> keys = jax.random.split(jax.random.key(0), 2)
    >>> a = jnp.array([1.0, -1.0]) + 0.1 * jax.random.normal(keys[0], (50, 2))
    >>> x = jax.random.uniform(keys[1], (50, 2, 2), minval=-1.0)
    >>> loss = lambda w, task, i: (task["x"][i] @ (w - task["a"])) ** 2
    >>> problem = hx.Problem(
    ...     inner=lambda w, lam, task: loss(w, task, 0) + lam(w),
    ...     outer=lambda w, lam, task: loss(w, task, 1),
    ...     init=lambda lam, task: jnp.zeros(2),
    ... )
    >>> f = hx.mean_over_tasks(hx.hypergradient(problem, hx.GradientDescent(0.1), hx.Reverse(10)))
    >>> lam, adam = LearnedL2(jnp.zeros(2)), optax.adam(0.1)
    >>> solution = hx.minimize(f, lam, data={"x": x, "a": a}, optimizer=adam, steps=100, constraint=lam.constraint())
    >>> solution.value < 0.1 * solution.history[0]["value"], jnp.sign(solution.lam.centre).tolist()
    (True, [1.0, -1.0])
    """

    strength: PyTree
    pull: PyTree

    def __init__(self, w: PyTree):
        self.strength = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), w)
        self.pull = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), w)

    @property
    def centre(self) -> PyTree:
        """The centre c = b / rho, which is not finite where rho is 0."""
        return jax.tree.map(jnp.divide, self.pull, self.strength)

    def constraint(self) -> Any:
        """No negative strength."""
        return sets_of(self, {"strength": Projected(Positive())})

    def __call__(self, w: PyTree) -> Array:
        """R."""
        term = lambda w, rho, b: jnp.sum(rho * jnp.square(w) / 2 - b * w)
        return sum(jax.tree.leaves(jax.tree.map(term, w, self.strength, self.pull)), jnp.zeros(()))


@final
class TowardsClassMeans(eqx.Module):
    """L2 regularisation of a linear classifier with a learned map from the class means of its features to its centre.

        R(w, lam) = sum_j sum_c rho_j w_cj^2 / 2 - s_j mu_cj w_cj,   lam = (rho, s),   rho >= 0

    with mu_c the mean feature of class c in the support set: (rho_j / 2) (w_cj - c_cj)^2 and a constant, with the
    centre c_cj = (s_j / rho_j) mu_cj. A centre that all classes share would do nothing: only differences of rows count.
    This one draws the classifier to that of prototypes, feature by feature; s < 0 draws it away.

    Arguments:
        features: their number.

    Both start at 0, so there is no effect at first; rho is kept from being negative by projection.
    Cost: elementwise in w, and the class means once an episode.
    Reference: Bridge paper 2017, Sec. 3 (a learned regularizer); Snell et al. 2017, eq. 1, for the class means.
    Do not use it on features that differ in size by orders: rho_j and s_j would have to, too.

    >>> regulariser = TowardsClassMeans(features=2)
    >>> means, w = jnp.array([[1.0, 0.0]]), jnp.array([[0.5, 3.0]])
    >>> strong = eqx.tree_at(lambda r: (r.strength, r.pull), regulariser, (jnp.ones(2), jnp.ones(2)))
    >>> float(regulariser(w, means)), float(strong(w, means))
    (0.0, 4.125)
    """

    strength: Float[Array, " features"]
    pull: Float[Array, " features"]

    def __init__(self, features: int):
        check_steps(features, "features", 1)
        self.strength = jnp.zeros(features, jnp.float32)
        self.pull = jnp.zeros(features, jnp.float32)

    def constraint(self) -> Any:
        """No negative strength."""
        return sets_of(self, {"strength": Projected(Positive())})

    def __call__(self, weight: Float[Array, "ways features"], means: Float[Array, "ways features"]) -> Array:
        """R."""
        return jnp.sum(self.strength * jnp.square(weight) / 2 - self.pull * means * weight)
