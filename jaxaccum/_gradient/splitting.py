"""Splits a window's batch into K micro-batches."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxaccum._devices import layout
from jaxaccum._types import Tree


class MicroBatches(NamedTuple):
    """The batch arguments of a window, with a micro-batch axis, from which the loop slices one micro-batch at a time.

    Moving that axis to the front first would copy the batch, and would gather a batch that is sharded over devices.
    """

    arrays: tuple[Tree, ...]
    axis: int  # 1 for leaves (N, K, ...), or 0 for stacked leaves (K_max, N, ...).
    length: int  # K or K_max.

    def take(self, index: Any) -> tuple[Tree, ...]:
        """Returns micro-batch `index`, with leaves (N, ...)."""
        leaf = lambda x: jax.lax.dynamic_index_in_dim(x, index, self.axis, keepdims=False)
        return jax.tree.map(leaf, self.arrays)


_REMEDY = "Drop or pad the rest (Weighted losses count only what is real)."


def split(
    args: Sequence[Tree], argnums: Sequence[int], k: Any, stacked: bool, *, remedy: str = _REMEDY
) -> MicroBatches:
    """Splits the batch arguments into micro-batches: micro-batch i is rows i, i + K, i + 2K, ... of each leaf.

    With this split, a batch that is sharded over devices doesn't move: each device has rows of every micro-batch.
    Blocks of N consecutive rows would each be on a few devices, and XLA would gather the batch on all of them.

    K may be traced if the batch is `stacked`, with leaves (K_max, N, ...). Raises for a batch that can't be split so.
    """
    batches = tuple(args[i] for i in argnums)
    length = _length(args, argnums, 0)
    if stacked:
        if isinstance(k, int) and k > length:
            raise ValueError(
                f"num_micro_batches={k}, but the stacked batch holds {length} micro-batches; stack {k} or pass "
                f"num_micro_batches={length}."
            )
        _check_layout(args, argnums, None)
        return MicroBatches(batches, 0, length)
    if length == 0 or length % k:
        below, above = length // k * k, (length // k + 1) * k
        nearest = f"{below} and {above}" if below else f"{above}"
        raise ValueError(
            f"a batch of {length} examples can't be split into num_micro_batches={k} equal micro-batches; nearest "
            f"sizes that can: {nearest}.{f' {remedy}' if below else ''}"
        )
    _check_layout(args, argnums, length // k)

    def leaf(x):
        x = jnp.asarray(x)
        return x.reshape((length // k, k, *x.shape[1:]))

    return MicroBatches(jax.tree.map(leaf, batches), 1, k)


def check_devices(args: Sequence[Tree], argnums: Sequence[int], k: Any, stacked: bool, devices: int) -> None:
    """Checks that the batch can be split over the devices and, on each, into K micro-batches."""
    length = _length(args, argnums, 1 if stacked else 0)
    pieces = devices if stacked else devices * k
    if length == 0 or length % pieces:
        into = f"{devices} devices" + ("" if stacked or k == 1 else f" of num_micro_batches={k}")
        raise ValueError(
            f"a batch of {length} examples can't be split over {into}: it must be a multiple of {pieces}, such as "
            f"{max(length // pieces, 1) * pieces} or {max(length // pieces + 1, 2) * pieces}."
        )


def _check_layout(args: Sequence[Tree], argnums: Sequence[int], n: int | None) -> None:
    """Checks the batch's sharding over explicit axes (a trace doesn't show automatic ones); `n` is None if stacked."""
    for name, leaf in _leaves(args, argnums):
        devices = layout.count(leaf, 0)
        if n is None and devices > 1:
            raise ValueError(
                f"stacked batch leaf {name} is split over {devices} devices along its micro-batches; split it along "
                "axis 1, the examples of a micro-batch, so that each device has rows of every micro-batch."
            )
        if n is not None and n % devices:
            raise ValueError(
                f"batch leaf {name} is split over {devices} devices, which don't divide the N={n} examples of a "
                f"micro-batch: the batch would have to be gathered. Make N a multiple of {devices}, or pass mesh=."
            )


def _length(args: Sequence[Tree], argnums: Sequence[int], dim: int) -> int:
    """The length of dimension `dim`, which must be the same for all leaves of the batch arguments."""
    lengths = {}
    for name, leaf in _leaves(args, argnums):
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


def _leaves(args: Sequence[Tree], argnums: Sequence[int]) -> list[tuple[str, Any]]:
    """The (name, leaf) pairs of the batch arguments."""
    return [
        (f"args[{i}]{jax.tree_util.keystr(path)}", leaf)
        for i in argnums
        for path, leaf in jax.tree_util.tree_leaves_with_path(args[i])
    ]
