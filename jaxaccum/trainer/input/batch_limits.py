"""Lightning's limits and intervals: an int counts batches, a float is a fraction of the epoch."""

from collections.abc import Iterable
from typing import Any

from jaxaccum._integers import as_int

_ENDLESS = 2**62  # Some loaders that repeat forever have length sys.maxsize.


def count_or_fraction(value: Any, name: str, least: int) -> int | float:
    """Checks an int of at least `least` or a float in (0, 1]; 0.0 is also allowed if `least` is 0."""
    wanted = f"an int of at least {least} (batches) or a float up to 1.0 (of the epoch)"
    if isinstance(value, float):
        if not (0 < value <= 1 or (value == 0 and least == 0)):
            raise ValueError(f"{name} must be {wanted}, got {value}.")
        return value
    number = as_int(value, name, wanted)
    if number < least:
        raise ValueError(f"{name} must be {wanted}, got {number}.")
    return number


def count_or_endless(value: Any, name: str, least: int = 1) -> int:
    """Checks an int of at least `least`, or -1 for no limit."""
    wanted = f"an int of at least {least}, or -1 for no limit"
    number = as_int(value, name, wanted)
    if number != -1 and number < least:
        raise ValueError(f"{name} must be {wanted}, got {number}.")
    return number


def size(loader: Iterable[Any]) -> int | None:
    """Returns a loader's length, which may change from epoch to epoch; None if it is unknown or infinite."""
    try:
        known = len(loader)  # pyrefly: ignore[bad-argument-type]
    except (TypeError, NotImplementedError):
        return None
    return known if 0 < known < _ENDLESS else None


def limit(loader: Iterable[Any], value: int | float, name: str) -> int | None:
    """Returns the maximum number of batches per epoch, None for no limit; a fraction needs a loader with a length."""
    if isinstance(value, int):
        return value
    if value in (0.0, 1.0):
        return None if value else 0
    known = size(loader)
    if known is None:
        raise ValueError(f"{name}={value} is a fraction of a loader without a length; pass an int.")
    return max(1, int(known * value))


def expected(loader: Iterable[Any], value: int | float, name: str) -> int | None:
    """Returns the expected number of batches per epoch, None if unknown; raises as `limit` does."""
    known = [batches for batches in (limit(loader, value, name), size(loader)) if batches is not None]
    return min(known, default=None)
