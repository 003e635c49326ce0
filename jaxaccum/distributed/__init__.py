"""Multi-process training: exits instead of deadlocking when a process dies, and checks that hosts agree.

Builds on `jax.distributed` and requires only jax. `import jaxaccum` does not import this module.
"""

import atexit
import ctypes
import io
import itertools
import json
import math
import signal
import sys
import traceback
from collections import defaultdict
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import jax

from jaxaccum._jax import coordination
from jaxaccum.distributed.heartbeat import Watch

_agreements = itertools.count()


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    peer_timeout: float = 10.0,
    exit_timeout: float = 300.0,
    **options: Any,
) -> None:
    """Calls `jax.distributed.initialize`, and makes all processes exit when one of them dies instead of deadlocking.

    This process exits with code 1, even while it waits in a collective, and reports the responsible process and a
    remedy on stderr, when another process

    - is killed or stopped, or its machine fails: after `peer_timeout` seconds, plus a few to notify the others;
    - ends with an uncaught exception: after a second or two;
    - is still running `exit_timeout` seconds after this one finished, by `sys.exit` with a code too.

    On SLURM, Open MPI, Kubernetes and TPU pods no argument is required. With several processes it starts two threads,
    which write this process's entry to jax's coordination service about twice a second and read the entries of all
    processes. It also wraps `sys.excepthook` and registers an exit handler that waits for the other processes. It makes
    stdout line-buffered, disables jax's preemption service, which would keep SIGTERM from ending the process, and
    delays aborts by 6 seconds, except on process 0.

    Example:
      >>> import jaxaccum.distributed
      >>> jaxaccum.distributed.initialize("10.0.0.1:1234", num_processes=4, process_id=0)  # doctest: +SKIP

    Args:
      coordinator_address: host and port of process 0. Here and below, None detects the value from the cluster.
      num_processes: the number of processes. With one, nothing is installed.
      process_id: this process's index, from 0.
      peer_timeout: seconds, above 0, of silence after which a process counts as dead. A call that holds Python's GIL
        for longer also counts as a death.
      exit_timeout: seconds, above 0, that the first process to finish waits for the last.
      **options: for `jax.distributed.initialize`, such as `local_device_ids` and `initialization_timeout`.

    Raises:
      ValueError: if a timeout is not positive and finite, or if an argument is missing and can't be detected.
      RuntimeError: from jax, if already initialized or if called after the first computation.
    """
    _check_timeout("peer_timeout", peer_timeout)
    _check_timeout("exit_timeout", exit_timeout)
    jax.config.update("jax_enable_preemption_service", False)
    try:
        # jax's own timeouts are longer than ours, because it aborts without naming the process at fault.
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            heartbeat_timeout_seconds=100 + math.ceil(peer_timeout),
            shutdown_timeout_seconds=math.ceil(exit_timeout),
            **options,
        )
    except ValueError as error:
        raise ValueError(
            f"coordinator_address={coordinator_address!r}, num_processes={num_processes!r}, process_id={process_id!r}: "
            f"{error} jax knows what is None only under SLURM or Open MPI, on Kubernetes or on a TPU pod. Elsewhere, "
            "give every process all three, for example 'localhost:1234', 2, and 0 or 1."
        ) from error
    process, num_processes = coordination.place()
    if num_processes == 1:
        return
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # `os._exit` does not flush.
    if process:
        _slow_down_aborts()
    watch = Watch(process, num_processes, peer_timeout, exit_timeout)
    excepthook = sys.excepthook

    def fail(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """Prints the exception and ends this process, which would otherwise deadlock with the others at exit."""
        excepthook(kind, error, trace)
        watch.fail(traceback.format_exception_only(error)[0].partition("\n")[0].rstrip("."))

    sys.excepthook = fail
    atexit.register(watch.finish)


def agree(name: str, value: Any, *, timeout: float = 300.0) -> Any:
    """Checks that all processes pass the same `value`, and returns it.

    Use it for host-side decisions that collectives depend on: K, the number of micro-steps per epoch, whether to stop.
    If these differ, some processes wait at a boundary that the others never reach, which is a deadlock; this function
    raises on all processes instead. Every process must call it the same number of times, for example at the start of
    each epoch. It takes milliseconds and does not use devices.

    Example:
      >>> import jaxaccum.distributed
      >>> jaxaccum.distributed.agree("epoch 0", {"every_k": 8, "micro_steps": 120})
      {'every_k': 8, 'micro_steps': 120}

    Args:
      name: the name of the value in error messages.
      value: Python numbers, strings, lists and dictionaries, as in JSON.
      timeout: seconds, above 0, that the first process waits for the last.

    Returns:
      `value`; immediately, if there is only one process.

    Raises:
      TypeError: if `value` can't be serialized to JSON.
      ValueError: on all processes, if their values or names differ. The message lists the processes for each value.
        Also if `timeout` is not positive and finite.
      TimeoutError: if a process does not call this in time. The message names it.
    """
    _check_timeout("timeout", timeout)
    try:
        answer = f"{name}={json.dumps(value, sort_keys=True)}"
    except TypeError as error:
        raise TypeError(
            f"{name} must be made of Python's numbers, strings, lists and dictionaries, got {value!r}; for example "
            "int(k) for an array's k."
        ) from error
    process, num_processes = coordination.place()
    if num_processes == 1:
        return value
    directory = f"jaxaccum/agreements/{next(_agreements)}/"
    coordination.write(f"{directory}{process}", answer)
    try:
        coordination.meet(directory, timeout)
    except RuntimeError as error:
        came = coordination.read(directory)
        missing = [other for other in map(str, range(num_processes)) if other not in came]
        who = f"no answer from process {', '.join(missing)}" if missing else f"process {process} came too late"
        raise TimeoutError(
            f"{who}: agree({name!r}) waited for timeout={timeout:g} s from the first call on. Every process must call "
            "agree equally often; if one only had more to do, raise timeout."
        ) from error
    answers = coordination.read(directory)
    check_same([answers[other] for other in sorted(answers, key=int)])
    return value


def check_same(answers: Sequence[str]) -> None:
    """Raises ValueError if the processes' answers, in process order, differ; it lists the processes for each answer."""
    processes = defaultdict(list)
    for process, answer in enumerate(answers):
        processes[answer].append(str(process))
    if len(processes) > 1:
        whose = "; ".join(f"{answer} on process {', '.join(others)}" for answer, others in processes.items())
        raise ValueError(
            f"the processes disagree: {whose}. Let all of them decide it from what all of them know, such as the "
            "configuration and the epoch."
        )


def _check_timeout(name: str, seconds: float) -> None:
    if not 0 < seconds < math.inf:
        raise ValueError(f"{name} must be a finite number of seconds above 0, got {seconds!r}.")


def _slow_down_aborts() -> None:
    """Delays aborts by a few seconds, so that the watch can report the reason first.

    jax aborts within milliseconds of losing process 0. This installs libc's `sleep` as the SIGABRT handler, which takes
    the signal number, 6, as seconds. That is safe in any thread and blocks only the aborting one.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))
