"""Serialises the state of callbacks and loaders as JSON text, for the notes of a checkpoint, without pickle.

A value that JSON can't represent becomes an object whose only key is a marker, such as `{"__tuple__": [1, 2]}`.
"""

import base64
import importlib
import json
import sys
from typing import Any

import numpy as np

_BYTES, _TUPLE, _DICT, _ARRAY, _TENSOR = "__bytes__", "__tuple__", "__dict__", "__array__", "__tensor__"


def dumps(value: Any, owner: str) -> str:
    """Serialises dicts, lists, tuples, strings, numbers, bools, None, bytes, NumPy arrays and torch tensors.

    Dict keys may be any of these that are hashable. NumPy scalars are restored as Python scalars, and tensors on the
    CPU. `owner` names the object whose state it is.

    Raises:
      TypeError: if `value` contains anything else.
    """
    try:
        return json.dumps(_encoded(value))
    except TypeError as error:
        raise TypeError(
            f"the state of {owner} can't be kept in a checkpoint: {error}. It must be made of dicts, lists, tuples, "
            f"strings, numbers, bytes, NumPy arrays and torch tensors, got {value!r}."
        ) from error


def loads(text: str) -> Any:
    """Restores the value that `dumps` serialised.

    Raises:
      ImportError: if it contains a torch tensor and torch is missing.
    """
    return json.loads(text, object_hook=_decoded)


def _encoded(value: Any) -> Any:
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, dict):
        return _encoded_dict(value)
    if isinstance(value, list):
        return [_encoded(entry) for entry in value]
    if isinstance(value, tuple):
        return {_TUPLE: [_encoded(entry) for entry in value]}
    if isinstance(value, bytes):
        return {_BYTES: _text(value)}
    if isinstance(value, np.generic) and value.dtype.kind not in "mM" and isinstance(value.item(), (int, float)):
        return value.item()
    if type(value) is np.ndarray:
        return {_ARRAY: [_dtype_name(value.dtype), value.shape, _text(value.tobytes())]}
    torch = sys.modules.get("torch")  # If there is a tensor, torch has been imported.
    if torch is not None and isinstance(value, torch.Tensor):
        return {_TENSOR: [str(value.dtype).removeprefix("torch."), list(value.shape), _text(_tensor_bytes(value))]}
    raise TypeError(f"it holds a {type(value).__name__}")


def _encoded_dict(value: dict[Any, Any]) -> dict[str, Any]:
    """Encodes a dict with string keys as an object, any other as pairs, since JSON keys are strings."""
    is_marked = len(value) == 1 and next(iter(value)) in _READERS
    if all(isinstance(key, str) for key in value) and not is_marked:
        return {key: _encoded(entry) for key, entry in value.items()}
    return {_DICT: [[_encoded(key), _encoded(entry)] for key, entry in value.items()]}


def _decoded(value: dict[str, Any]) -> Any:
    """Decodes a JSON object whose entries have been decoded already."""
    marker = next(iter(value)) if len(value) == 1 else None
    return _READERS[marker](value[marker]) if marker in _READERS else value


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _dtype_name(dtype: np.dtype) -> str:
    """Returns a string that NumPy parses as `dtype`: its code, or its name for an ml_dtypes type."""
    if not dtype.hasobject and dtype.names is None:
        for name in (dtype.str, dtype.name):
            if np.dtype(name) == dtype:
                return name
    raise TypeError(f"it holds a ndarray of dtype {dtype}")


def _tensor_bytes(tensor: Any) -> bytes:
    torch = sys.modules["torch"]
    try:
        flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
        return flat.view(torch.uint8).numpy().tobytes()
    except RuntimeError as error:
        raise TypeError(f"it holds a Tensor whose elements can't be read ({error})") from error


def _array(kept: list[Any]) -> np.ndarray:
    dtype, shape, text = kept
    return np.frombuffer(bytearray(base64.b64decode(text)), dtype).reshape(shape)


def _tensor(kept: list[Any]) -> Any:
    dtype, shape, text = kept
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        raise ImportError("the state in a checkpoint holds a torch tensor: install torch.") from error
    data = torch.from_numpy(_array(["u1", [-1], text]))
    return data.view(getattr(torch, dtype)).reshape(shape)


_READERS = {_BYTES: base64.b64decode, _TUPLE: tuple, _DICT: dict, _ARRAY: _array, _TENSOR: _tensor}
