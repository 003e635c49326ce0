"""What objects say of their own state, as JSON text: for the notes of a checkpoint, never a pickle."""

import base64
import json
from typing import Any

import numpy as np

_BYTES = "__bytes__"


def dumps(value: Any, owner: str) -> str:
    """`value` as text.

    Args:
      value: dicts with names for keys, lists, tuples (they come back as lists), strings, numbers, bools, None, bytes
        and NumPy scalars.
      owner: whose it is, for the error.

    Raises:
      TypeError: if it holds anything else.
    """
    _check_keys(value, owner)
    try:
        return json.dumps(value, default=_default)
    except TypeError as error:
        raise TypeError(
            f"the state of {owner} can't be kept in a checkpoint ({error}): it must be made of dicts, lists, strings, "
            f"numbers and bytes, got {value!r}."
        ) from error


def loads(text: str) -> Any:
    """What `dumps` was given."""
    return json.loads(text, object_hook=_object)


def _check_keys(value: Any, owner: str) -> None:
    """JSON would make any key a string, and nobody would notice."""
    if isinstance(value, dict):
        for key, entry in value.items():
            if not isinstance(key, str):
                raise TypeError(
                    f"the state of {owner} can't be kept in a checkpoint: its key {key!r} is not a string; use str."
                )
            _check_keys(entry, owner)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            _check_keys(entry, owner)


def _default(value: Any) -> Any:
    if isinstance(value, bytes):
        return {_BYTES: base64.b64encode(value).decode()}
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"it holds a {type(value).__name__}")


def _object(pairs: dict[str, Any]) -> Any:
    return base64.b64decode(pairs[_BYTES]) if pairs.keys() == {_BYTES} else pairs
