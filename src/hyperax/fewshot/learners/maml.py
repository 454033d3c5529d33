"""The published learners of an initialisation, and the Bridge paper's mixed designs, as settings of one."""

from __future__ import annotations

from typing import Any

import equinox as eqx

from hyperax.fewshot.learners.initialisation import Initialisation
from hyperax.fewshot.learners.partition import LastStages, ShareOfFilters
from hyperax.linear_solvers import ConjugateGradient
from hyperax.methods import FirstOrder, Implicit


def maml(ways: int, step_size: float = 0.4, first_order: bool = False, **settings: Any) -> Initialisation:
    """Model-agnostic meta-learning: the start of all parameters is learned through T steps of gradient descent.

        w_0 = lam,   w_t = w_{t-1} - eta grad L(w_{t-1}),   f_T(lam) = mean over tasks of E(w_T)

    Arguments:
        ways: classes an episode.
        step_size: eta; 0.4 (T = 1) in the paper's Omniglot runs, 0.01 (T = 5) on miniImageNet.
        first_order: leave the second derivatives out: the gradient of E at w_T, taken for that of f_T at lam.
        settings: other arguments of `Initialisation`.

    Returns: the learner, an `Initialisation`.
    Cost: exact, about three times the inner run, and memory T passes; first order, the inner run and one gradient.
    Reference: Finn et al. 2017, Algorithm 2, Sec. 5.2 (first order). There the head is "learned".
    Do not use it with many steps where memory is short: `differentiated_by=eqx.Partial(Reverse, segment="sqrt")`.

    >>> maml(5).method(3), maml(5, first_order=True).method(3)
    (Reverse(steps=3), FirstOrder(steps=3))
    """
    if first_order:
        settings = {"differentiated_by": FirstOrder} | settings
    return Initialisation(ways, step_size=step_size, **settings)


def anil(ways: int, step_size: float = 0.4, **settings: Any) -> Initialisation:
    """Almost no inner loop: as MAML, with the head alone adapted and its start learned.

        w = head,   w_0 = lam_head,   w_t = w_{t-1} - eta grad L(w_{t-1}, lam_network)

    Arguments:
        ways: classes an episode.
        step_size: eta.
        settings: other arguments of `Initialisation`. With head="zero" it is `HyperRepresentation`.

    Returns: the learner, an `Initialisation`.
    Cost: that of `HyperRepresentation`: the features are computed once an episode.
    Reference: Raghu et al. 2020, Sec. 4.
    Do not use it where the tasks need other features.

    >>> anil(5).adapted, anil(5).head
    (False, 'learned')
    """
    settings = {"head": "learned"} | settings
    return Initialisation(ways, step_size=step_size, adapted=False, **settings)


def meta_sgd(ways: int, step_size: float = 0.1, **settings: Any) -> Initialisation:
    """Meta-SGD: as MAML, with a step size for each parameter learned beside its start.

        w_0 = lam_0,   w_t = w_{t-1} - alpha * grad L(w_{t-1}),   lam = (lam_0, alpha), alpha like w and free in sign

    Arguments:
        ways: classes an episode.
        step_size: the initial value of every entry of alpha; the paper draws it from [0.005, 0.1] and takes T = 1.
        settings: other arguments of `Initialisation`.

    Returns: the learner, an `Initialisation`.
    Cost: as MAML; lam is twice as large.
    Reference: Li et al. 2017, Algorithm 1.
    Do not use it with a large T in training: free step sizes can make the inner run diverge.

    >>> meta_sgd(5).learn_step_sizes
    True
    """
    return Initialisation(ways, step_size=step_size, learn_step_sizes=True, **settings)


def imaml(
    ways: int, proximity: float = 2.0, step_size: float = 0.1, solver_steps: int = 5, **settings: Any
) -> Initialisation:
    """Implicit MAML: the inner problem is held near lam, solved, and differentiated implicitly.

        w* = argmin over w of L(w) + (rho / 2) |w - lam|^2,   grad f = (I + grad^2 L(w*) / rho)^-1 grad E(w*)

    Arguments:
        ways: classes an episode.
        proximity: rho, in units of L / w^2; 2 in the paper's Omniglot runs.
        step_size: eta < 2 / (nu + rho), nu the largest curvature of L.
        solver_steps: of conjugate gradients; 5 in the paper.
        settings: other arguments of `Initialisation`.

    Returns: the learner, an `Initialisation`.
    Cost: the inner run without derivatives and `solver_steps` + 1 Hessian-vector products; memory independent of T.
    Reference: Rajeswaran et al. 2019, Lemma 1 and Algorithm 1; T = 16 in their 5-way Omniglot runs.
    Do not use it with few steps, where w_T is far from w*, nor where rho is below the negative curvature of L: there w*
    is no function of lam.

    >>> imaml(5).method(16).solver.max_steps
    5
    """
    # The residual that conjugate gradients stop at: in float32 five steps seldom come near it.
    method = eqx.Partial(Implicit, solver=ConjugateGradient(max_steps=solver_steps))
    settings = {"differentiated_by": method} | settings
    return Initialisation(ways, step_size=step_size, proximity=proximity, **settings)


def in_depth(ways: int, stages: int, step_size: float = 0.4, **settings: Any) -> Initialisation:
    """The mixed design in depth: lower layers are hyperparameters, upper ones are initialised and adapted.

        h = upper o lower,   w = (upper, head),   w_0 = (lam_upper, lam_head or 0),   lower = lam_lower throughout

    Arguments:
        ways: classes an episode.
        stages: how many of the last ones are adapted; between `HyperRepresentation` (none) and MAML (all).
        step_size: eta.
        settings: other arguments of `Initialisation`.

    Returns: the learner, an `Initialisation`.
    Cost: as MAML for the upper stages; the lower ones are computed, and differentiated, once an episode.
    Reference: Bridge paper 2017, end of Sec. 4.
    Do not use it on a network without the property `stages`.

    >>> in_depth(5, stages=2).adapted
    LastStages(count=2)
    """
    return Initialisation(ways, step_size=step_size, adapted=LastStages(stages), **settings)


def in_width(ways: int, share: float, step_size: float = 0.4, **settings: Any) -> Initialisation:
    """The mixed design in width: of every layer, the first filters are initialised and adapted, the others shared.

        w = (those filters, head),   w_0 = (lam_those, lam_head or 0),   the other filters = lam_others throughout

    Arguments:
        ways: classes an episode.
        share: the part of the filters of a layer that is adapted, in (0, 1].
        step_size: eta.
        settings: other arguments of `Initialisation`.

    Returns: the learner, an `Initialisation`.
    Cost: that of MAML: activations depend on adapted filters from the first layer on.
    Reference: Bridge paper 2017, end of Sec. 4.
    Do not use it to save time: `in_depth` does.

    >>> in_width(5, share=0.5).adapted
    ShareOfFilters(share=0.5)
    """
    return Initialisation(ways, step_size=step_size, adapted=ShareOfFilters(share), **settings)
