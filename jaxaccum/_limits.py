"""Lightning's limits and intervals: an int counts batches, a float is a fraction of the epoch."""

import math
from collections.abc import Iterable
from typing import Any

from jaxaccum._integers import as_int


def count_or_fraction(value: Any, name: str, least: int) -> int | float:
    """`value` as an int of at least `least`, or a float from 0 (above 0, where `least` is 1) to 1.

    Raises:
      TypeError: if it is neither an int nor a float.
      ValueError: if it is out of range.
    """
    wanted = f"an int of at least {least} (batches) or a float up to 1.0 (of the epoch)"
    if isinstance(value, float):
        if not (0 < value <= 1 or (value == 0 and least == 0)):
            raise ValueError(f"{name} must be {wanted}, got {value}.")
        return value
    number = as_int(value, name, wanted)
    if number < least:
        raise ValueError(f"{name} must be {wanted}, got {number}.")
    return number


def count_or_endless(value: Any, name: str) -> int:
    """`value` as an int of at least 1, or -1, which is without end.

    Raises:
      TypeError, ValueError: if it is neither.
    """
    number = as_int(value, name, "an int of at least 1, or -1 for no limit")
    if number != -1 and number < 1:
        raise ValueError(f"{name} must be an int of at least 1, or -1 for no limit, got {number}.")
    return number


def size(loader: Iterable[Any]) -> int | None:
    """How many batches the loader has; None where it can't say."""
    try:
        return len(loader)  # pyrefly: ignore[bad-argument-type]
    except (TypeError, NotImplementedError):
        return None


def batches(loader: Iterable[Any], limit: int | float, name: str) -> int | None:
    """How many of the loader's batches an epoch takes; None where that is all, and the loader can't say how many.

    Raises:
      ValueError: if `limit` is a fraction of a length that is not known.
    """
    known = size(loader)
    if isinstance(limit, int):
        return limit if known is None else min(limit, known)
    if limit == 1.0:
        return known
    if known is None:
        raise ValueError(f"{name}={limit} is a fraction of a loader without a length; pass an int.")
    return max(1, int(known * limit)) if limit else 0


def validation_interval(value: int | float, epoch: int | float) -> int | float:
    """Every how many micro-steps of an epoch of `epoch` validation is due; infinite: at the epoch's end alone.

    Raises:
      ValueError: if `value` is a fraction of a length that is not known.
    """
    if isinstance(value, int):
        return value
    if value == 1.0:
        return math.inf
    if math.isinf(epoch):
        raise ValueError(
            f"val_check_interval={value} is a fraction of an epoch whose length is not known; pass an int."
        )
    return max(1, int(epoch * value))
