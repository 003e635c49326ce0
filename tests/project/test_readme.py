"""The README states only what is tested: its code runs, and its links lead to tests that exist."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def test_the_readmes_code_runs(capsys):
    """Catches an example that a reader can't paste."""
    namespace = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(compile(block, "README.md", "exec"), namespace)
    assert "2 optimizer steps" in capsys.readouterr().out
    assert int(namespace["state"].gradient_step) == 16 // 8 + 16 // 4


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(([^)#]+)\)", README))))
def test_the_readmes_links_lead_somewhere(path):
    """Catches a file that was moved or renamed."""
    assert (ROOT / path).exists()


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(test_\w+)`", README))))
def test_the_readmes_tests_exist(name):
    """Catches a guarantee whose test was renamed or deleted."""
    assert any(f"def {name}(" in file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))


def test_the_first_block_is_the_two_commands():
    """Catches a set-up that takes more than two commands, one a line."""
    first = re.search(r"```bash\n(.*?)```", README, re.DOTALL).group(1).strip().splitlines()
    assert README.index("```bash") == README.index("```")
    assert len(first) == 2 and first[0].endswith("examples/train_lm.py") and "pytest" in first[1]
