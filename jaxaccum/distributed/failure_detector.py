"""What the processes tell each other, and which of them is the end of all. Pure: knows no thread and no store."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

Blame = Mapping[str, str]
_SUSPICIOUS_ROUNDS = 3
_AGAIN = "then start all processes again, from the last checkpoint if there is one."


class Entry(NamedTuple):
    """What a process tells the others, written anew with every beat.

    Attributes:
      beat: counts up while the process lives.
      where: its host and process id, for people.
      finished: whether it has come to its end, and waits for the others to.
      blame: the number of a process, as text -> a sentence on why it is the end of all. Empty while all is well.
    """

    beat: int
    where: str
    finished: bool
    blame: Blame


class News(NamedTuple):
    """The store as it was last read.

    Attributes:
      reads: how often it has been read.
      entries: process -> its entry, for those that have written one.
    """

    reads: int
    entries: Mapping[int, Entry]

    def of(self, process: int) -> Entry:
        """The entry of `process`, one without a beat if it has written none."""
        return self.entries.get(process, Entry(0, "not heard of yet", False, {}))


class Judge:
    """Decides, round by round, whether a process is the end of all, and which.

    Silence is counted in rounds, not read off a clock: after a pause of all machines nobody has been silent for long.

    Args:
      process: this process' number.
      num_processes: how many there are.
      interval: seconds between rounds.
      peer_timeout: seconds of silence after which a process counts as dead.
      exit_timeout: seconds that this process, once it has finished, waits for the others.
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
        """One round.

        Args:
          news: the store as it was last read.
          failure: the exception that ends this process, in a line, if there is one.
          finished: whether this process has come to its end.
          store_is_gone: asks whether the store's process certainly is, which takes time; called only if it is silent.

        Returns:
          Who is to blame; empty if nobody is.
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
        # A collective fails as soon as a peer has died, long before that one counts as dead. So this process is to
        # blame for its exception only when all others have been heard of since.
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
    """For how many rounds a count has not moved."""

    def __init__(self):
        self._count, self._rounds = 0, 0

    def after(self, count: int) -> int:
        """The rounds of silence, this one included, in which it stands at `count`."""
        self._rounds = self._rounds + 1 if count == self._count else 0
        self._count = count
        return self._rounds


class _RollCall:
    """Whether processes have been heard of since the roll call began."""

    def __init__(self, news: News):
        self._first_read = news.reads + 2  # The next one may have begun before.
        self._before: News | None = None

    def is_complete(self, news: News, processes: Sequence[int]) -> bool:
        """Whether every one of `processes` has."""
        if self._before is None and news.reads >= self._first_read:
            self._before = news
        before = self._before
        return before is not None and all(news.of(p).beat > before.of(p).beat for p in processes)
