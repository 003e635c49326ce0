"""Random keys: a different one for each micro-batch, and errors for keys shared by mistake."""

import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxaccum._types import Tree


def is_typed(leaf: Any) -> bool:
    """Whether `leaf` is an array of typed keys, as from `jax.random.key`."""
    return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def is_key(leaf: Any) -> bool:
    """Whether `leaf` can be a random key, of either style."""
    return is_typed(leaf) or getattr(leaf, "dtype", None) == jnp.uint32


def fold(keys: Tree, number: Any) -> Tree:
    """Applies `jax.random.fold_in(key, number)` to every key; arrays of typed keys may have any shape.

    Scalars that are not keys, such as the counts of an `nnx.Rngs`, are unchanged.
    """

    def leaf(key):
        if not is_typed(key) and jnp.ndim(key) == 0:
            return key
        fold_in = jax.random.fold_in
        for _ in range(key.ndim if is_typed(key) else 0):
            fold_in = jax.vmap(fold_in, (0, None))
        return fold_in(key, number)

    return jax.tree.map(leaf, keys)


def fold_typed(tree: Tree, number: Any) -> Tree:
    """Folds `number` into the typed keys of `tree`."""
    return jax.tree.map(lambda x: fold(x, number) if is_typed(x) else x, tree)


def fold_beyond_first(tree: Tree, device: Any) -> Tree:
    """Folds the device index into the typed keys of `tree`, on all devices but the first.

    Devices that start with the same keys then use different ones, and the first device matches a single-device run.
    """
    if isinstance(device, int) and device == 0:
        return tree
    return jax.tree.map(lambda x: jnp.where(device == 0, x, fold(x, device)) if is_typed(x) else x, tree)


def refuse_shared(
    args: Sequence[Tree], kwargs: Mapping[str, Tree], known: Collection[int], what: str = "micro-batches"
) -> None:
    """Raises if a typed key is outside the positional arguments `known`: parameters, batch, carry and `key_argnums`.

    All micro-batches, or `what`, would share it and draw the same masks.
    """
    others = {f"args[{i}]": arg for i, arg in enumerate(args) if i not in known}
    others |= {f"kwargs[{name!r}]": arg for name, arg in kwargs.items()}
    for name, tree in others.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if is_typed(leaf):
                raise ValueError(
                    f"{name}{jax.tree_util.keystr(path)} is a random key that all {what} would share, so that all "
                    "draw the same dropout mask. For a key of its own for each of them pass it by position and name "
                    "that in key_argnums; for one mask on purpose pass jax.random.key_data(key), and use "
                    "jax.random.wrap_key_data in the loss."
                )


def refuse_rngs(args: Sequence[Tree]) -> None:
    """Raises if an argument of a micro-step is an `nnx.Rngs`: the traced loss can't update its counts."""
    nnx = sys.modules.get("flax.nnx")  # A user with an Rngs has imported flax.nnx.
    if nnx is not None and any(isinstance(arg, nnx.Rngs) for arg in args):
        raise TypeError(
            "an argument is an nnx.Rngs, whose counts can't change inside the traced loss: all micro-steps would draw "
            "the same dropout mask. Pass a key in its place, for example rngs(), and make nnx.Rngs(key) in the loss; "
            "jaxaccum.value_and_grad takes an nnx.Rngs in key_argnums."
        )
