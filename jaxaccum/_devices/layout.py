"""How a mesh's data axis splits one dimension of an array: the layout of ZeRO's gradients and optimizer state."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxaccum._jax import varying


def dimension(leaf: Any, mesh: Mesh, names: tuple[str, ...]) -> int | None:
    """The first dimension of `leaf` that the data axes divide, and that no other axis is known to split.

    Args:
      leaf: an array, or its shape and dtype.
      mesh: the mesh.
      names: its data axes.

    Returns:
      The dimension; None where there is none, such as for a scalar: then every device keeps all of `leaf`.
    """
    size = math.prod(mesh.shape[name] for name in names)
    free = [not _names(entry) - set(names) for entry in layout(leaf)]
    fits = (d for d, n in enumerate(leaf.shape) if free[d] and n and n % size == 0)
    return next(fits, None)


def sharding(leaf: Any, mesh: Mesh, names: tuple[str, ...]) -> NamedSharding:
    """How `leaf` lies when the data axes split `dimension(leaf)`, other axes as it is."""
    split = dimension(leaf, mesh, names)
    placed = getattr(leaf, "sharding", None)
    spec = _padded(placed.spec if isinstance(placed, NamedSharding) else (), len(leaf.shape))
    others = [tuple(name for name in _in_order(entry) if name not in names) for entry in spec]
    if split is not None:
        both = names + others[split]
        divides = leaf.shape[split] % math.prod(mesh.shape[name] for name in both) == 0
        others[split] = both if divides else names
    return NamedSharding(mesh, P(*[entry[0] if len(entry) == 1 else entry or None for entry in others]))


def lay(leaf: jax.Array, mesh: Mesh, names: tuple[str, ...], split: int | None) -> jax.Array:
    """`leaf` with its dimension `split` over the data axes, or with none; other axes are left to jax."""
    if not leaf.ndim:
        return leaf
    if is_explicit(mesh):
        return reshard(leaf, mesh, names, P(*[None] * split, names) if split is not None else P())
    spec: list[Any] = [P.UNCONSTRAINED] * leaf.ndim
    concerned = dimension(leaf, mesh, names) if split is None else split
    if concerned is not None:
        spec[concerned] = None if split is None else names
    # Only under jit can a dimension be left open.
    return jax.jit(lambda x: jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*spec))))(leaf)


def reshard(leaf: jax.Array, mesh: Mesh, names: tuple[str, ...], spec: P) -> jax.Array:
    """`leaf` as `spec` says over the data axes, other axes as they are: on explicit axes jax won't do it by itself."""
    current = layout(leaf)
    rest = [tuple(name for name in _in_order(entry) if name not in names) or None for entry in current]
    wanted = (*(new or old for new, old in zip(spec, rest, strict=False)), *rest[len(spec) :])
    if all(_in_order(new) == _in_order(old) for new, old in zip(wanted, current, strict=True)):
        return leaf
    return jax.reshard(leaf, NamedSharding(mesh, P(*wanted)))


def reduce_scatter(local: jax.Array, mesh: Mesh, names: tuple[str, ...]) -> jax.Array:
    """The sum over the leading device axis of `local`, (P, *shape), split over the data axes as far as it can be.

    It is formed and returned in float32 or wider.

    Where the mesh's other axes are automatic, how they split `local` is not known here, and XLA would gather it before
    a reduce-scatter: it is left to XLA to make one out of a reduction and a layout, which it does on GPU and TPU.
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
    scatter = lambda x: jax.lax.psum_scatter(x[0], names, scatter_dimension=split, tiled=True)
    out = [names if d == split else entry for d, entry in enumerate(spec)]
    mapped = jax.shard_map(scatter, mesh=mesh, in_specs=P(names, *spec), out_specs=P(*out), check_vma=False)
    return jax.jit(mapped)(local)


def zeros(length: int, row: Any) -> jax.Array:
    """`length` rows of zeros, of the shape, dtype and layout of `row`, a type."""
    x = jnp.zeros((length, *row.shape), row.dtype)
    known = _known(row)
    if known is not None:
        x = jax.reshard(x, NamedSharding(known.mesh, P(None, *layout(row))))
    axes = tuple(varying.axes_of(row))
    return jax.lax.pcast(x, axes, to="varying") if axes else x


def count(leaf: Any, dimension: int) -> int:
    """The number of devices that the explicit axes of a mesh split a dimension of `leaf` over."""
    known = _known(leaf)
    return math.prod(known.mesh.shape[name] for name in _in_order(layout(leaf)[dimension])) if known else 1


def wide(x: jax.Array) -> jax.Array:
    """`x` in float32, if it is of a narrower inexact dtype: what several devices hold is added in no less."""
    is_narrow = jnp.issubdtype(x.dtype, jnp.inexact) and jnp.finfo(x.dtype).bits < 32
    return x.astype(jnp.float32) if is_narrow else x


def is_explicit(mesh: Mesh | AbstractMesh) -> bool:
    """Whether jax's types know how arrays lie on `mesh`."""
    return any(kind == AxisType.Explicit for kind in mesh.axis_types)


def layout(leaf: Any) -> tuple[Any, ...]:
    """How jax's types say that `leaf` lies: an entry for each dimension, None where they know of none."""
    known = _known(leaf)
    return _padded(known.spec if known else (), len(leaf.shape))


def _known(leaf: Any) -> NamedSharding | None:
    """The layout of `leaf` over a mesh with explicit axes, if jax's types know of one."""
    known = getattr(jax.typeof(leaf) if isinstance(leaf, jax.Array) else leaf, "sharding", None)
    return known if isinstance(known, NamedSharding) and is_explicit(known.mesh) else None


def _padded(spec: Any, ndim: int) -> tuple[Any, ...]:
    return (*spec, *[None] * (ndim - len(spec)))


def _in_order(entry: Any) -> tuple[str, ...]:
    return entry if isinstance(entry, tuple) else () if entry is None else (entry,)


def _names(entry: Any) -> set[str]:
    return set(_in_order(entry))
