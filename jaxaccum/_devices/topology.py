"""Devices: how the sums of one device differ from those of all, and the one reduction that joins them.

What the drivers know of devices is one of three values with the same methods: `OneDevice()`; `MappedAxis(names)` inside
a mapped axis; `MeshAxis(mesh, names)` under jit, where what is local has a leading device axis.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxaccum._devices import layout
from jaxaccum._jax import prng, varying
from jaxaccum._sums import overwrites
from jaxaccum._types import Tree


@dataclasses.dataclass(frozen=True)
class OneDevice:
    """No device but this one: local sums are the sums.

    Attributes:
      names: of the axes that the devices lie along: none.
      shape: of a scalar that each device has one of.
    """

    names: tuple[str, ...] = ()
    shape: tuple[int, ...] = ()

    def options(self) -> dict[str, Any]:
        """The public arguments that ask for this."""
        return {}

    def size(self) -> int:
        """The number of devices."""
        return 1

    def index(self) -> Any:
        """This device's number."""
        return 0

    def local(self, tree: Tree) -> Tree:
        """`tree`, common to all devices, as what each may change on its own."""
        return tree

    def each(self, fun: Callable[[Tree], Tree], tree: Tree) -> Tree:
        """`fun` of each device's own part of a local tree."""
        return fun(tree)

    def joined(self, tree: Tree, reduced: Tree = None) -> Tree:
        """The sum over the devices of what is local."""
        del reduced
        return tree

    def averaged(self, tree: Tree) -> Tree:
        """The mean over the devices of what floats in a local tree; the rest must agree."""
        return tree

    def one(self, tree: Tree) -> Tree:
        """A local tree as one device has it; shapes and dtypes are enough."""
        return tree

    def spread(self, tree: Tree) -> Tree:
        """`tree` laid out as joined sums are."""
        return tree

    def whole(self, tree: Tree) -> Tree:
        """`tree`, made of joined sums, laid out as parameters are."""
        return tree

    def settled(self, state: Tree) -> Tree:
        """`state` where the steps to come will leave it."""
        return state

    def own(self, tree: Tree) -> Tree:
        """A local tree, each device's part on it."""
        return tree

    def like(self, tree: Tree, params: Tree) -> Tree:
        """Joined sums `tree`, laid out as jax's types say that `params` are."""
        del params
        return tree

    def varies(self, leaf: Any) -> bool:
        """Whether `leaf` is known to differ between devices."""
        del leaf
        return False

    def is_reduced(self, leaf: Any) -> bool:
        """Whether `leaf` is known to be the same on every device, though it should be local."""
        del leaf
        return False


@dataclasses.dataclass(frozen=True)
class MappedAxis:
    """The devices of a mapped axis, inside `jax.pmap` or `jax.shard_map`.

    Under shard_map with `check_vma=True` jax tracks in its types what varies over the axis. There a gradient with
    respect to parameters that don't vary is reduced by jax in every micro-step, and comes out as the sum over devices;
    parameters cast to varying keep their gradient local. Elsewhere nothing is tracked and nothing needs a cast.

    Attributes:
      names: the axis, or several.
      shape: of a scalar that each device has one of: inside the mapped function it sees its own.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...] = ()

    def options(self) -> dict[str, Any]:
        """The public arguments that ask for this."""
        return {"axis_name": self.names}

    def size(self) -> int:
        """The number of devices."""
        return jax.lax.axis_size(self.names)

    def index(self) -> jax.Array:
        """This device's number, an int32 scalar."""
        return jax.lax.axis_index(self.names)

    def local(self, tree: Tree) -> Tree:
        """`tree` cast to varying over the axis, where jax tracks that.

        Outside of the mapped function, where a script makes its state before it replicates it, it is as it is.
        """
        try:
            self.size()
        except NameError:
            return tree

        def leaf(x):
            missing = tuple(name for name in self.names if name not in varying.axes(x))
            return jax.lax.pcast(x, missing, to="varying") if missing else x

        return jax.tree.map(leaf, tree)

    def each(self, fun: Callable[[Tree], Tree], tree: Tree) -> Tree:
        """`fun` of each device's own part of a local tree."""
        return fun(tree)

    def joined(self, tree: Tree, reduced: Tree = None) -> Tree:
        """The sum over the devices of what is local, in one reduction, in float32 or wider.

        Of statistics that are overwritten it is the maximum.

        Args:
          tree: local sums.
          reduced: for each leaf the names of the axes over which it is a sum already; None where that is none at all.
        """

        def leaf(path, x, done=()):
            names = tuple(name for name in self.names if name not in done)
            if not names:
                return x
            return jax.lax.pmax(x, names) if overwrites.holds(path) else jax.lax.psum(layout.wide(x), names)

        tree = self.local(tree)
        return jax.tree.map_with_path(leaf, tree, *(() if reduced is None else (reduced,)))

    def averaged(self, tree: Tree) -> Tree:
        """The mean over the devices of what floats in a local tree; the first device's keys; the rest must agree."""

        def leaf(x):
            if jnp.issubdtype(x.dtype, jnp.inexact):
                return jax.lax.pmean(layout.wide(x), self.names).astype(x.dtype)
            if prng.is_typed(x):
                data = jax.random.key_data(x)
                first = jax.lax.psum(jnp.where(self.index() == 0, data, jnp.zeros_like(data)), self.names)
                return jax.random.wrap_key_data(first, impl=jax.random.key_impl(x))
            return jax.lax.pmax(x.astype(jnp.uint8) if x.dtype == bool else x, self.names).astype(x.dtype)

        return jax.tree.map(leaf, self.local(tree))

    def one(self, tree: Tree) -> Tree:
        """A local tree as one device has it."""
        return tree

    def spread(self, tree: Tree) -> Tree:
        """`tree`: joined sums are whole on every device."""
        return tree

    def whole(self, tree: Tree) -> Tree:
        """`tree`: joined sums are whole on every device."""
        return tree

    def settled(self, state: Tree) -> Tree:
        """`state` where the steps to come will leave it."""
        return state

    def own(self, tree: Tree) -> Tree:
        """A local tree, each device's part on it."""
        return tree

    def like(self, tree: Tree, params: Tree) -> Tree:
        """`tree`: joined sums lie as the parameters do."""
        del params
        return tree

    def varies(self, leaf: Any) -> bool:
        """Whether jax knows that `leaf` differs between devices."""
        return any(name in varying.axes(leaf) for name in self.names)

    def is_reduced(self, leaf: Any) -> bool:
        """Whether jax knows that `leaf` is the same on every device."""
        tracked = self.varies(self.local(jnp.zeros(())))
        return tracked and not self.varies(leaf)


@dataclasses.dataclass(frozen=True)
class MeshAxis:
    """The data axis of a mesh under jit: what is local is a global array with a leading device axis, sharded over it.

    Attributes:
      mesh: the mesh.
      names: its data axes.
      scatter: whether joined sums, and the optimizer state with them, are split over the data axes (ZeRO), or whole on
        every device.
    """

    mesh: Mesh
    names: tuple[str, ...]
    scatter: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a scalar that each device has one of."""
        return (self.size(),)

    def options(self) -> dict[str, Any]:
        """The public arguments that ask for this."""
        return {"mesh": self.mesh, "data_axis": self.names, "reduce": "scatter" if self.scatter else "mean"}

    def size(self) -> int:
        """The number of devices of the data axis."""
        return math.prod(self.mesh.shape[name] for name in self.names)

    def index(self) -> int:
        """This code's number: it is one for all devices."""
        return 0

    def local(self, tree: Tree) -> Tree:
        """A copy of `tree` for each device: leaves (P, ...), laid out beyond that as they were."""
        expand = lambda tree: jax.tree.map(lambda x: x[None], tree)
        options = {"mesh": self.mesh, "axis_names": set(self.names), "check_vma": False}
        # Under jit also when called outside of it: only there can a result lie over axes that are not manual.
        if layout.is_explicit(self.mesh):
            tree = jax.tree.map(lambda x: layout.reshard(x, self.mesh, self.names, P()), tree)
        return jax.jit(jax.shard_map(expand, in_specs=P(), out_specs=P(self.names), **options))(tree)

    def each(self, fun: Callable[[Tree], Tree], tree: Tree) -> Tree:
        """`fun` of each device's own part of a local tree."""
        return jax.vmap(fun)(tree)

    def joined(self, tree: Tree, reduced: Tree = None) -> Tree:
        """The sum over the leading axis, in float32 or wider: jax makes it a reduction over the data axis."""
        del reduced

        def leaf(path, x):
            if overwrites.holds(path):
                return jnp.max(x, axis=0)
            if self.scatter:
                return layout.reduce_scatter(x, self.mesh, self.names)
            return jnp.sum(layout.wide(x), axis=0)

        return jax.tree.map_with_path(leaf, tree)

    def averaged(self, tree: Tree) -> Tree:
        """The mean over the leading axis of what floats; the first keys; the rest must agree."""
        return averaged(tree)

    def one(self, tree: Tree) -> Tree:
        """Shapes and dtypes of a local tree as one device has it."""
        stored = lambda tree: jax.tree.map(lambda total, x: total.astype(x.dtype), self.joined(tree), tree)
        return jax.eval_shape(stored, tree)

    def spread(self, tree: Tree) -> Tree:
        """`tree` laid out as joined sums are: under ZeRO each array split over the data axes where it can be."""
        dimension = lambda x: layout.dimension(x, self.mesh, self.names)
        lay = lambda x: layout.lay(x, self.mesh, self.names, dimension(x))
        return jax.tree.map(lay, tree) if self.scatter else tree

    def whole(self, tree: Tree) -> Tree:
        """`tree`, made of joined sums, laid out as parameters are: on every device."""
        lay = lambda x: layout.lay(x, self.mesh, self.names, None)
        return jax.tree.map(lay, tree) if self.scatter else tree

    def own(self, tree: Tree) -> Tree:
        """A local tree, each device's part on it: XLA leaves constants with all, and the next step compiles anew."""
        sharding = NamedSharding(self.mesh, P(self.names))
        lay = jax.reshard if layout.is_explicit(self.mesh) else jax.lax.with_sharding_constraint
        return jax.tree.map(lambda x: lay(x, sharding), tree)

    def settled(self, state: Tree) -> Tree:
        """`state` with what lies on no particular device put on every one of the mesh, where a step would leave it.

        Under jit that is for jax to say; elsewhere a step would compile twice, for a fresh state and for its own.
        """

        def leaf(x):
            fresh = isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) and not x.committed
            return jax.device_put(x, NamedSharding(self.mesh, P())) if fresh else x

        return jax.tree.map(leaf, state)

    def like(self, tree: Tree, params: Tree) -> Tree:
        """Joined sums `tree`, laid out as jax's types say that `params` are."""
        if self.scatter or not layout.is_explicit(self.mesh):
            return tree
        spec = lambda p: jax.typeof(p).sharding.spec
        return jax.tree.map(lambda x, p: layout.reshard(x, self.mesh, self.mesh.axis_names, spec(p)), tree, params)

    def varies(self, leaf: Any) -> bool:
        """Whether `leaf` is known to differ between devices: under jit every array is one for all."""
        del leaf
        return False

    def is_reduced(self, leaf: Any) -> bool:
        """Whether `leaf` lacks the leading device axis: that is checked by its shape."""
        del leaf
        return False


Sync = OneDevice | MappedAxis | MeshAxis


def averaged(tree: Tree) -> Tree:
    """The mean over the leading axis of what floats; the first keys; the rest must agree."""

    def leaf(x):
        if jnp.issubdtype(x.dtype, jnp.inexact):
            return jnp.mean(layout.wide(x), axis=0).astype(x.dtype)
        return x[0] if prng.is_typed(x) else jnp.max(x, axis=0)

    return jax.tree.map(leaf, tree)
