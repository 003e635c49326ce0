"""The gradient of one micro-batch, for windows, micro-steps and the Trainer alike.

It is the gradient of the loss's total, w·g, and is not divided by w: a window keeps sums of w·g and of w. Some leaves
are added to their sums inside the backward pass; the caller adds the others.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxaccum._devices import layout, mesh_map, placement
from jaxaccum._devices.topology import MappedAxis, MeshAxis, OneDevice
from jaxaccum._gradient import in_place_sums, wide_products
from jaxaccum._gradient.roles import Roles
from jaxaccum._jax import eager, jaxprs, refs
from jaxaccum._sums import numeric, overwrites, traced_loss, weighted_sum
from jaxaccum._sums.weighted_sum import Added, Weighted
from jaxaccum._types import Tree


class Gradient(NamedTuple):
    """Computes the gradient of a loss with respect to its parameters.

    Attributes:
      loss: the traced loss.
      inside: for each parameter leaf, whether its gradient is added to its sum inside the backward pass.
      wide: for each parameter leaf, whether its gradient in half-precision products is computed in float32.
    """

    loss: traced_loss.Traced
    inside: tuple[bool, ...]
    wide: tuple[bool, ...]

    def __call__(self, params: Tree, sums: Tree, *args: Any, kept: Any = None) -> tuple[Weighted, Any, Tree]:
        """Returns (loss, rest, w·g) of `loss(params, *args)`.

        Args:
          params: the parameters.
          sums: Σ w·g so far, a tree like `params`; None if nothing is added inside.
          *args: the other arguments of the loss.
          kept: a bool; where it is False, total, weight and gradient are 0 if they are finite. True changes nothing.
            None if it is not known.

        Returns:
          The loss as a `Weighted`, whose weight is None for a plain loss and a Python number if it is constant; the
          loss's other results; and the gradient of the total, with an `Added` holding the new sum for each leaf that
          was added inside. A micro-batch of weight 0 adds nothing inside.
        """
        if not any(self.inside) and not any(self.wide):
            total = lambda params: traced_loss.counted(kept, self.loss.total(params, *args))
            (_, (loss, rest)), grads = jax.value_and_grad(total, has_aux=True)(params)
        else:
            treedef = jax.tree.structure(params)
            pending = treedef.flatten_up_to(sums)
            pending = [layout.in_context(x) if inside else None for x, inside in zip(pending, self.inside, strict=True)]
            rewritten, operands = self._rewritten, (kept, jax.tree.leaves(params), pending, *args)
            if kept is True:  # Stays static.
                rewritten, operands = functools.partial(rewritten, True), operands[1:]
            (loss, rest), grads = jaxprs.purely(rewritten, *operands)
            marked = [Added(x) if inside else x for x, inside in zip(grads, self.inside, strict=True)]
            grads = treedef.unflatten(marked)
        return (loss if self.loss.weight is None else Weighted(loss.total, self.loss.weight)), rest, grads

    def _rewritten(self, kept, params, pending, *args):
        """`__call__` on flat parameters and sums; a leaf added inside is returned as its new sum."""
        closed, flat = self.loss.closed, jax.tree.leaves(args)
        if any(self.inside):
            closed = jax.make_jaxpr(in_place_sums.sliced(closed, params, self.inside))(*params, *flat)
        fun = wide_products.widened(closed, params, self.wide)
        total = lambda leaves: traced_loss.counted(kept, self.loss.unflatten(fun(*leaves, *flat)))
        leaves = wide_products.lifted(params, self.wide)
        if not any(self.inside):
            (_, returned), grads = jax.value_and_grad(total, has_aux=True)(leaves)
            return returned, grads
        value, vjp, returned = jax.vjp(total, leaves, has_aux=True)
        backward = functools.partial(refs.backward, vjp, jnp.ones_like(value), self.inside)
        loss, _ = returned
        if kept is not None or not self.loss.has_weight:
            return returned, backward(pending)
        # A gradient can't be removed once added, since it may be infinite, so weight 0 skips the backward pass.
        none = lambda pending: [
            x if inside else jnp.where(True, jnp.zeros_like(leaf), leaf)  # Varies over devices if `leaf` does.
            for x, inside, leaf in zip(pending, self.inside, leaves, strict=True)
        ]
        return returned, jax.lax.cond(jnp.asarray(loss.weight).astype(bool), backward, none, pending)


def of(
    loss: traced_loss.Traced, in_place: bool | None, sums: Tree, *, drops: bool | None = None, replaces: bool = False
) -> Gradient:
    """Chooses how to compute the gradient of a loss for the given sums.

    A leaf is added inside the backward pass if the loss passes it unchanged to one `jax.lax.scan`, as an operand that
    it scans over, and uses it nowhere else, and if this holds for all inexact operands that the scan runs over. This
    covers the parameters of stacked layers. Each layer's gradient is then added to its slice of the sum, and the
    stacked gradient, as large as the parameters, is never allocated. The gradient of any other leaf is complete before
    it can be added, and layers that are sliced from a stack one by one would each pass over the whole sum.

    The sum must have the gradient's dtype and at least 32 bits. A gradient can't be removed once it is added, so the
    backward pass of a loss whose weight may be 0, which is known after its forward pass, runs in a conditional. This
    saves memory but costs time, so it needs `in_place=True`. If the weight is known before (`kept`), there is none.

    Outside loops, a half-precision matrix product with a float32 result (see `wide_products`) can add to the sum, if
    no other operation, such as a selection, comes between the two.

    Args:
      loss: the loss.
      in_place: False: add nothing inside; True: add all leaves that allow it; None: as True, but only if no gradient
        may be dropped.
      sums: Σ w·g so far, a tree like the parameters; None if there are no sums to add to.
      drops: whether a gradient may be dropped after its forward pass. None: if the loss has a weight that may be 0.
      replaces: whether a gradient may replace its sum, by selection.

    Raises:
      ValueError: with `in_place=True`, if stacked layers can't be added inside because of their gradients' dtype, or
        because they are overwritten statistics.
    """
    named = jax.tree_util.tree_leaves_with_path(loss.args[0])
    none = (False,) * len(named)
    drops = loss.has_weight if drops is None else drops
    if sums is None or in_place is False or (drops and in_place is None):
        return Gradient(loss, inside=none, wide=none)
    pending = jax.tree.structure(loss.args[0]).flatten_up_to(sums)
    jaxpr = loss.closed.jaxpr
    fits = {
        var
        for var, (path, leaf), sum_ in zip(jaxpr.invars, named, pending, strict=False)
        if sum_ is not None and sum_.dtype == leaf.dtype and sum_.dtype.itemsize >= 4 and not overwrites.holds(path)
    }
    walked = in_place_sums.walked(jaxpr, fits)
    if in_place:
        inputs = {var: path for var, (path, _) in zip(jaxpr.invars, named, strict=False)}
        misfits = [jax.tree_util.keystr(inputs[var]) for var in in_place_sums.walked(jaxpr, set(inputs)) - walked]
        if misfits:
            raise ValueError(
                f"in_place=True: the gradients of {', '.join(sorted(misfits)) or 'the parameters'}, which a scan walks "
                "along, have another dtype than their sums, or are overwritten, and can't be added inside of the "
                "backward pass. Leave in_place at None, or keep those layers in the dtype of the sums, without a "
                "prepare that casts them."
            )
    inside = tuple(var in walked for var, _ in zip(jaxpr.invars, named, strict=False))
    products = not drops and not replaces and wide_products.occur(jaxpr)
    wide = tuple(products and sum_ is not None and sum_.dtype == jnp.float32 for sum_ in pending)
    return Gradient(loss, inside, wide)


class Target(NamedTuple):
    """The sums that a micro-batch's gradient is added to.

    Attributes:
      sums: each device's Σ w·g so far; with a mesh, leaves (P, ...). None if there are none.
      in_place: as for `of`.
      starts: whether the micro-batch starts a window, while `sums` still holds the previous window's sums; may be
        traced.
      counts: whether the micro-batch's weight is known to be positive.
    """

    sums: Tree = None
    in_place: bool | None = False
    starts: Any = False
    counts: bool = False


_NO_SUMS = Target()


def on_each(
    fun: Callable[..., tuple[Any, Any]],
    sync: OneDevice | MappedAxis | MeshAxis,
    roles: Roles,
    args: Sequence[Tree],
    kwargs: dict[str, Tree] | None = None,
    *,
    target: Target = _NO_SUMS,
    mean: bool = False,
) -> tuple[Weighted, Any, Tree]:
    """Computes the `Gradient` of a micro-batch on each device, without any reduction.

    Args:
      fun: `fun(*args, **kwargs)` returns (loss, rest); the loss is plain or a `Weighted` whose weight does not depend
        on the parameters.
      sync: the devices. With a mesh, the batch arguments are split over its data axis.
      roles: the roles of the positional arguments.
      args: the positional arguments.
      kwargs: the keyword arguments.
      target: the sums to add to.
      mean: whether to return the gradient of the loss's mean instead of its total.

    Returns:
      As `Gradient`; with a mesh, each array has a leading device axis.
    """
    (position,), own = roles.params, roles.own
    sums, in_place, starts, counts = target
    weights = []

    def on_device(device, sums, starts, *args, **kwargs):
        params = device.local(weighted_sum.arrays(args[position]))
        loss = traced_loss.trace(lambda p: fun(*args[:position], p, *args[position + 1 :], **kwargs), params)
        loss.refuse_reduced(device.names)
        loss.refuse_varying_weight()
        gradient = of(loss, in_place, sums, drops=False if counts else None, replaces=starts is not False)
        if any(gradient.inside):
            sums = weighted_sum.select(starts, jax.tree.map(jnp.zeros_like, sums), sums)
        value, rest, grads = gradient(params, sums, kept=True if counts else None)
        weights.append(loss.weight)
        if mean and value.weight is not None:
            grads = traced_loss.mean_gradient(value, grads)
        return value, rest, grads

    if not isinstance(sync, MeshAxis):
        others = lambda params: [params if i == position else arg for i, arg in enumerate(args)]
        of_params = lambda params, sums: on_device(sync, sums, starts, *others(params), **(kwargs or {}))
        value, rest, grads = eager.call_compiled(of_params, args[position], sums)
        return (value if weights[-1] is None else Weighted(value.total, weights[-1])), rest, grads

    def body(sums, starts, *args, **kwargs):
        one = lambda tree: jax.tree.map(lambda x: x[0], tree)
        args = [one(arg) if i in own else arg for i, arg in enumerate(args)]
        result = on_device(MappedAxis(sync.names), one(sums), starts, *args, **kwargs)
        return jax.tree.map(lambda x: jnp.asarray(x)[None], result)

    numeric.differentiable(args[position])
    placement.placed(args[position], sync)
    split = (0, *(i + 2 for i in (*own, *roles.batch)))
    options = {"split": split, "split_dim": 0, "out_specs": P(sync.names)}
    on_mesh = lambda *args: mesh_map.on_data_axes(body, sync, args, kwargs or {}, **options)
    value, rest, grads = eager.call_compiled(on_mesh, sums, starts, *args)
    return (value if weights[-1] is None else Weighted(value.total, weights[-1])), rest, grads
