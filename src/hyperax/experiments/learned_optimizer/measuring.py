"""The three kinds of parts: step sizes of the baselines, meta-training of a rule, the test on held-out problems."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

from hyperax.checkpoint import Checkpoint
from hyperax.dynamics.learned_optimizer import LearnedOptimizer
from hyperax.experiments.learned_optimizer.baselines import baselines, best_step_size, mean_final_losses
from hyperax.experiments.learned_optimizer.inner_runs import blocks, final_losses, losses, times
from hyperax.experiments.learned_optimizer.problems import Family
from hyperax.experiments.study import Part, Place
from hyperax.explosion import GradientExplosion
from hyperax.learned_optimizers import (
    HierarchicalRule,
    LSTMRule,
    MetaTraining,
    PerceptronRule,
    StepSizeRule,
    UpdateRule,
)
from hyperax.minimize import minimize
from hyperax.problem import Data
from hyperax.stopping import Validation

if TYPE_CHECKING:
    from hyperax.experiments.learned_optimizer.study import LearnedOptimizerStudy

STEP_SIZES, PERCEPTRON, LSTM, HIERARCHICAL = RULES = ("step-sizes", "perceptron", "lstm", "hierarchical")
"""The rules that can be meta-trained."""

TIMES = "times"
"""The array of a test with the steps after which losses were measured; the others are called after optimizers."""

_PURPOSES = ("rule", "validation", "test")


def key_for(seed: int, purpose: str) -> jax.Array:
    """The random key of a purpose: the same for all optimizers, so that they see the same problems."""
    return jax.random.fold_in(jax.random.key(seed), _PURPOSES.index(purpose))


@dataclass(frozen=True)
class Setting:
    """A distribution of problems to test on.

    Fields:
        name: in the table, and as part of a file name.
        tuning: what the step sizes of the baselines are chosen on.
        test: held out.
        long: whether runs of ten times the horizon are tested too.
    """

    name: str
    tuning: Family
    test: Family
    long: bool


def validation_tasks(config: LearnedOptimizerStudy, setting: Setting) -> Data:
    """The problems that choose step sizes and iterates."""
    return setting.tuning.tasks(key_for(config.seed, "validation"), config.validation_problems)


def tune(config: LearnedOptimizerStudy, setting: Setting, place: Place) -> Part:
    """The best constant step size of each baseline, for the horizon and, of a long setting, for ten times it."""
    tasks = validation_tasks(config, setting)
    records: list[dict[str, Any]] = []
    for one in baselines(config.momenta):
        means, near = mean_final_losses(one, setting.tuning.problem, tasks, setting.tuning.parallel), one.near
        for horizon in config.horizons_of(setting):
            what = f"{one.name} after {horizon} steps of {setting.name}"
            best = best_step_size(means(horizon), near, config.grid_factor, config.grid_each_side, what)
            common = {"optimizer": one.name, "momentum": one.momentum, "horizon": horizon}
            tried = {step_size: loss if np.isfinite(loss) else None for step_size, loss in best.tried.items()}
            records += [{"what": "tried", **common, "step_size": x, "loss": loss} for x, loss in tried.items()]
            records.append({"what": "best", **common, "step_size": best.step_size, "loss": best.loss})
            place.say(f"  {what}: step size {best.step_size:.3g}, loss {best.loss:.4g}")
            near = best.step_size
    return Part(records)


def tuned(part: Part, horizon: int) -> dict[str, Mapping[str, Any]]:
    """The best record of each optimizer for this horizon: of several momenta, that with the least loss."""
    found: dict[str, Mapping[str, Any]] = {}
    for record in part.records:
        if record["what"] == "best" and record["horizon"] == horizon:
            kept = found.setdefault(record["optimizer"], record)
            if record["loss"] < kept["loss"]:
                found[record["optimizer"]] = record
    return found


def new_rule(config: LearnedOptimizerStudy, name: str, family: Family, momentum: Mapping[str, Any]) -> UpdateRule:
    """An untrained rule; that of learned step sizes begins as the best heavy ball."""
    key = key_for(config.seed, "rule")
    if name == STEP_SIZES:
        return StepSizeRule(family.start(key), momentum["step_size"], momentum["momentum"] or None)
    if name == LSTM:
        return LSTMRule(key, config.lstm_units, config.lstm_layers, config.lstm_p, config.lstm_output_scale)
    return {PERCEPTRON: PerceptronRule, HIERARCHICAL: HierarchicalRule}[name](key)


def train(config: LearnedOptimizerStudy, name: str, family: Family, main: Setting, tuning: Part, place: Place) -> Part:
    """Meta-train one rule on windows of runs on new problems; the validation problems choose the iterate."""
    rule, dynamics = new_rule(config, name, family, tuned(tuning, config.horizon)["momentum"]), LearnedOptimizer()
    run = final_losses(main.tuning.problem, dynamics, main.tuning.parallel)
    tasks = validation_tasks(config, main)
    every = max(1, -(-config.hyperiterations // config.validations))
    begin = time.perf_counter()
    solution = minimize(
        MetaTraining(
            family.problem,
            dynamics,
            family.draw,
            horizon=(config.shortest, config.longest),
            window=config.window,
            tasks=config.tasks,
            curriculum=config.curriculum,
            at_end=config.at_end,
            first_order=config.first_order,
            parallel=family.parallel,
            seed=config.seed,
        ),
        rule,
        data=family.pool,
        optimizer=optax.chain(
            optax.clip_by_global_norm(config.clip),
            optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.hyperiterations)),
        ),
        steps=config.hyperiterations,
        callbacks=GradientExplosion(),
        validation=Validation(lambda lam: float(run(lam, tasks, jnp.asarray(config.horizon)).mean()), every=every),
        checkpoint=Checkpoint(
            place.folder / "checkpoints", every=every, keep=1, identity={"rule": name, **config.to_json()}
        ),
        resume="auto",
        record_every=max(1, config.hyperiterations // 200),
        progress=place.progress,
    )
    best = solution.best
    if best is None:
        raise ValueError(
            f"the meta-training of {name} {solution.stopped}, and no iterate of it has a finite loss on the validation "
            "problems: use a smaller learning_rate, clip or window, or first_order"
        )
    place.say(f"  {name}: loss {best['score']:.4g} after {config.horizon} steps of the validation problems")
    norms = [record["gradient_norm"] for record in solution.history if np.isfinite(record["gradient_norm"])]
    training = {
        "what": "training",
        "rule": name,
        "hyperiterations": solution.steps,
        "best": best["step"],
        "score": best["score"],
        "median_norm": float(np.median(norms)),
        "largest_norm": float(np.max(norms)),
        "parameters": sum(x.size for x in parameters(solution.lam)),
        "stopped": solution.stopped,
        "seconds": round(time.perf_counter() - begin, 1),
    }
    curve = [{"what": "hyperiteration", "rule": name, **_plain(record)} for record in solution.history]
    return Part([training, *curve], {str(i): np.asarray(x) for i, x in enumerate(parameters(solution.lam))})


def _plain(record: Mapping[str, Any]) -> dict[str, Any]:
    """What figures need of a record of `minimize`, in JSON types."""
    kept = {name: record[name] for name in ("step", "value", "gradient_norm", "score") if name in record}
    return {name: x if np.isfinite(x) else None for name, x in kept.items()}


def parameters(rule: UpdateRule) -> list[jax.Array]:
    """The arrays of a rule, in order."""
    return jax.tree.leaves(eqx.filter(rule, eqx.is_inexact_array))


def trained(untrained: UpdateRule, part: Part) -> UpdateRule:
    """The rule with the parameters that a part has found."""
    arrays, rest = eqx.partition(untrained, eqx.is_inexact_array)
    leaves = [jnp.asarray(part.arrays[str(i)]) for i in range(len(jax.tree.leaves(arrays)))]
    return eqx.combine(jax.tree.unflatten(jax.tree.structure(arrays), leaves), rest)


def test(
    config: LearnedOptimizerStudy, setting: Setting, rules: Mapping[str, UpdateRule], tuning: Part, place: Place
) -> Part:
    """The loss along the runs of every optimizer on the same held-out problems, [problems, times] each; a baseline
    tuned for the long horizon is another optimizer.
    """
    tasks = setting.test.tasks(key_for(config.seed, "test"), config.test_problems)
    measured = blocks(config.horizon, config.curve_points, setting.long)
    records: list[dict[str, Any]] = []
    arrays: dict[str, np.ndarray] = {TIMES: times(measured)}

    runner = lambda dynamics: losses(setting.test.problem, dynamics, measured, setting.test.parallel)

    def measure(name: str, run: Callable[..., Any], lam: Any, **record: Any) -> None:
        found = np.asarray(run(lam, tasks))
        place.say(f"  {setting.name}, {name}: loss {found[:, config.curve_points].mean():.4g}")
        records.append({"what": "test", "setting": setting.name, "optimizer": name, **record})
        arrays[name] = found

    for name, rule in rules.items():
        measure(name, runner(LearnedOptimizer()), rule, baseline=None, tuned_for=None)
    runs = {(one.name, one.momentum): runner(one.dynamics) for one in baselines(config.momenta)}
    for horizon in config.horizons_of(setting):
        for name, best in tuned(tuning, horizon).items():
            called = name if horizon == config.horizon else f"{name}, tuned for {horizon}"
            chosen = {what: best[what] for what in ("step_size", "momentum")}
            eta = jnp.asarray(best["step_size"], jnp.float32)
            measure(called, runs[name, best["momentum"]], eta, baseline=name, tuned_for=horizon, **chosen)
    return Part(records, arrays)


def fitting(rules: Mapping[str, UpdateRule], family: Family) -> dict[str, UpdateRule]:
    """The rules that fit these problems: learned step sizes belong to the coordinates that they were learned for."""
    shapes = lambda tree: (jax.tree.structure(tree), [leaf.shape for leaf in jax.tree.leaves(tree)])
    w = jax.eval_shape(family.start, jax.random.key(0))
    fits = lambda rule: not isinstance(rule, StepSizeRule) or shapes(rule.log_step) == shapes(w)
    return {name: rule for name, rule in rules.items() if fits(rule)}
