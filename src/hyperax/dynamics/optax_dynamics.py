"""Any Optax optimizer as inner dynamics."""

from __future__ import annotations

from collections.abc import Callable

import optax

from hyperax.dynamics.dynamics import Dynamics, Gradient, State, Step
from hyperax.problem import Lam, W


class Optax(Dynamics):
    """An Optax optimizer: (u_t, v_t) = update(grad L(w_{t-1}, lam), v_{t-1}, w_{t-1}), w_t = w_{t-1} + u_t.

    Arguments:
        transformation: an Optax gradient transformation, or a function lam -> transformation, so that learning rates,
            betas and weight decays can be hyperparameters: `Optax(lambda lam: optax.adam(lam["lr"], eps_root=1e-8))`.

    Raises: `ValueError` if it is neither.
    Cost: that of the optimizer; the state is (w, the optimizer's state).
    Reference: Franceschi et al. 2018, eq. 6 with auxiliary variables (footnote 2).
    Adam has no derivative where its second moment is zero (the first step of a dead unit): give `eps_root > 0`,
    which puts the constant inside the square root. Do not use optimizers that need the value of the objective
    (line searches): a step receives the gradient alone.

    >>> dynamics = Optax(lambda lam: optax.adam(lam["lr"], b1=lam["b1"], eps_root=1e-8))
    """

    transformation: optax.GradientTransformation | Callable[[Lam], optax.GradientTransformation]

    def __check_init__(self):
        if not isinstance(self.transformation, optax.GradientTransformation) and not callable(self.transformation):
            raise ValueError(
                f"Optax needs an optax transformation or a function of lam that returns one, not "
                f"{type(self.transformation).__name__}"
            )

    def _build(self, lam: Lam) -> optax.GradientTransformation:
        if isinstance(self.transformation, optax.GradientTransformation):
            return self.transformation
        built = self.transformation(lam)
        if not isinstance(built, optax.GradientTransformation):
            raise ValueError(
                f"the function given to Optax returned {type(built).__name__}, not an optax transformation"
            )
        return built

    def init(self, w: W, lam: Lam) -> State:
        """The optimizer's own first state."""
        return State(w, self._build(lam).init(w))

    def step(self, gradient: Gradient, state: State, lam: Lam, t: Step) -> State:
        """One update; the optimizer counts its steps itself, so t is not needed."""
        updates, auxiliary = self._build(lam).update(gradient(state.w, lam), state.auxiliary, state.w)
        return State(optax.apply_updates(state.w, updates), auxiliary)
