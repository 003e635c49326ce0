"""What a run has logged: fetched from the device a step late, so that logging doesn't empty its queue."""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

KEPT = 10_000  # records at the most: of a long run a figure shows no more


class Records:
    """Hands scalars to loggers in the order in which they were made.

    Each record waits until the next one is made, when the device has long computed it, or until `flush`.

    Args:
      loggers: objects with `write_scalars(step, dict)`.

    Attributes:
      history: the records as dicts of numbers, "step" among them. Whenever they become more than `KEPT`, every other
        one of each kind goes.
    """

    def __init__(self, loggers: Sequence[Any]):
        self._loggers = loggers
        self._waiting: list[tuple[int, dict[str, Any]]] = []
        self.history: list[dict[str, float]] = []

    def begin(self, place: Mapping[str, int] | None) -> None:
        """Tells the loggers of a run's start: see `loggers`."""

    def add(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Keeps a record; its values may be arrays that no program donates."""
        self.write()
        for value in scalars.values():
            if isinstance(value, jax.Array):
                value.copy_to_host_async()
        self._waiting.append((step, dict(scalars)))

    def flush(self, waits: bool = True) -> None:
        """Waits for what is still on its way, and has the loggers write all of it.

        Args:
          waits: if not, what the devices have not finished is left out: where a process is gone, they never will.
        """
        if not waits:
            is_ready = lambda scalars: all(x.is_ready() for x in scalars.values() if hasattr(x, "is_ready"))
            self._waiting = [(step, scalars) for step, scalars in self._waiting if is_ready(scalars)]
        self.write()
        for logger in self._loggers:
            if hasattr(logger, "flush"):
                logger.flush()

    def write(self) -> None:
        """Waits for what is still on its way, and hands it to the loggers."""
        while self._waiting:
            step, scalars = self._waiting.pop(0)
            numbers = {name: np.asarray(value).item() for name, value in scalars.items()}
            self.history.append({"step": step, **numbers})
            if len(self.history) > KEPT:
                self.history = _every_other(self.history)
            for logger in self._loggers:
                logger.write_scalars(step, numbers)


def _every_other(records: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """Half of the records of each kind, of those with the same names."""
    kinds: collections.Counter[tuple[str, ...]] = collections.Counter()
    kept = []
    for record in records:
        kind = tuple(record)
        if kinds[kind] % 2 == 0:
            kept.append(record)
        kinds[kind] += 1
    return kept
