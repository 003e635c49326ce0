"""Overwritten statistics: parameters whose "gradient" is their new value, such as the amax histories of fp8 layers.

flax keeps them in a collection `_overwrite_with_gradient` next to "params". They are neither averaged over
micro-batches nor updated by the optimizer. Their value for a window is the maximum over its micro-batches, which for
the amax of activations equals that of the big batch. They are nonnegative, so the maximum starts at 0.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxaccum._types import Tree

NAME = "_overwrite_with_gradient"  # flax.linen.fp8_ops.OVERWRITE_WITH_GRADIENT; flax may not be installed.


class New(NamedTuple):
    """An update that replaces the parameter."""

    value: Any


def holds(path: Any) -> bool:
    """Whether the leaf at `path` is an overwritten statistic."""
    return any(getattr(key, "key", getattr(key, "name", None)) == NAME for key in path)


def without(tree: Tree) -> Tree:
    """`tree` with None in place of each statistic."""
    return jax.tree.map_with_path(lambda path, x: None if holds(path) else x, tree)


def only(tree: Tree) -> Tree:
    """`tree` with None in place of all leaves but the statistics."""
    return jax.tree.map_with_path(lambda path, x: x if holds(path) else None, tree)


def either(a: Tree, b: Tree) -> Tree:
    """Fills the None leaves of `a` with those of `b`."""
    return jax.tree.map(lambda x, y: y if x is None else x, a, b, is_leaf=lambda leaf: leaf is None)


def optimized(tree: Tree) -> Tree:
    """The part of `tree` that an optimizer updates: all but the statistics, or "params" of flax variables."""
    if not jax.tree.leaves(only(tree)):
        return tree
    return tree["params"] if _is_flaxs(tree) else without(tree)


def with_new(updates: Tree, statistics: Tree) -> Tree:
    """Adds `statistics`, as `only` returns them, to an optimizer's `updates` as `New`."""
    if not jax.tree.leaves(statistics):
        return updates
    new = jax.tree.map(New, statistics)
    return type(new)({**new, "params": updates}) if _is_flaxs(new) else either(updates, new)


def _is_flaxs(tree: Tree) -> bool:
    return isinstance(tree, Mapping) and set(tree) == {"params", NAME}


def kept(new: Tree, old: Tree, pred: Any) -> Tree:
    """Returns `new`, with the statistics of `old` if the bool scalar `pred` is True: no micro-batch set them."""
    return jax.tree.map_with_path(lambda path, x, y: jnp.where(pred, y, x) if holds(path) else x, new, old)
