"""The READMEs state only what is tested: their code runs, and their links lead to tests that exist."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
LINKS = [
    (readme, path, text)
    for readme in ("README.md", "jaxaccum/README.md", "tests/README.md", "benchmarks/README.md", "examples/README.md")
    for text, path in re.findall(r"\[([^\]]+)\]\(([^)#]+)", (ROOT / readme).read_text())
    if not path.startswith("http")
]


def test_the_readmes_code_runs(capsys):
    """Catches an example that a reader can't paste."""
    namespace = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(compile(block, "README.md", "exec"), namespace)
    assert "2 optimizer steps" in capsys.readouterr().out
    assert int(namespace["state"].gradient_step) == 16 // 8 + 16 // 4


@pytest.mark.parametrize(("readme", "path"), sorted({link[:2] for link in LINKS}))
def test_the_readmes_links_lead_somewhere(readme, path):
    """Catches a file that was moved or renamed."""
    assert (ROOT / readme).parent.joinpath(path).exists()


def test_every_example_is_listed():
    """Catches an example that no reader finds."""
    files = {path.name for path in (ROOT / "examples").iterdir() if path.suffix in (".py", ".md")}
    assert {path for readme, path, _ in LINKS if readme == "examples/README.md"} == files - {"README.md"} | {
        "../README.md"
    }


@pytest.mark.parametrize(("readme", "path", "name"), [link for link in LINKS if re.fullmatch(r"`test_\w+`", link[2])])
def test_the_readmes_tests_exist(readme, path, name):
    """Catches a guarantee whose test was renamed, moved or deleted."""
    assert f"def {name.strip('`')}(" in (ROOT / readme).parent.joinpath(path).read_text()


def test_each_guarantee_has_a_test():
    """Catches a row of the tables that names none."""
    rows = re.findall(
        r"^\| guarantee \| test \|\n\|---\|---\|\n((?:\|.*\n)+)", (ROOT / "tests/README.md").read_text(), re.M
    )
    assert rows and all("(" in row.rsplit(" | ", 1)[1] for table in rows for row in table.splitlines())


def test_the_first_block_is_the_two_commands():
    """Catches a set-up that takes more than two commands, one a line."""
    first = re.search(r"```bash\n(.*?)```", README, re.DOTALL).group(1).strip().splitlines()
    assert README.index("```bash") == README.index("```")
    assert len(first) == 2 and first[0].endswith("examples/train_lm.py") and "pytest" in first[1]
