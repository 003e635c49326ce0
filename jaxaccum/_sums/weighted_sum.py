"""Weighted sums (Σ w·x, Σ w): pure functions on pytrees to add to them, merge them and take the mean."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxaccum._sums import overwrites
from jaxaccum._types import Tree


class Weighted(NamedTuple):
    """A loss's total and its weight: return it from a loss to weight micro-batches by their examples or tokens.

    Example:
      >>> import jaxaccum
      >>> def loss(w, batch):
      ...     squared = (w * batch["x"] - batch["y"]) ** 2 * batch["mask"]
      ...     return jaxaccum.Weighted(squared.sum(), batch["mask"].sum())
      >>> batch = {"x": jnp.array([1.0, 2.0]), "y": jnp.zeros(2), "mask": jnp.array([1.0, 0.0])}
      >>> print(*loss(3.0, batch))
      9.0 1.0

    A loss returns a `Weighted` to set the weight of its micro-batch. The window's loss is then Σ total / Σ weight and
    its gradient is the gradient of that, which is exact for micro-batches with different numbers of examples or tokens.
    A micro-batch with weight 0 is left out, even if its total is NaN, so a loss need not guard against an empty
    micro-batch.

    In `value_and_grad`, weights from the data cost nothing: the window is as fast and as small as with a plain loss.
    They must be computed from batch arguments and constants, without matrix products, loops or random numbers, as a sum
    of a mask is. A micro-batch of weight 0 then runs on the rows of another one, and adds 0 times its gradient; its aux
    is computed from its own rows, in a conditional. Any other weight selects each micro-batch's gradient, which takes
    room for a second one. So does a loss with side effects or communication between devices, and one with a
    `jax.custom_vjp` whose backward pass can't be shown to be linear.

    `HostDriven` computes such weights on the host. Only a micro-batch of weight 0, on any device, is left out by
    selection.

    Attributes:
      total: Σ w·x; for a loss, a floating scalar: the sum over the micro-batch's examples or tokens.
      weight: Σ w, a scalar; the number of examples or tokens in the sum.
    """

    total: Tree
    weight: Any


class Added(NamedTuple):
    """Replaces a leaf of a gradient that has already been added to its sum; `total` is the new sum."""

    total: Any


def sum_dtype(dtype: Any, accumulator_dtype: Any) -> Any:
    """The dtype of the sum of a leaf: `accumulator_dtype`, but float64 and complex dtypes are kept."""
    keeps = accumulator_dtype is None or dtype == jnp.float64 or jnp.issubdtype(dtype, jnp.complexfloating)
    return jnp.dtype(dtype) if keeps else jnp.dtype(accumulator_dtype)


def arrays(tree: Tree) -> Tree:
    """Converts plain numbers in `tree` to arrays."""
    return jax.tree.map(lambda x: x if hasattr(x, "dtype") else jnp.asarray(x), tree)


def promoted(a: Any, b: Any) -> Any:
    """Promotes two dtypes by jax's standard rules, even if jax is configured for strict promotion."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(a, b)


def weight_dtype() -> Any:
    """The dtype of weights and of averaged scalars: the widest float in use, float64 under x64."""
    return jax.dtypes.canonicalize_dtype(jnp.float64)


def is_inexact(leaf: Any) -> bool:
    """Whether `leaf` can have a gradient."""
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def zeros(tree: Tree, accumulator_dtype: Any) -> Tree:
    """Zero sums in each leaf's `sum_dtype` (overwritten statistics: their own), or None if it can't have a gradient."""
    leaf = lambda x, dtype: jnp.zeros_like(x, dtype=dtype)
    return _map_with_dtype(leaf, tree, accumulator_dtype)


def init(tree: Tree, accumulator_dtype: Any) -> Tree:
    """Zero sums with the layout of `tree`, also under jit."""
    if not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree)):
        return zeros(tree, accumulator_dtype)
    return cleared(_map_with_dtype(jnp.asarray, tree, accumulator_dtype))


def _map_with_dtype(fun: Callable[[Any, Any], Any], tree: Tree, accumulator_dtype: Any) -> Tree:
    """Maps `fun(leaf, dtype of its sum)` over `tree`; None for leaves that cannot have a gradient."""

    def leaf(path, x):
        wanted = None if overwrites.holds(path) else accumulator_dtype
        return fun(x, sum_dtype(jnp.result_type(x), wanted)) if is_inexact(x) else None

    return jax.tree.map_with_path(leaf, tree)


def cleared(sums: Tree) -> Tree:
    """Zeros with the layout of `sums`."""
    # Under jit, XLA propagates the layout only through a data dependence; the barrier keeps it from being removed.
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
    """Returns `total + weight·x`, leaf by leaf, rounded once to the dtype of `total`.

    `weight` and `keep` are scalars, or have one entry per index of the leaves' leading axis. `x` is left out where
    `keep` is False, and replaces `total` where the scalar `first` is True, so sums need not be cleared between windows.
    Both are selections, not products with a mask, since a value that is left out may be infinite or NaN.

    With `counters`, integers that differ between additions, sums in bfloat16 are rounded stochastically, so that the
    expected result is the exact sum. Rounding to nearest loses terms below half a unit in the last of bfloat16's 8
    significant bits: a sum of ones stops at 256.

    A leaf of `x` is ignored if that of `total` is None. Overwritten statistics (see `overwrites`) are not added: the
    larger value is kept, and the weight is ignored.
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
    """Replaces each `Added` in `grads` with its array."""
    is_added = lambda x: isinstance(x, Added)
    return jax.tree.map(lambda x: x.total if is_added(x) else x, grads, is_leaf=is_added)


def merge(a: Weighted, b: Weighted, *, keep: Any = None, counters: Sequence[Any] | None = None) -> Weighted:
    """Adds two weighted sums."""
    return Weighted(add(a.total, b.total, keep=keep, counters=counters), add(a.weight, b.weight, keep=keep))


def mean(sums: Weighted, like: Tree) -> Tree:
    """Returns Σ w·x / Σ w, in the wider of the sum's and `like`'s dtypes; if Σ w is 0, the sum is not divided.

    Leaves that are None in the sums are those of `like`. Overwritten statistics (see `overwrites`) are not divided.

    The code multiplies by the scalar 1 / Σ w. XLA does not fuse an elementwise division into the optimizer's kernels:
    it would write out the quotient first, which takes as much memory as the parameters.
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
    """Whether all inexact leaves of `tree` are finite: a bool, or one for each index of the leading `shape`."""
    leaves = [jnp.asarray(x) for x in jax.tree.leaves(tree) if is_inexact(x)]
    finite = [jnp.all(jnp.isfinite(x), axis=tuple(range(len(shape), x.ndim))) for x in leaves]
    return jnp.all(jnp.stack(finite), axis=0) if finite else jnp.ones(shape, jnp.bool_)


def _stochastic(x: jax.Array, counters: Sequence[Any]) -> jax.Array:
    """Rounds float32 `x` to bfloat16 stochastically: adds random bits to the lower half, then truncates it.

    The bits are a hash of a seed, made from `counters`, and each element's index. The hash fuses with the sum; XLA
    would write bits from `jax.random` to memory first.
    """
    key = functools.reduce(jax.random.fold_in, counters, jax.random.key(0))
    seed = jax.random.bits(key, (), jnp.uint32)
    index = jnp.zeros(x.shape, jnp.uint32)
    for dimension, length in enumerate(x.shape):
        index = index * jnp.uint32(length) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, dimension)
    return _truncated(x, _mixed(index ^ seed) & jnp.uint32(0xFFFF))


@jax.custom_jvp
def _truncated(x: jax.Array, noise: jax.Array) -> jax.Array:
    """Adds `noise` to the bits of `x` and truncates to bfloat16; its derivative is that of a cast."""
    carried = (jax.lax.bitcast_convert_type(x, jnp.uint32) + noise) & jnp.uint32(0xFFFF0000)
    rounded = jax.lax.bitcast_convert_type(carried, jnp.float32).astype(jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


@_truncated.defjvp
def _(primals, tangents):
    return _truncated(*primals), tangents[0].astype(jnp.bfloat16)


def _mixed(x: jax.Array) -> jax.Array:
    """Hashes uint32 `x` with the finalizer of MurmurHash3."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _wider(a: Any, b: Any) -> Any:
    """The wider of two inexact dtypes; `b` may have 8 bits, which jax doesn't promote, but `a` may not."""
    return a if jnp.finfo(b).bits < 16 else promoted(a, b)


def _beside(x: jax.Array, scalars: Any) -> jax.Array:
    """Reshapes `scalars`, () or of the leading shape of `x`, to broadcast with `x`."""
    scalars = jnp.asarray(scalars)
    return scalars.reshape(scalars.shape + (1,) * (x.ndim - scalars.ndim)) if scalars.ndim else scalars


def select(pred: Any, new: Tree, old: Tree) -> Tree:
    """Selects `new` where `pred`, a scalar or one per index of the leading axis, is True, else `old`."""
    if isinstance(pred, bool):
        return new if pred else old
    return jax.tree.map(lambda n, o: n if n.dtype == jax.dtypes.float0 else jnp.where(_beside(n, pred), n, o), new, old)


def only_if(pred: Any, tree: Tree) -> Tree:
    """`tree` where `pred` is True, else zeros, even in place of NaN."""
    return select(pred, tree, jax.tree.map(jnp.zeros_like, tree))
