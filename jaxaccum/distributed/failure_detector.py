"""The failure detector: decides from the processes' entries which one failed. Pure logic, without threads or I/O."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

Blame = Mapping[str, str]  # Process index, as text -> why that process makes all processes exit.
_SUSPICIOUS_ROUNDS = 3
_AGAIN = "then start all processes again, from the last checkpoint if there is one."


class Entry(NamedTuple):
    """What a process reports to the others, rewritten with every heartbeat."""

    beat: int  # Increases while the process is alive.
    where: str  # Its host and process id, for error messages.
    finished: bool  # Whether it has finished and is waiting for the others.
    blame: Blame


class News(NamedTuple):
    """The store's contents at the last read."""

    reads: int  # The number of reads so far.
    entries: Mapping[int, Entry]  # Of the processes that have written one.

    def of(self, process: int) -> Entry:
        """The entry of `process`, or one with beat 0 if it has written none."""
        return self.entries.get(process, Entry(0, "not heard of yet", False, {}))


class Judge:
    """Decides in each round whether a process has failed, and which.

    Silence is measured in rounds, not by a clock, so that suspending all machines is not mistaken for a failure. There
    are `interval` seconds between rounds. The timeouts are those of `initialize`.
    """

    def __init__(self, process: int, num_processes: int, interval: float, peer_timeout: float, exit_timeout: float):
        self._process = process
        self._others = [other for other in range(num_processes) if other != process]
        self._peer_timeout, self._exit_timeout = peer_timeout, exit_timeout
        self._patience, self._exit_patience = (math.ceil(t / interval) for t in (peer_timeout, exit_timeout))
        self._store_silence = _Silence()
        self._silence = {other: _Silence() for other in self._others}
        self._rounds_finished = 0
        self._roll_call: _RollCall | None = None

    def round(self, news: News, failure: str | None, finished: bool, store_is_gone: Callable[[], bool]) -> Blame:
        """Runs one round and returns the processes to blame.

        `failure` is the exception that ends this process, in one line. `store_is_gone` tells whether the process that
        hosts the store is definitely gone. It is slow, so it is called only if the store is silent.
        """
        store_silence = self._store_silence.after(news.reads)
        silent = [p for p, silence in self._silence.items() if silence.after(news.of(p).beat) >= self._patience]
        late = [other for other in self._others if not news.of(other).finished]
        self._rounds_finished += finished
        if failure and self._roll_call is None:
            self._roll_call = _RollCall(news)

        name = lambda process: f"process {process} ({news.of(process).where})"
        lost = (
            f"has not been heard of for {self._peer_timeout:g} s: killed or stopped, or its machine is gone. See the "
            f"end of its log, {_AGAIN} If it was only busy, raise peer_timeout."
        )
        for entry in news.entries.values():
            if entry.blame:
                return entry.blame
        if store_silence >= _SUSPICIOUS_ROUNDS and store_is_gone():
            return {"0": f"{name(0)} is gone, and jax's coordination service with it. See the end of its log, {_AGAIN}"}
        if store_silence >= self._patience:
            return {"0": f"{name(0)}, with jax's coordination service, {lost}"}
        if silent:
            return {str(other): f"{name(other)} {lost}" for other in silent}
        # A collective fails as soon as a peer dies, long before the peer counts as dead. So this process is blamed for
        # its exception only after all others have sent a heartbeat since.
        if self._roll_call and self._roll_call.is_complete(news, self._others):
            failed = f"{name(self._process)} failed with {failure}. See the traceback in its log, {_AGAIN}"
            return {str(self._process): failed}
        if late and self._rounds_finished >= self._exit_patience:
            late_text = (
                f"still runs {self._exit_timeout:g} s after process {self._process} has finished. Do all take the same "
                "number of steps? Check it with jaxaccum.distributed.agree. If it had more to do, raise exit_timeout."
            )
            return {str(other): f"{name(other)} {late_text}" for other in late}
        return {}


class _Silence:
    """Counts the rounds in which a counter has not changed."""

    def __init__(self):
        self._count, self._rounds = 0, 0

    def after(self, count: int) -> int:
        """Records the counter's value in this round and returns the number of rounds without a change."""
        self._rounds = self._rounds + 1 if count == self._count else 0
        self._count = count
        return self._rounds


class _RollCall:
    """Checks whether processes have sent a heartbeat since the roll call began."""

    def __init__(self, news: News):
        self._first_read = news.reads + 2  # The next read may have started before the roll call.
        self._before: News | None = None

    def is_complete(self, news: News, processes: Sequence[int]) -> bool:
        """Whether all of `processes` have sent a heartbeat since."""
        if self._before is None and news.reads >= self._first_read:
            self._before = news
        before = self._before
        return before is not None and all(news.of(p).beat > before.of(p).beat for p in processes)
