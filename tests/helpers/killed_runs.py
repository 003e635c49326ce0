"""Runs that are killed at random moments and resumed. `--kills 30` does it more often than the suite has time for."""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import flags

WORKER = Path(__file__).with_name("resume_worker.py")
MOMENTS = ["micro_step", "save", "validation", "epoch_end"]


def life(folder, devices, epochs, death=None):
    """What a training process printed at its end, or None if it was killed."""
    arguments = [str(folder), str(devices), str(epochs), *map(str, death or ())]
    environment = {**os.environ, "XLA_FLAGS": flags.forced(devices), "JAX_PLATFORMS": "cpu", "PYTHONWARNINGS": "ignore"}
    environment["JAX_COMPILATION_CACHE_DIR"] = str(folder.parent / "compiled")
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    command = [sys.executable, str(WORKER), *arguments]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=300)
    if done.returncode == -signal.SIGKILL:
        return None
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def killed_and_resumed(folder, devices, kills, seed):
    """(what a run ends with after `kills` kills at random moments, how many checkpoints they cut off)."""
    dice = random.Random(seed)
    # Every moment in turn, then a delay that takes the kill to any place in it or beyond.
    deaths = [(MOMENTS[i % 4], dice.randint(1, 4), dice.uniform(0, 0.04)) for i in range(kills)]
    ended = [life(folder, devices, epochs=2 * kills + 4, death=death) for death in deaths]
    assert ended == [None] * kills, "the run was over before its kills were: it needs more epochs"
    cut_off = len(list((folder / "checkpoints").glob("*orbax*")))
    return life(folder, devices, epochs=2 * kills + 4), cut_off


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        for name in ("unbroken", "killed"):
            (Path(root) / name).mkdir()
        want = life(Path(root) / "unbroken", options.devices, 2 * options.kills + 4)
        got, cut_off = killed_and_resumed(Path(root) / "killed", options.devices, options.kills, options.seed)
    print(f"{options.kills} kills, {cut_off} checkpoints cut off, the same in the end: {got == want}", got)
    sys.exit(got != want)
