"""Every example runs as its reader runs it, in a process of its own; the long one on a small part of its data."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import flags
import numpy as np

EXAMPLES = Path(__file__).parents[2] / "examples"
# They run for longer than they compile: convolutions that are not optimised at all take minutes.
IN_LESS_OF_A_HURRY = f"{flags.HURRY} --xla_backend_optimization_level=1"


def run(name, *arguments, cwd, xla_flags=IN_LESS_OF_A_HURRY):
    """What the example prints. It sees one device, or without `xla_flags` as many as it asks for."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {} if xla_flags is None else {"XLA_FLAGS": xla_flags}
    command = [sys.executable, EXAMPLES / name, *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_train_lm(tmp_path):
    options = ["--limit", "400", "--epochs", "3", "--accumulate", "0:5,1:3,2:1", "--out", "out"]
    printed = run("train_lm.py", *options, cwd=tmp_path)

    epochs = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [epoch["every_k"] for epoch in epochs] == [5, 3, 1]
    # 380 functions are 24 micro-batches of 16, the last not full; 24 of them are 5 windows of 5, the last not full.
    assert [epoch["optimizer_steps"] for epoch in epochs] == [5, 8, 24]
    assert all(math.isfinite(value) for epoch in epochs for value in epoch.values())
    for name in ("train_bits_per_byte", "held_out_bits_per_byte"):
        first, *_, last = (epoch[name] for epoch in epochs)
        assert last < 0.9 * first < 0.9 * math.log2(256), name
    assert (tmp_path / "out/loss.png").read_bytes().startswith(b"\x89PNG")
    assert "\n\ndef " in printed  # The sample.


def test_train_lm_loop(tmp_path):
    options = ["--limit", "400", "--epochs", "2", "--accumulate", "0:5,1:2"]
    printed = run("train_lm_loop.py", *options, cwd=tmp_path)
    moved, differ = map(float, re.search(r"moved by up to (\S+)\nand differ by at most (\S+)", printed).groups())
    assert moved > 1e-3
    assert differ < 1e-4
    assert "epoch 0, K = 5: 5 of 17 optimizer steps" in printed
    first, last = map(float, re.findall(r"(\S+) bits per byte", printed))
    assert last < 0.95 * first


def test_choose_batch(tmp_path):
    printed = run("choose_batch.py", "--limit", "400", "--max-k", "4", "--epochs", "1", "--out", "out", cwd=tmp_path)
    assert printed.startswith("micro_batch_size=8, every_k=8: ")
    # 380 functions are 48 micro-batches of 8, the last one filled up; K is between 2 and 4.
    assert 12 <= int(re.search(r"optimizer steps +(\S+) for 384 functions", printed).group(1)) <= 24
    assert re.search(r"K by optimizer step +\{0: 2[,}]", printed)
    assert float(re.search(r"held-out bits/byte +(\S+)", printed).group(1)) < 0.8 * math.log2(256)
    assert (tmp_path / "out/batch.png").read_bytes().startswith(b"\x89PNG")


def test_digits(tmp_path):
    assert accuracy(run("digits.py", cwd=tmp_path)) >= 0.97


def test_contrastive(tmp_path):
    options = ["--limit", "1200", "--epochs", "4", "--batch-size", "32", "--accumulate", "4", "--out", "out"]
    printed = run("contrastive.py", *options, cwd=tmp_path)
    assert printed.startswith("1,050 pairs to train on, 150 held out, 128 in a window")

    records = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    exact, naive = ([x for x in records if x["negatives"] == name] for name in ("exact", "naive"))
    assert len(exact) == len(naive) == 4
    # It is harder to find one of 128 than one of 32: at the start, by the difference of their logarithms.
    assert 0.5 * math.log(4) < exact[0]["loss"] - naive[0]["loss"] < 2 * math.log(4)
    for side in (exact, naive):
        assert side[-1]["loss"] < side[0]["loss"] and side[-1]["retrieved"] > 3 / 150
    assert (tmp_path / "out/retrieval.png").read_bytes().startswith(b"\x89PNG")


def test_minimal(tmp_path):
    assert accuracy(run("minimal.py", cwd=tmp_path)) >= 0.85


def test_pmap_train(tmp_path):
    printed = run("pmap_train.py", cwd=tmp_path, xla_flags=flags.forced(8))
    assert printed.startswith("8 devices, 4 micro-batches of 8 digits on each, 256 in a window")
    assert accuracy(printed) >= 0.95


def test_pmap_train_is_the_classic_script_but_for_one_line(tmp_path):
    """Catches a second place that accumulation had to change: with the replaced line put back, the old script runs."""
    script = (EXAMPLES / "pmap_train.py").read_text()
    ours = '    tx = jaxaccum.MultiSteps(tx, EVERY_K, axis_name="data")  # The changed line.\n'
    for old, new in ((ours, ""), ("# The line that it replaces: ", ""), ("EPOCHS = 8, 4, 12", "EPOCHS = 8, 4, 2")):
        assert script.count(old) == 1
        script = script.replace(old, new)
    (tmp_path / "classic.py").write_text(script)
    assert "jaxaccum." not in script
    printed = run(tmp_path / "classic.py", cwd=tmp_path, xla_flags=flags.forced(8))
    assert printed.startswith("8 devices, ") and accuracy(printed) >= 0.8


def test_mesh_train(tmp_path):
    printed = run("mesh_train.py", cwd=tmp_path, xla_flags=None)
    assert printed.startswith("mesh {'data': 4, 'model': 2}: 4 micro-batches of 8 digits on each row, 128 in a window")
    assert accuracy(printed) >= 0.95
    assert printed.count("P(None, None, 'model')") == 2  # Parameters and moments are split as they were.


def test_multi_process(tmp_path):
    """Catches a gradient that counts a process' share twice, or not at all."""
    printed = [run("multi_process.py", "--processes", n, "--out", f"{n}.npz", cwd=tmp_path) for n in ("1", "2")]
    assert all(accuracy(text) >= 0.95 for text in printed)
    assert printed[1].count("epoch 7") == 1  # One of the two prints.
    one, two = (np.load(tmp_path / f"{n}.npz") for n in ("1", "2"))
    for name in one.files:
        np.testing.assert_allclose(two[name], one[name], rtol=1e-4, atol=1e-5)


def accuracy(printed):
    """The last held-out accuracy."""
    return float(re.findall(r"held-out accuracy (\S+)", printed)[-1])
