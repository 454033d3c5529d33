"""README.md is true: its example runs and its numbers are those of the committed records."""

import re
import runpy
from pathlib import Path

import pytest

import hyperax as hx

ROOT = Path(__file__).parent.parent
TABLES = runpy.run_path(str(ROOT / "docs" / "tables.py"))


def test_the_example_runs_and_improves():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names: dict = {}
    exec(code, names)  # the reader's own next step
    assert names["solution"].value < 0.5 * names["h"].value
    assert 0 < names["solution"].lam["step_size"] < 0.1


@pytest.mark.parametrize("name", TABLES["PAGES"])
def test_numbers_are_those_of_the_records(name):
    text = (ROOT / name).read_text()
    assert TABLES["updated"](text) == text, "run: python docs/tables.py"
    written = re.findall(r"<!-- (\w+) -->\n(.*?)<!-- end -->", text, re.DOTALL)
    assert written
    assert all(block.strip() for _, block in written), "a block is empty"


def test_every_block_is_on_a_page():
    pages = "".join((ROOT / name).read_text() for name in TABLES["PAGES"])
    assert all(f"<!-- {name} -->" in pages for name in TABLES["BLOCKS"])


def test_a_changed_number_is_noticed():
    text = (ROOT / "README.md").read_text()
    changed = re.sub(r"\*\*(\d)(?=\d\.\d\d ±)", lambda found: f"**{(int(found[1]) + 1) % 10}", text, count=1)
    assert changed != text
    assert TABLES["updated"](changed) == text


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "docs/design.md",
        "docs/few-shot.md",
        "docs/methods.md",
        "docs/hyperparameters.md",
        "docs/patterns.md",
        "docs/pytorch.md",
    ],
)
def test_public_names_exist(name):
    names = set(re.findall(r"\bhx\.(\w+)", (ROOT / name).read_text()))
    assert not {x for x in names if not hasattr(hx, x)}


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "CONTRIBUTING.md",
        *(
            f"docs/{x}.md"
            for x in (
                "comparisons",
                "design",
                "few-shot",
                "hyperparameters",
                "learners",
                "methods",
                "patterns",
                "pytorch",
                "theory",
            )
        ),
    ],
)
def test_links_lead_somewhere(name):
    file = ROOT / name
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", file.read_text()):
        assert (file.parent / target).exists(), f"{name} links to {target}"
