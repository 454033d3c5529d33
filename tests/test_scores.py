"""Accuracies, their interval, and the pairs of the figure, on cases with a known answer."""

import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperax.fewshot.episodes import Episodes
from hyperax.fewshot.evaluation import interval, nearest_and_farthest, nearest_neighbour_accuracies
from hyperax.fewshot.image_classes import ImageClasses


def test_interval():
    accuracies = np.array([0.2, 0.4, 0.9])
    found = interval(accuracies)
    spread = math.sqrt(((0.2 - 0.5) ** 2 + (0.4 - 0.5) ** 2 + (0.9 - 0.5) ** 2) / 2)
    assert found == {"accuracy": pytest.approx(0.5), "ci95": pytest.approx(1.96 * spread / math.sqrt(3)), "episodes": 3}
    assert interval(np.ones(600))["ci95"] == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert math.isnan(interval(np.array([0.5]))["ci95"])


def test_nearest_neighbour_on_classes_far_apart_is_always_right():
    classes = ImageClasses.from_lists(
        {str(c): 50 * c + np.arange(4)[:, None, None] * np.ones((3, 3)) for c in range(5)}
    )
    found = nearest_neighbour_accuracies(Episodes(3, 1, 2), classes, jax.random.key(0), 7)
    np.testing.assert_array_equal(found, np.ones(7))


def test_nearest_neighbour_agrees_with_a_search_by_hand():
    random = np.random.default_rng(0)
    classes = ImageClasses.from_lists({str(c): random.integers(0, 256, (6, 4, 4, 3)) for c in range(5)})
    episodes, key = Episodes(4, 2, 3), jax.random.key(1)
    expected = []
    for one in jax.random.split(key, 9):
        episode = jax.tree.map(np.asarray, episodes.sample(one, jax.tree.map(jnp.asarray, classes)))
        difference = episode.query[:, None].astype(int) - episode.support[None].astype(int)
        nearest = (difference**2).sum((2, 3, 4)).argmin(1)
        expected.append((episode.support_labels[nearest] == episode.query_labels).mean())
    found = nearest_neighbour_accuracies(episodes, classes, key, 9)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert 0.05 < found.mean() < 0.6  # noise: near one in four


def test_nearest_and_farthest_pair():
    flat = lambda *levels: np.array(levels)[:, None, None] * np.ones((2, 2))
    classes = ImageClasses.from_lists({"dark": flat(10, 100, 60), "light": flat(240, 75, 200)})
    # Two components that say the same, so that a distance is sqrt(2) times that of the mean pixels.
    network = lambda images, moments: jnp.stack([images.mean((1, 2, 3)), 1 - images.mean((1, 2, 3))], axis=1)
    pair = nearest_and_farthest(network, classes, jax.random.key(0), components=40)
    order = [list(pair["names"]).index(name) for name in ("dark", "light")]
    assert sorted(order) == [0, 1]
    for name, levels in (("near", (60, 75)), ("far", (10, 240))):
        assert tuple(pair[f"{name}_images"][order, 0, 0, 0]) == levels
        assert pair[f"{name}_images"].shape == (2, 2, 2, 1)
        np.testing.assert_allclose(pair[f"{name}_features"][order, 0], np.array(levels) / 255, atol=1e-6)
        np.testing.assert_allclose(pair[f"{name}_distance"], 2**0.5 * abs(levels[1] - levels[0]) / 255, atol=1e-6)
    assert pair["component_index"].tolist() == [0, 1]
    first = nearest_and_farthest(network, classes, jax.random.key(0), most=1, components=1)
    assert tuple(first["far_images"][order, 0, 0, 0]) == tuple(first["near_images"][order, 0, 0, 0]) == (10, 240)
    assert first["component_index"].shape == (1,)
