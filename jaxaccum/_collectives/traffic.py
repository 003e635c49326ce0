"""What a program moves between devices, as values: counted by kind, axis and place, and told in words."""

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from jaxaccum._collectives.replica_groups import KINDS, Groups


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a compiled program.

    Attributes:
      kind: one of `KINDS`.
      groups: which devices take part together, as positions in `mesh.devices.flat`, sorted; of a collective-permute
        the pairs of source and target.
      axes: the mesh's axes along which the devices of a group differ; None if no mesh was given.
      operands: how many arrays it takes.
      num_bytes: their size on one device; of an all-gather, the size of what it gathers.
      where: the "loop"s and "conditional"s that it is in, from the outside in.
      trip_counts: for each of those loops its number of iterations, None where XLA doesn't know it.
    """

    kind: str
    groups: Groups
    axes: tuple[str, ...] | None
    operands: int
    num_bytes: int
    where: tuple[str, ...] = ()
    trip_counts: tuple[int | None, ...] = ()

    @property
    def in_loop(self) -> bool:
        """Whether it is inside a loop."""
        return "loop" in self.where

    @property
    def in_conditional(self) -> bool:
        """Whether it is inside a branch of a conditional."""
        return "conditional" in self.where

    @property
    def every_iteration(self) -> bool:
        """Whether it runs in every iteration of a loop: no conditional inside that loop decides."""
        return self.where[-1:] == ("loop",)

    @property
    def times(self) -> int | None:
        """How often a call runs it, at most where a conditional decides; None if XLA doesn't know that."""
        known = [count for count in self.trip_counts if count is not None]
        return math.prod(known) if len(known) == len(self.trip_counts) else None


@dataclasses.dataclass(frozen=True)
class Collectives:
    """What `collectives` returns; `print` it, or count.

    Attributes:
      all: every collective, in the order of the program.
      mesh: the mesh it was given.
      data_axes: that mesh's data axes; empty without a mesh.
    """

    all: tuple[Collective, ...]
    mesh: Any
    data_axes: tuple[str, ...]

    def count(
        self,
        kind: str | None = None,
        *,
        axis: Any = None,
        in_loop: bool | None = None,
        in_conditional: bool | None = None,
    ) -> int:
        """The number of collectives that are all that is asked for.

        Args:
          kind: one of "all-reduce", "reduce-scatter", "all-gather", "all-to-all", "ragged-all-to-all",
            "collective-permute", "collective-broadcast".
          axis: those over this axis of the mesh, or over all of these, alone or together with others.
          in_loop: those in a loop, or those in none.
          in_conditional: those in a branch of a conditional, or those in none.

        Returns:
          How many there are in the program, however often they run.

        Raises:
          ValueError: if there is no such kind or axis, or `axis` is given where no mesh was.
        """
        if kind is not None and kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}.")
        axes = () if axis is None else axis if isinstance(axis, tuple) else (axis,)
        if axes and self.mesh is None:
            raise ValueError(f"axis={axis!r} needs the mesh: jaxaccum.collectives(compiled, mesh=mesh).")
        missing = [name for name in axes if name not in self.mesh.axis_names]
        if missing:
            raise ValueError(f"axis={axis!r}: the mesh has no axis {missing[0]!r}, only {self.mesh.axis_names}.")
        return sum(
            (kind is None or one.kind == kind)
            and set(axes) <= set(one.axes or ())
            and in_loop in (None, one.in_loop)
            and in_conditional in (None, one.in_conditional)
            for one in self.all
        )

    def by_groups(self) -> dict[Groups, int]:
        """The number of collectives for each set of groups."""
        return dict(collections.Counter(one.groups for one in self.all))

    def by_axes(self) -> dict[tuple[str, ...] | None, int]:
        """The number of collectives for each set of the mesh's axes; of all, under None, if no mesh was given."""
        return dict(collections.Counter(one.axes for one in self.all))

    def __str__(self) -> str:
        if not self.all:
            return "No collectives: every device works on its own."
        alike = collections.defaultdict(list)
        for one in self.all:
            alike[one.kind, self._over(one), _place(one)].append(one)
        lines = [
            f"{_counted(ones, kind)} {over}, {_size(sum(one.num_bytes for one in ones))}, {place}"
            for (kind, over, place), ones in alike.items()
        ]
        return "\n".join([f"{_counted(self.all, 'collective')}:", *(f"- {line}" for line in lines), self._verdict()])

    def _over(self, one: Collective) -> str:
        """Over what a collective is, in words."""
        size = max(map(len, one.groups))
        if one.axes is None:
            return f"over {len(one.groups)} groups of {size} devices" if len(one.groups) > 1 else f"over {size} devices"
        whole = one.kind == "collective-permute" or size == math.prod(self.mesh.shape[name] for name in one.axes)
        return f"over {'' if whole else 'parts of '}{_quoted(one.axes)}"

    def _verdict(self) -> str:
        """Whether the sync is deferred, and what to do if it is not."""
        ours = [one for one in self.all if self.mesh is None or set(self.data_axes) & set(one.axes or ())]
        over = f"Over {_quoted(self.data_axes)}" if self.mesh is not None else "Over all axes (mesh= would name them)"
        if not ours:
            return f"{over} nothing runs: this program doesn't synchronise."
        repeated = collections.defaultdict(list)
        for one in ours:
            if one.every_iteration:
                repeated[one.kind].append(one)
        if repeated:
            runs = " and ".join(_counted(ones, kind) for kind, ones in repeated.items())
            return (
                f"{over} every iteration of a loop runs {runs}. If that is the loop over micro-batches, the sync is "
                "NOT deferred: a window pays for it K times. Sum on each device and reduce once a window, as "
                "jaxaccum.value_and_grad and jaxaccum.MultiSteps do with mesh= or axis_name=."
            )
        if not any(one.kind in ("all-reduce", "reduce-scatter") for one in ours):
            return f"{over} nothing is reduced: this program doesn't synchronise."
        if all(one.in_conditional for one in ours):
            return f"{over} nothing runs but where a conditional decides: the sync is deferred."
        return (
            f"{over} nothing runs inside a loop: the sync is deferred if a call is a window or its boundary, and not "
            "if it is one micro-step of several."
        )


def _place(one: Collective) -> str:
    """Where a collective is, and how often a call runs it."""
    if not one.where:
        return "outside of loops"
    times = {None: "how often is not known", 1: "once a call"}.get(one.times, f"{one.times} times a call")
    at_most = "at most " if one.in_conditional and one.times is not None else ""
    return f"{', there '.join(f'in a {frame}' for frame in one.where)}: {at_most}{times}"


def _counted(ones: Sequence[Collective], noun: str) -> str:
    return f"{len(ones)} {noun}{'s' if len(ones) > 1 else ''}"


def _quoted(names: tuple[str, ...]) -> str:
    return " and ".join(map(repr, names))


def _size(num_bytes: int) -> str:
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    power = min(max(num_bytes.bit_length() - 1, 0) // 10, len(units) - 1)
    return f"{num_bytes / 1024**power:.1f} {units[power]}" if power else f"{num_bytes} B"
