"""Handles SIGTERM and SIGINT during a run: the first signal requests a stop, the second has its default effect.

With several processes, a signal to any of them stops all of them after the same micro-step.
"""

import signal
import threading
from types import FrameType
from typing import Any

from jaxaccum.distributed.process_group import Processes

_LISTENED_TO = (signal.SIGTERM, signal.SIGINT)


class Signals:
    """A context manager that records the first signal in this process's wishes and restores the previous handlers.

    Signal handlers can only be set in the main thread; in other threads this does nothing.
    """

    def __init__(self, processes: Processes):
        self._processes = processes
        self._former: dict[int, Any] = {}
        self._left = False

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            former = {number: signal.getsignal(number) for number in _LISTENED_TO}
            # None is a handler that was not set from Python and can't be restored.
            self._former = {number: handler for number, handler in former.items() if handler is not None}
            for number in self._former:
                signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._put_back()

    def leave_if_told(self) -> None:
        """Raises KeyboardInterrupt after SIGINT, and SystemExit with code 128 + signal number after SIGTERM."""
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
