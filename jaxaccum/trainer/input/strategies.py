"""How a loader's batches become micro-steps on devices: one device, or the data axis of a mesh."""

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from jaxaccum._devices.topology import MeshAxis, OneDevice
from jaxaccum._devices.zero import zero_sharding
from jaxaccum._integers import positive_int
from jaxaccum._jax import prng
from jaxaccum._types import Tree
from jaxaccum.distributed.process_group import Processes

NAMES = ("auto", "single", "ddp", "dp", "zero")


class Place(NamedTuple):
    """Where a piece of a micro-step stands; an int32 array of these three on the devices.

    Attributes:
      first: the number of its first share: that of its device, and P more where P shares of the batch precede it.
      present: how many devices, from that one on, have a share; the others hold what counts for nothing.
      advance: how many loader batches it completes.
    """

    first: int
    present: int
    advance: int


_WHOLE = Place(first=0, present=1, advance=1)  # of a loader batch on the one device


class Piece(NamedTuple):
    """What one call of a program takes.

    Attributes:
      batch: leaves (N, ...) on one device; (P·N, ...) on several, split over the data axis.
      place: a `Place`, on the devices.
    """

    batch: Tree
    place: Any


class Loaded(NamedTuple):
    """A loader batch as it was read.

    Attributes:
      given: what the loader gave.
      arrays: the same tree with leaves that jax takes; `given` itself where all of its leaves are such.
      examples: the number of its examples.
    """

    given: Tree
    arrays: Tree
    examples: int


_DTYPES = frozenset(map(np.dtype, ("bool", *np.typecodes["AllInteger"], *"efdFD")))  # The common ones that jax takes.


class Strategy:
    """A strategy on its devices.

    A micro-step is a group of loader batches, P with "ddp" and "zero" and else one, and runs as a list of pieces. It is
    one piece wherever it can be: else each run of batches of one shape is one; with "dp" what divides over the devices
    is one and the rest another. Devices without a share are given a copy of another's, of weight 0.

    With several processes the devices are those of process 0, then those of process 1 and so on, each equally many. A
    process' loader gives the batches of its own devices, with "dp" its share of each batch.

    Args:
      name: one of `NAMES`.
      devices: how many, over all processes, or "auto" for all there are ("single": the first).

    Attributes:
      name: without "auto".
      processes: that the devices belong to.
      sync: the devices, for sums.
      common: the sharding of what all devices share.
      local: the sharding of what each has of its own.
      size: P, the number of devices.
      own: how many of them are this process'.
      group: this process' loader batches in a micro-step.
      batches: all of the loader batches in a micro-step.

    Raises:
      TypeError, ValueError: for an unknown name, more devices than there are, or "single" with several processes.
      RuntimeError: if there are several processes that have no way to talk.
    """

    def __init__(self, name: str, devices: int | str):
        if name not in NAMES:
            raise ValueError(f"strategy must be one of {NAMES}, got {name!r}.")
        available, self.processes = jax.devices(), Processes()
        processes = self.processes.count
        if processes != jax.process_count():
            raise RuntimeError(
                f"there are {jax.process_count()} processes, but jax.distributed is not initialised: call "
                "jaxaccum.distributed.initialize() first."
            )
        if name == "single" and processes > 1:
            raise ValueError(f"strategy='single' runs in one process, and there are {processes}: pass 'ddp' or 'auto'.")
        every = 1 if name == "single" else len(available)
        count = every if devices == "auto" else positive_int(devices, "devices")
        if count > len(available):
            raise ValueError(f"devices={count}, but there are only {len(available)}: {available}; pass devices='auto'.")
        if name == "single" and count > 1:
            raise ValueError(f"strategy='single' runs on one device, got devices={count}; pass 'ddp', 'dp' or 'zero'.")
        self.name = ("single" if count == 1 else "ddp") if name == "auto" else name
        self.sync: OneDevice | MeshAxis = OneDevice()
        self.common: Any = SingleDeviceSharding(available[0])
        self.local: Any = self.common
        if count > 1:
            auto = (jax.sharding.AxisType.Auto,)
            if processes == 1:
                mesh = jax.make_mesh((count,), ("data",), axis_types=auto, devices=available[:count])
            else:
                mesh = Mesh(np.array(_equally_many(available, count, processes)), ("data",), axis_types=auto)
            self.sync = MeshAxis(mesh, ("data",), scatter=name == "zero")
            self.common, self.local = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
        self.size, self.own = count, count // processes
        self.group, self.batches = (1, 1) if self.name == "dp" else (self.own, self.size)
        self._constants: dict[Any, jax.Array] = {}
        # A CPU has a host's arrays in its memory already, and jit takes them faster than device_put does.
        self._puts = count > 1 or available[0].platform != "cpu"

    def micro_steps(self, batches: int | None) -> int | float:
        """How many micro-steps so many batches of this process' loader make; infinite for None."""
        return math.inf if batches is None else -(-batches // self.group)

    def read(self, batch: Tree) -> Loaded:
        """Reads a loader batch that is to be put on the devices.

        Raises:
          TypeError, ValueError: as `loaded`; and ValueError for a leaf that can't be spread over several devices.
        """
        read = loaded(batch)
        if self.size > 1:
            _check_entries(read, is_split=self.name == "dp")
        return read

    def pieces(self, batches: Sequence[Tree]) -> list[Piece]:
        """The pieces of a micro-step of up to `group` loader batches, sent on their way to the devices.

        The batches are the `arrays` of what `read` gives. With several processes see `_shares`.
        """
        if self.size == 1:
            return [self.sent(batches[0], _WHOLE)]
        if self.name == "dp":
            return self._split(batches[0])
        return [self._run(list(run)) for _, run in itertools.groupby(batches, key=signature)]

    def sent(self, batch: Tree, place: Place) -> Piece:
        """A piece on its way to the devices; `batch` is what this process has of it."""
        if self.processes.count > 1:
            shape = lambda x: (self.processes.count * len(x), *x.shape[1:])
            put = lambda x: jax.make_array_from_process_local_data(self.local, x, shape(x))
            batch = jax.tree.map(put, batch)
        elif self._puts:
            batch = jax.device_put(batch, self.local)
        return Piece(batch, self.constant(place, np.int32))

    def _run(self, run: list[Tree]) -> Piece:
        """Batches of one shape, one for each device."""
        filled = run + [run[-1]] * (self.size - len(run))
        return self.sent(stacked(filled), Place(0, len(run), len(run)))

    def _split(self, batch: Tree) -> list[Piece]:
        """One batch over all devices, and what does not divide on the first alone."""
        examples = length(batch)
        whole = examples // self.size * self.size
        rest = examples - whole
        pieces = []
        if whole:
            pieces.append(self.sent(rows(batch, slice(whole)), Place(0, self.size, 0 if rest else 1)))
        if rest or not whole:
            repeated = stacked([rows(batch, slice(whole, None))] * self.size)
            pieces.append(self.sent(repeated, Place(self.size if whole else 0, 1, 1)))
        return pieces

    def constant(self, value: float | tuple[int, ...], dtype: Any) -> jax.Array:
        """`value` on every device, where it stays: sending the few that there are anew would cost each call."""
        constant = self._constants.get((value, dtype))
        if constant is None:
            constant = self._constants[value, dtype] = self.placed(np.asarray(value, dtype), self.common)
        return constant

    def placed(self, tree: Tree, sharding: Any) -> Tree:
        """`tree`, which every process has as a whole, on the devices, in buffers that may be donated."""
        if self.processes.count == 1:
            return jax.device_put(tree, sharding, may_alias=False)
        return jax.tree.map(lambda x: _placed(x, sharding), tree)

    def of_first(self, tree: Tree) -> Tree:
        """`tree` as process 0 has it."""
        if self.processes.count == 1:
            return tree
        data = jax.tree.map(lambda x: jax.random.key_data(x) if prng.is_typed(x) else x, tree)
        first = multihost_utils.broadcast_one_to_all(data)
        as_was = lambda x, old: jax.random.wrap_key_data(x, impl=jax.random.key_impl(old)) if prng.is_typed(old) else x
        return jax.tree.map(as_was, first, tree)

    def spread(self, tree: Tree) -> Tree:
        """The shardings of an optimizer's state: the parameters' own, or with "zero" split over the devices."""
        if isinstance(self.sync, MeshAxis) and self.sync.scatter:
            return zero_sharding(tree, self.sync.mesh, self.sync.names)
        return jax.tree.map(lambda _: self.common, tree)


def loaded(batch: Tree) -> Loaded:
    """Reads a loader batch.

    A leaf that jax takes stays as it is: an array of numbers or bools, a random key, a Python number. Any other leaf
    goes through `np.asarray`, which reads the arrays of most libraries. A mapping that jax doesn't know becomes a dict.

    Raises:
      TypeError: if that makes no array of numbers or bools of a leaf; it names the leaf.
      ValueError: if there is no leaf.
    """
    given, leaves = batch, jax.tree_util.tree_leaves(batch)
    if not leaves:
        raise ValueError(f"the loader gave a batch without arrays: {batch!r}.")
    entries = -1
    for leaf in leaves:  # What nearly every batch is, in a microsecond.
        if type(leaf) is not np.ndarray or leaf.dtype not in _DTYPES or not leaf.ndim:
            break
        if entries < 0:
            entries = len(leaf)
        elif len(leaf) != entries:
            break
    else:
        return Loaded(batch, batch, entries)
    if not all(map(_is_taken, leaves)):
        batch = jax.tree_util.tree_map_with_path(_converted, _dicts(batch))
        leaves = jax.tree.leaves(batch)
    return Loaded(given, batch, _examples(leaves))


def _dicts(batch: Tree) -> Tree:
    """A loader batch with dicts for mappings of other classes, such as those that Hugging Face's collators return."""
    return jax.tree.map(lambda leaf: _dicts(dict(leaf)) if isinstance(leaf, Mapping) else leaf, batch)


def arrays(batch: Tree) -> Tree:
    """A loader batch with leaves that jax takes, as `loaded` reads it; `batch` itself where all of its leaves are such.

    Raises:
      TypeError, ValueError: as `loaded`.
    """
    return loaded(batch).arrays


def length(batch: Tree) -> int:
    """The number of examples in a loader batch: the leading length that most of its leaves have.

    Of several lengths that equally many leaves have it is the first one. Scalars don't count; where there is nothing
    else, it is 1.

    Raises:
      TypeError, ValueError: as `loaded`.
    """
    return loaded(batch).examples


def signature(batch: Tree) -> Any:
    """What batches that can be stacked have in common: the tree, and its leaves' shapes and dtypes."""
    leaves, treedef = jax.tree.flatten(batch)
    return treedef, [(np.shape(leaf), getattr(leaf, "dtype", type(leaf))) for leaf in leaves]


def rows(batch: Tree, part: slice) -> Tree:
    """Some of a loader batch's examples."""
    return jax.tree.map(lambda x: x[part], batch)


def stacked(batches: Sequence[Tree]) -> Tree:
    """Loader batches of one shape as one."""
    return jax.tree.map(lambda *leaves: _concatenate(leaves), *batches)


@functools.cache
def _is_dtype_of_jax(dtype: np.dtype) -> bool:
    """Whether jax takes arrays of `dtype`: numbers or bools, in this machine's byte order, not wider than 64 bits."""
    try:
        jax.eval_shape(lambda x: x, np.empty(0, dtype))
    except TypeError:
        return False
    return True


def _is_taken(leaf: Any) -> bool:
    """Whether jax takes a leaf as it is."""
    if type(leaf) is np.ndarray:
        return _is_dtype_of_jax(leaf.dtype)
    if isinstance(leaf, (np.ndarray, np.generic)):
        return _is_dtype_of_jax(leaf.dtype) and not isinstance(leaf, np.ma.MaskedArray)
    return isinstance(leaf, (jax.Array, bool, int, float, complex))


def _converted(path: Any, leaf: Any) -> Any:
    """A leaf that jax takes."""
    if _is_taken(leaf):
        return leaf
    if isinstance(leaf, np.ma.MaskedArray):
        raise _no_array(path, leaf, "which would lose its mask", "Pass leaf.filled(value), and the mask beside it.")
    try:
        array = np.asarray(leaf)
    except Exception as error:
        remedy = "Convert it in the loader; a torch tensor for example by x.detach().cpu().float()."
        raise _no_array(path, leaf, f"and np.asarray raises {error!r}", remedy) from error
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    if _is_dtype_of_jax(native.dtype):
        return native
    remedy = "Make numbers of it in the loader, or leave it out of the batch."
    if dataclasses.is_dataclass(leaf):
        remedy = "Register its class with jax.tree_util.register_dataclass, so that its fields are leaves."
    raise _no_array(path, leaf, f"of which np.asarray gives dtype {array.dtype}", remedy)


def _no_array(path: Any, leaf: Any, why: str, remedy: str) -> TypeError:
    return TypeError(
        f"batch{jax.tree_util.keystr(path)} is a {type(leaf).__name__}, {why}: the leaves of a batch must be arrays of "
        f"numbers or bools. {remedy}"
    )


def _examples(leaves: Sequence[Any]) -> int:
    """As `length`, of a batch's leaves."""
    lengths = [leaf.shape[0] for leaf in leaves if getattr(leaf, "shape", ())]
    if not lengths:
        return 1
    return collections.Counter(lengths).most_common(1)[0][0]


def _check_entries(read: Loaded, is_split: bool) -> None:
    """Each leaf must have examples to be spread over devices: if a batch is split, one entry for each example."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(read.arrays):
        shape = np.shape(leaf)
        if not shape:
            raise ValueError(
                f"batch{jax.tree_util.keystr(path)} is a scalar and can't be spread over several devices; give it one "
                "entry for each example."
            )
        if is_split and shape[0] != read.examples:
            raise ValueError(
                f"batch{jax.tree_util.keystr(path)} has {shape[0]} entries, but the batch has {read.examples} "
                "examples, the length of most of its leaves: strategy='dp' can't split it over the devices. Give it "
                "one entry for each example, or use strategy='ddp', which splits no batch."
            )


def _concatenate(leaves: Sequence[Any]) -> Any:
    on_device = any(isinstance(leaf, jax.Array) for leaf in leaves)
    return jnp.concatenate(leaves) if on_device else np.concatenate(leaves)


def _equally_many(available: Sequence[Any], count: int, processes: int) -> list[Any]:
    """The devices to use, by process: of each the first."""
    of = [[device for device in available if device.process_index == process] for process in range(processes)]
    if count % processes or any(len(own) < count // processes for own in of):
        raise ValueError(
            f"devices={count} must be equally many of each of the {processes} processes, which have "
            f"{[len(own) for own in of]}; pass devices={processes * min(map(len, of))}."
        )
    return [device for own in of for device in own[: count // processes]]


def _placed(x: Any, sharding: Any) -> jax.Array:
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return jax.jit(jnp.copy, out_shardings=sharding)(x)
    if prng.is_typed(x):
        data = _placed(jax.random.key_data(x), sharding)
        return jax.jit(lambda data: jax.random.wrap_key_data(data, impl=jax.random.key_impl(x)))(data)
    whole = np.asarray(x, jax.dtypes.canonicalize_dtype(np.asarray(x).dtype))
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: np.array(whole[index]))
