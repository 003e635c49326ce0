"""Every recipe runs alone, in a namespace of its own, and asserts its point."""

import pathlib
import re

import pytest

FILE = pathlib.Path(__file__).resolve().parents[2] / "examples/recipes.md"
TEXT = FILE.read_text()
BLOCKS = {
    title: re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    for title, section in re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE)
}


@pytest.mark.parametrize("title", BLOCKS)
def test_a_recipe_runs_alone(title):
    """Catches a recipe that needs another one's names, or whose point no longer holds."""
    (block,) = BLOCKS[title]
    assert "assert" in block
    line = TEXT[: TEXT.index(block)].count("\n")  # So that a traceback names the line of the file.
    exec(compile("\n" * line + block, FILE, "exec"), {"__name__": "__main__"})


def test_the_contents_name_every_recipe():
    """Catches a recipe that is not in the list at the top, and a link there that leads nowhere."""
    anchor = lambda title: re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
    assert re.findall(r"\]\(#([^)]+)\)", TEXT) == [anchor(title) for title in BLOCKS]
