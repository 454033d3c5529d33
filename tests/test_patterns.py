"""The code of docs/patterns.md runs as it stands, with fewer hyperiterations, tasks, episodes, filters and images."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hyperax.fewshot import datasets

PAGE = Path(__file__).parent.parent / "docs" / "patterns.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


class Noise:
    """In place of Glyphs, whose drawing takes seconds: as large, but fewer."""

    def load(self):
        random = np.random.default_rng(0)
        images = [random.integers(0, 256, (15, 28, 28)) for _ in range(5)]
        classes = datasets.ImageClasses.from_lists({str(index): x for index, x in enumerate(images)})
        return datasets.MetaDataset("Noise", classes, classes, classes, {})


@pytest.mark.parametrize("block", range(len(BLOCKS)), ids=("representation", "optimizer", "loss"))
def test_the_code_of_a_pattern_runs(block, capsys, monkeypatch):
    code = BLOCKS[block]
    fewer = {
        r"steps=[45]00\b": "steps=2",
        r"count=200": "count=2",
        r"tasks=64": "tasks=2",
        r"(image_shape, jax.random.key\(0\))": r"\1, filters=2",
    }
    for pattern, text in fewer.items():
        code = re.sub(pattern, text, code)
    assert code != BLOCKS[block]
    monkeypatch.setattr(datasets, "Glyphs", Noise)
    names: dict = {}
    exec(code, names)  # the reader's own next step
    assert capsys.readouterr().out.strip()
    lam = names["solution"].last_lam
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(lam) if jnp.ndim(leaf))
