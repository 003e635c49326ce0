"""The sums of biases and norms as one vector, while a window runs: one addition for all of them.

A model has many of them, hardly a percent of its parameters, and on an accelerator each addition of its own takes as
long as its start takes.
"""

import collections
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from jaxaccum import _overwrites

Tree = Any

_SMALL = 2**16  # elements


class Packing(NamedTuple):
    """Which leaves of a tree lie in one vector.

    Attributes:
      like: the tree; None where it has no leaf.
      packed: for each leaf of it whether it lies in the vector.
    """

    like: Tree
    packed: tuple[bool, ...]

    def pack(self, tree: Tree) -> tuple[jax.Array | None, Tree]:
        """(the vector, the tree with None for the leaves that lie in it)."""
        leaves = self._leaves(tree)
        pieces = [
            jnp.ravel(x).astype(like.dtype)
            for x, like, packed in zip(leaves, self._leaves(self.like), self.packed, strict=True)
            if packed
        ]
        others = [None if packed else x for x, packed in zip(leaves, self.packed, strict=True)]
        return jnp.concatenate(pieces) if pieces else None, self._tree(others)

    def unpack(self, packed: tuple[Any, Tree]) -> Tree:
        """The tree again."""
        vector, others = packed
        leaves, at = self._leaves(others), 0
        for i, (like, is_packed) in enumerate(zip(self._leaves(self.like), self.packed, strict=True)):
            if is_packed:
                leaves[i] = vector[at : at + like.size].reshape(like.shape)
                at += like.size
        return self._tree(leaves)

    def _leaves(self, tree: Tree) -> list[Any]:
        return jax.tree.structure(self.like, is_leaf=_is_none).flatten_up_to(tree)

    def _tree(self, leaves: list[Any]) -> Tree:
        return jax.tree.structure(self.like, is_leaf=_is_none).unflatten(leaves)


def of(sums: Tree, stay: Sequence[bool]) -> Packing:
    """How to pack `sums`: small leaves, those of the most common kind, if none can lie split over devices.

    Args:
      sums: arrays; None where there is no leaf.
      stay: for each array whether it must stay a leaf of its own.
    """
    stays = iter(stay)
    stays_out = lambda path, x: next(stays) or x.ndim > 1 or x.size > _SMALL or _overwrites.holds(path)
    kinds = [
        None if x is None or stays_out(path, x) else (x.dtype, jax.typeof(x).mat.varying)
        for path, x in jax.tree_util.tree_leaves_with_path(sums, is_leaf=_is_none)
    ]
    counts = collections.Counter(kind for kind in kinds if kind is not None)
    most = max(counts, key=counts.__getitem__) if counts and _are_whole() else None
    return Packing(sums, tuple(kind is not None and kind == most and counts[kind] > 1 for kind in kinds))


def _are_whole() -> bool:
    """Whether each device is known to have the whole of what it adds to. Else a vector of parts would be gathered."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.device_count() == 1
    return all(kind == AxisType.Manual for kind in mesh.axis_types)


def _is_none(x: Any) -> bool:
    return x is None
