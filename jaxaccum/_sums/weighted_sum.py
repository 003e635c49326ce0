"""The monoid: a weighted sum (Σ w·x, Σ w) that can be added to, merged, and divided exactly once.

Pure functions over pytrees. Nothing here knows an optimizer, a device or a loop.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxaccum._sums import overwrites
from jaxaccum._types import Tree


class Weighted(NamedTuple):
    """A weighted sum: Σ w·x, and Σ w.

    A loss returns one to say what its micro-batch counts for; the window's loss and gradient are then
    Σ total / Σ weight, exact where the micro-batches hold different numbers of examples or tokens. Weight 0 takes a
    micro-batch out, whatever its total is, so no loss needs to guard a division by its token count.

    Attributes:
      total: Σ w·x; for a loss a floating scalar, the sum over the micro-batch's examples or tokens.
      weight: Σ w, a scalar; the number of examples or tokens in the sum.

    Example:
      >>> import jaxaccum
      >>> def loss(w, batch):
      ...     squared = (w * batch["x"] - batch["y"]) ** 2 * batch["mask"]
      ...     return jaxaccum.Weighted(squared.sum(), batch["mask"].sum())
      >>> batch = {"x": jnp.array([1.0, 2.0]), "y": jnp.zeros(2), "mask": jnp.array([1.0, 0.0])}
      >>> print(*loss(3.0, batch))
      9.0 1.0
    """

    total: Tree
    weight: Any


class Added(NamedTuple):
    """Stands for a leaf of a gradient that is in the sum already.

    Attributes:
      total: the new sum.
    """

    total: Any


def sum_dtype(dtype: Any, accumulator_dtype: Any) -> Any:
    """The dtype that sums of a leaf of `dtype` are kept in: `accumulator_dtype`, but float64 and complex stay."""
    keeps = accumulator_dtype is None or dtype == jnp.float64 or jnp.issubdtype(dtype, jnp.complexfloating)
    return jnp.dtype(dtype) if keeps else jnp.dtype(accumulator_dtype)


def arrays(tree: Tree) -> Tree:
    """`tree` with arrays for plain numbers."""
    return jax.tree.map(lambda x: x if hasattr(x, "dtype") else jnp.asarray(x), tree)


def promoted(a: Any, b: Any) -> Any:
    """The dtype that holds all numbers of both, even where jax is told to promote none by itself."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(a, b)


def weight_dtype() -> Any:
    """The dtype of weights and of averaged scalars: the widest float in use, float64 under x64."""
    return jax.dtypes.canonicalize_dtype(jnp.float64)


def is_inexact(leaf: Any) -> bool:
    """Whether `leaf` can have a gradient."""
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def zeros(tree: Tree, accumulator_dtype: Any) -> Tree:
    """Zero sums for `tree`, leaf by leaf in `sum_dtype`; a leaf that cannot have a gradient gets None.

    Statistics that are overwritten keep their dtype.
    """
    leaf = lambda x, dtype: jnp.zeros_like(x, dtype=dtype)
    return _map_with_dtype(leaf, tree, accumulator_dtype)


def init(tree: Tree, accumulator_dtype: Any) -> Tree:
    """The same, laid out on the devices as `tree` is, under jit too."""
    if not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree)):
        return zeros(tree, accumulator_dtype)
    return cleared(_map_with_dtype(jnp.asarray, tree, accumulator_dtype))


def _map_with_dtype(fun: Callable[[Any, Any], Any], tree: Tree, accumulator_dtype: Any) -> Tree:
    """`fun(leaf, dtype of its sum)`, None for a leaf that cannot have a gradient."""

    def leaf(path, x):
        wanted = None if overwrites.holds(path) else accumulator_dtype
        return fun(x, sum_dtype(jnp.result_type(x), wanted)) if is_inexact(x) else None

    return jax.tree.map_with_path(leaf, tree)


def cleared(sums: Tree) -> Tree:
    """Zeros that are laid out on the devices as `sums` are."""
    # Under jit only a dependence makes them so; XLA can't see that it is none.
    never = jax.lax.optimization_barrier(jnp.asarray(False))
    return jax.tree.map(lambda x: jnp.where(never, x, jnp.zeros_like(x)), sums)


def add(
    total: Tree,
    x: Tree,
    weight: Any = None,
    *,
    keep: Any = None,
    first: Any = None,
    counters: Sequence[Any] | None = None,
) -> Tree:
    """`total + weight·x`, leaf by leaf, rounded once to the dtype of `total`.

    With `counters` sums in bfloat16 are rounded stochastically: up or down, with chances whose mean is the exact sum.
    Rounding to the nearest loses whatever is smaller than half a unit in the last of bfloat16's 8 digits: a sum of
    ones stops at 256.

    The three options are selections, never products with a mask: what is left out may be infinite or NaN.

    Statistics that are overwritten (`_overwrites`) are not added: the larger one stays, whatever its weight.

    Args:
      total: the sums so far; where a leaf is None, the leaf of `x` is passed over.
      x: a tree like `total`, of any inexact dtypes; where a leaf is `Added`, it is the new sum.
      weight: a scalar, or one for each index of the leaves' leading axis; None where `x` counts once or is weighted
        already.
      keep: a bool, or one for each index; where False, `x` is left out.
      first: a bool scalar; where True, `x` takes the place of `total`, which is so never cleared.
      counters: integers, others for each sum: the same ones give the same roundings. None rounds to the nearest.

    Returns:
      The new sums.
    """
    numbers = itertools.count()

    def leaf(path, total, x):
        if total is None or isinstance(x, Added):
            return x.total if isinstance(x, Added) else None
        is_overwritten = overwrites.holds(path)
        wide = promoted(total.dtype, jnp.float32)
        x = jnp.asarray(x).astype(wide)
        if weight is not None and not is_overwritten:
            x = x * _beside(x, weight).astype(jnp.finfo(wide).dtype)
        if keep is not None:
            x = jnp.where(_beside(x, keep), x, jnp.zeros_like(x))
        new = jnp.maximum(total.astype(wide), x) if is_overwritten else total.astype(wide) + x
        if first is not None:
            new = jnp.where(first, x, new)
        number = next(numbers)
        if counters is not None and total.dtype == jnp.bfloat16:
            return _stochastic(new, (number, *counters))
        return new.astype(total.dtype)

    return jax.tree.map_with_path(leaf, total, x, is_leaf=lambda leaf: leaf is None)


def bare(grads: Tree) -> Tree:
    """`grads` with the array in place of each `Added`."""
    is_added = lambda x: isinstance(x, Added)
    return jax.tree.map(lambda x: x.total if is_added(x) else x, grads, is_leaf=is_added)


def merge(a: Weighted, b: Weighted, *, keep: Any = None, counters: Sequence[Any] | None = None) -> Weighted:
    """The weighted sum of both: of two micro-batches, of two devices, of two halves of a checkpoint."""
    return Weighted(add(a.total, b.total, keep=keep, counters=counters), add(a.weight, b.weight, keep=keep))


def mean(sums: Weighted, like: Tree) -> Tree:
    """Σ w·x / Σ w, the one division; 0 where Σ w is 0 and so is the sum.

    Statistics that are overwritten (`_overwrites`) are not divided.

    The division is that of a scalar: XLA does not fuse a division of every element into the optimizer's kernels, but
    writes its result out first, in memory of the parameters' size.

    Args:
      sums: the weighted sum.
      like: a tree of the summed values. A leaf of the mean is never narrower than its leaf here, and where the sums
        have no leaf the mean has this one.

    Returns:
      The mean, in the wider of the sum's and `like`'s dtypes.
    """
    weight = jnp.where(sums.weight == 0, jnp.ones_like(sums.weight), sums.weight)

    def leaf(path, total, x):
        if total is None:
            return x
        if overwrites.holds(path):
            return total.astype(jnp.result_type(x))
        wide = promoted(total.dtype, jnp.float32)
        mean = total.astype(wide) * (1 / weight.astype(jnp.finfo(wide).dtype))
        return mean.astype(_wider(total.dtype, jnp.result_type(x)))

    return jax.tree.map_with_path(leaf, sums.total, like, is_leaf=lambda leaf: leaf is None)


def all_finite(tree: Tree, shape: tuple[int, ...] = ()) -> jax.Array:
    """Whether the inexact leaves of `tree` are free of NaN and infinity: a bool, or one for each index of `shape`."""
    leaves = [jnp.asarray(x) for x in jax.tree.leaves(tree) if is_inexact(x)]
    finite = [jnp.all(jnp.isfinite(x), axis=tuple(range(len(shape), x.ndim))) for x in leaves]
    return jnp.all(jnp.stack(finite), axis=0) if finite else jnp.ones(shape, jnp.bool_)


def _stochastic(x: jax.Array, counters: Sequence[Any]) -> jax.Array:
    """float32 `x` in bfloat16, its upper half: random bits are added to what is cut off, and carry at times.

    The bits are a hash of a key made of `counters` and of each element's index, which fuses with the sum; those of
    `jax.random` would be written out first.
    """
    key = functools.reduce(jax.random.fold_in, counters, jax.random.key(0))
    seed = jax.random.bits(key, (), jnp.uint32)
    index = jnp.zeros(x.shape, jnp.uint32)
    for dimension, length in enumerate(x.shape):
        index = index * jnp.uint32(length) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, dimension)
    noise = _mixed(index ^ seed) & jnp.uint32(0xFFFF)
    carried = (jax.lax.bitcast_convert_type(x, jnp.uint32) + noise) & jnp.uint32(0xFFFF0000)
    rounded = jax.lax.bitcast_convert_type(carried, jnp.float32).astype(jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def _mixed(x: jax.Array) -> jax.Array:
    """Every bit of uint32 `x` spread over all of them: the finalizer of MurmurHash3."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _wider(a: Any, b: Any) -> Any:
    """The wider of two inexact dtypes; jax promotes none of 8 bits, and `a` is none."""
    return a if jnp.finfo(b).bits < 16 else promoted(a, b)


def _beside(x: jax.Array, scalars: Any) -> jax.Array:
    """`scalars`, () or of the leading shape of `x`, shaped to broadcast with it."""
    scalars = jnp.asarray(scalars)
    return scalars.reshape(scalars.shape + (1,) * (x.ndim - scalars.ndim)) if scalars.ndim else scalars


def select(pred: Any, new: Tree, old: Tree) -> Tree:
    """`new` where `pred`, else `old`, leaf by leaf; at once if `pred` is a Python bool.

    `pred` is a scalar, or has one for each index of the leaves' leading axis.
    """
    if isinstance(pred, bool):
        return new if pred else old
    return jax.tree.map(lambda n, o: n if n.dtype == jax.dtypes.float0 else jnp.where(_beside(n, pred), n, o), new, old)
