"""Converts `axis_name=`, `mesh=` and `data_axis=` to a `Sync`, and checks arrays against it."""

import dataclasses
from typing import Any

import jax

from jaxaccum._devices.topology import MappedAxis, MeshAxis, OneDevice, Sync
from jaxaccum._sums.numeric import path_name
from jaxaccum._sums.weighted_sum import is_inexact
from jaxaccum._types import Tree


def select_sync(
    axis_name: Any, mesh: Any, data_axis: Any, should_skip_update_fn: Any = None, *, reduce: str = "mean"
) -> Sync:
    """Returns the `Sync` that the public arguments select, and checks those arguments."""
    if reduce not in ("mean", "scatter"):
        raise ValueError(f"reduce must be 'mean' or 'scatter' (ZeRO), got {reduce!r}.")
    if reduce == "scatter" and mesh is None:
        raise ValueError(
            "reduce='scatter' needs mesh=: the update must run in global code, where clipping sees the norm of the "
            "whole gradient, and not that of one device's part."
        )
    if axis_name is None and mesh is None:
        return OneDevice()
    if axis_name is not None and mesh is not None:
        raise ValueError(f"axis_name={axis_name!r} is for pmap and shard_map, mesh for jit: give one of them.")
    if should_skip_update_fn is not None:
        raise ValueError(
            "should_skip_update_fn can't be used on several devices: one could skip a micro-step that the others "
            "count, and they would wait for each other for ever. Use nonfinite='drop', or weight=0 where a micro-batch "
            "should not count."
        )
    if axis_name is not None:
        return MappedAxis(_names("axis_name", axis_name))
    return dataclasses.replace(mesh_axis(mesh, data_axis), scatter=reduce == "scatter")


def mesh_axis(mesh: Any, data_axis: Any) -> MeshAxis:
    """Checks that the mesh has the data axes, and returns them as a `MeshAxis`."""
    if not isinstance(mesh, jax.sharding.Mesh):
        raise TypeError(f"mesh must be a jax.sharding.Mesh, for example jax.make_mesh((8,), ('data',)), got {mesh!r}.")
    names = _names("data_axis", data_axis)
    missing = [name for name in names if name not in mesh.axis_names]
    if missing:
        raise ValueError(f"data_axis={data_axis!r}: the mesh has no axis {missing[0]!r}, only {mesh.axis_names}.")
    return MeshAxis(mesh, names)


def _names(argument: str, value: Any) -> tuple[str, ...]:
    names = value if isinstance(value, tuple) else (value,)
    if not names or not all(isinstance(name, str) for name in names):
        raise TypeError(f"{argument} must be a name or a tuple of names, got {value!r}.")
    return names


def placed(params: Tree, sync: Sync) -> None:
    """Checks that concrete, committed parameters are on the mesh's devices."""
    if not isinstance(sync, MeshAxis):
        return
    devices = set(sync.mesh.devices.flat)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not isinstance(leaf, jax.Array) or isinstance(leaf, jax.core.Tracer) or not leaf.committed:
            continue
        others = leaf.sharding.device_set - devices
        if others:
            raise ValueError(
                f"the parameter {path_name(path) or 'given'} lies on {min(others, key=str)}, which is not among the "
                f"mesh's {len(devices)} devices; move it there, for example with jax.device_put(params, "
                "NamedSharding(mesh, P()))."
            )


def in_map(sync: Sync) -> None:
    """Raises if a mapped axis is used outside its map."""
    try:
        sync.size()
    except NameError:
        raise NameError(
            f"axis_name={sync.options()['axis_name']!r} names no axis here: call this inside the function that "
            "jax.pmap or jax.shard_map maps over that axis, or leave axis_name out."
        ) from None


def local_gradients(grads: Tree, sync: Sync) -> None:
    """Checks that gradients are local; gradients that are already reduced would be summed twice."""
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        if is_inexact(grad) and sync.is_reduced(grad):
            raise ValueError(
                f"grads{path_name(path)} does not vary over axis_name={sync.names!r}: it has been reduced over it "
                "already, in this micro-step. Differentiate with respect to parameters cast by jax.lax.pcast(params, "
                f"{sync.names!r}, to='varying'), or use MultiSteps.micro_step or jaxaccum.value_and_grad, which do."
            )
