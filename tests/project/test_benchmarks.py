"""The benchmarks run, their sides agree, and the README's tables are those of the records."""

import importlib
import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path

import flags
import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
TINY = ["--layers", "1", "--width", "32", "--heads", "2", "--vocabulary", "128", "--length", "16"]


def run(script, *arguments, **variables):
    """The output of a benchmark, run from the repository's root as its README says."""
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    done = subprocess.run(command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_transform(tmp_path):
    out = tmp_path / "transform.json"
    options = ["--parameters", "20e3", "--k", "3", "--repeats", "2", "--out", str(out)]
    printed = run("transform.py", *options, XLA_FLAGS=flags.HURRY)
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


def test_plan(tmp_path):
    """Catches a record whose sizes are not those of the plan."""
    out = tmp_path / "plan.json"
    options = [*TINY, "--target", "8", "--memory-limit", "6e5", "--out", str(out)]
    printed = run("plan.py", *options, XLA_FLAGS=flags.HURRY)
    record = json.loads(out.read_text())
    sizes = [trial["n"] for trial in record["plan"]["trials"]]
    assert [trial["n"] for trial in record["plan"]["trials"] if trial["fits"]][-1] == record["plan"]["n"]
    assert sizes[-1] > record["plan"]["n"] and len(record["runs"]) == 2
    assert all(f"| {n} | {8 // n} |" in printed for n in sizes)


def test_adaptive(tmp_path):
    """Catches policies that see other data, and a curve without its last validation."""
    out = tmp_path / "adaptive.json"
    options = ["--limit", "64", "--epochs", "1", "--seeds", "1", "--validations", "2", "--out", str(out)]
    path = f"{ROOT}:{ROOT / 'examples'}"
    printed = run("adaptive.py", *options, "--policies", "adaptive", "K = 4", PYTHONPATH=path, XLA_FLAGS=flags.HURRY)
    adaptive, fixed = json.loads(out.read_text())["runs"]
    assert adaptive["chosen"] == {"0": 2} and not fixed["chosen"]
    assert [point[:2] for point in adaptive["curve"]] == [[32, 2], [64, 4]]
    assert [point[:2] for point in fixed["curve"]] == [[32, 1], [64, 2]]
    assert all(4 < point[2] < 8 for point in adaptive["curve"] + fixed["curve"])
    assert "| K = 4 | adaptive | 1 of 1 |" in printed


@pytest.mark.parametrize("options", [[], ["--overlap", "--unrolled"]])
def test_devices(tmp_path, options):
    """Catches a side that does other work than its name says: a sync too many or too few, or other data."""
    out = tmp_path / "devices.json"
    options = [*options, *TINY, "--batches", "1", "--k", "2", "--repeats", "2", "--out", str(out)]
    printed = run("devices.py", *options, XLA_FLAGS=flags.forced(2))
    [case] = json.loads(out.read_text())["cases"]
    loss, rival = case["loss"], "sync in every micro-step"
    assert {"no sync", "window", rival} < loss.keys()
    for side, seconds in case["seconds"].items():
        assert f"| {side} |" in printed
        assert len(seconds) == 2 and all(math.isfinite(time) and time > 0 for time in seconds)
        parts = 2 if side == "ZeRO" else 1
        assert case["state_bytes"][side] == pytest.approx(case["state_bytes"]["no sync"] / parts, rel=1e-3)
        in_loop = " in a loop" * (side in (rival, "automatic"))
        kinds = ["all-reduce", "reduce-scatter", "all-gather"] if side == "ZeRO" else [f"all-reduce{in_loop}"]
        syncs = not side.startswith("no sync")
        assert sorted(case["collectives"][side]) == sorted(kinds if syncs else [])
        assert math.isfinite(case["difference"][side])
        # What is rounded to bfloat16 elsewhere parts where a mean is nearly zero: AdamW makes whole steps of it.
        assert (case["difference"][side] < 2) if syncs else (case["difference"][side] > 0.5)
        assert (abs(loss[side] - loss[rival]) < 1e-3) == syncs


def test_window(tmp_path):
    """Catches a side that trains another model: a micro-batch lost or counted twice, a step too many."""
    out = tmp_path / "window.json"
    sides = [
        "floor",
        "hand-written scan",
        "window, auto, by two",
        "window, noise scale",
        "Weighted",
        "Weighted, auto",
        "host driven, cast",
    ]
    sides += [
        "host driven, Weighted",
        "Trainer",
        "Trainer, fused, Weighted",
        "Trainer, drop",
        "counter",
        "optax.MultiSteps",
    ]
    options = ["--batches", "1", "--k", "2", "--repeats", "2", "--out", str(out), "--sides", *sides]
    printed = run("window.py", *TINY, *options, XLA_FLAGS=flags.HURRY)
    [case] = json.loads(out.read_text())["cases"]
    assert case["failed"] == {}
    assert list(case["seconds"]) == sides
    assert case["loss"].keys() == case["difference"].keys() == case["seconds"].keys() - {"floor"}
    for side, seconds in case["seconds"].items():
        assert f"| {side} |" in printed
        assert len(seconds) == 2 and all(math.isfinite(time) and time > 0 for time in seconds)
    for side, loss in case["loss"].items():
        # AdamW makes whole steps of what is rounded to bfloat16 elsewhere, where a bias's mean is nearly zero.
        rounds_elsewhere = side.startswith(("window", "Weighted", "host driven", "Trainer"))
        assert case["difference"][side] < (2 if rounds_elsewhere else 1e-4)
        assert abs(loss - case["loss"]["hand-written scan"]) < (3e-3 if rounds_elsewhere else 1e-4)


def test_memory(tmp_path):
    """Catches a case that measures another program than its name says, and a failure that passes for a result."""
    out = tmp_path / "memory.json"
    options = ["--ks", "4", "--sides", "one big batch", "--jobs", "2", "--out", str(out)]
    printed = run("memory.py", *TINY, *options, XLA_FLAGS=flags.HURRY)
    one, four = json.loads(out.read_text())["cases"]
    assert (one["side"], one["k"], four["side"], four["k"]) == ("gradient", 1, "one big batch", 4)
    assert one["output"] == four["output"] > 0 and one["argument"] < four["argument"]
    assert 2 < four["temp"] / one["temp"] < 5  # four times the activations; weights once
    assert "| one big batch | 4 |" in printed


def test_coupled(tmp_path):
    """Catches a side that compares other rows than its name says."""
    out = tmp_path / "coupled.json"
    sides = ["plain window", "coupled", "coupled, auto", "one big batch"]
    options = ["--batches", "4", "--k", "2", "--repeats", "2", "--out", str(out), "--sides", *sides]
    printed = run("coupled.py", *TINY, *options, XLA_FLAGS=flags.HURRY)
    [case] = json.loads(out.read_text())["cases"]
    assert case["failed"] == {} and list(case["seconds"]) == sides
    for side, seconds in case["seconds"].items():
        assert f"| {side} |" in printed
        assert len(seconds) == 2 and all(math.isfinite(time) and time > 0 for time in seconds)
        assert (case["difference"][side] > 0.2) == (side == "plain window")
    assert run("coupled.py", "--table", str(out)) == printed


def test_scaling(tmp_path):
    """Catches a side that compiles for each K that it is given."""
    out = tmp_path / "scaling.json"
    no_layers = ["--unrolled", "--layers", "0"]
    options = ["--n", "1", "--ks", "1,3", "--repeats", "2", "--compiles", "1", "--out", str(out)]
    printed = run("scaling.py", *TINY, *no_layers, *options, XLA_FLAGS=flags.HURRY)
    cases = {case["name"]: case for case in json.loads(out.read_text())["cases"]}
    assert [cases[side]["compiles_when_k_changes"] for side in ("window, traced K", "counter")] == [0, 0]
    for case in cases.values():
        for times in [*case["seconds"].values(), *(case["compile_seconds"] or {}).values()]:
            assert times and all(math.isfinite(time) and time > 0 for time in times)
        assert f"| {case['name']}: K |" in printed
    assert run("scaling.py", "--table", str(out)) == printed


def test_beside_lightning(tmp_path):
    """Catches sides that train different models, and a gate that lets nothing through."""
    pytest.importorskip("torch")
    pytest.importorskip("lightning")
    out = tmp_path / "lightning.json"
    options = ["--batches", "1", "--k", "2", "--repeats", "2", "--out", str(out)]
    printed = run("beside_lightning.py", *TINY, *options, XLA_FLAGS=flags.HURRY, TORCH_COMPILE_DISABLE="1")
    [case] = json.loads(out.read_text())["cases"]
    assert case["failed"] == {} and len(case["seconds"]) == 6
    for side, seconds in case["seconds"].items():
        assert f"| {side} |" in printed
        assert len(seconds) == 2 and all(math.isfinite(time) and time > 0 for time in seconds)
        assert len(case["losses"][side]) == 1 + 2 + 2


def test_plots(tmp_path):
    """Catches a figure without a side, and one that is another file when drawn again."""
    records = ["window-unrolled-n4-h100", "devices-unrolled-h100", "memory-1.3B-h100"]
    paths = [tmp_path / f"{record}.json" for record in records]
    for path in paths:
        path.write_text((BENCHMARKS / "results" / path.name).read_text())

    def figures():
        run("plots.py", *map(str, paths))
        return [path.with_suffix(".svg").read_text() for path in paths]

    drawn = figures()
    assert figures() == drawn
    for path, figure in zip(paths, drawn, strict=True):
        cases = json.loads(path.read_text())["cases"]
        sides = {case["side"] for case in cases} if "side" in cases[0] else cases[0]["seconds"]
        assert sides and all(f"<!-- {side} -->" in figure for side in sides)


@pytest.mark.parametrize("record", sorted(BENCHMARKS.glob("results/*.json")), ids=lambda path: path.stem)
def test_the_readme_has_the_table_of_each_record(record, monkeypatch, capsys):
    """A record is named after its benchmark."""
    script = str(BENCHMARKS / f"{record.stem.split('-')[0]}.py")
    monkeypatch.setattr(sys, "argv", [script, "--table", str(record)])
    importlib.import_module("devices")  # The helper of this name, which is put back after the test.
    monkeypatch.delitem(sys.modules, "devices")
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.syspath_prepend(BENCHMARKS)
    runpy.run_path(script, run_name="__main__")
    assert capsys.readouterr().out in (BENCHMARKS / "README.md").read_text()
