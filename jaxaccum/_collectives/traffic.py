"""`Collective` and `Collectives`: counts by kind, axis and location, and a summary in words."""

import collections
import dataclasses
import math
from typing import Any

from jaxaccum._collectives.replica_groups import KINDS, Groups


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a compiled program.

    Attributes:
      kind: one of `KINDS`.
      groups: the groups of participating devices, as sorted positions in `mesh.devices.flat`; for a
        collective-permute, the (source, target) pairs.
      axes: the mesh axes along which the devices of a group differ; None if no mesh was given.
      operands: the number of array operands.
      num_bytes: the operands' size on one device; for an all-gather, the size of its result.
      where: the enclosing "loop"s and "conditional"s, outermost first.
      trip_counts: the number of iterations of each of those loops; None if XLA does not know it.
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
        """Whether it runs in every iteration of a loop, with no conditional inside that loop."""
        return self.where[-1:] == ("loop",)

    @property
    def times(self) -> int | None:
        """How often it runs per call, an upper bound inside a conditional; None if XLA does not know."""
        known = [count for count in self.trip_counts if count is not None]
        return math.prod(known) if len(known) == len(self.trip_counts) else None


@dataclasses.dataclass(frozen=True)
class Collectives:
    """The result of `collectives`; `print` it for a summary.

    Attributes:
      all: every collective, in program order.
      mesh: the mesh that was given, or None.
      data_axes: the mesh's data axes; empty without a mesh.
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
        """The number of collectives that match all conditions.

        Args:
          kind: one of "all-reduce", "reduce-scatter", "all-gather", "all-to-all", "ragged-all-to-all",
            "collective-permute", "collective-broadcast".
          axis: a mesh axis, or a tuple of axes that must all match; a collective may run over other axes too.
          in_loop: True for those inside a loop, False for those outside.
          in_conditional: True for those in a branch of a conditional, False for those outside.

        Returns:
          The number of matching collectives in the program, however often they run.

        Raises:
          ValueError: if the kind or axis does not exist, or if `axis` is given without a mesh.
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
        """The number of collectives for each set of mesh axes; without a mesh, the total, under None."""
        return dict(collections.Counter(one.axes for one in self.all))

    def __str__(self) -> str:
        if not self.all:
            return "No collectives: every device works on its own."
        alike = collections.defaultdict(list)
        for one in self.all:
            alike[one.kind, self._over(one), _place(one)].append(one)
        lines = [
            f"{_counted(len(ones), kind)} {over}, {_size(sum(one.num_bytes for one in ones))}, {place}"
            for (kind, over, place), ones in alike.items()
        ]
        return "\n".join(
            [f"{_counted(len(self.all), 'collective')}:", *(f"- {line}" for line in lines), self._verdict()]
        )

    def _over(self, one: Collective) -> str:
        """The devices or axes of a collective, in words."""
        size = max(map(len, one.groups))
        if one.axes is None:
            return f"over {len(one.groups)} groups of {size} devices" if len(one.groups) > 1 else f"over {size} devices"
        whole = one.kind == "collective-permute" or size == math.prod(self.mesh.shape[name] for name in one.axes)
        return f"over {'' if whole else 'parts of '}{_quoted(one.axes)}"

    def _verdict(self) -> str:
        """Whether the reduction is deferred, and the remedy if it is not."""
        ours = [one for one in self.all if self.mesh is None or set(self.data_axes) & set(one.axes or ())]
        over = f"Over {_quoted(self.data_axes)}" if self.mesh is not None else "Over all axes (mesh= would name them)"
        if not ours:
            return f"{over} nothing runs: this program doesn't synchronise."
        repeated = collections.Counter(one.kind for one in ours if one.every_iteration)
        if repeated:
            runs = " and ".join(_counted(number, kind) for kind, number in repeated.items())
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
    """Where a collective is and how often it runs per call, in words."""
    if not one.where:
        return "outside of loops"
    times = {None: "how often is not known", 1: "once a call"}.get(one.times, f"{one.times} times a call")
    at_most = "at most " if one.in_conditional and one.times is not None else ""
    return f"{', there '.join(f'in a {frame}' for frame in one.where)}: {at_most}{times}"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number > 1 else ''}"


def _quoted(names: tuple[str, ...]) -> str:
    return " and ".join(map(repr, names))


def _size(num_bytes: int) -> str:
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    power = min(max(num_bytes.bit_length() - 1, 0) // 10, len(units) - 1)
    return f"{num_bytes / 1024**power:.1f} {units[power]}" if power else f"{num_bytes} B"
