"""The gradient of one micro-batch, for windows, micro-steps and the Trainer alike.

It is formed of the loss's total, w·g, and never divided: sums of w·g and of w are what a window is made of. Some leaves
are added to their sums on the way, inside of the backward pass; the caller adds all others.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxaccum._devices import mesh_map, placement
from jaxaccum._devices.topology import MappedAxis, MeshAxis, OneDevice
from jaxaccum._gradient import in_place_sums, wide_products
from jaxaccum._gradient.roles import Roles
from jaxaccum._jax import eager, jaxprs, refs
from jaxaccum._sums import numeric, overwrites, traced_loss, weighted_sum
from jaxaccum._sums.weighted_sum import Added, Weighted
from jaxaccum._types import Tree


class Gradient(NamedTuple):
    """The gradient of a loss with respect to its parameters, for sums of some kind.

    Attributes:
      loss: the loss, traced.
      inside: for each leaf of the parameters whether it is added to its sum inside of the backward pass.
      wide: for each leaf whether its gradient in half-precision products is formed in float32.
    """

    loss: traced_loss.Traced
    inside: tuple[bool, ...]
    wide: tuple[bool, ...]

    def __call__(self, params: Tree, sums: Tree, *args: Any) -> tuple[Weighted, Any, Tree]:
        """(loss, rest, w·g) of `loss(params, *args)`.

        Args:
          params: the parameters.
          sums: Σ w·g so far, a tree like them; None where nothing is added inside.
          *args: whatever else the loss takes.

        Returns:
          The loss as a `Weighted`, whose weight is None where it was plain and a Python number where it is the same for
          every micro-batch; what else the loss returned; and the gradient of the total, in which a leaf that was added
          is `Added`, its new sum. A micro-batch of weight 0 adds nothing.
        """
        if not any(self.inside) and not any(self.wide):
            (_, (loss, rest)), grads = jax.value_and_grad(self.loss.total, has_aux=True)(params, *args)
        else:
            treedef = jax.tree.structure(params)
            pending = treedef.flatten_up_to(sums)
            pending = [x if inside else None for x, inside in zip(pending, self.inside, strict=True)]
            (loss, rest), grads = jaxprs.purely(self._rewritten, jax.tree.leaves(params), pending, *args)
            marked = [Added(x) if inside else x for x, inside in zip(grads, self.inside, strict=True)]
            grads = treedef.unflatten(marked)
        return (loss if self.loss.weight is None else Weighted(loss.total, self.loss.weight)), rest, grads

    def _rewritten(self, params, pending, *args):
        """The same with flat parameters and sums, from the loss's trace; leaves that are added are their new sums."""
        fun = wide_products.widened(self.loss.closed, params, self.wide)
        total = lambda leaves: self.loss.unflatten(fun(*leaves, *jax.tree.leaves(args)))
        leaves = wide_products.lifted(params, self.wide)
        if not any(self.inside):
            (_, returned), grads = jax.value_and_grad(total, has_aux=True)(leaves)
            return returned, grads
        value, vjp, returned = jax.vjp(total, leaves, has_aux=True)
        backward = functools.partial(refs.backward, vjp, jnp.ones_like(value), self.inside)
        loss, _ = returned
        if not self.loss.has_weight:
            return returned, backward(pending)
        # What has been added can't be taken out again, and it may be infinite.
        none = lambda pending: [
            x if inside else jnp.where(True, jnp.zeros_like(leaf), leaf)  # Varying over devices where that is.
            for x, inside, leaf in zip(pending, self.inside, leaves, strict=True)
        ]
        return returned, jax.lax.cond(jnp.asarray(loss.weight) != 0, backward, none, pending)


def of(loss: traced_loss.Traced, in_place: bool | None, sums: Tree, *, replaces: bool = False) -> Gradient:
    """How to form the gradient of a loss for sums that are kept as `sums` are.

    Added inside are leaves that the loss hands, as they are, to one `jax.lax.scan` as what it walks along, and to
    nothing else, if it walks along nothing else that floats: the parameters of stacked layers. There each layer's
    gradient goes straight into its slice of the sum, and the stack of gradients, as large as the parameters, is never
    made. Of any other leaf the gradient exists as a whole before it could be added, and where layers are slices of a
    stack, taken one by one, each would pass over all of it.

    The sum must have the gradient's dtype, and at least 32 bits. What is added can't be taken out again, so a loss with
    a weight, which may be 0, is run backward in a conditional. That costs more than it saves in time, if not in memory,
    and is done only where it is asked for.

    Outside of loops it is the matrix product that can add, if it makes float32 of half precision (`_products`) and if
    nothing comes between it and the sum, as a selection would.

    Args:
      loss: the loss.
      in_place: False: nothing is added inside; True: whatever can be; None: what gains by it.
      sums: Σ w·g so far, a tree like the parameters; None: there are none to add to.
      replaces: whether a gradient may take the place of its sum, by selection.

    Raises:
      ValueError: with `in_place=True`, if layers could be added but for the dtype of their gradients.
    """
    named = jax.tree_util.tree_leaves_with_path(loss.args[0])
    none = (False,) * len(named)
    if sums is None or in_place is False or (loss.has_weight and in_place is None):
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
    products = not loss.has_weight and not replaces and wide_products.occur(jaxpr)
    wide = tuple(products and sum_ is not None and sum_.dtype == jnp.float32 for sum_ in pending)
    return Gradient(loss, inside, wide)


def on_each(
    fun: Callable[..., tuple[Any, Any]],
    sync: OneDevice | MappedAxis | MeshAxis,
    roles: Roles,
    args: Sequence[Tree],
    kwargs: dict[str, Tree] | None = None,
    *,
    own: Sequence[int] = (),
    sums: Tree = None,
    in_place: bool | None = False,
    starts: Any = False,
    mean: bool = False,
) -> tuple[Weighted, Any, Tree]:
    """`Gradient` of a micro-batch on each device, before any reduction.

    Args:
      fun: `fun(*args, **kwargs)` returns (loss, rest), the loss plain or a `Weighted` whose weight does not depend on
        the parameters.
      sync: the devices. With a mesh the arguments that `roles` calls batch are split over its data axis.
      roles: which of the arguments is the parameters, and which are batch.
      args: the positional arguments.
      kwargs: the keyword arguments.
      own: the arguments of which each device has its own, with a mesh leaves (P, ...).
      sums: Σ w·g of each device so far, with a mesh leaves (P, ...).
      in_place: as for `of`.
      starts: whether a window starts with this micro-batch and `sums` still hold the last one's; traced.
      mean: the gradient of the loss's mean, in place of that of its total.

    Returns:
      As `Gradient`; with a mesh each array has a leading device axis.
    """
    (position,) = roles.params
    weights = []

    def on_device(device, sums, starts, *args, **kwargs):
        params = device.local(weighted_sum.arrays(args[position]))
        loss = traced_loss.trace(lambda p: fun(*args[:position], p, *args[position + 1 :], **kwargs), params)
        loss.refuse_reduced(device.names)
        loss.refuse_varying_weight()
        gradient = of(loss, in_place, sums, replaces=starts is not False)
        if any(gradient.inside):
            sums = weighted_sum.select(starts, jax.tree.map(jnp.zeros_like, sums), sums)
        value, rest, grads = gradient(params, sums)
        weights.append(loss.weight)
        if mean and value.weight is not None:
            grads = traced_loss.mean_gradient(value, grads)
        return value, rest, grads

    if not isinstance(sync, MeshAxis):
        others = lambda params: [params if i == position else arg for i, arg in enumerate(args)]
        of_params = lambda params, sums: on_device(sync, sums, starts, *others(params), **(kwargs or {}))
        value, rest, grads = eager.run(of_params, args[position], sums)
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
    on_mesh = lambda *args: mesh_map.run(body, sync, args, kwargs or {}, **options)
    value, rest, grads = eager.run(on_mesh, sums, starts, *args)
    return (value if weights[-1] is None else Weighted(value.total, weights[-1])), rest, grads
