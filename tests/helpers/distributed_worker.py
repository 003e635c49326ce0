"""One process of test_distributed.py: sums alone, joins the others at boundaries, and ends as its arguments say.

python distributed_worker.py ADDRESS NUM_PROCESSES PROCESS '{"role": ..., ...}'
"""

import json
import os
import signal
import sys
import time

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import jaxaccum.distributed


def make_sum():
    """A function of one number a process that returns their sum over all processes."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    replicated, split = (NamedSharding(mesh, PartitionSpec(*names)) for names in ((), ("data",)))
    add = jax.jit(lambda x: x.sum(), out_shardings=replicated)
    return lambda x: float(add(jax.make_array_from_process_local_data(split, np.array([x], np.float32))))


def train(every_k, seconds, victim, die_at, end):
    """Windows without end. The `victim` ends itself by `end` in place of micro-step `die_at`."""
    sum_all = make_sum()
    total = 0.0
    for i in range(10**6):
        if victim == PROCESS and i == die_at:
            print(f"the end begins at {time.time()}")
            if end == "exception":
                raise RuntimeError("out of luck\nand of words")
            os.kill(os.getpid(), signal.Signals[end])
        time.sleep(seconds)
        total += 1.0
        if (i + 1) % every_k == 0:
            assert sum_all(total) == NUM_PROCESSES * total


def finish(shutdown):
    """Process 0 comes to its end long before the others do."""
    assert make_sum()(1.0) == NUM_PROCESSES
    time.sleep(4 * PROCESS)
    if shutdown:
        jax.distributed.shutdown()
    print("done")


def leave():
    """Process 1 leaves while the others wait for it in a boundary."""
    sum_all = make_sum()
    sum_all(1.0)
    if PROCESS == 1:
        sys.exit(3)
    sum_all(1.0)


def agree():
    """Calls `agree` for each value, and prints the results."""
    agree = jaxaccum.distributed.agree
    print(agree("same", {"every_k": 8, "rest": [1, 2.5, None]}))
    agree("another order", {"a": 1, "b": 2} if PROCESS else {"b": 2, "a": 1})
    tries = [
        lambda: agree("every_k", 4 if PROCESS == 1 else 8),
        lambda: agree("stop", 4) if PROCESS == 1 else agree("epoch", 8),
        lambda: time.sleep(2.5 * (PROCESS == 1)) or agree("slow", 1, timeout=0.3),
        lambda: PROCESS or agree("alone", 1, timeout=0.3),
    ]
    for attempt in tries:
        try:
            attempt()
        except (ValueError, TimeoutError) as error:
            print(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    _address, _num_processes, _process, _task = sys.argv[1:]
    NUM_PROCESSES, PROCESS, TASK = int(_num_processes), int(_process), json.loads(_task)
    jaxaccum.distributed.initialize(_address, NUM_PROCESSES, PROCESS, **TASK.pop("timeouts", {}))
    {"train": train, "finish": finish, "leave": leave, "agree": agree}[TASK.pop("role")](**TASK)
