"""The sums of biases and norms in stacks, while a window runs: one addition for all those of a shape.

A model has many of them, hardly a percent of its parameters, and on an accelerator each addition of its own takes as
long as its start takes. A stack has a new first axis and leaves the others as they are, so leaves that are split over
devices stay where they lie.
"""

import collections
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxaccum._devices import layout
from jaxaccum._jax import varying
from jaxaccum._sums import overwrites
from jaxaccum._types import Tree

_SMALL = 2**16  # elements


class Packing(NamedTuple):
    """Which leaves of a tree are stacked.

    Attributes:
      structure: the tree's, with None as a leaf.
      stacks: the leaves of each stack, by number.
    """

    structure: Any
    stacks: tuple[tuple[int, ...], ...]

    def pack(self, tree: Tree) -> tuple[list[jax.Array], Tree]:
        """(the stacks, the tree with None for the leaves that are in one)."""
        leaves = self.structure.flatten_up_to(tree)
        stacked = [jnp.stack([leaves[i] for i in numbers]) for numbers in self.stacks]
        for i in (i for numbers in self.stacks for i in numbers):
            leaves[i] = None
        return stacked, self.structure.unflatten(leaves)

    def unpack(self, packed: tuple[list[jax.Array], Tree]) -> Tree:
        """The tree again."""
        stacked, others = packed
        leaves = self.structure.flatten_up_to(others)
        for numbers, stack in zip(self.stacks, stacked, strict=True):
            for i, leaf in zip(numbers, stack, strict=True):
                leaves[i] = leaf
        return self.structure.unflatten(leaves)


def of(sums: Tree, stay: Sequence[bool] | None = None) -> Packing:
    """How to pack `sums`: small leaves, with others of their shape, dtype and layout.

    Args:
      sums: arrays; None where there is no leaf.
      stay: for each array whether it must stay a leaf of its own; None where none must.
    """
    is_none = lambda x: x is None
    stays = itertools.repeat(False) if stay is None else iter(stay)
    alike = collections.defaultdict(list)
    for i, (path, x) in enumerate(jax.tree_util.tree_leaves_with_path(sums, is_leaf=is_none)):
        if x is None or next(stays) or x.ndim > 1 or x.size > _SMALL or overwrites.holds(path):
            continue
        alike[x.shape, x.dtype, varying.axes(x), layout.layout(x)].append(i)
    stacks = tuple(tuple(numbers) for numbers in alike.values() if len(numbers) > 1)
    return Packing(jax.tree.structure(sums, is_leaf=is_none), stacks)
