"""`collectives`: lists the collectives of a compiled program and where they run."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from jaxaccum._collectives import hlo, replica_groups
from jaxaccum._collectives.replica_groups import Groups
from jaxaccum._collectives.traffic import Collective, Collectives
from jaxaccum._devices import placement

# The control flow that an attribute's computation belongs to; attributes not listed are plain calls.
_FRAMES = {
    "body": "loop",
    "condition": "loop",
    "branch_computations": "conditional",
    "true_computation": "conditional",
    "false_computation": "conditional",
}


def collectives(compiled: Any, *, mesh: Any = None, data_axis: Any = "data") -> Collectives:
    """Lists the collectives of a compiled program, with the mesh axes they run over and the loops they are in.

    A reduction inside the accumulation loop gives the right result, but communicates K times as much as needed. Print
    the result to find out, or assert on it in a test: `assert not jaxaccum.collectives(compiled,
    mesh=mesh).count(axis="data", in_loop=True)`.

    All of XLA's own collectives are included, also fused and asynchronous ones. Communication by custom kernels, `send`
    and `recv` is not, and neither are collectives whose groups have a single device.

    Example:
      >>> import jax, jax.numpy as jnp, jaxaccum
      >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
      >>> f = jaxaccum.value_and_grad(lambda w, x: jnp.mean((x * w) ** 2), 4, mesh=mesh)
      >>> compiled = jax.jit(f).lower(jnp.ones(()), jnp.ones(4 * mesh.size)).compile()
      >>> jaxaccum.collectives(compiled, mesh=mesh).count(axis="data", in_loop=True)
      0

    Args:
      compiled: the result of `jax.jit(f).lower(...).compile()`, the same for `jax.pmap(f)`, or its `as_text()`.
      mesh: the `jax.sharding.Mesh` that the program runs on; device groups are then named by its axes.
      data_axis: the mesh's data axis, a name or a tuple of names.

    Returns:
      A `Collectives`. It has the fields and methods `all`, `count`, `by_groups` and `by_axes`, and its `str` says
      whether the reduction is deferred.

    Raises:
      TypeError: if `compiled` is not a compiled program, or `mesh` is not a mesh.
      ValueError: if the text is not that of one compiled program or can't be parsed; if the mesh has a different number
        of devices or lacks the axis.
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
    """The text of a compiled program, checked; `compiled` may already be its text."""
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
    """Every collective reachable from the entry computation, once per call site."""
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
    """The `Collective` for an instruction; None if it is not a collective or its groups have a single device."""
    kind = instruction.opcode.removesuffix("-start")
    groups = replica_groups.devices(kind, instruction.attributes, module.replicas, module.partitions)
    if all(len(set(group)) == 1 for group in groups):
        return None
    num_bytes = sum(hlo.num_bytes(instructions[name].shape) for name in instruction.operands)
    num_bytes *= max(map(len, groups)) if kind == "all-gather" else 1
    return Collective(kind, groups, _axes(groups, mesh), len(instruction.operands), num_bytes)


def _axes(groups: Groups, mesh: Any) -> tuple[str, ...] | None:
    """The mesh axes along which the devices of a group differ; None without a mesh."""
    if mesh is None:
        return None
    differ = [
        np.ptp(np.unravel_index(group, mesh.devices.shape), axis=1) > 0  # Coordinates: one row per mesh axis.
        for group in groups
    ]
    return tuple(name for name, varies in zip(mesh.axis_names, np.any(differ, axis=0), strict=True) if varies)
