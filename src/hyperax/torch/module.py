"""The short way: a PyTorch module, its loss and a usual optimizer as a problem, with what is to be tuned in lam."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn

from hyperax.dynamics.dynamics import arity
from hyperax.rollout import check_steps
from hyperax.torch.batches import Batches
from hyperax.torch.crossing import to_torch
from hyperax.torch.optimizers import OPTIMIZERS, Optimizer
from hyperax.torch.problem import JaxObjective, Problem
from hyperax.torch.seeds import mixed
from hyperax.torch.settings import Setting, matching
from hyperax.torch.training import ModuleRun, Training, Validation
from hyperax.tuning.hyperparameters import Hyperparameter, sets_of, values_of

_OTHERS = ("loss_weights", "example_weights", "init", "parameters")


def per_layer(module: nn.Module, value: Any) -> dict[str, Any]:
    """The same value for every layer of a module that has trainable parameters, by the layer's name.

        {"conv1": value, "head": value, ...}

    Arguments:
        module: any.
        value: a number, a schedule, or a `Hyperparameter` of either, such as `hyperax.log_scale(1e-4)`.

    Returns: a dict for `tune` or `fixed` of `from_module`.
    Raises: `ValueError` for a module without trainable parameters.
    Cost: none to speak of.
    Do not use it where few groups are enough: `{"features.*": a, "*": b}` is a dict of the same kind.

    >>> per_layer(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)), 0.1)
    {'0': 0.1, '2': 0.1}
    """
    names = dict.fromkeys(name.rpartition(".")[0] for name, p in module.named_parameters() if p.requires_grad)
    if not names:
        raise ValueError("the module has no trainable parameter, so there is nothing to set for a layer")
    # Parameters of the module itself belong to the layer "", which no pattern but their own names would match.
    own = [name for name, p in module.named_parameters(recurse=False) if p.requires_grad]
    return dict.fromkeys([*(name for name in names if name), *own], value)


def from_module(
    module: nn.Module,
    loss: Callable[..., Any],
    optimizer: str = "sgd",
    *,
    tune: dict[str, Any],
    data: Any,
    validation: Any,
    fixed: dict[str, Any] | None = None,
    validation_loss: Callable[..., Any] | JaxObjective | None = None,
    has_metrics: bool = False,
    batch_size: int | None = None,
    steps: int | None = None,
    buffers: str | None = None,
    seed: int | None = 0,
) -> Training:
    """The training of a module as a bilevel problem: w its parameters, lam what `tune` names.

        min over lam of E(w_T, lam),   w_t = w_{t-1} + update(grad_w L(w_{t-1}, lam, batch_t), lam, t)

    Arguments:
        module: any; it is copied, and stays as it is. Parameters with `requires_grad=False` are constants.
        loss: L, (model, batch) -> scalar, or (model, batch, lam); `model` is called as the module is, and
            `model.tensors` has its parameters and buffers of now, by name. It may also return the
            losses of single examples [B], of which the mean is taken, or a dict of terms, which are summed.
        optimizer: "sgd", "momentum", "adam", "adamw" or "rmsprop", with the settings and defaults of `torch.optim`
            under the names `step_size`, `momentum`, `beta1`, `beta2`, `alpha`, `eps`, `weight_decay`. sqrt(v) + eps is
            sqrt(v + eps^2) here, which has a derivative at v = 0.
        tune: what is in lam, with initial values:
            settings of the optimizer: a number; [K] numbers, the knots of a schedule over `steps`, linear between them;
                or {layer, or pattern of parameter names: either} (`per_layer` makes one), the most specific counts;
            `loss_weights`: {term: weight} of a loss that returns terms (others have weight one);
            `example_weights`: [n] weights of the training examples, for a loss that returns [B];
            `init`: patterns of parameters whose initial values are in lam, `"*"` for all;
            `parameters`: patterns of parameters that are in lam themselves, and not trained by the steps;
            any other name, for a loss that takes lam.
            Values are numbers, lists, arrays, or with a set to stay in, `hyperax.log_scale(1e-4)` and the like.
        data: training examples: tensors, a `Dataset` or a `DataLoader` (see `Batches`).
        validation: what E sees, whole: a pytree of tensors, or a `Dataset` or `DataLoader`, collated once.
        fixed: settings that are not tuned, in the same forms. `step_size` must be here or in `tune`.
        validation_loss: E, (model, validation) -> scalar, the module in evaluation mode; `None` is the mean of `loss`,
            its terms with weight one. Or a `JaxObjective` of (state, lam, run).
        has_metrics: whether it also returns metrics.
        batch_size: examples a step; `None` is the loader's own, or all.
        steps: T, where there are schedules.
        buffers: of layers that keep statistics (batch normalisation): "state", they are updated by every step, carried
            along, used in E and differentiated; or "frozen", they stay as they are and normalise in training too.
        seed: of mini-batches and of dropout masks: those of step t are a function of (seed, run, t). `None` leaves
            torch's random numbers alone (and mini-batches are as with 0).

    Returns: a `Training` with `problem`, `lam` and `constraint`.
    Raises: `ValueError` for unknown optimizers, settings and names, patterns without a match, and a module whose
    buffers change in training if `buffers` does not say what to do.
    Cost: one training loss here; a step costs as much as in plain PyTorch.
    Reference: Franceschi et al. 2018; step sizes and schedules as in Maclaurin et al. 2015; example weights as in
    Franceschi et al. 2017 (ICML), Sec. 5.1.
    Do not use it for a training loop with several networks or losses that alternate: write its step, `Problem`.

    >>> import hyperax as hx, hyperax.torch as ht, optax
    >>> x = torch.linspace(-1, 1, 24)[:, None]
    >>> training = from_module(
    ...     nn.Linear(1, 1), lambda model, batch: (model(batch[0]) - batch[1]).pow(2).mean(), "momentum",
    ...     tune={"step_size": hx.log_scale([0.05, 0.05])}, steps=9,
    ...     data=(x, 3 * x), validation=(x, 3 * x), batch_size=8)
    >>> f = ht.hypergradient(training.problem, hx.Reverse(9))
    >>> found = hx.minimize(f, training.lam, constraint=training.constraint, optimizer=optax.adam(0.1), steps=3)
    >>> found.value < found.history[0]["value"]
    True
    """
    checked = _checked(loss, optimizer, tune, fixed or {}, buffers, seed)
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not trainable:
        raise ValueError("the module has no trainable parameter, so there are no inner variables")
    in_lam = matching(tune["parameters"], trainable, "parameters") if "parameters" in tune else []
    w = {name: p for name, p in trainable.items() if name not in in_lam}
    if not w:
        raise ValueError("all parameters are in lam, so there are no inner variables: leave some of them to the steps")
    starting = matching(tune["init"], w, "init") if "init" in tune else []
    nodes = {name: _as_arrays(node) for name, node in tune.items() if name not in ("init", "parameters")}
    for name, chosen in (("init", starting), ("parameters", in_lam)):
        if name in tune:
            nodes[name] = {p: jnp.asarray(trainable[p].detach().cpu().numpy()) for p in chosen}
    lam = jax.tree.map(jnp.asarray, values_of(nodes))
    settings = to_torch(jax.tree.map(jnp.asarray, values_of(_as_arrays(fixed or {}))))
    settings = {name: settings.get(name, default) for name, default in checked.settings.items()}
    forms = {
        name: Setting(name, lam.get(name, settings[name]), w, steps, 0.0 if name == "weight_decay" else None)
        for name in checked.settings
    }
    weighted = "example_weights" in tune
    batches = Batches(data, batch_size, seed=seed or 0, with_index=weighted)
    if weighted and lam["example_weights"].shape != (batches.count,):
        raise ValueError(
            f"example_weights has shape {list(lam['example_weights'].shape)}; give one for each of the {batches.count} "
            "examples"
        )
    run = ModuleRun(module, loss, checked, forms, settings, list(w), in_lam, starting, weighted)
    run.keep_buffers(buffers, to_torch(lam, run.device), batches(None, 1))
    whole = batches.size is None
    if whole:
        run.everything = batches(None, 1)
    outer = validation_loss
    if not isinstance(outer, JaxObjective):
        outer = Validation(run, loss if outer is None else outer, outer is None, _whole(validation, run.device))
    problem = Problem(
        step=run.step,
        outer=outer,
        init=run.init,
        batch=None if whole else batches,
        inner=run.inner,
        has_metrics=has_metrics,
        seed=None if seed is None else lambda number: mixed(seed, 0 if number is None else int(number)),
        device=run.device,
        example=to_torch(lam, run.device),
    )
    return Training(problem, lam, sets_of(nodes), run.module, run.part_in_lam)


def _checked(loss: Any, optimizer: Any, tune: Any, fixed: Any, buffers: Any, seed: Any) -> Optimizer:
    """The optimizer of this name; `ValueError` for what no module could make right."""
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer is {optimizer!r}; use one of {', '.join(OPTIMIZERS)}, or write the step: Problem")
    chosen = OPTIMIZERS[optimizer]
    if not callable(loss) or arity(loss) not in (2, 3):
        raise ValueError(f"loss is {loss!r}; use a function (model, batch) or (model, batch, lam)")
    if buffers not in (None, "state", "frozen"):
        raise ValueError(f'buffers is {buffers!r}; use "state" or "frozen"')
    if seed is not None:
        check_steps(seed, "seed")
    if not isinstance(tune, dict) or not tune:
        raise ValueError('tune is to name what lam holds, such as {"step_size": hyperax.log_scale(0.1)}')
    known = [*chosen.settings, *_OTHERS]
    unknown = [name for name in fixed if name not in chosen.settings]
    unknown += [] if arity(loss) == 3 else [name for name in tune if name not in known]
    if unknown:
        raise ValueError(
            f"{optimizer} has no {', '.join(unknown)}; it has {', '.join(chosen.settings)}, and tune may have "
            f"{', '.join(_OTHERS)}, and what else a loss (model, batch, lam) reads"
        )
    twice = [name for name in fixed if name in tune]
    if twice:
        raise ValueError(f"{', '.join(twice)} cannot be both tuned and fixed: leave it out of one of them")
    missing = [name for name, default in chosen.settings.items() if default is None and name not in {**tune, **fixed}]
    if missing:
        raise ValueError(f"{optimizer} needs {', '.join(missing)}: put it into tune, or into fixed={{...}}")
    return chosen


def _as_arrays(node: Any) -> Any:
    """The node with lists of numbers as arrays, and numbers as floats; sets stay."""
    if isinstance(node, Hyperparameter):
        return node
    if isinstance(node, dict):
        return {name: _as_arrays(one) for name, one in node.items()}
    if isinstance(node, torch.Tensor):
        node = node.detach().cpu().numpy()
    try:
        return jnp.asarray(np.asarray(node, float))
    except (TypeError, ValueError):
        raise ValueError(f"{node!r} is no value to tune: use a number, a list of them, an array or a set") from None


def _whole(validation: Any, device: torch.device) -> Any:
    """The validation examples as one batch, where the module is."""
    batch = Batches(validation)
    batch.size = None
    return jax.tree.map(lambda x: x.to(device) if isinstance(x, torch.Tensor) else x, batch(None, 1))
