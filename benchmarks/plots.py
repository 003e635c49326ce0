"""The figures of records: times beside the floor's as bars, with the fastest and the slowest round; memory over K.

    PYTHONPATH=. python benchmarks/plots.py benchmarks/results/window-unrolled-h100.json

writes `window-unrolled-h100.svg` beside the record.
"""

import argparse
import importlib
import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

Record = dict[str, Any]


def times(record: Record, floor: str) -> Figure:
    """Medians over the floor's, one panel for each case."""
    cases = record["cases"]
    rows = max(len(case["seconds"]) for case in cases)
    figure = Figure(figsize=(1 + 5 * len(cases), 0.6 + 0.28 * rows), layout="constrained")
    panels = figure.subplots(1, len(cases), squeeze=False)
    for axes, case in zip(panels[0], cases, strict=True):
        base = statistics.median(case["seconds"][floor])
        sides = list(case["seconds"])
        ratios = [sorted(x / base for x in case["seconds"][side]) for side in sides]
        medians = [statistics.median(x) for x in ratios]
        below = [median - x[0] for median, x in zip(medians, ratios, strict=True)]
        above = [x[-1] - median for median, x in zip(medians, ratios, strict=True)]
        bars = axes.barh(sides, medians, xerr=[below, above], color="#4c78a8", ecolor="#aaaaaa")
        axes.bar_label(bars, [f"{median:.2f}" for median in medians], label_type="center", color="white")
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set(xlim=(0, 1.35 * max(medians)), xlabel=f"time / {floor}", title=case["name"])
        axes.invert_yaxis()
    return figure


def memory(record: Record) -> Figure:
    """Temporary memory over K, a line for each side."""
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    cases = [case for case in record["cases"] if "temp" in case]
    for side in dict.fromkeys(case["side"] for case in cases):
        points = [(case["k"], case["temp"]) for case in cases if case["side"] == side]
        axes.plot(*zip(*points, strict=True), marker="o", label=side)
    axes.set(xscale="log", yscale="log", xlabel="K", ylabel="temporary MiB")
    axes.legend(fontsize=7)
    return figure


def main() -> None:
    """Draws the records that the command line names."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("records", nargs="+", type=Path, metavar="FILE.json")
    for path in options.parse_args().records:
        record, kind = json.loads(path.read_text()), path.stem.split("-")[0]
        figure = memory(record) if kind == "memory" else times(record, importlib.import_module(kind).COMPARISON.floor)
        with matplotlib.rc_context({"svg.hashsalt": "jaxaccum"}):  # Drawn again, the file is the same.
            figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
