"""Many processes: none waits for ever for one that is gone, and what their hosts decide is the same on all.

Builds on `jax.distributed`, and needs jax alone. `import jaxaccum` does not load it.
"""

import atexit
import ctypes
import functools
import io
import itertools
import json
import math
import signal
import sys
import traceback
from collections import defaultdict
from collections.abc import Callable, Sequence
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
    """`jax.distributed.initialize`, after which the end of one process is the end of all, and never a hang.

    This process exits with code 1, whatever it is doing, waiting in a collective included, and says on stderr which
    process is the reason and what to do, when another one

    - is killed or stopped, or its machine is gone: `peer_timeout` seconds later, and a few to tell the others;
    - ends by an exception that nothing catches: a second or two later;
    - still runs `exit_timeout` seconds after this one has come to its end, by `sys.exit` with a code too.

    Under SLURM and Open MPI, on Kubernetes and on a TPU pod it takes no argument. It installs two threads, which twice
    a second write an entry to the store of jax's coordination service and read those of all processes; a
    `sys.excepthook` around the present one; and a function that waits for the other processes at exit. It makes stdout
    line-buffered, switches jax's preemption service off, since with it SIGTERM would end nothing, and lets an abort
    take 6 seconds, except on process 0.

    Args:
      coordinator_address: host and port of process 0. None, here and below: as the cluster says.
      num_processes: how many processes there are. With one, nothing is installed.
      process_id: the number of this one, from 0.
      peer_timeout: seconds, above 0. A call that keeps Python's lock for longer passes for a death.
      exit_timeout: seconds, above 0, between the end of the first process and that of the last.
      **options: for `jax.distributed.initialize`, such as `local_device_ids` and `initialization_timeout`.

    Raises:
      ValueError: if a timeout is not above 0 and finite, or an argument is missing where there is no cluster to ask.
      RuntimeError: from jax, if it was called before, or after the first computation.

    Example:
      >>> import jaxaccum.distributed
      >>> jaxaccum.distributed.initialize("10.0.0.1:1234", num_processes=4, process_id=0)  # doctest: +SKIP
    """
    _check_timeout("peer_timeout", peer_timeout)
    _check_timeout("exit_timeout", exit_timeout)
    jax.config.update("jax_enable_preemption_service", False)
    try:
        # jax's own timeouts come after ours, since it ends a process by an abort that names none.
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
        sys.stdout.reconfigure(line_buffering=True)  # Who is made to end flushes nothing, and the end of a log matters.
    if process:
        _slow_down_aborts()
    watch = Watch(process, num_processes, peer_timeout, exit_timeout)
    sys.excepthook = functools.partial(_fail, watch, sys.excepthook)
    atexit.register(watch.finish)


def agree(name: str, value: Any, *, timeout: float = 300.0) -> Any:
    """`value`, if every process calls this with the same one.

    For what each host decides on its own and a collective relies on: K, the number of micro-steps of an epoch, whether
    to stop. If it differed, some processes would wait in a boundary that the others never reach; here all raise. Every
    process calls it equally often, for instance at each epoch's start. It takes milliseconds, and no device.

    Args:
      name: what to call it in an error.
      value: numbers, strings, lists and dictionaries of Python, as in JSON.
      timeout: seconds, above 0, that the first process waits for the last.

    Returns:
      `value`; at once, where there is one process.

    Raises:
      TypeError: if JSON can't hold `value`.
      ValueError: on all processes, if their values or names differ: it says whose are which.
      TimeoutError: if a process has not come in time: it says which.

    Example:
      >>> import jaxaccum.distributed
      >>> jaxaccum.distributed.agree("epoch 0", {"every_k": 8, "micro_steps": 120})
      {'every_k': 8, 'micro_steps': 120}
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
    """Whether all processes, whose answers these are in order, gave the same one.

    Raises:
      ValueError: if not; it says whose are which.
    """
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


def _fail(
    watch: Watch,
    excepthook: Callable[..., Any],
    kind: type[BaseException],
    error: BaseException,
    trace: TracebackType | None,
) -> None:
    """Shows the exception and ends this process, which would otherwise wait at exit for others that wait for it."""
    excepthook(kind, error, trace)
    watch.fail(traceback.format_exception_only(error)[0].partition("\n")[0].rstrip("."))


def _slow_down_aborts() -> None:
    """Lets an abort take some seconds, in which the watch can name the reason.

    jax aborts within milliseconds of the loss of process 0. The signal's handler becomes libc's own `sleep`, which
    takes the signal's number for seconds: 6. That is safe wherever the abort comes from, and holds up its thread alone.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))
