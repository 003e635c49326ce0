"""ZeRO shardings for the caller's arrays."""

from typing import Any

import jax

from jaxaccum._devices import layout, placement
from jaxaccum._types import Tree


def zero_sharding(tree: Tree, mesh: Any, data_axis: Any = "data") -> Tree:
    """Returns ZeRO shardings for an optimizer state: each array sharded over the data axis, for `reduce="scatter"`.

    An array is sharded along its first dimension whose length is divisible by the number of devices and that no
    explicit mesh axis shards. If there is none (scalars, small vectors), the array is replicated. Shardings over other
    axes are kept.

    Example:
      >>> import jax.numpy as jnp, jaxaccum, optax
      >>> mesh, opt = jax.make_mesh((jax.device_count(),), ("data",)), optax.adam(1e-3)
      >>> params = {"w": jnp.ones((4 * mesh.size, 3))}
      >>> shardings = jaxaccum.zero_sharding(jax.eval_shape(opt.init, params), mesh)
      >>> state = jax.jit(opt.init, out_shardings=shardings)(params)
      >>> state[0].mu["w"].sharding.shard_shape((4 * mesh.size, 3))
      (4, 3)

    Args:
      tree: arrays, or shapes with dtypes, such as `jax.eval_shape(opt.init, params)`. Shapes don't record shardings
        over automatic axes. With `reduce="scatter"`, gradients have the shardings that this function returns for the
        parameters.
      mesh: a `jax.sharding.Mesh`.
      data_axis: the mesh's data axis, a name or a tuple of names.

    Returns:
      A tree like `tree` of `jax.sharding.NamedSharding`, for `jax.device_put` or `out_shardings`.

    Raises:
      TypeError: if `mesh` is not a `jax.sharding.Mesh`, or `data_axis` is not a name or a tuple of names.
      ValueError: if the mesh lacks the axis.
    """
    sync = placement.mesh_axis(mesh, data_axis)
    return jax.tree.map(lambda leaf: layout.sharding(leaf, sync.mesh, sync.names), tree)
