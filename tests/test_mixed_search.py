"""mixed_search: the best choices with their solution, pruning, failures that lose nothing, resuming, determinism."""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import optax
import optuna
import pytest

import hyperax as hx
from hyperax.minimize import minimize
from hyperax.mixed_search import TrialFailedWarning, mixed_search
from hyperax.problem import Hypergradient
from hyperax.tuning import log_scale, tune

STEPS = 3


def valley(lam, data, carry):
    """(lam - 1)^2 + data: data is what the discrete choices cost."""
    value, grad = jax.value_and_grad(lambda lam: (lam - 1.0) ** 2 + data)(lam)
    return Hypergradient(value, grad, None, {}, carry)


def build(trial, asked=None, callbacks=()):
    kind, size = trial.suggest_categorical("kind", ["a", "b"]), trial.suggest_int("size", 1, 9)
    if asked is not None:
        asked.append((kind, size))
    cost = jnp.asarray(abs(size - 4) + 2.0 * (kind == "a"))
    settings = {"optimizer": optax.sgd(0.25), "steps": STEPS, "dispatch": 1, "callbacks": callbacks}
    return partial(minimize, valley, 0.0, data=cost, **settings)


def test_the_best_trial_is_kept_with_its_solution():
    asked, seen = [], []
    study = optuna.create_study(pruner=optuna.pruners.NopPruner())
    found = mixed_search(lambda trial: build(trial, asked, callbacks=seen.append), trials=12, study=study, seed=1)
    costs = [abs(size - 4) + 2.0 * (kind == "a") for kind, size in asked]
    least = min(range(12), key=lambda i: costs[i])
    assert tuple(found.choices.values()) == asked[least]
    assert found.value == found.solution.value == study.best_value == pytest.approx(costs[least] + 1 / 16)
    assert float(found.solution.lam) == pytest.approx(1 - 0.5**STEPS)
    assert len(seen) == 12 * STEPS  # the search's own callbacks are called as well
    assert list(study.trials[0].intermediate_values) == [1, 2, 3]
    assert repr(found).endswith("trials: 12 complete)")
    again = mixed_search(build, trials=12, study=optuna.create_study(pruner=optuna.pruners.NopPruner()), seed=1)
    assert [trial.params for trial in again.study.trials] == [trial.params for trial in study.trials]


def test_pruned_trials_end_early_and_resuming_equals_going_on(tmp_path):
    def study(name):
        backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / name))
        settings = {"storage": optuna.storages.JournalStorage(backend), "study_name": "s", "load_if_exists": True}
        return optuna.create_study(pruner=optuna.pruners.MedianPruner(n_startup_trials=2), **settings)

    level = optuna.logging.get_verbosity()
    whole = mixed_search(build, trials=9, study=study("whole"), seed=3)
    mixed_search(build, trials=5, study=study("parts"), seed=3)
    study("parts").ask()  # a process that was killed leaves a trial that never ends
    parts = mixed_search(build, trials=9, study=study("parts"), seed=3)
    assert parts.choices == whole.choices
    assert float(parts.solution.lam) == float(whole.solution.lam)
    plain = lambda study: [(t.params, t.values, t.intermediate_values) for t in study.trials if t.state.is_finished()]
    assert plain(parts.study) == plain(whole.study)
    pruned = [trial for trial in whole.study.trials if trial.state.name == "PRUNED"]
    assert pruned
    assert all(len(trial.intermediate_values) < STEPS for trial in pruned)
    assert optuna.logging.get_verbosity() == level

    asked = []  # nothing left to do: only the best trial is solved again
    assert mixed_search(partial(build, asked=asked), trials=9, study=study("parts")).choices == whole.choices
    assert asked == [tuple(whole.choices.values())]


def test_a_trial_that_fails_does_not_lose_the_rest():
    def faulty(trial):
        search = build(trial)
        if trial.number == 1:
            raise MemoryError("too large")
        # From lam = 0 with this step the next value is infinite: the trial diverges.
        return partial(search, optimizer=optax.sgd(1e300)) if trial.number == 2 else search

    with pytest.warns(TrialFailedWarning) as caught:
        found = mixed_search(faulty, trials=5)
    assert [str(w.message)[:28] for w in caught] == ["trial 1 failed: too large", "trial 2 failed: diverged at "]
    states = [trial.state.name for trial in found.study.trials]
    assert states[:3] == ["COMPLETE", "FAIL", "FAIL"]
    assert found.study.trials[1].user_attrs["failure"] == "MemoryError: too large"

    with pytest.raises(ZeroDivisionError):  # in the first trial it is a mistake in `build`
        mixed_search(lambda trial: 1 / 0, trials=5)
    hopeless = optuna.create_study()
    hopeless.tell(hopeless.ask(), state=optuna.trial.TrialState.FAIL)
    with pytest.raises(ValueError, match="no trial finished; the last of 1: FAIL"):
        mixed_search(build, trials=1, study=hopeless)


def test_tune_inside_a_trial():
    def of_power(trial):
        power = trial.suggest_categorical("power", [2, 4])
        x = jnp.array([[1.0], [2.0]])
        loss = lambda w, d: jnp.mean(jnp.abs(d @ w - 1.0) ** power)
        train = lambda w, d, h: loss(w, d)
        data = {"data": x, "validation_data": x, "steps": 2, "hyperiterations": 1}
        return partial(tune, train, loss, jnp.zeros(1), optax.sgd, log_scale(0.1), **data)

    found = mixed_search(of_power, trials=1)
    assert found.value == found.solution.after < found.solution.before


def test_refusals(monkeypatch):
    with pytest.raises(ValueError, match="trials must be a whole number"):
        mixed_search(build, trials=0)
    with pytest.raises(ValueError, match="seed must be a whole number"):
        mixed_search(build, trials=1, seed=-1)
    with pytest.raises(ValueError, match="must minimise one objective"):
        mixed_search(build, trials=1, study=optuna.create_study(direction="maximize"))
    with pytest.raises(ValueError, match=r"use optuna\.create_study"):
        mixed_search(build, trials=1, study="sqlite:///a.db")
    with pytest.raises(ValueError, match=r"build returned .*Problem; return functools.partial"):
        mixed_search(lambda trial: hx.Problem(max, max, max), trials=1)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ValueError, match=r"pip install hyperax\[search\]"):
        mixed_search(build, trials=1)
