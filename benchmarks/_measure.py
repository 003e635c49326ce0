"""What the benchmarks share: interleaved timing, the record of a run, and the table made from it."""

import argparse
import dataclasses
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import optax

Tree = Any
Record = dict[str, Any]

WARMUP = 2  # untimed rounds: the first compiles, the second runs on buffers that were donated once
SETTLING, ROUND = 2, 3  # windows of a side's turn, off the clock and on it
OUT_OF_MEMORY = "out of memory"


@dataclasses.dataclass
class Side:
    """One way to do the work that a benchmark compares.

    Attributes:
      name: its row in the table.
      run: `run(carry) -> carry`, the work of one round. It is what is timed, from the first dispatch until the whole
        carry is ready, and may donate the carry.
      carry: parameters, state and whatever else goes from round to round.
      prepare: `prepare(carry) -> carry` before each round, off the clock.
    """

    name: str
    run: Callable[[Tree], Tree]
    carry: Tree
    prepare: Callable[[Tree], Tree] = lambda carry: carry


def interleave(sides: Sequence[Side], repeats: int) -> dict[str, list[float]]:
    """Times every side once a round, so that a slow moment of the machine hits all of them alike.

    The order rotates: no side always runs in the wake of the same other one. `WARMUP` rounds come first.

    Args:
      sides: what to compare. Their carries are left as the last round made them.
      repeats: the timed rounds.

    Returns:
      Each side's times in seconds, in the order of the rounds.
    """
    seconds = {side.name: [] for side in sides}
    for turn in range(WARMUP + repeats):
        first = turn % len(sides)
        for side in [*sides[first:], *sides[:first]]:
            carry = jax.block_until_ready(side.prepare(side.carry))
            start = time.perf_counter()
            side.carry = jax.block_until_ready(side.run(carry))
            seconds[side.name].append(time.perf_counter() - start)
    return {name: times[WARMUP:] for name, times in seconds.items()}


def interleave_windows(sides: Sequence[Side], repeats: int) -> dict[str, list[float]]:
    """`interleave` for sides whose run is a window: rounds of `ROUND` windows, after `SETTLING` off the clock.

    A program whose buffers lie where those of its last run lay starts faster, as it does in training.

    Returns:
      Each side's times of a window.
    """

    def train(side, carry, count):
        for _ in range(count):
            carry = side.run(carry)
        return carry

    def in_turns(side):
        settled = lambda carry: train(side, side.prepare(carry), SETTLING)
        return Side(side.name, lambda carry: train(side, carry, ROUND), side.carry, settled)

    turns = [in_turns(side) for side in sides]
    seconds = interleave(turns, repeats)
    for side, turn in zip(sides, turns, strict=True):
        side.carry = turn.carry
    return {name: [time / ROUND for time in times] for name, times in seconds.items()}


def environment() -> dict[str, Any]:
    """The machine and the versions that a run was made with."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    device = jax.devices()[0]
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "platform": device.platform,
        "device": device.device_kind,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "optax": optax.__version__,
        "jaxaccum": project["version"],
    }


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What a benchmark's tables show.

    Attributes:
      floor: the side that costs the least that the work can cost.
      rival: the side that does it the other way.
      columns: further columns: what to write for a side, `columns[header](case, side)`.
    """

    floor: str
    rival: str
    columns: dict[str, Callable[[Record, str], str]]

    def table(self, record: Record) -> str:
        """The markdown of a run: a table for each case, with a row for each side.

        A cell of times is a ratio of medians and, in brackets, the side's fastest and slowest round over the same
        median of the floor. Milliseconds are shown for accelerators only: those of a shared CPU mean nothing elsewhere.

        Args:
          record: what `finish` wrote. A case may say in `failed` why a side has no times; then its row does.
        """
        absolute = record["environment"]["platform"] != "cpu"
        lines = [heading(record)]
        for case in record["cases"]:
            header = [case["name"], f"time / {self.floor}", f"{self.rival} / time", *self.columns, *["ms"] * absolute]
            lines += ["", row(header), row(["---"] * len(header))]
            medians = {name: statistics.median(times) for name, times in case["seconds"].items()}
            for name, median in medians.items():
                floor, times = medians[self.floor], case["seconds"][name]
                cells = [
                    name,
                    f"{median / floor:.2f} ({min(times) / floor:.2f} to {max(times) / floor:.2f})",
                    f"{medians[self.rival] / median:.2f}" if self.rival in medians else "–",
                    *[cell(case, name) for cell in self.columns.values()],
                    *[f"{1e3 * median:.2f}"] * absolute,
                ]
                lines.append(row(cells))
            for name, why in case.get("failed", {}).items():
                lines.append(row([name, why, *[""] * (len(header) - 2)]))
        return "\n".join(lines)

    def finish(self, out: Path | None, settings: Record, cases: Sequence[Record]) -> None:
        """Prints a run's table and writes its record.

        Args:
          out: a file for the record, or None.
          settings: the options that the numbers depend on.
          cases: for each, its `name`, its `seconds` (raw times) by side, and whatever the columns show.
        """
        publish({"environment": environment(), "settings": settings, "cases": cases}, self.table, out)


def publish(record: Record, table: Callable[[Record], str], out: Path | None) -> None:
    """Writes the record of a run to `out`, unless that is None, and prints its table, made from what was written."""
    text = json.dumps(record, indent=1)
    if out is not None:
        out.write_text(text + "\n")
    print(table(json.loads(text)))


def reason(error: Exception) -> str:
    """Why a side failed, in a table's cell."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" in text:
        return OUT_OF_MEMORY
    return f"{type(error).__name__}: {text.strip().splitlines()[0][:200] if text.strip() else ''}".replace("|", "/")


def in_a_process(script: str, case: Record) -> Record:
    """What `script --case CASE` prints last, as JSON, in a process of its own. Its failure is the case's result."""
    done = subprocess.run(
        [sys.executable, script, "--case", json.dumps(case)], check=False, capture_output=True, text=True
    )
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    return {"failed": OUT_OF_MEMORY if "RESOURCE_EXHAUSTED" in done.stderr else done.stderr.strip()[-200:]}


def heading(record: Record) -> str:
    """The line over the tables: when, on what, with which versions and options."""
    env, settings = record["environment"], record["settings"]
    machine = f"CPU, {env['cores']} cores" if env["platform"] == "cpu" else env["device"]
    used = ", ".join(f"{key} {value}" for key, value in settings.items())
    return (
        f"{env['date']}: {machine}; jax {env['jax']}, optax {env['optax']}, jaxaccum {env['jaxaccum']}, "
        f"Python {env['python']}; {used}."
    )


def row(cells: Sequence[str]) -> str:
    """A table's line of markdown."""
    return f"| {' | '.join(cells)} |"


def parser(description: str, timed: bool = True) -> argparse.ArgumentParser:
    """The options that every benchmark has; `timed`, also the number of rounds."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if timed:
        result.add_argument("--repeats", type=int, default=9, help="timed rounds")
    result.add_argument("--out", type=Path, metavar="FILE.json", help="write the record, with all raw times, here")
    result.add_argument("--table", type=Path, metavar="FILE.json", help="only print the table of a record")
    return result


@jax.jit
def difference(params: Tree, reference: Tree, start: Tree) -> jax.Array:
    """The largest distance of a leaf from its reference, relative to the way that the reference has gone.

    Norms of leaves, not elements: where a mean gradient is nearly 0 its sign, which is all that a first Adam step looks
    at, is a matter of rounding.
    """
    distance = lambda p, r, s: jnp.linalg.norm(p - r) / jnp.linalg.norm(r - s)
    return jnp.max(jnp.stack(jax.tree.leaves(jax.tree.map(distance, params, reference, start))))


def difference_cell(case: Record, side: str) -> str:
    """The column of a case's `difference` by side, where there is one."""
    return f"{case['difference'][side]:.0e}" if side in case["difference"] else "–"
