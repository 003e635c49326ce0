"""Converts loader batches to pytrees that jax accepts, and counts, slices and stacks their examples."""

import collections
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxaccum._types import Tree

_DTYPES = frozenset(map(np.dtype, ("bool", *np.typecodes["AllInteger"], *"efdFD")))  # Common dtypes that jax accepts.


class Loaded(NamedTuple):
    """A loader batch after conversion."""

    given: Tree  # The loader's batch.
    arrays: Tree  # The same tree with leaves that jax accepts; `given` itself if no leaf had to be converted.
    examples: int


def loaded(batch: Tree) -> Loaded:
    """Converts a loader batch to leaves that jax accepts.

    Arrays of numbers or bools, random keys and Python numbers are kept as they are. Any other leaf is converted with
    `np.asarray`, which reads the arrays of most libraries. A mapping that is not a pytree becomes a dict. Raises
    TypeError for a leaf that can't be converted to numbers or bools, and ValueError if there are no leaves.
    """
    given, leaves = batch, jax.tree_util.tree_leaves(batch)
    if not leaves:
        raise ValueError(f"the loader gave a batch without arrays: {batch!r}.")
    entries = -1
    for leaf in leaves:  # Fast path for plain NumPy batches.
        if type(leaf) is not np.ndarray or leaf.dtype not in _DTYPES or not leaf.ndim:
            break
        if entries < 0:
            entries = len(leaf)
        elif len(leaf) != entries:
            break
    else:
        return Loaded(batch, batch, entries)
    if not all(map(_is_taken, leaves)):
        batch = jax.tree_util.tree_map_with_path(_converted, _dicts(batch))
        leaves = jax.tree.leaves(batch)
    return Loaded(given, batch, _examples(leaves))


def _dicts(batch: Tree) -> Tree:
    """Converts mappings of other classes, such as those from Hugging Face collators, to dicts."""
    return jax.tree.map(lambda leaf: _dicts(dict(leaf)) if isinstance(leaf, Mapping) else leaf, batch)


def arrays(batch: Tree) -> Tree:
    """Returns a loader batch with leaves that jax accepts; `batch` itself if nothing had to be converted."""
    return loaded(batch).arrays


def length(batch: Tree) -> int:
    """Returns the number of examples in a loader batch: the most common leading length of its leaves.

    Ties go to the length that comes first. Scalars don't count; a batch with only scalars has length 1.
    """
    return loaded(batch).examples


def signature(batch: Tree) -> Any:
    """Returns the tree structure and the leaves' shapes and dtypes; batches can be stacked if they are equal."""
    leaves, treedef = jax.tree.flatten(batch)
    return treedef, [(np.shape(leaf), getattr(leaf, "dtype", type(leaf))) for leaf in leaves]


def rows(batch: Tree, part: slice) -> Tree:
    """Slices the examples of a loader batch."""
    return jax.tree.map(lambda x: x[part], batch)


def stacked(batches: Sequence[Tree]) -> Tree:
    """Concatenates loader batches of the same shape."""
    return jax.tree.map(lambda *leaves: _concatenate(leaves), *batches)


@functools.cache
def _is_dtype_of_jax(dtype: np.dtype) -> bool:
    """Whether jax accepts `dtype`: numbers or bools in native byte order, at most 64 bits wide."""
    try:
        jax.eval_shape(lambda x: x, np.empty(0, dtype))
    except TypeError:
        return False
    return True


def _is_taken(leaf: Any) -> bool:
    """Whether jax accepts a leaf without conversion."""
    if type(leaf) is np.ndarray:
        return _is_dtype_of_jax(leaf.dtype)
    if isinstance(leaf, (np.ndarray, np.generic)):
        return _is_dtype_of_jax(leaf.dtype) and not isinstance(leaf, np.ma.MaskedArray)
    return isinstance(leaf, (jax.Array, bool, int, float, complex))


def _converted(path: Any, leaf: Any) -> Any:
    """Converts a leaf to one that jax accepts."""
    if _is_taken(leaf):
        return leaf
    if isinstance(leaf, np.ma.MaskedArray):
        raise _no_array(path, leaf, "which would lose its mask", "Pass leaf.filled(value), and the mask beside it.")
    try:
        array = np.asarray(leaf)
    except Exception as error:
        remedy = "Convert it in the loader; a torch tensor for example by x.detach().cpu().float()."
        raise _no_array(path, leaf, f"and np.asarray raises {error!r}", remedy) from error
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    if _is_dtype_of_jax(native.dtype):
        return native
    remedy = "Make numbers of it in the loader, or leave it out of the batch."
    if dataclasses.is_dataclass(leaf):
        remedy = "Register its class with jax.tree_util.register_dataclass, so that its fields are leaves."
    raise _no_array(path, leaf, f"of which np.asarray gives dtype {array.dtype}", remedy)


def _no_array(path: Any, leaf: Any, why: str, remedy: str) -> TypeError:
    return TypeError(
        f"batch{jax.tree_util.keystr(path)} is a {type(leaf).__name__}, {why}: the leaves of a batch must be arrays of "
        f"numbers or bools. {remedy}"
    )


def _examples(leaves: Sequence[Any]) -> int:
    """Same as `length`, for a list of leaves."""
    lengths = [leaf.shape[0] for leaf in leaves if getattr(leaf, "shape", ())]
    if not lengths:
        return 1
    return collections.Counter(lengths).most_common(1)[0][0]


def _concatenate(leaves: Sequence[Any]) -> Any:
    on_device = any(isinstance(leaf, jax.Array) for leaf in leaves)
    return jnp.concatenate(leaves) if on_device else np.concatenate(leaves)
