"""The short way: a PyTorch module, its loss and a usual optimizer as a problem, with what is to be tuned in lam."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

from hyperax.dynamics.dynamics import arity
from hyperax.rollout import check_steps
from hyperax.torch.batches import Batches, check_sampler
from hyperax.torch.crossing import to_torch
from hyperax.torch.names import check_names, optimizer_named
from hyperax.torch.problem import JaxObjective, Problem
from hyperax.torch.seeds import mixed, seeded
from hyperax.torch.settings import Setting, matching
from hyperax.torch.trained import Training, described, named_sets
from hyperax.torch.training import ModuleRun, Validation, moved
from hyperax.torch.values import check_patterns, constant, precision_of, setting, shown, type_in_jax, values
from hyperax.tuning.hyperparameters import sets_of, values_of


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
    validation_batch_size: int | None = None,
    steps: int | None = None,
    buffers: str | None = None,
    seed: int | None = 0,
) -> Training:
    """The training of a module as a bilevel problem: w its parameters, lam what `tune` names.

        min over lam of E(w_T, lam),   w_t = w_{t-1} + update(grad_w L(w_{t-1}, lam, batch_t), lam, t)

    Arguments:
        module: any; it is copied, and stays as it is. Parameters with `requires_grad=False` are constants. It is
            trained in training mode, whatever mode it is in; but layers that were put into evaluation mode in a module
            that is in training mode stay in it (batch normalisation then uses its running statistics, and needs no
            `buffers`; dropout is off).
        loss: L, (model, batch) -> scalar, or (model, batch, lam); `model` is used as the module is (see `Model`):
            `model(x)`, `model.encoder(x)`, `model.parameters()` are those of now; the module itself stays at its first
            values. It may also return the losses of single examples [B], of which the mean is taken, or a dict of
            terms, which are summed.
        optimizer: "sgd", "momentum", "adam", "adamw" or "rmsprop", with the settings and defaults of `torch.optim`
            under the names `step_size`, `momentum`, `beta1`, `beta2`, `alpha`, `eps`, `weight_decay`. sqrt(v) + eps is
            sqrt(v + eps^2) here, which has a derivative at v = 0.
        tune: what is in lam, with initial values:
            settings of the optimizer: a number; [K] numbers, K <= `steps`, the knots of a schedule over `steps`, linear
                between them; or {layer, or pattern of parameter names: either} (`per_layer` makes one), the most
                specific counts. Parameters that no pattern of `weight_decay` matches have none, with "adamw" too (its
                0.01 is for a `weight_decay` that is not given at all); patterns of other settings must match all;
            `loss_weights`: {term: weight} of a loss that returns terms (others have weight one);
            `example_weights`: [n] weights of the training examples, for a loss that returns [B];
            `init`: patterns of parameters whose initial values are in lam, `"*"` for all;
            `parameters`: patterns of parameters that are in lam themselves, and not trained by the steps;
            any other name, for a loss that takes lam.
            Values are numbers, lists, arrays, or with a set to stay in, `hyperax.log_scale(1e-4)` and the like. In lam
            they have the module's precision, float32 at least, if JAX can hold it.
        data: training examples: tensors, NumPy arrays, a `Dataset` or a `DataLoader` (see `Batches`).
        validation: what E sees: a pytree of tensors or arrays, or a `Dataset` or `DataLoader`.
        fixed: settings that are not tuned, in the same forms. `step_size` must be here or in `tune`.
        validation_loss: E, (model, validation) -> scalar, the module in evaluation mode; `None` is the mean of `loss`,
            its terms with weight one, unless it reads lam. Or a `JaxObjective` of (state, lam, run).
        has_metrics: whether it also returns metrics.
        batch_size: examples a step; `None` is the loader's own, or all.
        validation_batch_size: how many validation examples E sees, others in each run (`sample` of `minimize` draws
            runs); `None` is all, collated once, whatever the batch size of a loader.
        steps: T: needed where there are schedules, and the default of `Training.trained`.
        buffers: of layers that keep statistics (batch normalisation): "state", they are updated by every step, carried
            along, used in E and differentiated; or "frozen", they stay as they are and normalise in training too.
        seed: of mini-batches and of dropout masks: those of step t are a function of (seed, run, t). `None` leaves
            torch's random numbers alone (and mini-batches are as with 0).

    Returns: a `Training` with `problem`, `lam` and `constraint`. `problem.inner` is L + 1/2 sum of weight_decay |w|^2,
    for `Implicit`; `None` where the steps descend no such function, with decay beside the gradient ("adamw") or of a
    schedule.
    Raises: `ValueError` for unknown optimizers, settings and names, values out of range, patterns without a match, a
    loss of (model, batch, lam) without `validation_loss`, and a module whose buffers change in training if `buffers`
    does not say what to do. A `UserWarning` for a module in float64 while JAX is in float32.
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
    chosen, fixed = optimizer_named(optimizer), {} if fixed is None else fixed
    check_names(optimizer, chosen, tune, fixed, callable(loss) and arity(loss) == 3)
    _check(loss, validation_loss, tune, buffers, seed, steps)
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not trainable:
        raise ValueError("the module has no trainable parameter, so there are no inner variables")
    in_lam = matching(tune["parameters"], trainable, "parameters") if "parameters" in tune else []
    w = {name: p for name, p in trainable.items() if name not in in_lam}
    if not w:
        raise ValueError("all parameters are in lam, so there are no inner variables: leave some of them to the steps")
    starting = matching(tune["init"], w, "init") if "init" in tune else []
    precision = precision_of(module)
    dtype = type_in_jax(precision)
    nodes = {
        name: setting("tune", name, node, dtype) if name in chosen.settings else values(f'tune["{name}"]', node, dtype)
        for name, node in tune.items()
        if name not in ("init", "parameters")
    }
    for name, learned in (("init", starting), ("parameters", in_lam)):
        if name in tune:
            nodes[name] = {p: values(p, trainable[p], dtype) for p in learned}
    lam = jax.tree.map(jnp.asarray, values_of(nodes))
    device = next(iter(w.values())).device
    own = {name: setting("fixed", name, node, np.float64) for name, node in fixed.items()}
    settings = chosen.settings | {name: constant(node, precision, device) for name, node in own.items()}
    forms = {
        name: Setting(name, lam.get(name, settings[name]), w, steps, 0.0 if name == "weight_decay" else None)
        for name in chosen.settings
    }
    weighted = "example_weights" in tune
    batches = Batches(data, batch_size, seed=seed or 0, with_index=weighted)
    if weighted and lam["example_weights"].shape != (batches.count,):
        raise ValueError(
            f"example_weights has shape {list(lam['example_weights'].shape)}; give one for each of the {batches.count} "
            "examples"
        )
    run = ModuleRun(module, loss, chosen, forms, settings, list(w), in_lam, starting, weighted)
    example = to_torch(lam, device)
    run.structure = jax.tree.structure(example)
    with seeded(0, device):
        first = batches(None, 1)
    run.keep_buffers(buffers, example, first)
    whole = batches.size is None
    if whole:
        run.everything = moved(first, device)
    outer = validation_loss
    seen = _seen_by_outer(validation, validation_batch_size, seed or 0, device)
    if not isinstance(outer, JaxObjective):
        outer = Validation(run, loss if outer is None else outer, outer is None, seen)
    problem = Problem(
        step=run.step,
        outer=outer,
        init=run.init,
        batch=None if whole else batches,
        inner=run.inner if run.has_inner(example) else None,
        has_metrics=has_metrics,
        seed=None if seed is None else lambda number: mixed(seed, 0 if number is None else int(number)),
        device=device,
        example=example,
        steps=steps,
    )
    constraint = sets_of(nodes)
    made = {
        "optimizer": optimizer,
        "fixed": described("fixed", values_of(own)),
        "tune": described("lam", lam) | named_sets(constraint),
        "seed": seed,
        "batch_size": batches.size,
        "examples": batches.count,
        "validation_batch_size": validation_batch_size,
        "steps": steps,
        "buffers": buffers,
    }
    return Training(problem, lam, constraint, run.module, steps, run.part_in_lam, made)


def _check(loss: Any, validation_loss: Any, tune: Any, buffers: Any, seed: Any, steps: Any) -> None:
    """`ValueError` for what no module could make right."""
    for name, function in (("loss", loss), ("validation_loss", validation_loss)):
        if name == "validation_loss" and (function is None or isinstance(function, JaxObjective)):
            continue
        if isinstance(function, nn.Module) or not callable(function) or arity(function) not in (2, 3):
            raise ValueError(
                f"{name} is {shown(function)}; use a function (model, batch) or (model, batch, lam), such as lambda "
                "model, batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1])"
            )
    if validation_loss is None and arity(loss) == 3:
        raise ValueError(
            "the loss reads lam, so that its regulariser or augmentation would be in the validation loss as well: say "
            "what is to be minimised on the validation data, such as validation_loss=lambda model, batch: "
            "torch.nn.functional.cross_entropy(model(batch[0]), batch[1])"
        )
    if buffers not in (None, "state", "frozen"):
        raise ValueError(f'buffers is {shown(buffers)}; use "state" or "frozen"')
    if seed is not None:
        check_steps(seed, "seed")
    if steps is not None:
        check_steps(steps, "steps", 1)
    for name in ("init", "parameters"):
        if name in tune:
            check_patterns(name, tune[name])


def _seen_by_outer(validation: Any, size: int | None, seed: int, device: torch.device) -> Callable[[Any], Any]:
    """The validation examples of a run, as one batch where the module is."""
    collate = None
    if isinstance(validation, DataLoader):
        check_sampler(validation)
        validation, collate = validation.dataset, validation.collate_fn
    batches = Batches(validation, size, seed=mixed(seed, 1), collate=collate)
    if size is not None:
        return lambda run: moved(batches(run, 1), device)
    with seeded(0, device):
        whole = moved(batches(None, 1), device)
    return lambda run: whole
