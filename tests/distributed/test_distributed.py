"""Several processes: when one fails, all end within 15 seconds and say why; those that finish together end well."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import distributed_worker
import pytest

import jaxaccum.distributed

WORKER = distributed_worker.__file__


def run(tmp_path, num_processes, *, stopped=None, **task):
    """Runs the worker in several processes, each on one device, until all have ended but the `stopped` one.

    Returns:
      ([(exit code, stdout, stderr) of each], the time at which the last one had ended).
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    # Eight devices, logs that lose nothing, and a cache that a killed process may leave half an entry in.
    forced = {"XLA_FLAGS", "PYTHONUNBUFFERED", "JAX_COMPILATION_CACHE_DIR"}
    environment = {name: value for name, value in os.environ.items() if name not in forced} | {"JAX_PLATFORMS": "cpu"}
    processes = []
    for i in map(str, range(num_processes)):
        command = [sys.executable, "-W", "error", WORKER, address, str(num_processes), i, json.dumps(task)]
        with open(tmp_path / f"{i}.out", "w") as out, open(tmp_path / f"{i}.err", "w") as err:
            processes.append(subprocess.Popen(command, stdout=out, stderr=err, env=environment))
    try:
        for i, process in enumerate(processes):
            if i != stopped:
                process.wait(timeout=60)
        end = time.time()
    finally:
        for process in processes:
            process.kill()
            process.wait()
    read = lambda i, name: (tmp_path / f"{i}.{name}").read_text()
    return [(process.returncode, read(i, "out"), read(i, "err")) for i, process in enumerate(processes)], end


PLACES = {
    "mid-window": {"every_k": 10**6, "seconds": 0.05, "die_at": 3},  # Nobody comes to a boundary.
    "boundary": {"every_k": 2, "seconds": 0.0, "die_at": 7},  # The others wait in it.
}
ENDS = ["SIGKILL", "SIGTERM", "SIGSTOP", "exception"]


@pytest.mark.parametrize(
    ("num_processes", "victim", "place", "end", "peer_timeout"),
    [
        *[(2, 1, "mid-window", end, 3.0) for end in ENDS],
        *[(2, 0, "boundary", end, 3.0) for end in ("SIGKILL", "SIGSTOP")],
        (4, 0, "mid-window", "SIGKILL", 3.0),
        (4, 3, "boundary", "exception", 3.0),
        (4, 2, "boundary", "SIGKILL", 10.0),  # The default keeps the promise of 15 seconds too.
    ],
)
def test_the_end_of_one_process_is_the_end_of_all(tmp_path, num_processes, victim, place, end, peer_timeout):
    """Catches a process that waits for ever for one that is gone, one that does not say which, and exit code 0."""
    task = {"role": "train", "victim": victim, "end": end, **PLACES[place], "timeouts": {"peer_timeout": peer_timeout}}
    processes, ended = run(tmp_path, num_processes, stopped=victim if end == "SIGSTOP" else None, **task)
    began = float(re.search(r"the end begins at (\S+)", processes[victim][1])[1])
    assert ended - began < 15
    for i, (code, _, err) in enumerate(processes):
        if i == victim and end != "exception":
            assert code == -(signal.SIGKILL if end == "SIGSTOP" else signal.Signals[end])
            continue
        assert code == 1, err
        message = re.search(rf"^jaxaccum: process {i} of {num_processes} ends: (.*)$", err, re.MULTILINE)[1]
        assert re.match(rf"process {victim} \(.*\)", message), message
        assert set(re.findall(r"process (\d)", message)) == {str(victim)}, message
        why = "failed with RuntimeError: out of luck. " if end == "exception" else "gone"
        assert why in message
        assert "start all processes again" in message
    if end == "exception":
        assert "Traceback" in processes[victim][2]


@pytest.mark.parametrize("shutdown", [False, True])
def test_processes_that_finish_apart_end_well(tmp_path, shutdown):
    """Catches an end that looks like a death, whether the script ends or calls `jax.distributed.shutdown` first."""
    processes, _ = run(tmp_path, 2, role="finish", timeouts={"peer_timeout": 3.0}, shutdown=shutdown)
    for code, out, err in processes:
        assert (code, err) == (0, "")
        assert [line for line in out.splitlines() if not line.startswith("[Gloo]")] == ["done"]


def test_a_process_that_leaves_early_does_not_hold_up_the_others(tmp_path):
    """Catches processes that wait for ever for one that has come to its end in good order."""
    processes, _ = run(tmp_path, 2, role="leave", timeouts={"exit_timeout": 1.0})
    for code, _, err in processes:
        assert code == 1
        assert re.search(r"process 0 \(.*\) still runs 1 s after process 1 has finished.*exit_timeout", err), err


def test_processes_agree_or_all_raise(tmp_path):
    """Catches a disagreement that one process does not hear of, and errors that don't say whose value is which."""
    processes, _ = run(tmp_path, 3, role="agree")
    for i, (code, out, err) in enumerate(processes):
        assert code == 0, err
        same, values, names, slow, *alone = out.splitlines()
        assert same == "{'every_k': 8, 'rest': [1, 2.5, None]}"
        disagree = "ValueError: the processes disagree: {}=8 on process 0, 2; {}=4 on process 1."
        assert values.startswith(disagree.format("every_k", "every_k"))
        assert names.startswith(disagree.format("epoch", "stop"))
        came = "process 1 came too late" if i == 1 else "no answer from process 1"
        assert slow.startswith(f"TimeoutError: {came}: agree('slow') waited for timeout=0.3 s")
        assert [line.partition(": agree")[0] for line in alone] == (
            ["TimeoutError: no answer from process 1, 2"] if i == 0 else []
        )


def test_one_process_agrees_with_itself():
    """Catches an agreement that needs `jax.distributed`."""
    value = {"every_k": 8}
    assert jaxaccum.distributed.agree("epoch 0", value) is value


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: jaxaccum.distributed.agree("k", {1, 2}), TypeError, ["k must be", "{1, 2}", "lists"]),
        (lambda: jaxaccum.distributed.agree("k", 1, timeout=0), ValueError, ["timeout", "above 0", "got 0"]),
        (lambda: jaxaccum.distributed.initialize(peer_timeout=-1.0), ValueError, ["peer_timeout", "got -1.0"]),
        (lambda: jaxaccum.distributed.initialize(exit_timeout=float("nan")), ValueError, ["exit_timeout", "got nan"]),
    ],
)
def test_a_bad_argument_is_refused_by_name_and_value(call, error, words):
    """Catches a timeout that never or always fires, and jax's own errors, which don't say what to do."""
    with pytest.raises(error) as caught:
        call()
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_missing_address_is_named():
    """Catches jax's own error, which doesn't say what to do. In a process of its own: this one has computed already."""
    program = "import jaxaccum.distributed as d; d.initialize(num_processes=2, cluster_detection_method='deactivate')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    words = "ValueError", "coordinator_address=None", "num_processes=2", "SLURM", "'localhost:1234'"
    assert all(word in done.stderr for word in words), done.stderr
