"""Discrete choices by Optuna, continuous ones by hypergradient, on folds. `python examples/mixed_search.py [TRIALS]`.

    min over c of  min over lam of  (1 / K) sum over folds k of E(w^k(lam; c); validation_k)

c is which features a model has (polynomials or ripples, and how many), lam the L2 coefficient of each of them: Optuna
alone would have a dimension for each. Needs pip install "hyperax[search,estimators]".
"""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import optax
from sklearn.model_selection import KFold

import hyperax as hx

trials = int(sys.argv[1]) if len(sys.argv) > 1 else 20

t = jnp.linspace(-1, 1, 60)
y = jnp.sin(3 * jnp.pi * t) + 0.5 * t + 0.3 * jax.random.normal(jax.random.key(0), t.shape)
folds = hx.folds(KFold(5, shuffle=True, random_state=0), t)


def features(kind, count):
    """Of each point t, [60, count]."""
    powers = jnp.arange(count)
    return t[:, None] ** powers if kind == "polynomial" else jnp.cos(jnp.pi * (t[:, None] + 1) / 2 * powers)


def solve(lam, d):
    """Ridge on the training side of a fold, in closed form."""
    gram = (d["x"].T * d["fold"].train) @ d["x"] + jnp.diag(jnp.exp(lam))
    return jnp.linalg.solve(gram, d["x"].T @ (d["fold"].train * d["y"]))


problem = hx.Problem(
    inner=lambda w, lam, d: jnp.sum(d["fold"].train * (d["x"] @ w - d["y"]) ** 2) + jnp.sum(jnp.exp(lam) * w**2),
    outer=lambda w, lam, d: d["fold"].validation_mean((d["x"] @ w - d["y"]) ** 2),
    init=lambda lam, d: jnp.zeros(d["x"].shape[1]),
)
mean = hx.mean_over_tasks(hx.hypergradient(problem, None, hx.ClosedForm(solve)))


def build(trial):
    """The choices of a trial, and the search for its lam."""
    kind = trial.suggest_categorical("features", ["polynomial", "ripples"])
    count = trial.suggest_int("count", 4, 24, step=4)
    data = {"x": hx.Shared(features(kind, count)), "y": hx.Shared(y), "fold": folds}
    return partial(hx.minimize, mean, jnp.zeros(count), data=data, optimizer=optax.adam(0.3), steps=40, record_every=5)


found = hx.mixed_search(build, trials=trials, seed=0)
print(found)
print("log L2 coefficients:", " ".join(f"{coefficient:.1f}" for coefficient in found.solution.lam))
