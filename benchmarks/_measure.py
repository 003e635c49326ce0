"""What the benchmarks share: interleaved timing, the record of a run, and the table made from it."""

import argparse
import dataclasses
import datetime
import json
import os
import platform
import statistics
import time
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jaxlib
import optax

Tree = Any
Record = dict[str, Any]

WARMUP = 2  # untimed rounds: the first compiles, the second runs on buffers that were donated once
FLOOR, RIVAL = "floor", "optax.MultiSteps"  # the two sides that every table compares with


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


def table(record: Record) -> str:
    """The markdown of a run: a table for each case, with a row for each side.

    A cell is a ratio of medians and, in brackets, the side's fastest and slowest round over the same median of the
    floor. Milliseconds are shown for accelerators only: those of a shared CPU mean nothing elsewhere.

    Args:
      record: what `finish` wrote.
    """
    env, settings = record["environment"], record["settings"]
    absolute = env["platform"] != "cpu"
    machine = env["device"] if absolute else f"CPU, {env['cores']} cores"
    used = ", ".join(f"{key} {value}" for key, value in settings.items())
    lines = [
        f"{env['date']}: {machine}; jax {env['jax']}, optax {env['optax']}, jaxaccum {env['jaxaccum']}, "
        f"Python {env['python']}; {used}."
    ]
    for case in record["cases"]:
        header = [case["name"], f"time / {FLOOR}", f"{RIVAL} / time", "difference", *["ms"] * absolute]
        lines += ["", _row(header), _row(["---"] * len(header))]
        medians = {name: statistics.median(times) for name, times in case["seconds"].items()}
        for name, median in medians.items():
            floor, times = medians[FLOOR], case["seconds"][name]
            cells = [
                name,
                f"{median / floor:.2f} ({min(times) / floor:.2f} to {max(times) / floor:.2f})",
                f"{medians[RIVAL] / median:.2f}",
                f"{case['difference'][name]:.0e}",
                *[f"{1e3 * median:.2f}"] * absolute,
            ]
            lines.append(_row(cells))
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def parser(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--repeats", type=int, default=9, help="timed rounds")
    result.add_argument("--out", type=Path, metavar="FILE.json", help="write the record, with all raw times, here")
    result.add_argument("--table", type=Path, metavar="FILE.json", help="only print the table of a record")
    return result


def finish(out: Path | None, settings: dict[str, Any], cases: Sequence[dict[str, Any]]) -> None:
    """Prints a run's table and writes its record.

    Args:
      out: a file for the record, or None.
      settings: the options that the numbers depend on.
      cases: for each, its `name`, and by side its `seconds` (raw times) and its `difference` from the floor's result.
    """
    record = {"environment": environment(), "settings": settings, "cases": cases}
    print(table(record))
    if out is not None:
        out.write_text(json.dumps(record, indent=1) + "\n")
