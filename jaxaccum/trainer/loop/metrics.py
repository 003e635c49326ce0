"""The numbers that a run logs: window means, validation results and values logged by callbacks."""

from collections.abc import Mapping
from typing import Any

import jax

from jaxaccum.loggers import records
from jaxaccum.loggers.records import Records
from jaxaccum.trainer.loop.counters import Counters

UNFINISHED = 256  # Maximum number of unfinished windows whose means are kept.


class Metrics:
    """The metrics of a run. Only `all` waits for the devices."""

    def __init__(self, records: Records):
        self.records = records
        self.window: dict[str, jax.Array] = {}  # The last window's means by name.
        self.results: dict[str, Any] = {}  # The last validation's results and the values logged by callbacks.
        self.logged: dict[str, Any] = {}  # The values logged by callbacks since the last record.
        self._unfinished: list[dict[str, jax.Array]] = []  # Includes the last window.
        self._finished: dict[str, jax.Array] = {}  # The newest window that is known to be finished.

    def close_window(self, means: dict[str, jax.Array]) -> None:
        """Stores the means of a closed window."""
        self.window = means
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
            self.record(at, sizes | _train(self.window))
            at.recorded = True

    def all(self) -> dict[str, float]:
        """Returns the last window's means, as "train_...", and the results."""
        return {name: float(records.number(value)) for name, value in (_train(self.window) | self.results).items()}

    def finished(self) -> dict[str, float]:
        """Returns the means of the newest window that the devices have finished; empty before the first."""
        if _is_ready(self.window):
            self._finished = self.window
            self._unfinished.clear()
        while self._unfinished and _is_ready(self._unfinished[0]):
            self._finished = self._unfinished.pop(0)
        return {name: float(records.number(mean)) for name, mean in _train(self._finished).items()}


def _train(means: dict[str, jax.Array]) -> dict[str, Any]:
    return {f"train_{name}": mean for name, mean in means.items()}


def _is_ready(means: dict[str, Any]) -> bool:
    return all(mean.is_ready() for mean in means.values())
