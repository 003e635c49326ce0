"""A run's records, which are fetched from the device one record late, so that logging doesn't drain its queue."""

import collections
import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

KEPT = 10_000  # Maximum number of records in the history.


class Records:
    """Passes scalars to the loggers in the order in which they were recorded.

    Each record is held until the next one is added, by when the device has usually computed it, or until `flush`.

    An exception in a logger causes a warning, once per method and exception type. The other loggers are still called.
    """

    def __init__(self, loggers: Sequence[Any]):
        self._loggers = loggers
        self._waiting: list[tuple[int, dict[str, Any]]] = []
        self._warned: set[tuple[int, str, type[Exception]]] = set()
        # With "step". When there are more than `KEPT`, every other record of each kind is dropped.
        self.history: list[dict[str, float]] = []

    def begin(self, place: Mapping[str, int] | None) -> None:
        """Calls `begin(place)` on the loggers that define it; see `jaxaccum.loggers`."""
        self._call("begin", place)

    def add(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Adds a record; its values may be arrays that no program donates."""
        self.write()
        for value in scalars.values():
            if isinstance(value, jax.Array):
                value.copy_to_host_async()
        self._waiting.append((step, dict(scalars)))

    def flush(self, waits: bool = True) -> None:
        """Writes the pending records and flushes the loggers."""
        if not waits:  # Drops what the devices have not finished; they never will if a process is gone.
            is_ready = lambda scalars: all(x.is_ready() for x in scalars.values() if hasattr(x, "is_ready"))
            self._waiting = [(step, scalars) for step, scalars in self._waiting if is_ready(scalars)]
        try:
            self.write()
        finally:
            self._call("flush")

    def write(self) -> None:
        """Waits for the pending records and passes them to the loggers."""
        while self._waiting:
            step, scalars = self._waiting.pop(0)
            numbers = {name: number(value) for name, value in scalars.items()}
            self.history.append({"step": step, **numbers})
            if len(self.history) > KEPT:
                self.history = _every_other(self.history)
            self._call("write_scalars", step, numbers)

    def _call(self, method: str, *args: Any) -> None:
        """Calls a method on every logger that defines it, with copies of the arguments."""
        failures = []
        for i, logger in enumerate(self._loggers):
            try:
                if hasattr(logger, method):
                    getattr(logger, method)(*map(copy.copy, args))
            except Exception as error:
                failures.append((i, error))
        # Warn only after all loggers have been called, since warnings may be errors.
        for i, error in failures:
            kind = (i, method, type(error))
            if kind not in self._warned:
                self._warned.add(kind)
                name = type(self._loggers[i]).__qualname__
                warnings.warn(
                    f"logger {name} failed in {method}: {error!r}. The run goes on; this is not said again.",
                    stacklevel=2,
                )


def number(value: Any) -> Any:
    """Converts a scalar to a Python number. Waits for the device."""
    return np.asarray(value).item()


def loggable(name: str, value: Any) -> float | jax.Array:
    """Converts a logged value to a float, or copies a device scalar so that no program donates it.

    Raises:
      TypeError: if it is not a real number.
    """
    try:
        if isinstance(value, jax.Array) and not isinstance(value, jax.core.Tracer):
            kinds = (jnp.floating, jnp.integer, jnp.bool_)
            if value.size != 1 or not any(jnp.issubdtype(value.dtype, kind) for kind in kinds):
                raise TypeError(f"its dtype is {value.dtype} and its shape {value.shape}")
            return jnp.copy(value.addressable_data(0))
        scalar = value.item() if hasattr(value, "item") else value
        if isinstance(scalar, (str, bytes)):
            raise TypeError("text is not a number")
        return float(scalar)
    except Exception as error:
        raise TypeError(
            f"trainer.log({name!r}, ...) takes a real number or a scalar array, got {type(value).__qualname__}: {error}"
        ) from error


def _every_other(records: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """Drops every other record of each kind; records with the same names are of one kind."""
    kinds: collections.Counter[tuple[str, ...]] = collections.Counter()
    kept = []
    for record in records:
        kind = tuple(record)
        if kinds[kind] % 2 == 0:
            kept.append(record)
        kinds[kind] += 1
    return kept
