"""The numbers that a run logs: window means, validation results and values logged by callbacks."""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jaxaccum._sums.weighted_sum import Weighted
from jaxaccum.loggers import records
from jaxaccum.loggers.records import Records
from jaxaccum.trainer.loop.counters import Counters
from jaxaccum.trainer.programs.compiled import WindowLogs

UNFINISHED = 256  # Maximum number of unfinished windows whose means or sums are kept.


class Metrics:
    """The metrics of a run. Only `all` waits for the devices."""

    def __init__(self, records: Records):
        self.records = records
        self.window: dict[str, jax.Array] = {}  # The last window's means by their names in the log.
        self.epoch = EpochSums()
        self.results: dict[str, Any] = {}  # The last validation's results and the values logged by callbacks.
        self.logged: dict[str, Any] = {}  # The values logged by callbacks since the last record.
        self._unfinished: list[dict[str, jax.Array]] = []  # Includes the last window.
        self._finished: dict[str, jax.Array] = {}  # The newest window that is known to be finished.

    def close_window(self, logs: WindowLogs) -> None:
        """Stores the means of a closed window, and adds its sums to those of the epoch."""
        self.window = means = logs.means
        if logs.sums is not None:
            self.epoch.add(logs.sums)
        if len(self._unfinished) == UNFINISHED:
            del self._unfinished[1::2]  # Keeps the oldest, because the devices finish it first.
        self._unfinished.append(means)

    def log(self, name: str, value: Any) -> None:
        """Adds a callback's value to the results and to the next record."""
        self.results[name] = self.logged[name] = records.loggable(name, value)

    def record(self, at: Counters, scalars: Mapping[str, Any]) -> None:
        """Records scalars, and the values logged by callbacks, for the position `at`."""
        logged, self.logged = self.logged, {}
        place = {"epoch": at.epoch, "micro_step": at.micro_step, "samples_seen": at.samples_seen}
        self.records.add(at.global_step, {**place, **scalars, **logged})
        at.records += 1

    def record_window(self, at: Counters) -> None:
        """Records the last window, if this is due."""
        if not at.recorded:
            sizes = {"accumulate_grad_batches": at.every_k, "effective_batch_size": at.effective_batch}
            self.record(at, sizes | self.window)
            at.recorded = True

    def all(self) -> dict[str, float]:
        """Returns the last window's means, as "train_...", and the results."""
        return {name: float(records.number(value)) for name, value in (self.window | self.results).items()}

    def finished(self) -> dict[str, float]:
        """Returns the means of the newest window that the devices have finished; empty before the first."""
        if _is_ready(self.window):
            self._finished = self.window
            self._unfinished.clear()
        while self._unfinished and _is_ready(self._unfinished[0]):
            self._finished = self._unfinished.pop(0)
        return {name: float(records.number(mean)) for name, mean in self._finished.items()}


class EpochSums:
    """The weighted sums of the loss and the metrics over the windows of an epoch, in float64 on the host.

    Windows are added in order, each once the devices have finished it. Adding one waits only if `UNFINISHED` are not.
    """

    def __init__(self):
        self._sums: dict[str, Weighted] = {}
        self._unfinished: collections.deque[dict[str, Weighted]] = collections.deque()

    def add(self, sums: dict[str, Weighted]) -> None:
        """Adds the sums of a closed window."""
        for x in jax.tree.leaves(sums):
            x.copy_to_host_async()
        self._unfinished.append(sums)
        is_ready = lambda sums: all(x.is_ready() for x in jax.tree.leaves(sums))
        while self._unfinished and (len(self._unfinished) > UNFINISHED or is_ready(self._unfinished[0])):
            self._add_oldest()

    def all(self) -> dict[str, Weighted]:
        """Returns the sums; waits for the devices."""
        while self._unfinished:
            self._add_oldest()
        return self._sums

    def means(self) -> dict[str, float]:
        """Returns the means by their names in the log; NaN for a weight of 0. Waits for the devices."""
        quotient = lambda total, weight: total / weight if weight else float("nan")
        return {f"train_{name}_epoch": quotient(*sums) for name, sums in self.all().items()}

    def begin(self, sums: Mapping[str, Sequence[float]]) -> None:
        """Starts an epoch, with the sums of a checkpoint within it."""
        self._sums = {name: Weighted(*pair) for name, pair in sums.items()}
        self._unfinished.clear()

    def _add_oldest(self) -> None:
        for name, (total, weight) in self._unfinished.popleft().items():
            sums = self._sums.get(name, Weighted(0.0, 0.0))
            self._sums[name] = Weighted(sums.total + records.number(total), sums.weight + records.number(weight))


def _is_ready(means: dict[str, Any]) -> bool:
    return all(mean.is_ready() for mean in means.values())
