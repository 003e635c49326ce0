"""Computes the weights of micro-batches on the host, before the micro-batches run.

A micro-batch that may have weight 0 needs a selection, which costs a pass over its gradient. For those that the host
knows to count, it runs another program, without the selection.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxaccum._gradient import substitution
from jaxaccum._jax import core
from jaxaccum._sums import traced_loss
from jaxaccum._types import Tree


class HostWeight:
    """Tells which micro-batches are known to have a positive weight on every device.

    The weight must be a constant, or be computed from the data by cheap operations (see `substitution`). The loss is
    traced once more for each signature of its arguments.

    Args:
      fun: `fun(params, *data)` returns (loss, rest). The weight may depend on `data` alone.
      shares: the number of devices that the first of `data` is split over, along its leading axis.
    """

    def __init__(self, fun: Callable[..., tuple[Any, Any]], shares: int):
        self._fun, self._shares = fun, shares
        self._known: dict[Any, bool | _Test] = {}

    def is_positive(self, params: Tree, *data: Tree) -> bool:
        """Whether the micro-batch's weight is known to be positive on every device.

        Reads the leaves that the weight depends on, and waits for them if they are on a device.
        """
        leaves, treedef = jax.tree.flatten(data)
        signature = treedef, tuple([(np.shape(x), getattr(x, "dtype", type(x))) for x in leaves])
        known = self._known.get(signature)
        if known is None:
            known = self._known[signature] = self._test(params, data)
        if isinstance(known, bool):
            return known
        inputs = [leaves[i] for i in known.inputs]
        return all(map(_is_readable, inputs)) and bool(known.program(*map(np.asarray, inputs)))

    def _test(self, params: Tree, data: Sequence[Tree]) -> "bool | _Test":
        """How to test micro-batches like this one."""
        is_split = self._shares > 1
        shares = [jax.tree.map(self._share, data[0]), *data[1:]] if is_split else data
        try:
            cpu = jax.local_devices(backend="cpu")[0]
            loss = traced_loss.trace(self._fun, params, *shares)
        except Exception:  # The loss may need a context, such as a mapped axis. Errors in it are raised by its program.
            return False
        if not loss.has_weight:
            return True
        found = substitution.data_weight(loss, range(1, len(loss.args)))
        if found is None:
            return False
        closed, used = found
        inputs = [i for i, is_used in enumerate(used[jax.tree.structure(params).num_leaves :]) if is_used]
        of_share = jax.tree.structure(data[0]).num_leaves if is_split else 0
        axes = [0 if i < of_share else None for i in inputs]
        weight = core.jaxpr_as_fun(closed)

        def are_positive(*inputs):
            by_share = [
                x if axis is None else x.reshape(self._shares, -1, *x.shape[1:])
                for x, axis in zip(inputs, axes, strict=True)
            ]
            (weights,) = jax.vmap(weight, axes)(*by_share) if any(axis == 0 for axis in axes) else weight(*by_share)
            # Below the smallest normal number, another device may round a weight to 0.
            least = jnp.finfo(weights.dtype).tiny if jnp.issubdtype(weights.dtype, jnp.floating) else 1
            return jnp.all(weights >= least)

        jitted = jax.jit(are_positive)

        def program(*inputs):
            return jitted(*jax.device_put(inputs, cpu))

        return _Test(program, inputs)

    def _share(self, leaf: Any) -> Any:
        """The type of one device's share of an array."""
        return jax.ShapeDtypeStruct((leaf.shape[0] // self._shares, *leaf.shape[1:]), leaf.dtype)


class _Test(NamedTuple):
    """Whether weights are positive: `program` of the leaves of the arguments, without the parameters, at `inputs`."""

    program: Callable[..., Any]
    inputs: Sequence[int]


def _is_readable(leaf: Any) -> bool:
    """Whether the host can read `leaf`."""
    if not isinstance(leaf, jax.Array):
        return True
    return not isinstance(leaf, jax.core.Tracer) and leaf.is_fully_addressable
