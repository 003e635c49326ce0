"""A window's batch as K micro-batches."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxaccum._devices import layout
from jaxaccum._types import Tree


class MicroBatches(NamedTuple):
    """The micro-batches of a window.

    A micro-batch is read inside the loop. To move the axis of micro-batches to the front first would copy the batch,
    and where the batch is split over devices it would have to be gathered.

    Attributes:
      arrays: the batch arguments; each leaf has an axis of micro-batches.
      axis: that axis: 1 of leaves (N, K, ...), or 0 of stacked leaves (K_max, N, ...).
      length: its length.
    """

    arrays: tuple[Tree, ...]
    axis: int
    length: int

    def take(self, index: Any) -> tuple[Tree, ...]:
        """Micro-batch `index` of the batch arguments, leaves (N, ...)."""
        leaf = lambda x: jax.lax.dynamic_index_in_dim(x, index, self.axis, keepdims=False)
        return jax.tree.map(leaf, self.arrays)


def split(args: Sequence[Tree], argnums: Sequence[int], k: Any, stacked: bool) -> MicroBatches:
    """The batch arguments as micro-batches: number i is rows i, i + K, i + 2K, ... of each leaf.

    So divided, a batch that is split over devices stays where it is: each device has rows of every micro-batch. Runs of
    N rows would each lie on a few devices, and XLA would gather the batch on all of them.

    Args:
      args: all arguments of the call.
      argnums: which of them are batches.
      k: K, a Python int, or a traced scalar where `stacked`.
      stacked: whether leaves are (K_max, N, ...) already.

    Raises:
      ValueError: if there is no array, a scalar, leaves of different lengths, or a length that K does not divide; on
        explicit axes of a mesh, if micro-batches don't divide over the devices that the batch is split over.
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
            f"sizes that can: {nearest}. Drop or pad the rest (Weighted losses count only what is real)."
        )
    _check_layout(args, argnums, length // k)

    def leaf(x):
        x = jnp.asarray(x)
        return x.reshape((length // k, k, *x.shape[1:]))

    return MicroBatches(jax.tree.map(leaf, batches), 1, k)


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


def _check_layout(args: Sequence[Tree], argnums: Sequence[int], n: int | None) -> None:
    """Explicit axes that split a batch's first dimension must divide N; None for a stacked batch, which none may split.

    A layout over automatic axes can't be seen while tracing.
    """
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
    """The one length of dimension `dim` that all leaves of the batch arguments have."""
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
    """The leaves of the batch arguments, by name."""
    return [
        (f"args[{i}]{jax.tree_util.keystr(path)}", leaf)
        for i in argnums
        for path, leaf in jax.tree_util.tree_leaves_with_path(args[i])
    ]
