"""Redistributes local sums over a different number of devices."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxaccum._devices import layout
from jaxaccum._devices.topology import MeshAxis, OneDevice
from jaxaccum._multi_steps.config import Config
from jaxaccum._multi_steps.state import MultiStepsState
from jaxaccum._sums import overwrites
from jaxaccum._types import Tree

BATCHES = ("per_device", "global", "weighted")


def redistribute(config: Config, state: MultiStepsState, devices: int, batch: str | None) -> MultiStepsState:
    """Moves the local sums of `state` to `devices` devices, in the layout of `config`; see `MultiSteps.redistribute`.

    Sums are scaled by new devices / old devices in two cases. With `batch="global"`, all sums are, so that micro-steps
    before and after the change weigh the same. With `use_grad_mean=False`, whose result is a mean over devices, the
    gradients' sums are, so that each micro-step contributes its mean over the devices it ran on.
    """
    is_stacked = jnp.ndim(state.mini_step) == 1  # From pmap: every leaf has a leading device axis.
    shared = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)[0]), state) if is_stacked else state
    local = {name: getattr(state, name) for name in ("acc_grads", "weight", "averages", "dropped")}
    local["norms"] = state.norms.pending if state.norms else None
    if jnp.ndim(state.weight) == 0:
        local = jax.tree.map(lambda x: x[None], local)

    before = np.size(local["weight"])
    if batch is None and before != devices and np.any(shared.mini_step) and np.any(local["weight"]):
        raise ValueError(
            f"batch must be given: {before} devices hold the sums of an open window, which go on with {devices}, and "
            "the state can't tell what their weights count. batch='per_device' if each device's batch stays as large "
            "as it was; 'global' if the batch of all devices does, and the loss is a plain mean: what is pending is "
            f"scaled by {devices}/{before}; 'weighted' if weights are numbers of examples or tokens, as those of a "
            "Weighted loss."
        )
    ratio = devices / before
    scales = {
        "acc_grads": ratio if batch == "global" or not config.use_grad_mean else 1,
        "weight": ratio if batch == "global" else 1,
        "averages": ratio if batch == "global" else 1,
        "dropped": 1,
        "norms": 1,
    }
    moved = {name: folded(jax.tree.map(_through_host, local[name]), devices, scale) for name, scale in scales.items()}
    if moved["norms"] is not None:  # All are weighted but the number of micro-batches, the last one.
        is_number = np.arange(moved["norms"].shape[-1]) == moved["norms"].shape[-1] - 1
        moved["norms"] *= np.where(is_number, 1, scales["weight"]).astype(moved["norms"].dtype)
    if isinstance(config.sync, MeshAxis):
        moved = jax.tree.map(functools.partial(_placed, config.sync), moved, local)
    if isinstance(config.sync, OneDevice):
        moved = jax.tree.map(lambda x: x[0], moved)
    if not isinstance(config.sync, OneDevice | MeshAxis):
        shared = jax.tree.map(lambda x: jnp.broadcast_to(x, (devices, *jnp.shape(x))), shared)
    pending = moved.pop("norms")
    if pending is not None:  # The last micro-batch's norms are those of other devices.
        micro_batch = None if shared.norms.micro_batch is None else 0 * moved["weight"]
        shared = shared._replace(norms=shared.norms._replace(micro_batch=micro_batch, pending=pending))
    return shared._replace(**moved)


def folded(sums: Tree, devices: int, scale: float = 1) -> Tree:
    """Folds leaves (P, ...) to (devices, ...): old device p's sum, times `scale`, goes to new device p·devices // P.

    Sums are added and scaled in float32 or wider and rounded once to their own dtype. Statistics that are overwritten
    are merged by their maximum, unscaled.
    """

    def leaf(path, x):
        heirs = np.arange(len(x)) * devices // len(x)
        wide = layout.wide(jnp.asarray(x))
        if overwrites.holds(path):
            return jnp.stack([jnp.max(wide[heirs == i], axis=0, initial=0) for i in range(devices)]).astype(x.dtype)
        merged = [jnp.sum(wide[heirs == i], axis=0) for i in range(devices)]
        total = jnp.stack(merged)
        return (total if scale == 1 else total * scale).astype(x.dtype)

    return jax.tree.map_with_path(leaf, sums)


def _through_host(x: Any) -> jax.Array:
    """Copies `x` by way of the host, because its devices may not be among the new ones."""
    return jnp.asarray(np.asarray(x))


def _placed(sync: MeshAxis, sums: jax.Array, old: Any) -> jax.Array:
    """Places `sums` on the mesh: over the data axis, and over those of the old axes that the mesh has."""
    known = getattr(old, "sharding", None)
    spec = known.spec[1:] if isinstance(known, NamedSharding) else ()
    kept = [
        entry if set(entry if isinstance(entry, tuple) else (entry,)) <= set(sync.mesh.axis_names) else None
        for entry in spec
    ]
    return jax.device_put(sums, NamedSharding(sync.mesh, P(sync.names, *kept)))
