"""Two background threads that end this process when another one fails."""

import contextlib
import functools
import json
import os
import socket
import threading
import time

from jaxaccum._jax import coordination
from jaxaccum.distributed.failure_detector import Blame, Entry, Judge, News

_ENTRIES = "jaxaccum/processes/"


class Watch:
    """Exchanges heartbeats with the other processes while the main thread computes.

    The main thread can hang in a collective that can't be interrupted, so two other threads do the work. One reads and
    writes the store, and hangs if the process that hosts the store is stopped. The other evaluates what was read, or
    that nothing was, and ends this process when a process has failed. The timeouts are those of `initialize`.
    """

    def __init__(self, process: int, num_processes: int, peer_timeout: float, exit_timeout: float):
        self._process, self._num_processes = process, num_processes
        self._interval = min(0.5, peer_timeout / 10)
        self._judge = Judge(process, num_processes, self._interval, peer_timeout, exit_timeout)
        self._where = f"{socket.gethostname()}, pid {os.getpid()}"
        self._news = News(0, {})
        self._failure: str | None = None
        self._blame: Blame = {}
        self._finished = False
        self._all_finished = threading.Event()
        self._beat_now = threading.Event()
        self._stop = threading.Event()
        self._talking = threading.Thread(target=self._talk, name="jaxaccum-talk", daemon=True)
        self._judging = threading.Thread(target=self._judge_all, name="jaxaccum-judge", daemon=True)
        self._talking.start()
        self._judging.start()

    def fail(self, reason: str) -> None:
        """Ends all processes because of an exception in this one. Returns only if the watch has already ended."""
        self._failure = reason
        self._judging.join()

    def finish(self) -> None:
        """Waits until every process has called this, then ends the watch."""
        self._finished = True
        self._beat_now.set()
        while self._judging.is_alive() and not self._all_finished.wait(self._interval):
            pass
        self._stop.set()
        self._beat_now.set()
        self._judging.join()
        self._talking.join()

    def _talk(self) -> None:
        """Writes this process's entry and reads all entries, at every heartbeat."""
        beat = 0
        while not self._stop.is_set():
            beat += 1
            entry = Entry(beat, self._where, self._finished, self._blame)
            with contextlib.suppress(RuntimeError):  # The judge notices the missing reads.
                coordination.write(f"{_ENTRIES}{self._process}", json.dumps(entry))
                entries = {int(key): Entry(*json.loads(value)) for key, value in coordination.read(_ENTRIES).items()}
                self._news = News(self._news.reads + 1, entries)
                if len(entries) == self._num_processes and all(entry.finished for entry in entries.values()):
                    self._all_finished.set()
            self._beat_now.wait(self._interval)
            self._beat_now.clear()

    def _judge_all(self) -> None:
        """Runs the judge's rounds, and ends this process as soon as a process is to blame."""
        store_is_gone = functools.partial(coordination.is_gone, self._interval)
        while not self._stop.wait(self._interval):
            if not coordination.is_open():
                return  # The script called jax.distributed.shutdown, which waits for all processes.
            self._blame = self._judge.round(self._news, self._failure, self._finished, store_is_gone)
            if self._blame:
                self._leave()

    def _leave(self) -> None:
        """Reports the blame on stderr and to the other processes, then ends this process without the main thread."""
        self._beat_now.set()
        reasons = " ".join(self._blame.values())
        with contextlib.suppress(OSError):
            os.write(2, f"\njaxaccum: process {self._process} of {self._num_processes} ends: {reasons}\n".encode())
        # The store ends with process 0, which therefore waits until the other live processes have announced their exit.
        rounds, leaving = 2, {self._process}
        if self._process == 0:
            rounds, leaving = 4, {process for process in range(self._num_processes) if str(process) not in self._blame}
        while rounds and not all(self._news.of(process).blame for process in leaving):
            rounds -= 1
            time.sleep(self._interval)
        os._exit(1)
