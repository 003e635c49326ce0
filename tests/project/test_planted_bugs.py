"""The list of planted bugs must stay applicable; that each is caught is shown by running planted_bugs.py itself."""

import planted_bugs
import pytest


@pytest.mark.parametrize("bug", planted_bugs.BUGS, ids=lambda bug: bug.name)
def test_a_planted_bug_still_finds_its_place(bug, tmp_path):
    """Catches a bug that would be planted nowhere, and so prove nothing."""
    planted_bugs.plant(bug, tmp_path)
    assert bug.new in (tmp_path / "jaxaccum" / bug.file).read_text()
