"""Trees as arrays by name, in the form in which checkpoints store them."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxaccum._jax import prng
from jaxaccum._types import Tree


def arrays(tree: Tree) -> dict[str, Any]:
    """Returns the arrays of a tree by their path, such as "['w']"; typed keys as their key data."""
    named = {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}
    return {name: _data(x) for name, x in named.items()}


def kinds(named: Mapping[str, Any]) -> dict[str, str]:
    """Returns the dtype and the shape of each array, as text."""
    return {name: f"{jnp.result_type(x).name}{list(np.shape(x))}" for name, x in named.items()}


def check_same(given: Mapping[str, str], wanted: Mapping[str, str], source: str, remedy: str) -> None:
    """Raises ValueError if names or kinds differ; the message names the first array that does."""
    for name in [*wanted, *given]:
        there, here = given.get(name, "missing"), wanted.get(name, "missing")
        if there != here:
            raise ValueError(f"{source} is not of this task: {name} is {there} there and {here} here. {remedy}")


def unnamed(named: Mapping[str, np.ndarray], like: Tree) -> Tree:
    """Returns the arrays of these names in the tree of `like`, the inverse of `arrays`."""

    def leaf(path, x):
        data = named[jax.tree_util.keystr(path)]
        return jax.random.wrap_key_data(jnp.asarray(data), impl=jax.random.key_impl(x)) if prng.is_typed(x) else data

    return jax.tree_util.tree_map_with_path(leaf, like)


def _data(x: Any) -> Any:
    """Returns the key data of typed keys, and any other array as it is."""
    if not prng.is_typed(x):
        return x
    return jax.eval_shape(jax.random.key_data, x) if isinstance(x, jax.ShapeDtypeStruct) else jax.random.key_data(x)
