"""The Trainer in two processes of two devices: as one process with four, also when one of them fails."""

import json
import os
import signal
import socket
import subprocess
import sys

import flags
import numpy as np
import process_worker
import pytest
from process_worker import SIZES, TOKENS, ZERO, Positioned, fit, fit_adaptively, of_process
from training import Logged, loader

from jaxaccum.callbacks import ModelCheckpoint

pytestmark = pytest.mark.skipif(os.name != "posix", reason="sends signals")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def alone(folder):
    """What one process ends with, by strategy; "single" leaves checkpoints for the processes to go on from."""
    log, val = Logged(), loader(4, 4, 4, 4, 4, seed=1)
    saves = ModelCheckpoint(folder / "single", every_n_micro_steps=2, save_top_k=-1)
    return {
        "ddp": fit(folder, strategy="ddp", devices=4, val=val, logger=log) | {"records": log.records},
        "tokens": fit(folder, devices=4, accumulate_grad_batches=TOKENS),
        "adaptive": fit_adaptively(folder, devices=4),
        "single": fit(folder, saves, strategy="single", accumulate_grad_batches={0: 12, 1: 8}),
        "zero": fit(folder, batches=loader(*SIZES)[:16], devices=4, **ZERO),
        "twice": fit(folder, batches=loader(*SIZES)[:16], devices=4, twice=True, **ZERO),
        "dp": fit(folder, batches=loader(16, 16, 14), strategy="dp", devices=4, dropout=0),
    }


@pytest.fixture(scope="module")
def together(folder, alone):
    """What came of each case, on process 0 and on process 1."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {**os.environ, "XLA_FLAGS": flags.forced(2), "JAX_PLATFORMS": "cpu"}
    processes = []
    try:
        for i in "01":
            command = [sys.executable, "-W", "error", process_worker.__file__, address, "2", i, str(folder)]
            with open(folder / f"{i}.out", "w") as out, open(folder / f"{i}.err", "w") as err:
                processes.append(subprocess.Popen(command, stdout=out, stderr=err, env=environment))
        codes = [process.wait(timeout=400) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert codes == [0, 0], "\n".join((folder / f"{i}.err").read_text() for i in "01")
    lines = [(folder / f"{i}.out").read_text().splitlines() for i in "01"]
    return [{said["case"]: said for said in map(json.loads, (x for x in of if x.startswith("{")))} for of in lines]


def assert_same_end(got, want):
    """Parameters to 1e-6, counters exactly; micro-steps are as many as the devices make them."""
    for name, param in want["params"].items():
        np.testing.assert_allclose(got["params"][name], param, rtol=1e-6, atol=1e-6)
    assert (got["samples_seen"], got["global_step"]) == (want["samples_seen"], want["global_step"])


def errors(together, case):
    return [of_process[case]["error"] for of_process in together]


@pytest.mark.parametrize("case", ["ddp", "zero", "dp", "tokens", "adaptive", "twice"])
def test_two_processes_train_as_one_with_all_their_devices(alone, together, case):
    """Catches keys, weights and batches that are numbered or counted in each process alone, and sums not joined."""
    zero, one = (of[case] for of in together)
    assert zero["digest"] == one["digest"]
    assert_same_end(zero, alone[case])
    for name in ("micro_step", "effective_batch_size"):
        assert zero[name] == one[name] == alone[case][name]
    if case == "adaptive":
        assert len(zero["chosen"]) > 1 and zero["chosen"] == one["chosen"] == alone[case]["chosen"]


def test_process_0_alone_logs_what_is_of_all(alone, together):
    """Catches a log for each process, and losses, validations and effective batches of one process' examples."""
    got, want = together[0]["ddp"]["records"], alone["ddp"]["records"]
    assert together[1]["ddp"]["records"] == []
    for record, other in zip(got, want, strict=True):
        assert record == pytest.approx(other, rel=1e-6)


def test_a_resume_is_exact(together):
    """Catches local sums of the other process that a checkpoint lacks, and its loader's state given to this one."""
    assert together[0]["2 to 2"]["digest"] == together[0]["ddp"]["digest"]
    for case in ("ema", "tokens"):
        assert together[0][f"{case}, resumed"] == together[1][case] | {"case": f"{case}, resumed"}


def test_a_resume_in_more_processes_ends_at_the_same_parameters(alone, together):
    """Catches sums that are lost or counted twice, and batches that both processes see or neither."""
    assert_same_end(together[0]["1 to 2"], alone["single"])
    for error in errors(together, "1 to 2, in the middle of a group"):
        assert "after 10 loader batches" in error and "4 devices of 2 processes" in error and "multiple of 4" in error


@pytest.mark.parametrize(("strategy", "devices"), [("ddp", 4), ("single", 1)])
def test_a_resume_in_one_process_ends_at_the_same_parameters(folder, alone, together, strategy, devices):
    """Catches sums that are lost or counted twice, and a loader's state that is only half of it."""
    path = folder / "ddp" / "epoch=0-micro_step=4"
    k = {0: 12 // devices, 1: 8 // devices}
    options = {"strategy": strategy, "devices": devices, "accumulate_grad_batches": k, "ckpt_path": path}
    assert_same_end(fit(folder, batches=Positioned(loader(*SIZES)), **options), alone["ddp"])


def test_a_signal_to_one_process_saves_and_ends_all(together):
    """Catches a process that trains on without the other, or waits for it, and a save of one alone."""
    for name in ("SIGTERM", "SIGUSR1"):
        error = f"SystemExit: {128 + getattr(signal, name)}"
        assert [of[name] for of in together] == [{"case": name, "error": error, "micro_step": 2}] * 2
    assert together[0]["after SIGTERM"]["digest"] == together[0]["ddp"]["digest"]


def test_the_time_of_a_save_is_that_of_process_0(folder, together):
    """Catches a process that saves by its own clock, where the others don't."""
    zero, one = (of["timed"] for of in together)
    assert zero == one and zero["digest"] == together[0]["ddp"]["digest"]
    assert len(list((folder / "timed").iterdir())) == 3  # 10 micro-steps, and the end.


def test_a_stop_by_one_process_is_a_stop_of_all(together):
    """Catches a process that trains on alone, and one that stops later than it would by itself."""
    zero, one = (of["should_stop"] for of in together)
    assert zero["micro_step"] == one["micro_step"] == 2 and zero["digest"] == one["digest"]


def test_an_exception_in_one_process_is_told_to_the_others(folder, together):
    """Catches a process that waits for one that has ended, or saves without it, and an error that names no process."""
    assert errors(together, "an exception")[1] == "KeyError: 'luck'"
    assert "process 1 left the run with KeyError('luck')" in errors(together, "an exception")[0]
    assert not list(folder.glob("x/*"))
    assert "process 1 left the run with ValueError('train_loader=[] is empty" in errors(together, "an empty loader")[0]


def test_a_loaders_error_in_one_process_saves_and_ends_all(folder, together):
    """Catches an error of a loader that loses what was trained, or hangs the others."""
    of_others, own = errors(together, "a loader's error")
    assert own == "OSError: disk" and "the loader raised OSError('disk') on process 1" in of_others
    assert [path.name for path in (folder / "broken").iterdir()] == ["epoch=0-micro_step=2"]


def test_a_batch_of_one_process_that_cannot_be_read_saves_and_ends_all(folder, together):
    """Catches a process that leaves the others waiting in mid-run, and an error that names no leaf."""
    of_others, own = errors(together, "a batch that can't be read")
    assert own.startswith("TypeError: batch['x'] is a str")
    assert "the loader raised" in of_others and "batch['x'] is a str" in of_others and "on process 1" in of_others
    assert [path.name for path in (folder / "unread").iterdir()] == ["epoch=0-micro_step=2"]


def test_random_keys_in_a_batch_train_as_in_one_process(together):
    """Catches a kind of array that one process alone can put on its devices."""
    assert together[0]["keys"]["digest"] == together[0]["ddp"]["digest"]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("K", ["epoch 0: accumulate_grad_batches=3 on process 0", "accumulate_grad_batches=7 on process 1"]),
        ("options", ["accumulate_grad_batches=[[0, 2]] on process 0", "accumulate_grad_batches=[[0, 3]] on process 1"]),
        ("lengths", ["8 on process 0, 6 on process 1", "limit_train_batches=6"]),
        ("unknown lengths", ["after 6 batches each there are 2 on process 0, 0 on process 1", "limit_train_batches=6"]),
        ("trees", ["different trees", "on process 0; ", "'z': *}) on process 1"]),
    ],
)
def test_what_differs_raises_on_all_and_is_named(together, case, words):
    """Catches a boundary that one process never comes to, and an error that doesn't say whose value is which."""
    first, second = errors(together, case)
    assert first == second and first.startswith("ValueError")
    assert all(word in first for word in words), first


def test_the_order_of_batches_over_processes_is_that_of_their_devices():
    """Catches a worker whose order is not the one that fit's docstring gives."""
    assert of_process(list(range(10)), 0) == [0, 1, 4, 5, 8, 9] and of_process(list(range(10)), 1) == [2, 3, 6, 7]


def test_each_process_predicts_for_its_own_batches(together):
    """Catches predictions of the other process' batches, of those that fill up a micro-step, and another order."""
    ddp, dp = ([of["predict"][name] for of in together] for name in ("ddp", "dp"))
    assert ddp == [[[2], [4, 4], [6, 6, 6]], [[4, 4], [4, 4]]]
    assert dp == [[[0, 2, 4], [12, 14, 16]], [[6, 8, 10], [18, 20, 22]]]
