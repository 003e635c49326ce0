"""What `plan` returns: sizes, the memory of each by kind, as a table and as a figure."""

import dataclasses
import itertools
import os
from typing import Any, NamedTuple

from jaxaccum import _extras


class Memory(NamedTuple):
    """Bytes of one device at the peak of a step, by kind.

    Attributes:
      parameters: the parameters, and model state.
      optimizer: the optimizer's state.
      batch: the examples of a window.
      sums: the gradient sums.
      activations: all else that the step holds at once, mostly activations.
    """

    parameters: int
    optimizer: int
    batch: int
    sums: int
    activations: int

    @property
    def total(self) -> int:
        """The peak."""
        return sum(self)


class Trial(NamedTuple):
    """A size that was compiled.

    Attributes:
      micro_batch_size: N, the examples of a micro-batch on each device.
      every_k: K.
      memory: None if the compiler itself ran out of memory.
      fits: whether the peak is within the limit.
      seconds: the time of a window; None if it was not measured.
    """

    micro_batch_size: int
    every_k: int
    memory: Memory | None
    fits: bool
    seconds: float | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """A micro-batch that fits, and the window that it makes; `str` of it is a table.

    Attributes:
      micro_batch_size: N, the examples of a micro-batch on each device.
      every_k: K, the micro-batches of a window.
      devices: P, the devices of the data axis. P·N·K is the target.
      memory_limit: bytes of one device.
      trials: the sizes that were compiled, smallest first.
      alternatives: the peaks that other options would have at this size, by option; None for one that the compiler
        could not compile for want of memory.
    """

    micro_batch_size: int
    every_k: int
    devices: int
    memory_limit: int
    trials: tuple[Trial, ...]
    alternatives: dict[str, Memory | None]

    @property
    def memory(self) -> Memory:
        """The step's peak, by kind."""
        (memory,) = (trial.memory for trial in self.trials if trial.micro_batch_size == self.micro_batch_size)
        assert memory is not None
        return memory

    def __str__(self) -> str:
        each = f" on each of {self.devices} devices" if self.devices > 1 else ""
        lines = [
            f"micro_batch_size={self.micro_batch_size}, every_k={self.every_k}: "
            f"{in_units(self.memory.total)} of {in_units(self.memory_limit)}{each}",
            "",
            *_table(["N", "K", *_KINDS, "fits", *["ms"] * self._is_timed], map(self._row, self.trials)),
        ]
        if self.alternatives:
            rows = ([name, *_cells(memory)] for name, memory in self.alternatives.items())
            lines += ["", *_table([f"N = {self.micro_batch_size}, with", *_KINDS], rows)]
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Plots the memory of each size by kind, and the limit; saves the figure if `path` is given.

        Returns:
          The `matplotlib.figure.Figure`.

        Raises:
          ImportError: without matplotlib.
        """
        figure = _extras.require("matplotlib.figure", "plots", "plot").Figure(figsize=(6, 3.2), layout="constrained")
        axes = figure.subplots()
        known = [(str(trial.micro_batch_size), trial.memory) for trial in self.trials if trial.memory is not None]
        names, memories = zip(*known, strict=True)
        tops = [0.0] * len(names)
        for kind, sizes in zip(Memory._fields, zip(*memories, strict=True), strict=True):
            heights = [size / 2**30 for size in sizes]
            axes.bar(names, heights, bottom=tops, label=kind)
            tops = [top + height for top, height in zip(tops, heights, strict=True)]
        axes.axhline(self.memory_limit / 2**30, color="black", linewidth=0.8)
        axes.set(xlabel="N", ylabel="GiB")
        axes.legend(fontsize=7)
        if path is not None:
            figure.savefig(path)
        return figure

    @property
    def _is_timed(self) -> bool:
        return any(trial.seconds is not None for trial in self.trials)

    def _row(self, trial: Trial) -> list[str]:
        n, k, memory, fits, seconds = trial
        time = "–" if seconds is None else f"{1e3 * seconds:.4g}"
        return [str(n), str(k), *_cells(memory), "yes" if fits else "no", *[time] * self._is_timed]


_KINDS = (*Memory._fields, "peak")


def in_units(size: int) -> str:
    """Returns a number of bytes in the largest unit of which there is one."""
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if size >= 1024**power:
            return f"{size / 1024**power:.2f} {unit}"
    return f"{size} B"


def _cells(memory: Memory | None) -> list[str]:
    return ["–"] * len(_KINDS) if memory is None else [*map(in_units, memory), in_units(memory.total)]


def _table(header: list[str], rows: Any) -> list[str]:
    """Returns the lines of a markdown table with aligned columns."""
    table = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    line = lambda cells: f"| {' | '.join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))} |"
    rule = f"|{'|'.join('-' * (width + 1) + ':' for width in widths)}|"
    return [line(header), rule, *map(line, itertools.islice(table, 1, None))]
