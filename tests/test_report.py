"""Reports from synthetic run folders: what they say, what they refuse, and that they stand alone."""

import base64
import html
import io
import json
import re

import numpy as np
import pytest
from PIL import Image

from hyperax.experiments import figures, report

CONFIG = {
    "recipe": "omniglot-5way-1shot",
    "title": "Omniglot, 5-way 1-shot",
    "seed": 3,
    "dataset": {"type": "Omniglot"},
}
PAPER = {
    "accuracy": 0.986,
    "ci95": None,
    "source": "Franceschi et al. 2018, Table 3",
    "protocol": "support and query sets overlapping, as far as the public code shows",
}


def make_records(count=400, every=20, final=0.985):
    random = np.random.default_rng(0)
    records = []
    for i in range(1, count + 1):
        error = (1 - final) + 0.5 * np.exp(-i / 40)
        record = {"step": 50 * i, "value": 3 * error * random.lognormal(0, 0.15), "gradient_norm": 0.1}
        record["metrics"] = {"accuracy": max(1 - error * random.lognormal(0, 0.15), 0.2)}
        if i % every == 0:
            accuracy = max(1 - error * random.lognormal(0.1, 0.05), 0.2)
            record |= {"score": 1 - accuracy, "validation": {"accuracy": accuracy, "ci95": 0.004, "steps": 7}}
        records.append(record)
    return records


def make_summary(**changes):
    summary = {
        "recipe": "omniglot-5way-1shot",
        "title": "Omniglot, 5-way 1-shot",
        "test": {"accuracy": 0.98123, "ci95": 0.00417, "episodes": 600, "steps": 7},
        "validation": {"accuracy": 0.9845, "ci95": 0.004, "episodes": 600},
        "steps_by_validation": [
            {"steps": t, "accuracy": 0.985 - 0.08 / t**1.5 - 2e-4 * t, "ci95": 0.004} for t in range(1, 21)
        ],
        "steps_training": 5,
        "baselines": {
            "nearest neighbour on pixels": {"accuracy": 0.4512, "ci95": 0.0091, "episodes": 600},
            "untrained network": {"accuracy": 0.7034, "ci95": 0.0083, "episodes": 600},
        },
        "paper": PAPER,
        "protocol": {
            "ways": 5,
            "shots": 1,
            "queries": 15,
            "overlap": False,
            "statistics": "set",
            "transductive": True,
            "split": "by Vinyals et al.",
            "data": {"dataset": "Omniglot", "classes": {"train": 4800, "test": 1692}, "image_shape": [28, 28, 1]},
        },
        "best": {"step": 19000, "score": 0.0155},
        "stopped": "all hyperiterations done",
        "hyperiterations": 20000,
        "seed": 3,
        "commit": "0123abc",
        "versions": {"jax": "0.7.1", "hyperax": "0.1.0"},
        "machine": "2 x CPU",
        "timing": {"seconds": 7321.4, "hyperiterations_per_second": 2.73},
    }
    return summary | changes


def make_pairs(channels=1, size=28, components=24):
    random = np.random.default_rng(1)
    y, x = np.mgrid[:size, :size] / size
    shapes = [(x - a) ** 2 + (y - b) ** 2 < 0.08 for a, b in ((0.4, 0.5), (0.5, 0.4), (0.3, 0.3), (0.7, 0.7))]
    images = np.stack(shapes)[..., None] * np.array([255, 140, 60][:channels], np.uint8)
    features = np.maximum(random.normal(size=(4, 256)), 0)
    features[1] = features[0] + random.normal(0, 0.15, 256)
    arrays = {
        "names": np.array(["Tibetan/character07", "Keble/character21 <90>"]),
        "component_index": random.permutation(256)[:components],
    }
    for i, which in enumerate(("near", "far")):
        pair = slice(2 * i, 2 * i + 2)
        arrays |= {f"{which}_images": images[pair].astype(np.uint8), f"{which}_features": features[pair]}
        arrays[f"{which}_distance"] = np.linalg.norm(features[2 * i] - features[2 * i + 1])
    return arrays


def write_run(folder, records=None, summary=None, pairs=None, config=CONFIG):
    folder.mkdir(exist_ok=True)
    records = make_records() if records is None else records
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    timings = [{"step": record["step"], "seconds": 0.4 * record["step"]} for record in records]
    (folder / "timings.jsonl").write_text("".join(json.dumps(timing) + "\n" for timing in timings))
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    if pairs is not None:
        np.savez(folder / "pairs.npz", **pairs)
    return folder
