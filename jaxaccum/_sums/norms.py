"""Norms of gradients."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxaccum._sums import overwrites, weighted_sum
from jaxaccum._sums.weighted_sum import Weighted
from jaxaccum._types import Tree


class GradientNorms(NamedTuple):
    """The Euclidean norms of a window's gradients, without overwritten statistics; with x64, in float64.

    What an option doesn't compute is None. With `gradient_norms="noise"` a part g of a window is the mean gradient of
    one device or, on one device, of the window's first micro-batches.

    Attributes:
      window: the norm of the window's gradient, as the optimizer receives it.
      micro_batch: the norms of the micro-batches' mean gradients, on each device; 0 for one that is left out.
      squares: Σ w·‖g‖² and Σ w over the micro-batches, or the parts, g of the window on all devices, of weights w.
      count: how many of these count, an int32 scalar.
      pending: Σ w·‖g‖² and the number of micro-batches that count in the open window, on each device; with "noise"
        Σ w·‖g‖², Σ w and the number of its part.
      whole: W·‖g‖² and W of the window's mean gradient g, of weight W.
    """

    window: Any
    micro_batch: Any = None
    squares: Any = None
    count: Any = None
    pending: Any = None
    whole: Any = None

    @property
    def two_sizes(self) -> tuple[jax.Array, jax.Array]:
        """Arguments of `NoiseScale.update`: the squared norms and the weights of a small and a large batch, each (2,).

        They are 0 before the first window. With "all", a `prepare` function other than `cast` and
        `transform_micro_gradient` make the two norms those of different gradients: use "noise" with them.

        Raises:
          ValueError: without `gradient_norms="noise"` or "all".
        """
        if self.squares is None:
            raise ValueError("two_sizes needs gradient_norms='noise' or 'all'.")
        parts = self.squares
        whole = Weighted(parts.weight * self.window**2, parts.weight) if self.whole is None else self.whole
        divided = lambda total, by: total / jnp.where(by == 0, 1, by)
        squares = jnp.stack([divided(*parts), divided(*whole)])
        return squares, jnp.stack([divided(parts.weight, self.count), whole.weight])


def check_argument(value: Any, in_place: bool | None) -> None:
    """Checks `gradient_norms`: None, "window", "noise", or "all", which excludes `in_place=True`."""
    if value not in (None, "window", "noise", "all"):
        raise ValueError(f"gradient_norms must be None, 'window', 'noise' or 'all', got {value!r}.")
    if value == "all" and in_place:
        raise ValueError(
            "in_place=True can't be had with gradient_norms='all', which needs each micro-batch's gradient: leave it "
            "at None, or use gradient_norms='window' or 'noise'."
        )


def check_two_sizes(name: str, every_k: Any, devices: int, user: str = "gradient_norms='noise'") -> None:
    """Checks that a window of K = `every_k`, the argument `name`, holds the two batch sizes that `user` needs."""
    if isinstance(every_k, int) and every_k * devices == 1:
        raise ValueError(
            f"{user} needs two batch sizes in a window, and {name}=1 on one device has one: pass a "
            f"larger {name}, or use several devices."
        )


def refuse_reduced(reduced: Tree) -> None:
    """Checks that no leaf of the devices' sums is already reduced, as "noise" needs; `reduced` is as for `joined`."""
    if any(jax.tree.leaves(reduced)):
        raise ValueError(
            "gradient_norms='noise' compares the devices' own gradients with their mean, but prepare gathers "
            "parameters, so that its transpose sums their gradients over the devices: gather them elsewhere."
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


def of_part(sums: Weighted, shape: tuple[int, ...] = ()) -> jax.Array:
    """[W·‖S / W‖², W, 1] for gradients' sums S of weight W, 0 if W is 0; along a last axis if `shape` is given."""
    weight = sums.weight
    counts = weight != 0
    square = total(squares(sums.total, shape)) / jnp.where(counts, weight, 1)
    return weighted_sum.only_if(counts, jnp.stack([square, weight, jnp.ones_like(weight)], axis=-1))


def of_two_sizes(window: jax.Array, part: jax.Array, whole: Any) -> GradientNorms:
    """The norms for "noise": `part` and `whole` have entries like those of `of_part`, summed over the devices."""
    square, weight, count = part
    return GradientNorms(
        window, squares=Weighted(square, weight), count=count.astype(jnp.int32), whole=Weighted(*whole[:2])
    )


def root(square: jax.Array) -> jax.Array:
    """The square root, with derivative 0 at 0."""
    return jnp.where(square == 0, 0, jnp.sqrt(jnp.where(square == 0, 1, square)))
