"""A window's batch as K micro-batches along a new leading axis."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

Tree = Any


def split(args: Sequence[Tree], argnums: Sequence[int], k: Any, stacked: bool) -> tuple[tuple[Tree, ...], int]:
    """The batch arguments with leaves (K, N, ...), micro-batch i of them being rows i·N to (i+1)·N.

    Args:
      args: all arguments of the call.
      argnums: which of them are batches.
      k: K, a Python int, or a traced scalar where `stacked`.
      stacked: whether leaves are (K_max, N, ...) already.

    Returns:
      (the batch arguments, their leading length: K, or K_max where `stacked`).

    Raises:
      ValueError: if there is no array, a scalar, leaves of different lengths, or a length that K does not divide.
    """
    batches = tuple(args[i] for i in argnums)
    length = _length(args, argnums, 0)
    if stacked:
        if isinstance(k, int) and k > length:
            raise ValueError(
                f"num_micro_batches={k}, but the stacked batch holds {length} micro-batches; stack {k} or pass "
                f"num_micro_batches={length}."
            )
        return batches, length
    if length == 0 or length % k:
        below, above = length // k * k, (length // k + 1) * k
        nearest = f"{below} and {above}" if below else f"{above}"
        raise ValueError(
            f"a batch of {length} examples can't be split into num_micro_batches={k} equal micro-batches; nearest "
            f"sizes that can: {nearest}. Drop or pad the rest (Weighted losses count only what is real)."
        )

    def leaf(x):
        x = jnp.asarray(x)
        return x.reshape((k, length // k, *x.shape[1:]))

    return jax.tree.map(leaf, batches), k


def check_devices(args: Sequence[Tree], argnums: Sequence[int], k: Any, stacked: bool, devices: int) -> None:
    """The batch must divide over the devices, and there into K.

    Raises:
      ValueError: if it doesn't; all numbers are named.
    """
    length = _length(args, argnums, 1 if stacked else 0)
    pieces = devices if stacked else devices * k
    if length == 0 or length % pieces:
        into = f"{devices} devices" + ("" if stacked else f" of num_micro_batches={k}")
        raise ValueError(
            f"a batch of {length} examples can't be split over {into}: it must be a multiple of {pieces}, such as "
            f"{max(length // pieces, 1) * pieces} or {(length // pieces + 1) * pieces}."
        )


def _length(args: Sequence[Tree], argnums: Sequence[int], dim: int) -> int:
    """The one length of dimension `dim` that all leaves of the batch arguments have."""
    lengths = {}
    for i in argnums:
        for path, leaf in jax.tree_util.tree_leaves_with_path(args[i]):
            name = f"args[{i}]{jax.tree_util.keystr(path)}"
            if len(jnp.shape(leaf)) <= dim:
                what = "is a scalar" if dim == 0 else f"has shape {jnp.shape(leaf)}"
                raise ValueError(f"batch leaf {name} {what} and can't be split; pass it outside batch_argnums.")
            lengths[name] = jnp.shape(leaf)[dim]
    if not lengths:
        raise ValueError(f"the batch arguments (batch_argnums={tuple(argnums)}) hold no array to split.")
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name}: {length}" for name, length in lengths.items())
        raise ValueError(f"batch leaves must have one leading length, got {listed}.")
    return next(iter(lengths.values()))
