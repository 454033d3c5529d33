"""Ridge regression on class indicators as ground model, solved in closed form (R2-D2)."""

from __future__ import annotations

from typing import Any, final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from hyperax.constraints import Logarithmic
from hyperax.fewshot.layers import Statistics
from hyperax.fewshot.learners.formula import FormulaLearner
from hyperax.fewshot.learners.learner import OnFeatures
from hyperax.fewshot.learners.similarities import present, products
from hyperax.fewshot.networks import Network


@final
class RidgeClassifier(FormulaLearner):
    """Few-shot learning with a representation h_lam as hyperparameter and ridge regression as ground model.

        L^j(w, lam) = |H w^T - Y|^2 + rho |w|^2,   H = h_lam(x) over D_tr^j [n, features],   Y one-hot [n, ways],
        w^T = argmin of L^j = (H^T H + rho I)^-1 H^T Y = H^T (H H^T + rho I)^-1 Y,
        logits(x) = alpha w h_lam(x)

    The smaller of the two systems is solved: n equations where there are more features than support images.

    Arguments:
        ways: classes an episode; of episodes with a varying number, the most.
        statistics: where batch normalisation takes its statistics.
        penalty: the first rho > 0, in units of squared features.
        scale: the first alpha > 0: regression aims at 0 and 1, between which a softmax can hardly be confident.

    lam is `{"network": module, "penalty": rho, "scale": alpha}`; `constraint()` keeps both positive, on a logarithmic
    scale. The paper's third number, a shift beta of all logits alike, has no effect on a softmax and is left out.
    Raises: `ValueError` for a penalty or a scale that is not positive.
    Cost: one pass of the network over the episode, and a Cholesky factorisation of size min(n, features).
    Reference: Bertinetto et al. 2019 (R2-D2); Franceschi et al. 2018, Example 3.4 and eq. 8.
    Do not use it where probabilities matter: squares also punish a class for being more than right.

    >>> from hyperax.fewshot import PerImage
    >>> learner, images = RidgeClassifier(ways=2), jnp.asarray([[255, 0], [0, 255]], jnp.uint8).reshape(2, 1, 2, 1)
    >>> lam = learner.lam(PerImage(jnp.ravel))
    >>> learner.adapt(lam, images, jnp.array([0, 1]), steps=0).w.round(3).tolist()
    [[0.5, 0.0], [0.0, 0.5]]
    """

    ways: int
    statistics: Statistics = "set"
    penalty: float = 1.0
    scale: float = 10.0

    def __check_init__(self):
        for name in ("penalty", "scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be positive")

    def lam(
        self,
        network: Network,
        image_shape: tuple[int, int, int] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> dict[str, Any]:
        """The initial outer variables around a network."""
        return {
            "network": network,
            "penalty": jnp.asarray(self.penalty, jnp.float32),
            "scale": jnp.asarray(self.scale, jnp.float32),
        }

    def constraint(self) -> dict[str, Any]:
        """What `minimize` has to keep: a positive penalty and a positive scale."""
        return {"network": None, "penalty": Logarithmic(), "scale": Logarithmic()}

    def init(self, lam: Any, prepared: OnFeatures) -> Float[Array, "ways features"]:
        """The solution w; zero for a class that is not in the task."""
        there = present(prepared.support_targets)[:, None]
        H, Y, rho = prepared.support * there, prepared.support_targets.one_hot * there, lam["penalty"]
        # Rows of padding are zero: they add nothing to H^T H, and equations w_i = 0 to the system in H H^T.
        if H.shape[0] <= H.shape[1]:
            return _solve(products(H, H), rho, Y).T @ H
        return _solve(products(H.T, H.T), rho, H.T @ Y).T

    def inner(self, w: Float[Array, "ways features"], lam: Any, prepared: OnFeatures) -> Array:
        """L: the squared errors of the support images and the penalty."""
        residuals = prepared.support @ w.T - prepared.support_targets.one_hot
        there = present(prepared.support_targets)[:, None]
        return jnp.sum(there * residuals**2) + lam["penalty"] * jnp.sum(w**2)

    def logits(self, w: Float[Array, "ways features"], lam: Any, prepared: OnFeatures) -> Float[Array, "NQ ways"]:
        """The scaled outputs of the regression."""
        return lam["scale"] * prepared.query @ w.T


def _solve(gram: Float[Array, "n n"], rho: Array, right: Float[Array, "n ways"]) -> Float[Array, "n ways"]:
    """(G + rho I)^-1 B for a symmetric G >= 0."""
    return jax.scipy.linalg.solve(gram + rho * jnp.eye(len(gram), dtype=gram.dtype), right, assume_a="pos")
