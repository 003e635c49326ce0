"""Norms of gradients."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxaccum._sums import overwrites, weighted_sum
from jaxaccum._types import Tree


class GradientNorms(NamedTuple):
    """The Euclidean norms of a window's gradients, without overwritten statistics; with x64, in float64.

    Without `gradient_norms="all"`, all but `window` are None.

    Attributes:
      window: the norm of the window's gradient, as the optimizer receives it.
      micro_batch: the norms of the micro-batches' mean gradients, on each device; 0 for one that is left out.
      squares: Σ w·‖g‖² and Σ w over the micro-batches g of the window on all devices, of weights w.
      count: how many of these count, an int32 scalar.
      pending: Σ w·‖g‖² and the number of micro-batches that count in the open window, on each device.
    """

    window: Any
    micro_batch: Any = None
    squares: Any = None
    count: Any = None
    pending: Any = None


def check_argument(value: Any, in_place: bool | None) -> None:
    """Checks `gradient_norms`: None, "window", or "all", which excludes `in_place=True`."""
    if value not in (None, "window", "all"):
        raise ValueError(f"gradient_norms must be None, 'window' or 'all', got {value!r}.")
    if value == "all" and in_place:
        raise ValueError(
            "in_place=True can't be had with gradient_norms='all', which needs each micro-batch's gradient: leave it "
            "at None, or use gradient_norms='window'."
        )


def squares(grads: Tree, shape: tuple[int, ...] = ()) -> list[Any]:
    """For each leaf, the sum of squares over all but the leading `shape`; None for a leaf that is no gradient."""

    def leaf(path, x):
        if overwrites.holds(path) or not weighted_sum.is_inexact(x):
            return None
        x = jnp.asarray(x)
        parts = [x.real, x.imag] if jnp.iscomplexobj(x) else [x]
        axes = tuple(range(len(shape), x.ndim))
        return sum(jnp.sum(jnp.square(part.astype(weighted_sum.weight_dtype())), axes) for part in parts)

    return [leaf(*named) for named in jax.tree_util.tree_leaves_with_path(grads)]


def total(squares: list[Any]) -> jax.Array:
    """The sum of `squares`, a scalar or one per device."""
    return sum([x for x in squares if x is not None], start=jnp.zeros((), weighted_sum.weight_dtype()))


def of_micro_batch(
    grads: Tree, weight: Any, counted: Any, *, weighted: bool, shape: tuple[int, ...] = ()
) -> tuple[jax.Array, jax.Array]:
    """Returns (the norm of a micro-batch's mean gradient g, [w·‖g‖², 1]); 0 where `counted` is False.

    `grads` is g, or w·g if `weighted`; a weight of None is 1. They are per device if `shape` is given, and then the
    second result has its two entries along a last axis.
    """
    square = total(squares(grads, shape))
    weight = jnp.ones_like(square) if weight is None else jnp.broadcast_to(weight, square.shape).astype(square.dtype)
    if weighted:
        square = square / jnp.where(weight == 0, 1, weight) ** 2
    entries = square, weight * square, jnp.ones_like(square)
    if counted is not True:
        entries = weighted_sum.only_if(counted, entries)
    square, *sums = entries
    return root(square), jnp.stack(sums, axis=-1)


def root(square: jax.Array) -> jax.Array:
    """The square root, with derivative 0 at 0."""
    return jnp.where(square == 0, 0, jnp.sqrt(jnp.where(square == 0, 1, square)))
