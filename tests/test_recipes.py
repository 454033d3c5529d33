"""Recipes and their configurations: what survives, what is refused, the schedules."""

import json
import math
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from hyperax.experiments import FewShotConfig, recipe, recipes
from hyperax.experiments.config import config_from_json


@pytest.mark.parametrize("name", [name for name, config in recipes().items() if isinstance(config, FewShotConfig)])
def test_a_configuration_survives_json(name):
    config = recipe(name, seed=3)
    assert config_from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", lambda k: 1.0),
        ("inverse-time", lambda k: 1 / (1 + 0.1 * k)),
        ("cosine", lambda k: (1 + math.cos(math.pi * k / 20)) / 2),
    ],
)
def test_schedules(schedule, expected):
    config = recipe("folder-5way-1shot", schedule=schedule, decay=0.1, hyperiterations=20, learning_rate=0.5)
    optimizer = config.optimizer()
    state, updates = optimizer.init(jnp.zeros(())), []
    for _ in range(20):  # for a constant gradient Adam moves by its rate
        update, state = optimizer.update(jnp.ones(()), state)
        updates.append(-float(update))
    np.testing.assert_allclose(updates, [0.5 * expected(k) for k in range(20)], rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(({name: 0}, f"{name} is 0; it must be at least") for name in (*list(tiny.FIELDS)[2:5], "test_episodes")),
        *(
            ({name: 0}, f"{name} is 0; it must be")
            for name in ("validate_every", "record_every", "patience", "dispatch")
        ),
        ({"test_episodes": 1}, "it must be at least 2"),
        ({"learning_rate": float("nan")}, "learning_rate is nan; it must be positive and finite"),
        ({"step_size": -1.0}, "step_size is -1.0"),
        ({"decay": -1.0}, "decay is -1.0"),
        ({"ways": 1}, "ways must be a whole number, at least 2"),
        ({"train_ways": 0}, "train_ways and train_queries are at least"),
        ({"shots": 0}, "shots must be"),
        ({"parallel": 3}, "parallel is 3; it must divide the 4 tasks"),
        ({"statistics": "batch", "parallel": 2}, "leave parallel at None"),
        ({"shot": 1}, "has no field shot"),
    ],
)
def test_configurations_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        recipe("folder-5way-1shot", **changes)


def test_a_configuration_from_elsewhere():
    good = tiny.config("images").to_json()
    for bad in ({}, [], good | {"unknown": 1}, good | {"dataset": {"type": "Faces"}}, good | {"ways": "many"}):
        with pytest.raises(ValueError, match=r"ways must be|not the configuration of a few-shot run of this version"):
            config_from_json(bad)
    assert replace(config_from_json(good), seed=5).seed == 5
