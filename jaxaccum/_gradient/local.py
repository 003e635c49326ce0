"""The gradient of one micro-batch on each device of a mesh, not synchronised."""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from jaxaccum._devices import placement
from jaxaccum._devices.topology import MappedAxis, MeshAxis
from jaxaccum._gradient import micro_gradient
from jaxaccum._gradient.roles import Roles
from jaxaccum._jax import prng
from jaxaccum._sums.weighted_sum import Weighted
from jaxaccum._types import Tree


def local_value_and_grad(
    fun: Callable[..., Any],
    *,
    mesh: Any,
    data_axis: Any = "data",
    has_aux: bool = False,
    batch_argnums: int | Sequence[int] = 1,
    key_argnums: int | Sequence[int] = (),
) -> Callable[..., tuple[Any, Tree]]:
    """Computes one micro-batch's gradient on each device of a mesh, without synchronisation, for `MultiSteps(mesh=)`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxaccum
      >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
      >>> f = jaxaccum.local_value_and_grad(lambda w, x: jnp.mean((x * w) ** 2), mesh=mesh)
      >>> value, grads = jax.jit(f)(jnp.ones(()), jnp.ones(2 * mesh.size))
      >>> value.shape == grads.shape == (mesh.size,)
      True

    Args:
      fun: as for `value_and_grad`, but the weight of a `Weighted` must not depend on the parameters. It is
        differentiated with respect to its first argument.
      mesh: a `jax.sharding.Mesh`.
      data_axis: the mesh's data axis, a name or a tuple of names, of P devices in all.
      has_aux: whether `fun` returns (loss, aux); aux is returned with a leading device axis.
      batch_argnums: the arguments to split; their leaves are (P·N, ...).
      key_argnums: random keys; device p receives `jax.random.fold_in(key, p)`. A typed key that is neither here nor in
        the batch or the parameters raises an error: all devices would draw the same mask.

    Returns:
      A function of the same arguments that returns `(value, grads)`, or `((value, aux), grads)` with `has_aux`, with
      leaves (P, *shape) sharded over the data axis. The gradients are of each device's mean loss. If the loss is a
      `Weighted`, so is `value`: pass `weight=value.weight` to `MultiSteps`.

    Raises:
      TypeError, ValueError: as `value_and_grad`.
    """
    sync = placement.mesh_axis(mesh, data_axis)
    roles = Roles.of(0, batch_argnums, key_argnums, None)

    def normalised(*args, **kwargs):
        return fun(*args, **kwargs) if has_aux else (fun(*args, **kwargs), None)

    def value_and_grad(*args, **kwargs):
        roles.check(args)
        prng.refuse_shared(args, kwargs, roles.all(), "devices")
        # Keys are global here, so they are folded on each device.
        own = lambda *args, **kwargs: normalised(*_folded(args, roles, sync), **kwargs)
        value, aux, grads = micro_gradient.on_each(own, sync, roles, args, kwargs, mean=True)
        if value.weight is None:
            value = value.total
        else:
            value = Weighted(value.total, jnp.broadcast_to(value.weight, value.total.shape))
        return ((value, aux) if has_aux else value), grads

    return value_and_grad


def _folded(args: Sequence[Tree], roles: Roles, sync: MeshAxis) -> list[Tree]:
    device = MappedAxis(sync.names).index()
    return [prng.fold(arg, device) if i in roles.keys else arg for i, arg in enumerate(args)]
