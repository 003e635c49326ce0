"""Handles exit signals during a run: the first one requests a stop, the second one has its default effect.

With several processes, a signal to any of them stops all of them after the same micro-step.
"""

import signal
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any

from jaxaccum.distributed.process_group import Processes

# SLURM can send SIGUSR1 before a job ends, and a terminal sends SIGHUP when it is closed. Windows has neither.
EXIT_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP") if hasattr(signal, name)
)


class Signals:
    """A context manager that records the first of the signals `numbers` in this process's wishes.

    It restores the previous handlers. A signal is left alone if it is ignored, as under nohup, or has a handler of the
    user's. Handlers can only be set in the main thread; in other threads this does nothing.
    """

    def __init__(self, processes: Processes, numbers: Sequence[int] = EXIT_SIGNALS):
        self._processes, self._numbers = processes, numbers
        self._former: dict[int, Any] = {}
        self._left = False

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            former = {number: signal.getsignal(number) for number in self._numbers}
            defaults = (signal.SIG_DFL, signal.default_int_handler)
            self._former = {number: handler for number, handler in former.items() if handler in defaults}
            for number in self._former:
                signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._put_back()

    def leave_if_told(self) -> None:
        """Raises KeyboardInterrupt after SIGINT, and SystemExit with code 128 + number after any other signal."""
        told = self._processes.wishes.signal
        if told is not None:
            self._left = True
            self._processes.fail(KeyboardInterrupt() if told == signal.SIGINT else SystemExit(128 + told))

    def came_again(self, error: BaseException) -> bool:
        """Whether `error` is the KeyboardInterrupt of a second signal, which `leave_if_told` did not raise."""
        return self._processes.own.signal is not None and not self._left and isinstance(error, KeyboardInterrupt)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._processes.own.signal = number
        self._put_back()

    def _put_back(self) -> None:
        for number, handler in self._former.items():
            if signal.getsignal(number) == self._note:
                signal.signal(number, handler)
