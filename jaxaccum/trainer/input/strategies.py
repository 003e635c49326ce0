"""Places loader batches on the devices as micro-steps: on one device, or on the data axis of a mesh."""

import itertools
import math
from collections.abc import Sequence
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
from jaxaccum._jax import coordination, prng
from jaxaccum._types import Tree
from jaxaccum.trainer.input.batches import Loaded, length, loaded, rows, signature, stacked

NAMES = ("auto", "single", "ddp", "dp", "zero")


class Place(NamedTuple):
    """The position of a piece in its micro-step; an int32 array of these three values on the devices."""

    first: int  # The index of its first share: its device's index, plus P if P shares of the batch precede it.
    present: int  # The number of devices with a share, from that device on; the others' data has weight 0.
    advance: int  # The number of loader batches that the piece completes.


_WHOLE = Place(first=0, present=1, advance=1)  # A whole loader batch on a single device.


class Piece(NamedTuple):
    """The input of one program call."""

    batch: Tree  # Leaves (N, ...) on one device; (P·N, ...) on several, sharded over the data axis.
    place: Any  # A `Place`, on the devices.
    host: Tree  # `batch` before its transfer; with several processes, `batch` itself.
    is_full: bool  # Whether every device has a share.

    @property
    def inputs(self) -> tuple[Tree, Any]:
        """The inputs of a program."""
        return self.batch, self.place


class Strategy:
    """A strategy and its devices.

    A micro-step is a group of loader batches: P of them with "ddp" and "zero", otherwise one. It runs as a list of
    pieces, a single one if possible. Otherwise each run of batches with the same shape is a piece; with "dp" the part
    that divides over the devices is one piece and the remainder another. Devices without a share get a copy of another
    share, with weight 0.

    `devices` is P, the number of devices over all processes, or "auto" for all of them ("single": the first). With
    several processes the devices are ordered by process, with the same number from each. The loader of a process
    yields the batches for that process's devices, or with "dp" its share of each batch.
    """

    def __init__(self, name: str, devices: int | str):
        if name not in NAMES:
            raise ValueError(f"strategy must be one of {NAMES}, got {name!r}.")
        available = jax.devices()
        self.process_index, self.process_count = coordination.place()
        processes = self.process_count
        if processes != jax.process_count():
            raise RuntimeError(
                f"there are {jax.process_count()} processes, but jax.distributed is not initialised: call "
                "jaxaccum.distributed.initialize() first."
            )
        if name == "single" and processes > 1:
            raise ValueError(f"strategy='single' runs in one process, and there are {processes}: pass 'ddp' or 'auto'.")
        every = 1 if name == "single" else len(available)
        count = every if devices == "auto" else positive_int(devices, "devices", note="")
        if count > len(available):
            raise ValueError(f"devices={count}, but there are only {len(available)}: {available}; pass devices='auto'.")
        if name == "single" and count > 1:
            raise ValueError(f"strategy='single' runs on one device, got devices={count}; pass 'ddp', 'dp' or 'zero'.")
        self.name = ("single" if count == 1 else "ddp") if name == "auto" else name
        self.sync: OneDevice | MeshAxis = OneDevice()
        self.common: Any = SingleDeviceSharding(available[0])  # Of replicated arrays.
        self.local: Any = self.common  # Of per-device arrays.
        if count > 1:
            auto = (jax.sharding.AxisType.Auto,)
            if processes == 1:
                mesh = jax.make_mesh((count,), ("data",), axis_types=auto, devices=available[:count])
            else:
                mesh = Mesh(np.array(_equally_many(available, count, processes)), ("data",), axis_types=auto)
            self.sync = MeshAxis(mesh, ("data",), scatter=name == "zero")
            self.common, self.local = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
        self.size, self.own = count, count // processes  # The numbers of devices: P, and those of this process.
        # The numbers of loader batches in a micro-step: from this process's loader, and over all processes.
        self.group, self.batches = (1, 1) if self.name == "dp" else (self.own, self.size)
        self._constants: dict[Any, jax.Array] = {}
        # On the CPU, passing host arrays to jit is faster than device_put.
        self._puts = count > 1 or available[0].platform != "cpu"

    def micro_steps(self, batches: int | None) -> int | float:
        """Returns the number of micro-steps for this many batches of this process's loader; infinite for None."""
        return math.inf if batches is None else -(-batches // self.group)

    def read(self, batch: Tree) -> Loaded:
        """Converts a loader batch as `loaded` does, and checks that its leaves can be spread over the devices."""
        read = loaded(batch)
        if self.size > 1:
            _check_entries(read, is_split=self.name == "dp")
        return read

    def pieces(self, batches: Sequence[Tree]) -> list[Piece]:
        """Returns the pieces of a micro-step of up to `group` loader batches, with their transfer started.

        Takes the `arrays` of batches returned by `read`. With several processes use `process_shards.pieces`.
        """
        if self.size == 1:
            return [self.sent(batches[0], _WHOLE)]
        if self.name == "dp":
            return self._split(batches[0])
        runs = [list(run) for _, run in itertools.groupby(batches, key=signature)]
        starts = itertools.accumulate(map(len, runs), initial=0)
        return [self._run(first, run) for first, run in zip(starts, runs, strict=False)]

    def sent(self, batch: Tree, place: Place) -> Piece:
        """Starts the transfer of a piece to the devices; `batch` is this process's part."""
        host, place_on_devices = batch, self.constant(place, np.int32)
        if self.process_count > 1:
            shape = lambda x: (self.process_count * len(x), *x.shape[1:])
            put = lambda x: jax.make_array_from_process_local_data(self.local, x, shape(x))
            host = batch = jax.tree.map(put, batch)
        elif self._puts:
            batch = jax.device_put(batch, self.local)
        return Piece(batch, place_on_devices, host, place.present == self.size)

    def _run(self, first: int, run: list[Tree]) -> Piece:
        """Returns a piece of batches with the same shape, on the devices from `first` on."""
        after = self.size - first - len(run)
        return self.sent(stacked(run[:1] * first + run + run[-1:] * after), Place(first, len(run), len(run)))

    def _split(self, batch: Tree) -> list[Piece]:
        """Splits a batch over all devices; the remainder goes to the first device only."""
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
        """Returns `value` on every device, cached to avoid a transfer per call."""
        constant = self._constants.get((value, dtype))
        if constant is None:
            constant = self._constants[value, dtype] = self.placed(np.asarray(value, dtype), self.common)
        return constant

    def placed(self, tree: Tree, sharding: Any) -> Tree:
        """Puts `tree`, which every process holds in full, on the devices, in buffers that may be donated."""
        if self.process_count == 1:
            # device_put(may_alias=False) doesn't copy what is replicated.
            return jax.device_put(jax.tree.map(jnp.copy, tree), sharding)
        return jax.tree.map(lambda x: _placed(x, sharding), tree)

    def held(self, tree: Tree) -> Tree:
        """Replicates `tree` over the devices, without a copy if it lies there."""
        if self.process_count == 1:
            return jax.device_put(tree, self.common)
        spans = any(isinstance(x, jax.Array) and not x.is_fully_addressable for x in jax.tree.leaves(tree))
        return tree if spans else self.placed(tree, self.common)

    def of_first(self, tree: Tree) -> Tree:
        """Broadcasts `tree` from process 0."""
        if self.process_count == 1:
            return tree
        data = jax.tree.map(lambda x: jax.random.key_data(x) if prng.is_typed(x) else x, tree)
        first = multihost_utils.broadcast_one_to_all(data)
        as_was = lambda x, old: jax.random.wrap_key_data(x, impl=jax.random.key_impl(old)) if prng.is_typed(old) else x
        return jax.tree.map(as_was, first, tree)

    def spread(self, tree: Tree) -> Tree:
        """Returns the shardings of an optimizer state: replicated, or with "zero" split over the devices."""
        if isinstance(self.sync, MeshAxis) and self.sync.scatter:
            return zero_sharding(tree, self.sync.mesh, self.sync.names)
        return jax.tree.map(lambda _: self.common, tree)


def _check_entries(read: Loaded, is_split: bool) -> None:
    """Checks that each leaf has a leading axis; if batches are split, with one entry per example."""
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


def _equally_many(available: Sequence[Any], count: int, processes: int) -> list[Any]:
    """Returns the devices to use, ordered by process: the first ones of each."""
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
