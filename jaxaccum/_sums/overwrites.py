"""Statistics among the parameters whose "gradient" is their new value: the amax histories and scales of fp8 layers.

flax keeps them in a collection `_overwrite_with_gradient` beside "params". They are not averaged over micro-batches,
and no optimizer steps on them: of a window they are the largest that any micro-batch gave. For an amax of activations
that is the big batch's. They are not negative, so a sum that has seen none is 0.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxaccum._types import Tree

NAME = "_overwrite_with_gradient"  # flax.linen.fp8_ops.OVERWRITE_WITH_GRADIENT; flax may not be installed.


class New(NamedTuple):
    """Stands for an update: the parameter's new value.

    Attributes:
      value: the value.
    """

    value: Any


def holds(path: Any) -> bool:
    """Whether the leaf at `path` is such a statistic."""
    return any(getattr(key, "key", getattr(key, "name", None)) == NAME for key in path)


def without(tree: Tree) -> Tree:
    """`tree` with None for each statistic."""
    return jax.tree.map_with_path(lambda path, x: None if holds(path) else x, tree)


def only(tree: Tree) -> Tree:
    """`tree` with None for everything else."""
    return jax.tree.map_with_path(lambda path, x: x if holds(path) else None, tree)


def either(a: Tree, b: Tree) -> Tree:
    """The leaves of `a`, and those of `b` where `a` has None."""
    return jax.tree.map(lambda x, y: y if x is None else x, a, b, is_leaf=lambda leaf: leaf is None)


def optimized(tree: Tree) -> Tree:
    """What an optimizer sees of `tree`: all but the statistics; of flax's variables the collection "params"."""
    if not jax.tree.leaves(only(tree)):
        return tree
    return tree["params"] if _is_flaxs(tree) else without(tree)


def with_new(updates: Tree, statistics: Tree) -> Tree:
    """An optimizer's `updates` with each of `statistics`, as `only` gives them, as `New`."""
    if not jax.tree.leaves(statistics):
        return updates
    new = jax.tree.map(New, statistics)
    return type(new)({**new, "params": updates}) if _is_flaxs(new) else either(updates, new)


def _is_flaxs(tree: Tree) -> bool:
    return isinstance(tree, Mapping) and set(tree) == {"params", NAME}


def kept(new: Tree, old: Tree, pred: Any) -> Tree:
    """`new` with the statistics of `old` where `pred`, a bool scalar: where no micro-batch gave any."""
    return jax.tree.map_with_path(lambda path, x, y: jnp.where(pred, y, x) if holds(path) else x, new, old)
