"""The list of planted bugs must stay applicable; that each is caught is shown by running planted_bugs.py itself."""

import ast

import planted_bugs
import pytest


@pytest.mark.parametrize("bug", planted_bugs.BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_still_finds_its_place(bug):
    """Catches a bug that would be planted nowhere, or seen by no test, and so prove nothing."""
    path, source = planted_bugs.planted(bug)
    compile(source, path, "exec")
    assert source != ast.unparse(ast.parse(path.read_text()))
    assert len(bug.test_files) == len(bug.tests.split())


def test_the_readme_says_how_many_they_are():
    """Catches a number that was not updated with the list."""
    assert f"each of the {len(planted_bugs.BUGS)} bugs" in (planted_bugs.ROOT / "README.md").read_text()
