"""Checks of dtypes, numbers and tree leaves."""

import sys
from typing import Any

import jax
import jax.numpy as jnp

from jaxaccum._sums.weighted_sum import is_inexact
from jaxaccum._types import Tree


def floating(name: str, dtype: Any) -> None:
    """Checks that a dtype argument is floating or None."""
    try:
        is_floating = dtype is None or jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
        is_floating = False  # It is no dtype.
    if not is_floating:
        raise TypeError(f"{name} must be a floating dtype or None, got {dtype!r}.")


def available(name: str, dtype: Any) -> None:
    """Checks that a dtype argument is enabled in jax: float64 needs x64."""
    if dtype is not None and jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(f"{name}={jnp.dtype(dtype)} needs x64: set jax_enable_x64 first.")


def arrays(params: Tree) -> None:
    """Checks that all parameters are arrays or numbers to train; an equinox module also contains functions."""
    _refuse_nnx_state(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not (hasattr(leaf, "shape") or isinstance(leaf, (bool, int, float, complex))):
            raise TypeError(
                f"the parameters hold {leaf!r} at {path_name(path) or 'their root'}, which is not an array. For a "
                "flax linen module pass variables['params'], and call module.apply in the loss. Otherwise separate the "
                "arrays from the rest, for an equinox module with arrays, rest = eqx.partition(model, "
                "eqx.is_inexact_array); pass the arrays as the parameters, and call eqx.combine(arrays, rest) in the "
                "loss. jaxaccum.equinox.filter_value_and_grad, MultiSteps and HostDriven take a whole module."
            )


def _refuse_nnx_state(params: Tree) -> None:
    """Raises for an nnx model with other variables than `nnx.Param`s; an `nnx.State` is the user's own selection."""
    nnx = sys.modules.get("flax.nnx")  # A user with a model has imported it.
    if nnx is None:
        return
    found = lambda tree, kind: jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, kind))
    for model in (node for node in found(params, nnx.Module) if isinstance(node, nnx.Module)):
        variables = (node for node in found(model, nnx.Variable) if not isinstance(node, nnx.Param))
        if kinds := ", ".join(sorted({type(variable).__name__ for variable in variables})):
            raise TypeError(
                f"the parameters hold an nnx model ({type(model).__name__}) with {kinds} variables, which would be "
                "trained as parameters: use jaxaccum.flax.HostDriven or jaxaccum.flax.value_and_grad; for plan "
                "and the Trainer, jaxaccum.flax.nnx_task."
            )


def differentiable(params: Tree, what: str = "the argument that argnums names") -> None:
    """Checks that all parameters to differentiate are floating or complex."""
    arrays(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not is_inexact(leaf):
            raise TypeError(
                f"{what} holds {jnp.result_type(leaf)} at {path_name(path) or 'its root'}, which has no gradient; pass "
                "it as another argument."
            )


def path_name(path: Any) -> str:
    """A leaf's path, for an error message."""
    return jax.tree_util.keystr(path)


def scalar_dtype(value: Any) -> Any:
    """The dtype of a number or a bool; None for anything else, such as a string, which jax reads as a dtype."""
    is_scalar = isinstance(value, (bool, int, float, complex)) or getattr(value, "shape", None) == ()
    return jnp.result_type(value) if is_scalar else None


def is_real(value: Any, shape: tuple[int, ...]) -> bool:
    """Whether `value` is one real number, or an array of them of `shape`."""
    dtype = value.dtype if shape and getattr(value, "shape", None) == shape else scalar_dtype(value)
    return any(jnp.issubdtype(dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_)) if dtype else False


def kind(value: Any) -> str:
    """Describes `value` for an error message; arrays by dtype and shape, also in a tree."""
    leaf = lambda x: f"{x.dtype} of shape {x.shape}" if hasattr(x, "shape") and hasattr(x, "dtype") else x
    return leaf(value) if hasattr(value, "shape") else repr(jax.tree.map(leaf, value))
