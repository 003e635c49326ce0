"""Equinox modules: trees in which some leaves are trained, and others are not even arrays.

A tree that holds a module follows the convention of `equinox.filter_grad`: its floating and complex arrays are trained,
and all other leaves, such as functions, Python numbers, flags and integer arrays, stay as they are. Any other tree is
not changed here. Equinox itself is not imported.
"""

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxaccum._types import Tree

_REST = "the model"  # The keyword under which a loss gets the leaves that are not trained. It is no identifier.


def trained(tree: Tree) -> Tree:
    """The leaves that are trained, with None in place of the others."""
    return parted(tree)[0]


def parted(params: Tree) -> tuple[Tree, "_Wrapped | None"]:
    """(`trained(params)`, the other leaves); None if there are no others."""
    if not _holds_module(params):
        return params, None
    leaves, structure = jax.tree.flatten(params)
    is_trained = list(map(_is_inexact, leaves))
    if all(is_trained):
        return params, None
    rest = [None if is_one else x for x, is_one in zip(leaves, is_trained, strict=True)]
    of_trained = [x if is_one else None for x, is_one in zip(leaves, is_trained, strict=True)]
    return structure.unflatten(of_trained), _Wrapped.of(rest, structure)


def combined(params: Tree, rest: "_Wrapped | None") -> Tree:
    """The inverse of `parted`."""
    if rest is None:
        return params
    pairs = zip(rest.structure.flatten_up_to(params), rest.leaves(), strict=True)
    return rest.structure.unflatten([y if x is None else x for x, y in pairs])


def arguments(
    rest: "_Wrapped | None", args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments, besides the trained leaves, of `whole(fun)`: trees of arrays, for jit and `jax.shard_map`."""
    args, kwargs = _wrapped((args, kwargs))
    return args, kwargs if rest is None else {**kwargs, _REST: rest}


def whole(fun: Callable[..., Any]) -> Callable[..., Any]:
    """`fun(params, *args, **kwargs)` as a function of the trained leaves and of `arguments`.

    Modules that it returns are to be restored by `restored`.
    """

    def call(params, *args, **kwargs):
        params = combined(params, kwargs.pop(_REST, None))
        args, kwargs = restored((args, kwargs))
        return _wrapped(fun(params, *args, **kwargs))

    return call


def restored(tree: Tree) -> Tree:
    """`tree` with the modules that `arguments` and `whole` wrapped."""
    if _module_type() is None:
        return tree
    is_wrapped = lambda node: isinstance(node, _Wrapped)
    return jax.tree.map(
        lambda node: node.structure.unflatten(node.leaves()) if is_wrapped(node) else node, tree, is_leaf=is_wrapped
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Wrapped:
    """A module as a tree of arrays; its other leaves are part of the structure."""

    arrays: list[Any]
    others: tuple[Any, ...] = dataclasses.field(metadata={"static": True})  # With types: 1, 1.0 and True are equal.
    structure: Any = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, leaves: list[Any], structure: Any) -> "_Wrapped":
        others = tuple((type(x), None if _is_array(x) else x) for x in leaves)
        return cls([x if _is_array(x) else None for x in leaves], others, structure)

    def leaves(self) -> list[Any]:
        return [other if x is None else x for x, (_, other) in zip(self.arrays, self.others, strict=True)]


def _wrapped(tree: Tree) -> Tree:
    """`tree` with each module in it wrapped that has leaves which are no arrays."""
    module_type = _module_type()
    if module_type is None:
        return tree

    def node(x):
        if not isinstance(x, module_type):
            return x
        leaves, structure = jax.tree.flatten(x)
        return x if all(map(_is_array, leaves)) else _Wrapped.of(leaves, structure)

    return jax.tree.map(node, tree, is_leaf=lambda x: isinstance(x, module_type))


def _holds_module(tree: Tree) -> bool:
    module_type = _module_type()
    if module_type is None:
        return False
    is_module = lambda node: isinstance(node, module_type)
    return any(map(is_module, jax.tree.leaves(tree, is_leaf=is_module)))


def _module_type() -> type | None:
    """`equinox.Module`; None if nobody imported equinox, so that there are no modules."""
    return getattr(sys.modules.get("equinox"), "Module", None)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct))


def _is_inexact(leaf: Any) -> bool:
    return _is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact)
