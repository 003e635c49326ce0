"""Packs the sums of small leaves, such as biases and norms, into stacks during a window: one addition per stack.

A model has many such leaves, though they are hardly a percent of its parameters. On an accelerator, adding each one
separately costs mostly kernel launches. Stacking adds a new first axis and keeps the others, so sharded leaves keep
their layout.
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
    """Which leaves of a tree are stacked."""

    structure: Any  # The tree's, with None as a leaf.
    stacks: tuple[tuple[int, ...], ...]  # The indices of the leaves in each stack.

    def pack(self, tree: Tree) -> tuple[list[jax.Array], Tree]:
        """Returns (the stacks, the tree with None for each stacked leaf)."""
        leaves = self.structure.flatten_up_to(tree)
        stacked = [jnp.stack([leaves[i] for i in numbers]) for numbers in self.stacks]
        for i in (i for numbers in self.stacks for i in numbers):
            leaves[i] = None
        return stacked, self.structure.unflatten(leaves)

    def unpack(self, packed: tuple[list[jax.Array], Tree]) -> Tree:
        """Inverts `pack`."""
        stacked, others = packed
        leaves = self.structure.flatten_up_to(others)
        for numbers, stack in zip(self.stacks, stacked, strict=True):
            for i, leaf in zip(numbers, stack, strict=True):
                leaves[i] = leaf
        return self.structure.unflatten(leaves)


def of(sums: Tree, stay: Sequence[bool] | None = None) -> Packing:
    """Stacks small leaves of `sums` of the same shape, dtype and layout, except the arrays marked in `stay`."""
    is_none = lambda x: x is None
    stays = itertools.repeat(False) if stay is None else iter(stay)
    alike = collections.defaultdict(list)
    for i, (path, x) in enumerate(jax.tree_util.tree_leaves_with_path(sums, is_leaf=is_none)):
        if x is None or next(stays) or x.ndim > 1 or x.size > _SMALL or overwrites.holds(path):
            continue
        alike[x.shape, x.dtype, varying.axes(x), layout.layout(x)].append(i)
    stacks = tuple(tuple(numbers) for numbers in alike.values() if len(numbers) > 1)
    return Packing(jax.tree.structure(sums, is_leaf=is_none), stacks)
