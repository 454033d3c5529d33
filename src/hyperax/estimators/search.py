"""The search for L2 coefficients: a grid of common values, then L-BFGS-B on their logarithms."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy.optimize
from sklearn.exceptions import ConvergenceWarning

Evaluate = Callable[[np.ndarray], tuple[float, np.ndarray]]
"""log alpha [d] -> (f, its gradient [d])."""

GRID = 17  # common values: one a decade between the default bounds
NEARLY = 1.01


class Found(NamedTuple):
    """What the search found.

    Fields:
        log_alpha: [d], of the lowest f (with the prior's penalty).
        value: f there.
        curve: f at each evaluation, in order: first the grid.
        iterations: of L-BFGS-B.
    """

    log_alpha: np.ndarray
    value: float
    curve: np.ndarray
    iterations: int


class Recorder:
    """F on log alpha [d] as a function of one theta a group: log alpha_j = theta[group_j]; every f is kept."""

    def __init__(self, evaluate: Evaluate, group: np.ndarray):
        self.evaluate, self.group, self.curve = evaluate, group, []

    def __call__(self, theta: np.ndarray) -> tuple[float, np.ndarray]:
        """(f, its gradient [number of groups])."""
        value, slope = self.evaluate(theta[self.group])
        if not np.isfinite(value):
            raise ValueError(
                "the validation error is not finite: scale the columns of X and y to about 1, or raise the lower bound "
                "of alpha_bounds"
            )
        self.curve.append(float(value))
        return float(value), np.bincount(self.group, slope, minlength=theta.size)


def search(
    evaluate: Evaluate,
    group: np.ndarray,
    bounds: tuple[float, float],
    *,
    examples: float,
    unit: float | None,
    shrinkage: float,
    max_iter: int,
    tol: float,
    impatient: bool = False,
) -> Found:
    """The log alpha of the lowest validation error: the best common value, then one value for each of G groups.

        common = argmin over t of f(t, ..., t)
        theta  = argmin f(theta) + shrinkage unit (G / n^2) sum over g of (theta_g - max(mean(theta), common))^2

    The penalty is a Gaussian prior: f / unit is an example's error in nats, and theta has the variance n / (2 G) a
    group, since the more hyperparameters there are for n examples, the more they fit the noise of the folds. The prior
    follows the mean upwards only: many small alphas together can fit separable folds without an error.

    Arguments:
        evaluate: f and its gradient; called first with large alphas, so that a warm start follows a path.
        group: [d], the group of each feature, 0 ... G - 1.
        bounds: of log alpha.
        examples: n, how many are validated.
        unit: of f, for a nat; `None` takes 2 f(common), that of Gaussian noise.
        shrinkage: 0 for no penalty.
        max_iter: of L-BFGS-B, in each of the two searches.
        tol: it stops when an iteration lowers f by less than tol times f(common).
        impatient: where small alphas are costly: leave the grid where f is above its least value twice; end the search
            where f is below tol times f at the largest alpha, for nothing is left to gain; tol is a part of that f.

    Cost: at most 17 evaluations of the grid, and one to two for each iteration.
    """
    one = Recorder(evaluate, np.zeros_like(group))
    grid = np.linspace(bounds[1], bounds[0], GRID)
    values: list[float] = []
    for t in grid:
        values.append(one(np.array([t]))[0])
        if impatient and (min(values[-2:]) > min(values) or values[-1] < tol * values[0]):
            break
    best = int(np.argmin(values))
    if impatient and values[best] < tol * values[0]:
        return Found(np.full(group.shape, grid[best]), values[best], np.asarray(one.curve), 0)
    step = grid[0] - grid[1]
    near = np.clip([grid[best] - step, grid[best] + step], *bounds)
    size = values[0] if impatient else values[best]
    common = _descend(one, grid[best : best + 1], near, size, max_iter, tol if impatient else 1e-2 * tol)
    G = int(group.max()) + 1
    if G == 1:
        return _found(common, group, one.curve)
    each = Recorder(evaluate, group)
    each.curve = one.curve
    strength = shrinkage * 2 * G / examples**2 * (2 * common.value if unit is None else unit)
    # Where alpha is too small to matter f is flat, and says nothing: start at the largest that is nearly as good.
    start = next(t for t, value in zip(grid, values, strict=False) if value <= NEARLY * values[best])
    found = _descend(each, np.full(G, start), bounds, size, max_iter, tol, strength, common.theta[0])
    if found.penalised > common.value:
        found = common._replace(theta=np.full(G, common.theta[0]))
    return _found(found._replace(iterations=found.iterations + common.iterations), group, each.curve)


class _Point(NamedTuple):
    theta: np.ndarray
    value: float
    penalised: float
    iterations: int


def _found(point: _Point, group: np.ndarray, curve: list[float]) -> Found:
    return Found(point.theta[group], point.value, np.asarray(curve), point.iterations)


def _descend(
    function: Recorder,
    start: np.ndarray,
    bounds: tuple[float, float] | np.ndarray,
    unit: float,
    max_iter: int,
    tol: float,
    strength: float = 0.0,
    least: float = -np.inf,
) -> _Point:
    """L-BFGS-B from `start`, on (f + strength |theta - max(mean(theta), least)|^2 / 2) / unit."""
    unit = unit or 1.0

    # The first step of L-BFGS-B has length 1 in its own variables: one unit of log alpha for each of G.
    stride = np.sqrt(start.size)

    def objective(u: np.ndarray) -> tuple[float, np.ndarray]:
        theta = stride * u
        value, slope = function(theta)
        away = theta - max(theta.mean(), least)
        return (value + strength * away @ away / 2) / unit, stride * (slope + strength * away) / unit

    options = {"maxiter": max_iter, "ftol": tol, "gtol": 1e-2 * tol}
    box = [tuple(np.asarray(bounds) / stride)] * start.size
    result = scipy.optimize.minimize(
        objective, start / stride, jac=True, method="L-BFGS-B", bounds=box, options=options
    )
    if result.nit >= max_iter:
        warnings.warn(
            f"the search for alpha stopped after max_iter={max_iter} iterations: raise max_iter or tol",
            ConvergenceWarning,
            stacklevel=2,
        )
    theta = stride * np.asarray(result.x)
    away = theta - max(theta.mean(), least)
    penalised = float(result.fun * unit)
    return _Point(theta, penalised - float(strength * away @ away / 2), penalised, int(result.nit))
