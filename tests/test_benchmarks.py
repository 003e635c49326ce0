"""The benchmarks run, their sides agree, and the README's tables are those of the records."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"


def run(script, *arguments):
    """The output of a benchmark, run from the repository's root as its README says."""
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_transform(tmp_path):
    out = tmp_path / "transform.json"
    printed = run("transform.py", "--parameters", "20e3", "--k", "3", "--repeats", "2", "--out", str(out))
    cases = json.loads(out.read_text())["cases"]
    assert [case["optimizer"] for case in cases] == ["adamw", "muon"]
    for case in cases:
        assert case["seconds"].keys() == case["difference"].keys() > {"floor", "optax.MultiSteps", "update", "apply"}
        for side, seconds in case["seconds"].items():
            assert f"| {side} |" in printed
            assert len(seconds) == 2
            assert all(math.isfinite(time) and time > 0 for time in seconds)
            assert case["difference"][side] < 1e-3  # a lost micro-batch would make it 0.1 and more; NaN fails too


def test_trainer_overhead(tmp_path):
    out = tmp_path / "trainer.json"
    printed = run("trainer_overhead.py", "--micro-steps", "20", "--k", "3", "--repeats", "2", "--out", str(out))
    seconds = json.loads(out.read_text())["seconds"]
    assert list(seconds)[:3] == ["bare loop", "Trainer", "Trainer, with bar"]
    for side, times in seconds.items():
        assert f"| {side} |" in printed
        assert len(times) == 2 and all(math.isfinite(time) and time > 0 for time in times)
    assert run("trainer_overhead.py", "--table", str(out)) == printed


@pytest.mark.parametrize("record", sorted(BENCHMARKS.glob("results/transform-*.json")), ids=lambda path: path.stem)
def test_the_readme_has_the_table_of_each_record(record):
    assert run("transform.py", "--table", str(record)) in (BENCHMARKS / "README.md").read_text()
