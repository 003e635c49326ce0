"""`collectives`: reads what a compiled program moves between devices, and whether it does so in every micro-step."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from jaxaccum._collectives import hlo, replica_groups
from jaxaccum._collectives.replica_groups import Groups
from jaxaccum._collectives.traffic import Collective, Collectives
from jaxaccum._devices import placement

# What a computation is to its caller, by the attribute that names it there; any other is a mere call.
_FRAMES = {
    "body": "loop",
    "condition": "loop",
    "branch_computations": "conditional",
    "true_computation": "conditional",
    "false_computation": "conditional",
}


def collectives(compiled: Any, *, mesh: Any = None, data_axis: Any = "data") -> Collectives:
    """What a compiled program moves between devices: every collective, over which axis, in a loop or outside.

    A sync left in the accumulation loop changes no number, it only costs K times the wire. `print` the result to be
    told, or assert on it in a test: `assert not jaxaccum.collectives(compiled, mesh=mesh).count(axis="data",
    in_loop=True)`.

    XLA's own collectives are seen, fused and asynchronous ones too. What custom kernels, `send` and `recv` move is not.
    Collectives of one device with itself are left out.

    Args:
      compiled: what `jax.jit(f).lower(...).compile()` returns, or `jax.pmap(f)` likewise, or its `as_text()`.
      mesh: the `jax.sharding.Mesh` that the program runs on; the groups of devices are then named by its axes.
      data_axis: the mesh's data axis, a name or a tuple of names.

    Returns:
      A `Collectives`: `all` of them, `count` of those that are so and so, `by_groups`, `by_axes`; `str` of it says
      whether the sync is deferred.

    Raises:
      TypeError: if `compiled` is not compiled, or `mesh` is not a mesh.
      ValueError: if the text is not that of one compiled program, or not understood; if the mesh has another number of
        devices, or no such axis.

    Example:
      >>> import jax, jax.numpy as jnp, jaxaccum
      >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
      >>> f = jaxaccum.value_and_grad(lambda w, x: jnp.mean((x * w) ** 2), 4, mesh=mesh)
      >>> compiled = jax.jit(f).lower(jnp.ones(()), jnp.ones(4 * mesh.size)).compile()
      >>> jaxaccum.collectives(compiled, mesh=mesh).count(axis="data", in_loop=True)
      0
    """
    data_axes = () if mesh is None else placement.mesh_axis(mesh, data_axis).names
    module = hlo.parse(_text(compiled))
    devices = module.replicas * module.partitions
    if mesh is not None and mesh.size != devices:
        raise ValueError(
            f"mesh has {mesh.size} devices {dict(mesh.shape)}, but the program is compiled for {devices}: pass the "
            "mesh that it runs on."
        )
    return Collectives(_found(module, mesh), mesh, data_axes)


def _text(compiled: Any) -> str:
    """The text of a compiled program, or of what its text is already."""
    if isinstance(compiled, jax.stages.Compiled):
        compiled = compiled.as_text()
    if not isinstance(compiled, str):
        remedy = "call its .compile()" if isinstance(compiled, jax.stages.Lowered) else "pass f.lower(...).compile()"
        raise TypeError(
            f"compiled must be a compiled program, as jax.jit(f).lower(...).compile() returns it, or its text; got "
            f"{type(compiled).__name__}: {remedy}."
        )
    header = compiled.lstrip().partition("\n")[0]
    if not header.startswith("HloModule") or "is_scheduled=true" not in header:
        raise ValueError(
            f"compiled must be the text of a compiled program, got {header[:80]!r}...: what is only lowered has "
            "not got its collectives yet. Use lowered.compile().as_text()."
        )
    return compiled


def _found(module: hlo.Module, mesh: Any) -> tuple[Collective, ...]:
    """Every collective that a call of the program can reach, as often as it is called for."""
    own = {
        name: [
            (instruction, _collective(instruction, instructions, module, mesh)) for instruction in instructions.values()
        ]
        for name, instructions in module.computations.items()
    }
    reached = set()

    @functools.cache
    def inside(computation: str) -> tuple[Collective, ...]:
        if computation not in own:
            raise ValueError(
                f"compiled is cut short: the computation {computation} is called, but it is not in the text."
            )
        reached.add(computation)
        found: list[Collective] = []
        for instruction, collective in own[computation]:
            found += [collective] if collective else []
            for attribute, callee in instruction.calls():
                frame = _FRAMES.get(attribute)
                where, trips = (frame,) if frame else (), (instruction.trip_count,) if frame == "loop" else ()
                found += [
                    dataclasses.replace(one, where=where + one.where, trip_counts=trips + one.trip_counts)
                    for one in inside(callee)
                ]
        return tuple(found)

    found = inside(module.entry)
    for name, instructions in own.items():
        if name not in reached and any(collective for _, collective in instructions):
            raise ValueError(
                f"the computation {name} holds a collective, but nothing that jaxaccum understands calls it. Please "
                "report it, with the version of jaxlib."
            )
    return found


def _collective(
    instruction: hlo.Instruction, instructions: dict[str, hlo.Instruction], module: hlo.Module, mesh: Any
) -> Collective | None:
    """An instruction as a collective, if it is one and between devices."""
    kind = instruction.opcode.removesuffix("-start")
    groups = replica_groups.devices(kind, instruction.attributes, module.replicas, module.partitions)
    if all(len(set(group)) == 1 for group in groups):
        return None
    num_bytes = sum(hlo.num_bytes(instructions[name].shape) for name in instruction.operands)
    num_bytes *= max(map(len, groups)) if kind == "all-gather" else 1
    return Collective(kind, groups, _axes(groups, mesh), len(instruction.operands), num_bytes)


def _axes(groups: Groups, mesh: Any) -> tuple[str, ...] | None:
    """The mesh's axes along which the devices of a group differ."""
    if mesh is None:
        return None
    differ = [
        np.ptp(np.unravel_index(group, mesh.devices.shape), axis=1) > 0  # One row of places along each axis.
        for group in groups
    ]
    return tuple(name for name, varies in zip(mesh.axis_names, np.any(differ, axis=0), strict=True) if varies)
