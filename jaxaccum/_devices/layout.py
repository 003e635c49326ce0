"""How a mesh's data axes shard one dimension of an array: the layout of ZeRO's gradients and optimizer state."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxaccum._jax import varying


def dimension(leaf: Any, mesh: Mesh, names: tuple[str, ...]) -> int | None:
    """The dimension of `leaf`, an array or its shape and dtype, to shard over the data axes `names`.

    It is the first one whose length their size divides and that isn't known to be sharded over another axis. None if
    there is none, for example for a scalar: `leaf` is then replicated.
    """
    size = math.prod(mesh.shape[name] for name in names)
    free = [set(_in_order(entry)) <= set(names) for entry in layout(leaf)]
    fits = (d for d, n in enumerate(leaf.shape) if free[d] and n and n % size == 0)
    return next(fits, None)


def sharding(leaf: Any, mesh: Mesh, names: tuple[str, ...]) -> NamedSharding:
    """The sharding of `leaf` with `dimension(leaf)` split over the data axes; other axes are kept."""
    split = dimension(leaf, mesh, names)
    placed = getattr(leaf, "sharding", None)
    spec = _padded(placed.spec if isinstance(placed, NamedSharding) else (), len(leaf.shape))
    others = [tuple(name for name in _in_order(entry) if name not in names) for entry in spec]
    if split is not None:
        both = names + others[split]
        divides = leaf.shape[split] % math.prod(mesh.shape[name] for name in both) == 0
        others[split] = both if divides else names
    return NamedSharding(mesh, P(*[entry[0] if len(entry) == 1 else entry or None for entry in others]))


def is_explicitly_sharded(aval: Any) -> bool:
    """Whether an array of type `aval` is sharded over an explicit mesh axis."""
    return any(x is not None for x in aval.sharding.spec)


def lay(leaf: jax.Array, mesh: Mesh, names: tuple[str, ...], split: int | None) -> jax.Array:
    """Shards dimension `split` of `leaf` over the data axes, or none; other axes are left to jax."""
    if not leaf.ndim:
        return leaf
    if is_explicit(mesh):
        return reshard(leaf, mesh, names, P(*[None] * split, names) if split is not None else P())
    spec: list[Any] = [P.UNCONSTRAINED] * leaf.ndim
    concerned = dimension(leaf, mesh, names) if split is None else split
    if concerned is not None:
        spec[concerned] = None if split is None else names
    # UNCONSTRAINED is only allowed under jit.
    return jax.jit(lambda x: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*spec))))(leaf)


def reshard(leaf: jax.Array, mesh: Mesh, names: tuple[str, ...], spec: P) -> jax.Array:
    """Reshards `leaf` to `spec` over the data axes, other axes kept; jax doesn't reshard explicit axes implicitly."""
    current = layout(leaf)
    rest = [tuple(name for name in _in_order(entry) if name not in names) or None for entry in current]
    wanted = (*(new or old for new, old in zip(spec, rest, strict=False)), *rest[len(spec) :])
    if all(_in_order(new) == _in_order(old) for new, old in zip(wanted, current, strict=True)):
        return leaf
    return jax.reshard(leaf, NamedSharding(mesh, P(*wanted)))


def in_context(leaf: jax.Array) -> jax.Array:
    """Gives a leaf from outside of an explicit mesh the type that results of operations have inside of it."""
    mesh = jax.sharding.get_abstract_mesh()
    if not is_explicit(mesh) or not jax.typeof(leaf).sharding.mesh.empty:
        return leaf
    return jax.reshard(leaf, P())


def onto(leaf: jax.Array, mesh: Mesh) -> jax.Array:
    """Replicates a traced array from outside of the explicit `mesh` over it."""
    is_outside = isinstance(leaf, jax.core.Tracer) and jax.typeof(leaf).sharding.mesh.empty
    return jax.reshard(leaf, NamedSharding(mesh, P())) if is_outside else leaf


def reduce_scatter(local: jax.Array, mesh: Mesh, names: tuple[str, ...]) -> jax.Array:
    """Sums `local`, (P, *shape), over its leading device axis and shards the result over the data axes if possible.

    The sum is computed and returned in float32 or wider.

    If the mesh has other, automatic axes, the layout of `local` over them is not known here, and XLA would gather it
    before an explicit reduce-scatter. The sum is then written as a reduction with a sharding constraint, which XLA
    turns into a reduce-scatter on GPU and TPU.
    """
    local = wide(local)
    spec = layout(local)[1:]
    like = jax.ShapeDtypeStruct(local.shape[1:], local.dtype, sharding=NamedSharding(mesh, P(*spec)))
    split = dimension(like, mesh, names)
    if split is None:
        return jnp.sum(local, axis=0)
    others = [name for name in mesh.axis_names if name not in names and mesh.shape[name] > 1]
    if not is_explicit(mesh) and others:
        return lay(jnp.sum(local, axis=0), mesh, names, split)

    def scatter(x):
        return jax.lax.psum_scatter(x[0], names, scatter_dimension=split, tiled=True)

    out = [names if d == split else entry for d, entry in enumerate(spec)]
    mapped = jax.shard_map(scatter, mesh=mesh, in_specs=P(names, *spec), out_specs=P(*out), check_vma=False)
    return jax.jit(mapped)(local)


def zeros(length: int, row: Any) -> jax.Array:
    """`length` rows of zeros with the shape, dtype and layout of the abstract value `row`."""
    x = jnp.zeros((length, *row.shape), row.dtype)
    known = _known(row)
    if known is not None:
        x = jax.reshard(x, NamedSharding(known.mesh, P(None, *layout(row))))
    return jax.lax.pcast(x, tuple(varying.axes_of(row)), to="varying")


def count(leaf: Any, dimension: int) -> int:
    """The number of devices that a dimension of `leaf` is sharded over by explicit mesh axes."""
    known = _known(leaf)
    return math.prod(known.mesh.shape[name] for name in _in_order(layout(leaf)[dimension])) if known else 1


def unplaced(leaf: Any) -> Any:
    """The type of a leaf without its sharding over explicit axes; any other leaf as it is."""
    if _known(leaf) is None:
        return leaf
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, weak_type=leaf.weak_type)


def wide(x: jax.Array) -> jax.Array:
    """Casts narrower inexact dtypes to float32, the least precision for reductions over devices."""
    is_narrow = jnp.issubdtype(x.dtype, jnp.inexact) and jnp.finfo(x.dtype).bits < 32
    return x.astype(jnp.float32) if is_narrow else x


def is_explicit(mesh: Mesh | AbstractMesh) -> bool:
    """Whether `mesh` has an explicit axis, so that jax's types record shardings."""
    return any(kind == AxisType.Explicit for kind in mesh.axis_types)


def layout(leaf: Any) -> tuple[Any, ...]:
    """The sharding of `leaf` in jax's types: one entry per dimension, None where it is not known to be sharded."""
    known = _known(leaf)
    return _padded(known.spec if known else (), len(leaf.shape))


def _known(leaf: Any) -> NamedSharding | None:
    """The sharding of `leaf` over a mesh with explicit axes, if jax's types record one."""
    known = getattr(jax.typeof(leaf) if isinstance(leaf, jax.Array) else leaf, "sharding", None)
    return known if isinstance(known, NamedSharding) and is_explicit(known.mesh) else None


def _padded(spec: Any, ndim: int) -> tuple[Any, ...]:
    return (*spec, *[None] * (ndim - len(spec)))


def _in_order(entry: Any) -> tuple[str, ...]:
    return entry if isinstance(entry, tuple) else () if entry is None else (entry,)
