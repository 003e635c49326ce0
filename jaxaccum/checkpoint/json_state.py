"""What objects say of their own state, as JSON text: for the notes of a checkpoint, never a pickle.

What JSON has no form for is an object with one key, a marker, as `{"__tuple__": [1, 2]}`.
"""

import base64
import importlib
import json
import sys
from typing import Any

import numpy as np

_BYTES, _TUPLE, _DICT, _ARRAY, _TENSOR = "__bytes__", "__tuple__", "__dict__", "__array__", "__tensor__"


def dumps(value: Any, owner: str) -> str:
    """`value` as text.

    Args:
      value: dicts, lists, tuples, strings, numbers, bools, None, bytes, NumPy arrays and torch tensors; the keys of
        dicts are any of these that Python takes for keys. NumPy scalars come back as Python's, tensors on the CPU.
      owner: whose it is, for the error.

    Raises:
      TypeError: if it holds anything else.
    """
    try:
        return json.dumps(_encoded(value))
    except TypeError as error:
        raise TypeError(
            f"the state of {owner} can't be kept in a checkpoint: {error}. It must be made of dicts, lists, tuples, "
            f"strings, numbers, bytes, NumPy arrays and torch tensors, got {value!r}."
        ) from error


def loads(text: str) -> Any:
    """What `dumps` was given.

    Raises:
      ImportError: if that holds a torch tensor, and torch is missing.
    """
    return json.loads(text, object_hook=_decoded)


def _encoded(value: Any) -> Any:
    """`value` as JSON can hold it."""
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
    torch = sys.modules.get("torch")  # Who has a tensor has imported it.
    if torch is not None and isinstance(value, torch.Tensor):
        return {_TENSOR: [str(value.dtype).removeprefix("torch."), list(value.shape), _text(_tensor_bytes(value))]}
    raise TypeError(f"it holds a {type(value).__name__}")


def _encoded_dict(value: dict[Any, Any]) -> dict[str, Any]:
    """A dict with names for keys is an object; others are pairs, as JSON would make any key a string."""
    is_marked = len(value) == 1 and next(iter(value)) in _READERS
    if all(isinstance(key, str) for key in value) and not is_marked:
        return {key: _encoded(entry) for key, entry in value.items()}
    return {_DICT: [[_encoded(key), _encoded(entry)] for key, entry in value.items()]}


def _decoded(value: dict[str, Any]) -> Any:
    """A JSON object, whose entries have been decoded, as what it was."""
    marker = next(iter(value)) if len(value) == 1 else None
    return _READERS[marker](value[marker]) if marker in _READERS else value


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _dtype_name(dtype: np.dtype) -> str:
    """The text from which NumPy makes `dtype`: its code, or its name where it is one of ml_dtypes."""
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
