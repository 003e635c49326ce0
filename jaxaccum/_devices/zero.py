"""The shardings of ZeRO, for the caller's own arrays."""

from typing import Any

import jax

from jaxaccum._devices import layout, placement
from jaxaccum._types import Tree


def zero_sharding(tree: Tree, mesh: Any, data_axis: Any = "data") -> Tree:
    """How ZeRO lays an optimizer's state out: each array split over the data axis, for `reduce="scatter"`.

    An array is split along its first dimension that the number of devices divides and that no explicit axis of the mesh
    splits; where there is none (scalars, small vectors), it is whole on every device. Other axes' splits are kept.

    Args:
      tree: arrays, or shapes with dtypes, such as `jax.eval_shape(opt.init, params)`; the latter know of no automatic
        axis that the arrays will be split over. Gradients with `reduce="scatter"` lie as the parameters would here.
      mesh: a `jax.sharding.Mesh`.
      data_axis: its data axis, a name or a tuple of names.

    Returns:
      A tree like `tree` of `jax.sharding.NamedSharding`: for `jax.device_put`, or for `out_shardings`.

    Raises:
      TypeError, ValueError: if `mesh` is none, or lacks the axis.

    Example:
      >>> import jax.numpy as jnp, jaxaccum, optax
      >>> mesh, opt = jax.make_mesh((jax.device_count(),), ("data",)), optax.adam(1e-3)
      >>> params = {"w": jnp.ones((4 * mesh.size, 3))}
      >>> shardings = jaxaccum.zero_sharding(jax.eval_shape(opt.init, params), mesh)
      >>> state = jax.jit(opt.init, out_shardings=shardings)(params)
      >>> state[0].mu["w"].sharding.shard_shape((4 * mesh.size, 3))
      (4, 3)
    """
    sync = placement.mesh_axis(mesh, data_axis)
    return jax.tree.map(lambda leaf: layout.sharding(leaf, sync.mesh, sync.names), tree)
