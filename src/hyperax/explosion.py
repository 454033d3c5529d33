"""Exploding hypergradients: noticed while the run goes on, and said with advice."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from hyperax.rollout import check_steps
from hyperax.stopping import Progress

# How many records before one are its measure: the norms of a healthy run change too, but slowly.
REMEMBERED = 100


class ExplodingHypergradientWarning(RuntimeWarning):
    """The norm of a hypergradient is far above what it was: most likely the inner run amplifies small changes.

    >>> issubclass(ExplodingHypergradientWarning, RuntimeWarning)
    True
    """


@dataclass(frozen=True)
class GradientExplosion:
    """Warn, once a run, of a hypergradient that is not finite or far larger than those before it; stop if asked to:

        ||grad f_T(lam_k)|| > factor median_{i < k} ||grad f_T(lam_i)||      (over the last hundred records at most)

    Derivatives through T steps are products of T Jacobians: where those expand, by a factor of 1.1 only, the product
    is 10^4 after a hundred steps, and f_T, though a smooth function of lam, is a cliff to follow down.

    Arguments:
        factor: > 1. Hypergradients of random tasks differ by a factor of ten without any harm.
        after: records before the first judgement, at least 1.
        stop: whether to end the run also.

    Raises: ValueError for numbers outside these ranges.
    Cost: a median of a hundred numbers per record.
    Reference: Metz et al. 2019, Sec. 2; Pascanu et al. 2013, Sec. 2 (the same in recurrent networks).
    A value or hypergradient that is not finite ends a run of `minimize` by itself, with a `DivergenceWarning`.
    Do not use it to find a hypergradient too large from the first record on: it has nothing to compare with.

    >>> rule = GradientExplosion(factor=100.0, after=3, stop=True)
    >>> history = [{"gradient_norm": norm} for norm in (1.0, 2.0, 1.5, 1e6)]
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore")
    ...     reason = rule(Progress(40, 50, 0.5, {}, 1e6, None, history, 1.0, 1.0, lambda: None))
    >>> print(reason[:90])
    exploding hypergradient: norm 1e+06 at step 40, and 1.5 is the median of the 3 records bef
    """

    factor: float = 100.0
    after: int = 10
    stop: bool = False

    def __post_init__(self) -> None:
        if not self.factor > 1:
            raise ValueError(f"GradientExplosion(factor={self.factor}): use a number above 1, such as 100.")
        check_steps(self.after, "after", 1)

    def __call__(self, progress: Progress) -> str | None:
        """Why to stop, or `None`; the first time in a run, a warning."""
        norms = [record["gradient_norm"] for record in progress.history]
        if not self._explodes(norms):
            return None
        found = f"exploding hypergradient: norm {norms[-1]:.3g} at step {progress.step}"
        if len(norms) > 1:
            before = norms[:-1][-REMEMBERED:]
            found += f", and {median(before):.3g} is the median of the {len(before)} records before"
        if not any(self._explodes(norms[:end]) for end in range(1, len(norms))):
            advice = (
                f"{found}. The inner run amplifies small changes. Try a shorter truncation (MetaTraining(window=...), "
                "Truncated), clipping (optax.chain(optax.clip_by_global_norm(1.0), ...)), or a gradient without "
                "products of Jacobians (EvolutionStrategy); a smaller inner step size helps in any case."
            )
            # To the caller of `minimize`: through _verdict, its list, _after_dispatch, until_stopped and minimize.
            warnings.warn(advice, ExplodingHypergradientWarning, stacklevel=7)
        return found if self.stop else None

    def _explodes(self, norms: Sequence[float]) -> bool:
        """Whether the last of these norms is out of proportion."""
        *before, last = norms
        if not math.isfinite(last):
            return True
        known = [norm for norm in before if math.isfinite(norm)]
        return len(known) >= self.after and last > self.factor * median(known[-REMEMBERED:])
