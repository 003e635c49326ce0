"""How a loader's batches become micro-steps on devices: one device, or the data axis of a mesh."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from jaxaccum._integers import positive_int
from jaxaccum._sync import MeshAxis, OneDevice
from jaxaccum._zero import zero_sharding

Tree = Any

NAMES = ("auto", "single", "ddp", "dp", "zero")


class Place(NamedTuple):
    """Where a piece of a micro-step stands; an int32 array of these three on the devices.

    Attributes:
      first: the number of its first device's share, for keys: P where P shares of the same batch precede it.
      present: how many devices have a share; the others hold a copy of one, which counts for nothing.
      advance: how many loader batches it completes.
    """

    first: int
    present: int
    advance: int


class Piece(NamedTuple):
    """What one call of a program takes.

    Attributes:
      batch: leaves (N, ...) on one device; (P·N, ...) on several, split over the data axis.
      place: a `Place`, as a tuple on the host and as an array on the devices.
    """

    batch: Tree
    place: Any


class Strategy:
    """A strategy on its devices.

    A micro-step is a group of loader batches, P with "ddp" and "zero" and else one, and runs as a list of pieces. It is
    one piece wherever it can be: else each run of batches of one shape is one; with "dp" what divides over the devices
    is one and the rest another. Devices without a share are given a copy of another's, of weight 0.

    Args:
      name: one of `NAMES`.
      devices: how many, or "auto" for all there are ("single": the first).

    Raises:
      TypeError, ValueError: for an unknown name, or more devices than there are.
    """

    def __init__(self, name: str, devices: int | str):
        if name not in NAMES:
            raise ValueError(f"strategy must be one of {NAMES}, got {name!r}.")
        available = jax.devices()
        every = 1 if name == "single" else len(available)
        count = every if devices == "auto" else positive_int(devices, "devices")
        if count > len(available):
            raise ValueError(f"devices={count}, but there are only {len(available)}: {available}; pass devices='auto'.")
        if name == "single" and count > 1:
            raise ValueError(f"strategy='single' runs on one device, got devices={count}; pass 'ddp', 'dp' or 'zero'.")
        self.name = ("single" if count == 1 else "ddp") if name == "auto" else name
        self.sync: OneDevice | MeshAxis = OneDevice()
        self.common: Any = SingleDeviceSharding(available[0])  # of what all devices share
        self.local: Any = self.common  # of what each has of its own
        if count > 1:
            auto = (jax.sharding.AxisType.Auto,)
            mesh = jax.make_mesh((count,), ("data",), axis_types=auto, devices=available[:count])
            self.sync = MeshAxis(mesh, ("data",), scatter=name == "zero")
            self.common, self.local = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
        self.size = count
        self.group = 1 if self.name == "dp" else count  # loader batches in a micro-step
        self._constants: dict[Any, jax.Array] = {}
        # A CPU has a host's arrays in its memory already, and jit takes them faster than device_put does.
        self._puts = count > 1 or available[0].platform != "cpu"

    def pieces(self, batches: Sequence[Tree]) -> list[Piece]:
        """The pieces of a micro-step of up to `group` loader batches, sent on their way to the devices."""
        if self.size == 1:
            pieces = [Piece(batches[0], Place(0, 1, 1))]
        elif self.name == "dp":
            pieces = self._split(batches[0])
        else:
            pieces = [self._run(list(run)) for _, run in itertools.groupby(batches, key=signature)]
        return [Piece(self._put(piece.batch), self.constant(piece.place, np.int32)) for piece in pieces]

    def _run(self, run: list[Tree]) -> Piece:
        """Batches of one shape, one for each device."""
        filled = run + [run[-1]] * (self.size - len(run))
        batch = _map(lambda *leaves: _concatenate(leaves), *filled)
        return Piece(batch, Place(0, len(run), len(run)))

    def _split(self, batch: Tree) -> list[Piece]:
        """One batch over all devices, and what does not divide on the first alone."""
        whole = length(batch) // self.size * self.size
        rest = length(batch) - whole
        pieces = []
        if whole:
            pieces.append(Piece(_map(lambda x: x[:whole], batch), Place(0, self.size, 0 if rest else 1)))
        if rest or not whole:
            repeated = _map(lambda x: _concatenate([x[whole:]] * self.size), batch)
            pieces.append(Piece(repeated, Place(self.size if whole else 0, 1, 1)))
        return pieces

    def _put(self, batch: Tree) -> Tree:
        return jax.device_put(batch, self.local) if self._puts else batch

    def constant(self, value: float | tuple[int, ...], dtype: Any) -> jax.Array:
        """`value` on every device, where it stays: sending the few that there are anew would cost each call."""
        if (value, dtype) not in self._constants:
            self._constants[value, dtype] = jax.device_put(np.asarray(value, dtype), self.common)
        return self._constants[value, dtype]

    def spread(self, tree: Tree) -> Tree:
        """The shardings of an optimizer's state: the parameters' own, or with "zero" split over the devices."""
        if isinstance(self.sync, MeshAxis) and self.sync.scatter:
            return zero_sharding(tree, self.sync.mesh, self.sync.names)
        return jax.tree.map(lambda _: self.common, tree)


def length(batch: Tree) -> int:
    """The number of examples in a loader batch: the leading length of its first leaf, or 1 where that is a scalar.

    Raises:
      ValueError: if there is no leaf.
    """
    leaves = jax.tree.leaves(batch)
    if not leaves:
        raise ValueError(f"the loader gave a batch without arrays: {batch!r}.")
    shape = np.shape(leaves[0])
    return shape[0] if shape else 1


def signature(batch: Tree) -> Any:
    """What batches that can be stacked have in common: the tree, and its leaves' shapes and dtypes."""
    leaves, treedef = jax.tree.flatten(batch)
    return treedef, [(np.shape(leaf), getattr(leaf, "dtype", type(leaf))) for leaf in leaves]


def _map(fun: Callable[..., Any], *batches: Tree) -> Tree:
    """`fun` of the batches' leaves, all of which must have examples to be spread over devices."""

    def leaf(path, *leaves):
        if not np.shape(leaves[0]):
            raise ValueError(
                f"batch{jax.tree_util.keystr(path)} is a scalar and can't be spread over several devices; give it one "
                "entry for each example."
            )
        return fun(*leaves)

    return jax.tree_util.tree_map_with_path(leaf, *batches)


def _concatenate(leaves: Sequence[Any]) -> Any:
    on_device = any(isinstance(leaf, jax.Array) for leaf in leaves)
    return jnp.concatenate(leaves) if on_device else np.concatenate(leaves)
