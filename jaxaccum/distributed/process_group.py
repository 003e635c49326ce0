"""Host-side communication between the processes of a run, which keeps them in lockstep."""

import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from jaxaccum._jax import coordination
from jaxaccum.distributed import check_same

_PATIENCE = 1800.0  # Seconds that a process may lag behind; a dead process ends the run much earlier.
_SHELF = 100
_gatherings = itertools.count()


@dataclasses.dataclass
class Wishes:
    """Events on one process that concern all of them."""

    signal: int | None = None  # The number of a signal that it received.
    stop: bool = False  # Whether it wants training to stop.


class Processes:
    """The processes of `jax.distributed`; without it, this process alone, which never waits.

    All processes call `gather` in the same order, and it also exchanges their wishes. It takes the host a millisecond
    or two and does not use devices. A process that can't continue announces it in place of its next `gather`.
    """

    def __init__(self):
        self.index, self.count = coordination.place()
        self.begin()

    def begin(self) -> None:
        """Starts a run without any wishes."""
        self._common: BaseException | None = None  # What all processes have raised at the same place.
        self.left = False  # Whether any process has left the run; `gather` then no longer communicates.
        self.own = Wishes()
        # Those of all processes: a signal that any received, and whether any wants to stop; as of the last `gather`.
        self.wishes = self.own if self.count == 1 else Wishes()
        self._seconds = 0.0  # Of process 0, as of the last `gather`.

    def gather(self, about: str, value: Any = None) -> list[Any]:
        """Gathers the values of all processes, in order, and updates `wishes`.

        After a process has left the run, it returns this process's value alone. `about` is the place in the program, to
        check that all processes are at the same one; `value` is JSON-serializable.

        Raises:
          RuntimeError: if another process has left the run or is at a different place.
          TimeoutError: if a process does not arrive within half an hour.
        """
        if self.count == 1 or self.left:
            return [value]
        seconds = None if self.index else time.monotonic()
        entries = self._exchanged(json.dumps([about, value, dataclasses.astuple(self.own), seconds]))
        left = {i: entry["left"] for i, entry in enumerate(entries) if isinstance(entry, dict)}
        if left or len({place for place, *_ in entries}) > 1:
            self.left = True
            if left:
                who = "; ".join(f"process {process} left the run with {error}" for process, error in left.items())
                raise RuntimeError(f"{who}. See its log; the others can't go on without it.")
            where = "; ".join(f"process {i} is at {place!r}" for i, (place, *_) in enumerate(entries))
            raise RuntimeError(
                f"the processes have parted: {where}. Every process must call the Trainer's methods in the same order, "
                "with the same options."
            )
        wishes = [Wishes(*entry[2]) for entry in entries]
        signals = [wish.signal for wish in wishes if wish.signal is not None]
        self.wishes = Wishes(signals[0] if signals else None, any(wish.stop for wish in wishes))
        self._seconds = entries[0][3]
        return [value for _, value, *_ in entries]

    def seconds(self) -> float:
        """Returns the time of a monotonic clock: that of process 0, so that all processes see the same."""
        return time.monotonic() if self.count == 1 else self._seconds

    def share_wishes(self) -> None:
        """Exchanges the wishes that hooks and signals have set."""
        self.gather("the end of a hook")

    def agree(self, name: str, values: dict[str, Any]) -> None:
        """Raises ValueError on all processes if they differ in any of the `values`; it lists those by process."""
        if self.count == 1:
            return
        found = self.gather(name, values)
        differ = [key for key in values if any(other[key] != found[0][key] for other in found)]
        answers = [f"{name}: " + ", ".join(f"{key}={json.dumps(other[key])}" for key in differ) for other in found]
        self.together(lambda: check_same(answers))

    def together(self, check: Callable[[], Any]) -> Any:
        """Runs `check()`, which raises on all processes or on none, so that they stay in lockstep after an error."""
        try:
            return check()
        except Exception as error:
            self.fail(error)

    def fail(self, error: BaseException) -> NoReturn:
        """Raises `error`, which all processes must raise at the same place."""
        self._common = error
        raise error

    def are_together(self, error: BaseException) -> bool:
        """Whether all processes raised `error`, or their own version of it, at the same place."""
        return self.count == 1 or error is self._common

    def leave(self, error: BaseException) -> None:
        """Tells the waiting processes that this one ends with `error`, unless all of them raised it."""
        if not self.left and not self.are_together(error):
            self.left = True
            number, text = next(_gatherings), json.dumps({"left": repr(error)})
            if self.index:
                coordination.write(f"{_directory(number)}{self.index}", text)
            else:
                self._tell(number, [text])

    def _exchanged(self, text: str) -> list[Any]:
        """The entries of all processes. Process 0 collects them and sends them to the others."""
        number = next(_gatherings)
        directory = _directory(number)
        if not self.index:
            found = coordination.read(directory)
            others = range(1, self.count)
            texts = [found.get(str(i)) or _waited_for(f"{directory}{i}", i, _PATIENCE) for i in others]
            return self._tell(number, [text, *texts])
        coordination.write(f"{directory}{self.index}", text)
        told = json.loads(_waited_for(f"{directory}all", 0, _PATIENCE + 10))
        return [told["texts"][i] for i in told["whose"]]

    def _tell(self, number: int, entries: Sequence[str]) -> list[Any]:
        """Publishes `entries` to all processes, without duplicates, and returns them decoded."""
        texts = list(dict.fromkeys(entries))
        told = {"texts": [json.loads(text) for text in texts], "whose": [texts.index(text) for text in entries]}
        coordination.write(f"{_directory(number)}all", json.dumps(told))
        if number % _SHELF == 1 and number > _SHELF:
            coordination.forget(_shelf(number - _SHELF))  # All have read it, since they have written later entries.
        return [told["texts"][i] for i in told["whose"]]


def _waited_for(key: str, process: int, patience: float) -> str:
    try:
        return coordination.wait(key, patience)
    except RuntimeError as error:
        raise TimeoutError(
            f"process {process} had nothing to tell for {patience:g} s. Does it hang, or take another way through the "
            "program?"
        ) from error


def said(values: Sequence[Any] | Mapping[int, Any]) -> str:
    """The value of each process, in words."""
    pairs = values.items() if isinstance(values, Mapping) else enumerate(values)
    return ", ".join(f"{value} on process {process}" for process, value in pairs)


def _directory(number: int) -> str:
    return f"{_shelf(number)}{number}/"


def _shelf(number: int) -> str:
    """The parent directory of consecutive gatherings, which are deleted together."""
    return f"jaxaccum/gatherings/{number // _SHELF}/"
