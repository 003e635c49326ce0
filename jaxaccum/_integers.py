"""Checks of numbers, above all of a window's length, K. Host-side modules can use them without jax."""

import numbers
import operator
from typing import Any

_LARGEST = 2**31 - 1


def positive_int(value: Any, name: str, note: str = "; K=1 means no accumulation") -> int:
    """`value` as a Python int of at least 1.

    Example:
      >>> positive_int(7, "every_k")
      7

    Args:
      value: an integer of any kind: Python's, numpy's, or a concrete jax scalar. A bool is not one.
      name: what to call it in the error.
      note: the end of the error for an int out of range.

    Returns:
      The int.

    Raises:
      TypeError: if `value` is not an integer.
      ValueError: if it is below 1 or does not fit in an int32.
    """
    number = as_int(value, name, "an integer of at least 1")
    if not 1 <= number <= _LARGEST:
        raise ValueError(f"{name} must be an integer from 1 to {_LARGEST}, got {number}{note}.")
    return number


def as_int(value: Any, name: str, wanted: str) -> int:
    """`value` as a Python int; `wanted` completes the error's "must be ...".

    Raises:
      TypeError: if `value` is a bool or not an integer.
    """
    try:
        if isinstance(value, bool) or str(getattr(value, "dtype", "")) == "bool":
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be {wanted}, got {value!r:.60} of type {type(value).__name__}.") from None


def is_number(value: Any) -> bool:
    """Whether `value` is a real number; a bool is not one."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
