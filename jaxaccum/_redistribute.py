"""Local sums for another number of devices: what a checkpoint holds is merged, or split."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxaccum import _shards
from jaxaccum._micro_step import Config
from jaxaccum._state import MultiStepsState
from jaxaccum._sync import MeshAxis, OneDevice

Tree = Any


def redistribute(config: Config, state: MultiStepsState, devices: int) -> MultiStepsState:
    """`state` with its local sums merged or split for `devices` devices, laid out as `config` has them.

    Each sum goes to one of the new devices whole, and those without an heir start from zero: nothing is divided. Only
    in the sum mode, whose result is a mean over devices, are sums scaled, by the ratio of the numbers of devices.
    """
    is_stacked = jnp.ndim(state.mini_step) == 1
    if is_stacked:  # By pmap: every device holds all of it.
        shared = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)[0]), state)
        local = lambda name: getattr(state, name)
    else:
        shared = state
        is_one = jnp.ndim(state.weight) == 0
        local = lambda name: jax.tree.map(lambda x: x[None], getattr(state, name)) if is_one else getattr(state, name)

    names = ("acc_grads", "weight", "averages", "dropped")
    moved = {name: folded(jax.tree.map(_on_host, local(name)), devices) for name in names}
    if not config.use_grad_mean:
        ratio = devices / np.size(local("weight"))
        moved["acc_grads"] = jax.tree.map(lambda x: (x * ratio).astype(x.dtype), moved["acc_grads"])
    if isinstance(config.sync, MeshAxis):
        place = functools.partial(_placed, config.sync)
        moved = {name: jax.tree.map(place, moved[name], local(name)) for name in names}
    if isinstance(config.sync, OneDevice):
        moved = jax.tree.map(lambda x: x[0], moved)
    if isinstance(config.sync, OneDevice | MeshAxis):
        return shared._replace(**moved)
    stacked = jax.tree.map(lambda x: jnp.broadcast_to(x, (devices, *jnp.shape(x))), shared)
    return stacked._replace(**moved)


def folded(sums: Tree, devices: int) -> Tree:
    """Leaves (P, ...) as (devices, ...): old device p's sum goes to new device p·devices // P.

    Sums are added in float32 or wider, and rounded once to the dtype that they are stored in.
    """

    def leaf(x):
        heirs = np.arange(len(x)) * devices // len(x)
        wide = _shards.wide(jnp.asarray(x))
        merged = [jnp.sum(wide[heirs == i], axis=0) for i in range(devices)]
        return jnp.stack(merged).astype(x.dtype)

    return jax.tree.map(leaf, sums)


def _on_host(x: Any) -> jax.Array:
    """`x` away from the devices that it lay on, which the new ones need not have among them."""
    return jnp.asarray(np.asarray(x))


def _placed(sync: MeshAxis, sums: jax.Array, old: Any) -> jax.Array:
    """`sums` on the mesh, over the data axis and, where the mesh has the axes, as they lay before over others."""
    known = getattr(old, "sharding", None)
    spec = known.spec[1:] if isinstance(known, NamedSharding) else ()
    kept = [
        entry if set(entry if isinstance(entry, tuple) else (entry,)) <= set(sync.mesh.axis_names) else None
        for entry in spec
    ]
    return jax.device_put(sums, NamedSharding(sync.mesh, P(sync.names, *kept)))
