"""Devices: where local sums live and how they are reduced, in three types with the same methods."""

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
from jaxaccum._sums import norms, overwrites
from jaxaccum._types import Tree


class _Defaults:
    """What the types share. The layout methods suit code that sees one device; `MeshAxis` has its own."""

    def each(self, fun: Callable[[Tree], Tree], tree: Tree) -> Tree:
        """Applies `fun` to each device's part of a local tree."""
        return fun(tree)

    def one(self, tree: Tree) -> Tree:
        """A local tree as one device sees it; only its shapes and dtypes are needed."""
        return tree

    def spread(self, tree: Tree) -> Tree:
        """Lays out `tree` like joined sums."""
        return tree

    def aligned(self, joined: Tree, params: Tree | None) -> tuple[Tree, Tree | None]:
        """Joined sums and the parameters in one layout, that of the optimizer's state."""
        return joined, params

    def whole(self, tree: Tree, params: Tree | None) -> Tree:
        """Lays out `tree`, computed from joined sums, like the parameters."""
        del params
        return tree

    def settled(self, state: Tree) -> Tree:
        """Places `state` where a step leaves it."""
        return state

    def unchanged(self, params: Tree) -> Tree:
        """Gives parameters that no optimizer step changes the layout that a step gives them."""
        return params

    def own(self, tree: Tree) -> Tree:
        """Places each device's part of a local tree on that device."""
        return tree

    def like(self, tree: Tree, params: Tree) -> Tree:
        """Lays out joined sums `tree` like `params`, as far as jax's types record the layout."""
        del params
        return tree

    def norm(self, joined: Tree, reduced: Tree = None) -> jax.Array:
        """The norm of a joined tree; `reduced` as for `joined`."""
        del reduced
        return norms.root(norms.total(norms.squares(joined)))

    def varies(self, leaf: Any) -> bool:
        """Whether jax's types show that `leaf` differs between devices."""
        del leaf
        return False

    def is_reduced(self, leaf: Any) -> bool:
        """Whether jax's types show that `leaf`, which should be local, is the same on all devices."""
        del leaf
        return False


@dataclasses.dataclass(frozen=True)
class OneDevice(_Defaults):
    """A single device: the local sums are the total."""

    names: tuple[str, ...] = ()  # The data axes.
    shape: tuple[int, ...] = ()  # Of a per-device scalar.

    def options(self) -> dict[str, Any]:
        """The public arguments that select this topology."""
        return {}

    def size(self) -> int:
        """The number of devices."""
        return 1

    def index(self) -> Any:
        """This device's index."""
        return 0

    def local(self, tree: Tree) -> Tree:
        """Converts `tree`, the same on all devices, to a local tree."""
        return tree

    def joined(self, tree: Tree, reduced: Tree = None) -> Tree:
        """Sums a local tree over the devices."""
        del reduced
        return tree

    def averaged(self, tree: Tree) -> Tree:
        """Averages the inexact leaves of a local tree over the devices; all other leaves must be equal."""
        return tree

    def gathered(self, tree: Tree) -> Tree:
        """Concatenates the rows of all devices, in their order."""
        return tree

    def part(self, tree: Tree) -> Tree:
        """The rows of this device in a gathered tree."""
        return tree

    def once(self, tree: Tree) -> Tree:
        """Zeros in place of a local tree that is the same on all devices, on all but one: their sum is the tree."""
        return tree

    def common(self, tree: Tree) -> Tree:
        """Converts a local tree that is the same on all devices to one tree."""
        return tree


@dataclasses.dataclass(frozen=True)
class MappedAxis(_Defaults):
    """The devices of a mapped axis, inside `jax.pmap` or `jax.shard_map`.

    Under shard_map with `check_vma=True`, jax's types track which values vary over the axis, and jax reduces the
    gradient of parameters that don't vary, in every micro-step. Cast to varying, their gradient stays local.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...] = ()

    def options(self) -> dict[str, Any]:
        return {"axis_name": self.names}

    def size(self) -> int:
        return jax.lax.axis_size(self.names)

    def index(self) -> jax.Array:
        return jax.lax.axis_index(self.names)

    def local(self, tree: Tree) -> Tree:
        """Casts `tree` to varying over the axis, where jax tracks that.

        Outside the mapped function, `tree` is returned as is: a script may create its state before it replicates it.
        """
        try:
            self.size()
        except NameError:
            return tree

        def leaf(x):
            missing = tuple(name for name in self.names if name not in varying.axes(x))
            return jax.lax.pcast(x, missing, to="varying")

        return jax.tree.map(leaf, tree)

    def joined(self, tree: Tree, reduced: Tree = None) -> Tree:
        """Sums a local tree over the devices, in float32 or wider; takes the maximum of overwritten statistics.

        `reduced` has the names of the axes that each leaf is already summed over; None if there are none.
        """

        def leaf(path, x, done=()):
            names = tuple(name for name in self.names if name not in done)
            if not names:
                return x
            return jax.lax.pmax(x, names) if overwrites.holds(path) else jax.lax.psum(layout.wide(x), names)

        tree = self.local(tree)
        return jax.tree.map_with_path(leaf, tree, *(() if reduced is None else (reduced,)))

    def norm(self, joined: Tree, reduced: Tree = None) -> jax.Array:
        """As above; each device holds another part of a leaf that was reduced already, by the transpose of a gather."""
        squares = norms.squares(joined)
        axes = [()] * len(squares) if reduced is None else jax.tree.structure(joined).flatten_up_to(reduced)
        parts = {names: [x for x, own in zip(squares, axes, strict=True) if own == names] for names in axes}
        whole = [
            jax.lax.psum(norms.total(part), names) if names else norms.total(part) for names, part in parts.items()
        ]
        return norms.root(norms.total(whole))

    def averaged(self, tree: Tree) -> Tree:
        """Averages the inexact leaves and takes the first device's keys; all other leaves must be equal."""

        def leaf(x):
            if jnp.issubdtype(x.dtype, jnp.inexact):
                return jax.lax.pmean(layout.wide(x), self.names).astype(x.dtype)
            if prng.is_typed(x):
                data = jax.random.key_data(x)
                first = jax.lax.psum(jnp.where(self.index() == 0, data, jnp.zeros_like(data)), self.names)
                return jax.random.wrap_key_data(first, impl=jax.random.key_impl(x))
            return jax.lax.pmax(x.astype(jnp.uint8) if x.dtype == bool else x, self.names).astype(x.dtype)

        return jax.tree.map(leaf, self.local(tree))

    def gathered(self, tree: Tree) -> Tree:
        """Concatenates the rows of all devices, in their order."""
        return jax.tree.map(lambda x: jax.lax.all_gather(x, self.names, tiled=True), self.local(tree))

    def part(self, tree: Tree) -> Tree:
        """The rows of this device in a gathered tree."""

        def leaf(x):
            rows = x.shape[0] // self.size()
            return jax.lax.dynamic_slice_in_dim(x, self.index() * rows, rows)

        return jax.tree.map(leaf, tree)

    def once(self, tree: Tree) -> Tree:
        """Zeros in place of a local tree that is the same on all devices, on all but one: their sum is the tree."""
        is_first = self.index() == 0
        return jax.tree.map(lambda x: jnp.where(is_first, x, jnp.zeros_like(x)), tree)

    def common(self, tree: Tree) -> Tree:
        """Casts a local tree that is the same on all devices to one that does not vary over the axis."""

        def leaf(x):
            if not self.varies(x):
                return x
            if not jnp.issubdtype(x.dtype, jnp.inexact):
                return self.averaged(x)
            return jax.lax.psum(self.once(x), self.names)  # A mean could overflow.

        return jax.tree.map(leaf, tree)

    def varies(self, leaf: Any) -> bool:
        return any(name in varying.axes(leaf) for name in self.names)

    def is_reduced(self, leaf: Any) -> bool:
        tracked = self.varies(self.local(jnp.zeros(())))
        return tracked and not self.varies(leaf)


@dataclasses.dataclass(frozen=True)
class MeshAxis(_Defaults):
    """The data axis of a mesh under jit: a local value is a global array with a sharded leading device axis."""

    mesh: Mesh
    names: tuple[str, ...]
    scatter: bool = False  # ZeRO: joined sums and the optimizer state are sharded over the data axes, not replicated.

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.size(),)

    def options(self) -> dict[str, Any]:
        return {"mesh": self.mesh, "data_axis": self.names, "reduce": "scatter" if self.scatter else "mean"}

    def size(self) -> int:
        return math.prod(self.mesh.shape[name] for name in self.names)

    def index(self) -> int:
        """Always 0: the code is global, not per device."""
        return 0

    def local(self, tree: Tree) -> Tree:
        """Copies `tree` to each device: leaves (P, ...), with the layout of the other dimensions kept."""

        def expand(tree):
            return jax.tree.map(lambda x: x[None], tree)

        options = {"mesh": self.mesh, "axis_names": set(self.names), "check_vma": False}
        # jit, since only under jit can a result be sharded over axes that are not manual.
        return jax.jit(jax.shard_map(expand, in_specs=P(), out_specs=P(self.names), **options))(self.unsplit(tree))

    def unsplit(self, tree: Tree) -> Tree:
        """Gathers `tree` over those data axes that jax's types show it to be sharded over."""
        is_explicit = layout.is_explicit(self.mesh)
        return jax.tree.map(lambda x: layout.reshard(x, self.mesh, self.names, P()), tree) if is_explicit else tree

    def each(self, fun: Callable[[Tree], Tree], tree: Tree) -> Tree:
        return jax.vmap(fun)(tree)

    def joined(self, tree: Tree, reduced: Tree = None) -> Tree:
        """Sums over the leading axis, in float32 or wider; jax compiles it to a reduction over the data axis."""
        del reduced

        def leaf(path, x):
            if overwrites.holds(path):
                return jnp.max(x, axis=0)
            if self.scatter:
                return layout.reduce_scatter(x, self.mesh, self.names)
            return jnp.sum(layout.wide(x), axis=0)

        return jax.tree.map_with_path(leaf, tree)

    def averaged(self, tree: Tree) -> Tree:
        return averaged(tree)

    def one(self, tree: Tree) -> Tree:
        def stored(tree):
            return jax.tree.map(lambda total, x: total.astype(x.dtype), self.joined(tree), tree)

        return jax.eval_shape(stored, tree)

    def spread(self, tree: Tree) -> Tree:
        """Lays out `tree` like joined sums: under ZeRO, each array is sharded over the data axes if possible."""

        def lay(x):
            return layout.lay(x, self.mesh, self.names, layout.dimension(x, self.mesh, self.names))

        return jax.tree.map(lay, tree) if self.scatter else tree

    def aligned(self, joined: Tree, params: Tree | None) -> tuple[Tree, Tree | None]:
        # Only explicit axes refuse to combine arrays of different layouts.
        if params is None or not layout.is_explicit(self.mesh):
            return joined, params
        return (joined, self.spread(params)) if self.scatter else (self.like(joined, params), params)

    def whole(self, tree: Tree, params: Tree | None) -> Tree:
        """Lays out `tree` like the parameters; if their layout is not known, replicated over the data axes."""
        if not self.scatter:
            return tree
        if params is None or not layout.is_explicit(self.mesh):
            return jax.tree.map(lambda x: layout.lay(x, self.mesh, self.names, None), tree)
        return self._as(tree, params)

    def own(self, tree: Tree) -> Tree:
        # Otherwise XLA replicates constants, and the next step recompiles.
        sharding = NamedSharding(self.mesh, P(self.names))
        lay = jax.reshard if layout.is_explicit(self.mesh) else jax.lax.with_sharding_constraint
        return jax.tree.map(lambda x: lay(x, sharding), tree)

    def settled(self, state: Tree) -> Tree:
        """Replicates the uncommitted arrays of `state` over the mesh, where a step leaves them.

        Otherwise a step would compile twice: for a fresh state and for its own output. Tracers are left to jax.
        """

        def leaf(x):
            fresh = isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) and not x.committed
            return jax.device_put(x, NamedSharding(self.mesh, P())) if fresh else x

        return jax.tree.map(leaf, state)

    def unchanged(self, params: Tree) -> Tree:
        # XLA chooses the layout of a conditional's result that no type says, and may shard it.
        return jax.tree.map(lambda x: layout.onto(x, self.mesh), params) if layout.is_explicit(self.mesh) else params

    def like(self, tree: Tree, params: Tree) -> Tree:
        return tree if self.scatter or not layout.is_explicit(self.mesh) else self._as(tree, params)

    def _as(self, tree: Tree, params: Tree) -> Tree:
        """Lays out the arrays in `tree` as the explicit types of `params` record."""

        def leaf(x, param):
            if not isinstance(x, jax.Array):  # The update of an integer parameter is None or a float0.
                return x
            return layout.reshard(x, self.mesh, self.mesh.axis_names, jax.typeof(param).sharding.spec)

        return jax.tree.map(leaf, tree, params, is_leaf=lambda x: x is None)


Sync = OneDevice | MappedAxis | MeshAxis


def averaged(tree: Tree) -> Tree:
    """Averages inexact leaves over the leading axis and takes the first keys; all other leaves must be equal."""

    def leaf(x):
        if jnp.issubdtype(x.dtype, jnp.inexact):
            return jnp.mean(layout.wide(x), axis=0).astype(x.dtype)
        if prng.is_typed(x):  # Not `x[0]`, which an array that is sharded over explicit axes doesn't have.
            data = jax.random.key_data(x)
            is_first = jax.lax.broadcasted_iota(jnp.uint32, data.shape, 0) == 0
            return jax.random.wrap_key_data(jnp.max(data * is_first, axis=0), impl=jax.random.key_impl(x))
        return jnp.max(x, axis=0)

    return jax.tree.map(leaf, tree)
