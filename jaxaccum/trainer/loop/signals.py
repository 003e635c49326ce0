"""SIGTERM and SIGINT while a run goes on: the first asks it to leave, the second is as if nobody listened.

With several processes one that comes to any of them is for all, which leave in the same place.
"""

import signal
import threading
from types import FrameType
from typing import Any

from jaxaccum.distributed.process_group import Processes

_LISTENED_TO = (signal.SIGTERM, signal.SIGINT)


class Signals:
    """A context in which the first signal is noted, and puts the former handlers back.

    Handlers are the main thread's to set: in any other thread nothing is listened to.

    Args:
      processes: those of the run; the first signal that this one is sent is among its wishes.
    """

    def __init__(self, processes: Processes):
        self._processes = processes
        self._former: dict[int, Any] = {}
        self._left = False

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            former = {number: signal.getsignal(number) for number in _LISTENED_TO}
            # None is a handler that Python did not set, and could not put back.
            self._former = {number: handler for number, handler in former.items() if handler is not None}
            for number in self._former:
                signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._put_back()

    def leave_if_told(self) -> None:
        """Raises KeyboardInterrupt after SIGINT, and SystemExit with a shell's code for the signal after SIGTERM."""
        told = self._processes.wishes.signal
        if told is not None:
            self._left = True
            self._processes.fail(KeyboardInterrupt() if told == signal.SIGINT else SystemExit(128 + told))

    def came_again(self, error: BaseException) -> bool:
        """Whether `error` is that of a second signal: one that `leave_if_told` did not raise."""
        return self._processes.own.signal is not None and not self._left and isinstance(error, KeyboardInterrupt)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._processes.own.signal = number
        self._put_back()

    def _put_back(self) -> None:
        for number, handler in self._former.items():
            if signal.getsignal(number) == self._note:
                signal.signal(number, handler)
