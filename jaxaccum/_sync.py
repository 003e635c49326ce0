"""Devices: how the sums of one device differ from those of all, and the one reduction that joins them.

Everything that the drivers know of devices is one of the three values here: `OneDevice()`; `MappedAxis(names)`
inside a mapped axis; `MeshAxis(mesh, names)` under jit, where what is local has a leading device axis.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

Tree = Any


class OneDevice(NamedTuple):
    """No device but this one: local sums are the sums."""

    shape: tuple[int, ...] = ()

    def local(self, tree: Tree) -> Tree:
        """`tree`, as what each device may change on its own."""
        return tree

    def joined(self, tree: Tree) -> Tree:
        """The sum of `tree` over the devices."""
        return tree

    def averaged(self, tree: Tree) -> Tree:
        """The mean over the devices of what floats in `tree`; the rest must agree."""
        return tree

    def size(self) -> int:
        """The number of devices."""
        return 1

    def index(self) -> Any:
        """This device's number."""
        return 0

    def one(self, tree: Tree) -> Tree:
        """`tree` as one device has it."""
        return tree

    def options(self) -> dict[str, Any]:
        """The arguments that ask for this."""
        return {}

    def is_local(self, leaf: Any) -> bool:
        """Whether `leaf` is known to be one device's own."""
        del leaf
        return True

    def is_common(self, leaf: Any) -> bool:
        """Whether `leaf` is not known to differ between devices."""
        del leaf
        return True


class MappedAxis(NamedTuple):
    """The devices of a mapped axis, inside `jax.pmap` or `jax.shard_map`.

    Under shard_map with `check_vma=True` jax tracks in its types what varies over the axis. There a gradient with
    respect to parameters that don't vary is reduced by jax in every micro-step, and comes out as the sum over devices;
    parameters cast to varying keep their gradient local. Elsewhere nothing is tracked and nothing needs a cast.

    Attributes:
      names: the axis' name, or several.
    """

    names: tuple[str, ...]

    shape = ()

    def local(self, tree: Tree) -> Tree:
        """`tree` cast to varying over the axis, where jax tracks that."""

        def leaf(x):
            missing = tuple(name for name in self.names if name not in jax.typeof(x).mat.varying)
            return jax.lax.pcast(x, missing, to="varying") if missing else x

        return jax.tree.map(leaf, tree)

    def joined(self, tree: Tree) -> Tree:
        """The sum of `tree` over the axis, in one reduction."""
        return jax.lax.psum(self.local(tree), self.names)

    def averaged(self, tree: Tree) -> Tree:
        """The mean over the axis of what floats in `tree`; the rest must agree, and is that of the largest."""

        def leaf(x):
            if jnp.issubdtype(x.dtype, jnp.inexact):
                return jax.lax.pmean(x, self.names)
            return jax.lax.pmax(x, self.names) if jnp.issubdtype(x.dtype, jnp.number) else x

        return jax.tree.map(leaf, self.local(tree))

    def size(self) -> int:
        """The number of devices of the axis."""
        return jax.lax.axis_size(self.names)

    def index(self) -> jax.Array:
        """This device's number on the axis, an int32 scalar."""
        return jax.lax.axis_index(self.names)

    def one(self, tree: Tree) -> Tree:
        """`tree` as one device has it."""
        return tree

    def options(self) -> dict[str, Any]:
        """The arguments that ask for this."""
        return {"axis_name": self.names}

    def is_local(self, leaf: Any) -> bool:
        """Whether `leaf` varies over the axis, as far as jax tracks that."""
        return not self._tracked or self._varies(leaf)

    def is_common(self, leaf: Any) -> bool:
        """Whether `leaf` is not known to vary over the axis."""
        return not self._varies(leaf)

    def _varies(self, leaf: Any) -> bool:
        return any(name in jax.typeof(leaf).mat.varying for name in self.names)

    @property
    def _tracked(self) -> bool:
        return self._varies(self.local(jnp.zeros(())))


class MeshAxis(NamedTuple):
    """The data axis of a mesh under jit: what is local is a global array with a leading device axis, sharded over it.

    Attributes:
      mesh: the mesh.
      names: its data axes.
    """

    mesh: Mesh
    names: tuple[str, ...]

    def local(self, tree: Tree) -> Tree:
        """A copy of `tree` for each device: leaves (P, ...), laid out beyond that as they were."""
        expand = lambda tree: jax.tree.map(lambda x: x[None], tree)
        options = {"mesh": self.mesh, "axis_names": set(self.names), "check_vma": False}
        # Under jit also when called outside of it: only there can a result lie over axes that are not manual.
        return jax.jit(jax.shard_map(expand, in_specs=P(), out_specs=P(self.names), **options))(tree)

    def joined(self, tree: Tree) -> Tree:
        """The sum of `tree` over its leading axis: jax makes it a reduction over the data axis."""
        return jax.tree.map(lambda x: jnp.sum(x, axis=0), tree)

    def size(self) -> int:
        """The number of devices of the data axis."""
        return math.prod(self.mesh.shape[name] for name in self.names)

    def one(self, tree: Tree) -> Tree:
        """Shapes and dtypes of `tree` as one device has it."""
        return jax.eval_shape(self.joined, tree)

    def options(self) -> dict[str, Any]:
        """The arguments that ask for this."""
        return {"mesh": self.mesh, "data_axis": self.names}

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a scalar of each device."""
        return (self.size(),)

    def is_local(self, leaf: Any) -> bool:
        """Whether `leaf` is known to be each device's own: its leading axis says so, and is checked elsewhere."""
        del leaf
        return True

    def is_common(self, leaf: Any) -> bool:
        """Whether `leaf` is not known to differ between devices: under jit every array is one for all."""
        del leaf
        return True


Sync = OneDevice | MappedAxis | MeshAxis
