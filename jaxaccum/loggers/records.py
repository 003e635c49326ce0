"""What a run has logged: fetched from the device a step late, so that logging doesn't empty its queue."""

import collections
import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

KEPT = 10_000  # records at the most: of a long run a figure shows no more


class Records:
    """Hands scalars to loggers in the order in which they were made.

    Each record waits until the next one is made, when the device has long computed it, or until `flush`.

    A logger that raises an exception is warned of, once for each of its methods and each type of exception. The others
    are served all the same.

    Args:
      loggers: objects with `write_scalars(step, dict)`, and perhaps `flush()` and `begin(place)`.

    Attributes:
      history: the records as dicts of numbers, "step" among them. Whenever they become more than `KEPT`, every other
        one of each kind goes.
    """

    def __init__(self, loggers: Sequence[Any]):
        self._loggers = loggers
        self._waiting: list[tuple[int, dict[str, Any]]] = []
        self._warned: set[tuple[int, str, type[Exception]]] = set()
        self.history: list[dict[str, float]] = []

    def begin(self, place: Mapping[str, int] | None) -> None:
        """Tells the loggers that want to know it where the run begins.

        Args:
          place: None for a start; for a resume the checkpoint's "step", "micro_step" and "validated".
        """
        self._call("begin", place)

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
        try:
            self.write()
        finally:
            self._call("flush")

    def write(self) -> None:
        """Waits for what is still on its way, and hands it to the loggers."""
        while self._waiting:
            step, scalars = self._waiting.pop(0)
            numbers = {name: number(value) for name, value in scalars.items()}
            self.history.append({"step": step, **numbers})
            if len(self.history) > KEPT:
                self.history = _every_other(self.history)
            self._call("write_scalars", step, numbers)

    def _call(self, method: str, *args: Any) -> None:
        """Calls a method of every logger that has it, each with copies of the arguments."""
        failures = []
        for i, logger in enumerate(self._loggers):
            try:
                if hasattr(logger, method):
                    getattr(logger, method)(*map(copy.copy, args))
            except Exception as error:
                failures.append((i, error))
        # Where warnings are errors, this raises: after all loggers have been called.
        for i, error in failures:
            self._warn(i, method, error)

    def _warn(self, index: int, method: str, error: Exception) -> None:
        kind = (index, method, type(error))
        if kind not in self._warned:
            self._warned.add(kind)
            name = type(self._loggers[index]).__qualname__
            warnings.warn(
                f"logger {name} failed in {method}: {error!r}. The run goes on; this is not said again.",
                stacklevel=2,
            )


def number(value: Any) -> Any:
    """A scalar as a Python number. Waits for the device."""
    return np.asarray(value).item()


def loggable(name: str, value: Any) -> float | jax.Array:
    """A value that a user logs: a float, or of a scalar on a device a copy, which no program donates.

    Raises:
      TypeError: if it is not a real number.
    """
    try:
        return _loggable(value)
    except Exception as error:
        raise TypeError(
            f"trainer.log({name!r}, ...) takes a real number or a scalar array, got {type(value).__qualname__}: {error}"
        ) from error


def _loggable(value: Any) -> float | jax.Array:
    if isinstance(value, jax.Array) and not isinstance(value, jax.core.Tracer):
        kinds = (jnp.floating, jnp.integer, jnp.bool_)
        if value.size != 1 or not any(jnp.issubdtype(value.dtype, kind) for kind in kinds):
            raise TypeError(f"its dtype is {value.dtype} and its shape {value.shape}")
        return jnp.copy(value.addressable_data(0))
    scalar = value.item() if hasattr(value, "item") else value
    if isinstance(scalar, (str, bytes)):
        raise TypeError("text is not a number")
    return float(scalar)


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
