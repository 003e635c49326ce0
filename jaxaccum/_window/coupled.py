"""The two passes of `coupled_value_and_grad` on one device, before any reduction of gradients.

The first pass computes the representations of all micro-batches, and keeps nothing else. From those follow the loss and
its gradient with respect to them. The second pass is a window of the loss `sum(representations * their gradients)`,
whose gradient is what they contribute to the gradient of the parameters.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxaccum._devices.topology import MappedAxis, OneDevice
from jaxaccum._gradient import splitting
from jaxaccum._gradient.casting import Cast
from jaxaccum._jax import core, jaxprs
from jaxaccum._sums import numeric, traced_loss, weighted_sum
from jaxaccum._sums.weighted_sum import Weighted
from jaxaccum._types import Tree
from jaxaccum._window import once
from jaxaccum._window.loop import Window, first_step


class Coupled(NamedTuple):
    """The configuration of `coupled_value_and_grad`."""

    window: Window  # Of `encode`.
    loss: Callable[..., Any]
    has_aux: bool

    def run(
        self, device: OneDevice | MappedAxis, args: Sequence[Tree], kwargs: dict[str, Tree]
    ) -> tuple[Tree, Tree, jax.Array, Tree]:
        """Runs both passes on this device; `args` holds this device's whole batch.

        Returns (local sums of the gradient, the axes over which each is already reduced, the loss, aux).
        """
        window, batch = self.window, self.window.roles.batch
        params = device.local(weighted_sum.arrays(window.differentiated(args)))
        micro_batches = splitting.split(args, batch, window.k, False, remedy="Drop the rest.")
        check_split([args[i] for i in batch], device)
        first = first_step(device, micro_batches, [])
        call = window.call(device, args, kwargs)
        prepare = window.prepare
        if isinstance(prepare, Cast):
            prepare = self._seeing(prepare, device, call, params, first)
        prepared = once.of(prepare, device, call, params, *first, in_place=None if window.k > 1 else False)
        encoder = Encoder.trace(prepared.fun, prepared.params, *first)

        rows = device.gathered(encoder.rows(device, prepared.params, micro_batches, window.k))
        visible = prepared.params if callable(prepare) else params
        value, aux, (direct, cotangents) = self._gradient(device, encoder, visible, rows)

        cotangents = splitting.split((*args, device.part(cotangents)), (*batch, len(args)), window.k, False)
        sums, *_ = window.sums(device, encoder.surrogate, prepared.params, cotangents, [])
        grads, direct = sums.total[1], device.once(direct)
        if callable(prepare):
            grads = prepared.transpose(weighted_sum.add(grads, direct), window.k)
        else:
            grads = weighted_sum.add(prepared.transpose(grads, window.k), direct)
        return grads, prepared.reduced, value, aux

    def _seeing(self, prepare: Cast, device, call, params: Tree, first: Sequence[Any]) -> Cast:
        """Selects the leaves to cast by looking at both functions."""
        shapes = jax.eval_shape(call, params, *first)
        count = check_rows(shapes, first) * self.window.k * device.size()
        rows = jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype), shapes)
        both = lambda params, rows, *first: (call(params, *first), self._returned(params, rows))
        return prepare.seeing(both, params, rows, *first)

    def _gradient(self, device, encoder: "Encoder", visible: Tree, rows: list[jax.Array]):
        """(loss, aux, its gradients with respect to (what it sees of the parameters, the differentiated rows))."""
        varied, fixed = encoder.parted(rows)
        total = lambda visible, varied, fixed: self._returned(visible, encoder.joined(varied, fixed))
        traced = traced_loss.trace(total, visible, varied, fixed)
        if jaxprs.names_axis(traced.closed.jaxpr, device.names):
            raise ValueError(
                f"loss communicates over the data axis {device.names}, or reads its index, but it receives the "
                "representations of all devices already, in the batch's order, and must be the same on all of them. "
                "Leave collectives and jax.lax.axis_index out of it."
            )
        gradient = jax.value_and_grad(traced.total, (0, 1), has_aux=True)
        (value, (_, aux)), grads = gradient(visible, varied, fixed)
        value, aux = device.common((value, aux))
        return value, aux, grads

    def _returned(self, params: Tree, representations: Tree) -> tuple[Any, Tree]:
        """(loss, aux or None)."""
        params = (params,) if isinstance(self.window.argnums, int) else params
        value, aux = self.loss(*params, representations), None
        if self.has_aux:
            if not isinstance(value, (tuple, list)) or isinstance(value, Weighted) or len(value) != 2:
                raise TypeError(f"with has_aux=True loss must return (loss, aux), got {type(value)} for a pair.")
            value, aux = value
        if isinstance(value, Weighted):
            raise TypeError(
                "loss returned a Weighted, but it is called once, with the representations of all examples: there are "
                "no micro-batches to weigh. Return total / weight, or mask the examples that don't count in the loss."
            )
        dtype = numeric.scalar_dtype(value)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"loss must return one floating scalar, got {numeric.kind(value)}; reduce an array first, and return "
                "other results with has_aux=True."
            )
        return value, aux


class Encoder(NamedTuple):
    """A traced `encode(params, index, batch, carry)`: its Python code runs once for both passes."""

    closed: core.ClosedJaxpr
    structure: Any  # Of the representations.
    is_varied: tuple[bool, ...]  # For each leaf of the representations, whether it has a gradient.

    @classmethod
    def trace(cls, encode: Callable[..., Tree], params: Tree, *first: Any) -> "Encoder":
        """Traces `encode`, and checks what it returns."""
        closed, shapes = jax.make_jaxpr(encode, return_shape=True)(params, *first)
        check_rows(shapes, first)
        is_param = [i < jax.tree.structure(params).num_leaves for i in range(len(closed.in_avals))]
        depends = jaxprs.reached(closed.jaxpr, is_param)
        is_varied = tuple(
            is_reached and weighted_sum.is_inexact(aval)
            for is_reached, aval in zip(depends, closed.out_avals, strict=True)
        )
        if not any(is_varied):
            raise ValueError(
                "no floating representation that encode returned depends on the arguments that argnums names, so there "
                "is nothing to differentiate; use the differentiated parameters in encode."
            )
        return cls(closed, jax.tree.structure(shapes), is_varied)

    def leaves(self, *args: Any) -> list[jax.Array]:
        """The representations of a micro-batch."""
        return core.jaxpr_as_fun(self.closed)(*jax.tree.leaves(args))

    def rows(self, device, params: Tree, micro_batches: splitting.MicroBatches, k: int) -> list[jax.Array]:
        """The representations of this device's examples, in the batch's order."""
        encode = lambda i: self.leaves(params, device.local(i), micro_batches.take(i), [])
        if k == 1:
            return encode(jnp.int32(0))
        stacked = jax.lax.map(encode, jnp.arange(k, dtype=jnp.int32))
        return [x.swapaxes(0, 1).reshape(-1, *x.shape[2:]) for x in stacked]

    def parted(self, leaves: Sequence[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
        """(the leaves with a gradient, the others)."""
        marked = list(zip(leaves, self.is_varied, strict=True))
        return [x for x, is_varied in marked if is_varied], [x for x, is_varied in marked if not is_varied]

    def joined(self, varied: Sequence[jax.Array], fixed: Sequence[jax.Array]) -> Tree:
        """Inverts `parted`: returns the representations."""
        given = {True: iter(varied), False: iter(fixed)}
        return self.structure.unflatten(next(given[is_varied]) for is_varied in self.is_varied)

    def surrogate(self, params: Tree, index: Any, batch: tuple[Tree, ...], carry: list[jax.Array]) -> Any:
        """A loss whose gradient is the VJP of `encode`; the last batch argument holds the cotangents."""
        varied, _ = self.parted(self.leaves(params, index, batch[:-1], carry))
        return sum(map(_product, varied, batch[-1]), jnp.zeros((), weighted_sum.weight_dtype())), (carry, None)


def check_split(batch: Sequence[Tree], device: OneDevice | MappedAxis) -> None:
    """Raises if jax's types show that all devices have the same batch: each example would meet P copies of itself."""
    leaves = [jnp.asarray(x) for x in jax.tree.leaves(batch)]
    if leaves and all(map(device.is_reduced, leaves)):
        raise ValueError(
            f"the batch does not vary over axis_name={device.names!r}: every device has the same examples, and each "
            "would be compared with copies of itself. Split the batch over the axis, as by in_specs of jax.shard_map."
        )


def check_rows(shapes: Tree, first: Sequence[Any]) -> int:
    """Checks that all representations of a micro-batch have one row for each of its examples: their number."""
    n = jnp.shape(jax.tree.leaves(first[1])[0])[0]
    if any(isinstance(x, Weighted) for x in jax.tree.leaves(shapes, is_leaf=lambda x: isinstance(x, Weighted))):
        raise TypeError(
            "encode returned a Weighted, but representations have no weight: return arrays (N, ...), and mask the "
            "examples that don't count in the loss."
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        if leaf.shape[:1] != (n,):
            raise ValueError(
                f"encode returned {numeric.path_name(path) or 'an array'} of shape {leaf.shape} for a micro-batch of "
                f"N={n} examples: each leaf must lead with N, one row for each example. Return several views or towers "
                "as separate leaves."
            )
    return n


def _product(rows: jax.Array, cotangents: jax.Array) -> jax.Array:
    """The sum of the products of two arrays: its gradient by `rows` is `cotangents`, in jax's convention."""
    return jnp.sum(jnp.real(rows * cotangents), dtype=weighted_sum.weight_dtype())
