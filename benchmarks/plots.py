"""The figures of records: times over the floor's, with the fastest and the slowest round; memory over K; losses.

    PYTHONPATH=. python benchmarks/plots.py benchmarks/results/window-unrolled-h100.json

writes `window-unrolled-h100.svg` beside the record, and

    PYTHONPATH=. python benchmarks/plots.py --summary benchmarks/results/summary.svg

the figure of the top README, from three records.
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

RESULTS = Path(__file__).parent / "results"
OURS, OTHERS, INK, PAPER = "#2f6fbb", "#8a8f98", "#1f2328", "#ffffff"
# A dark page gets light ink on dark paper.
DARK = f"""<style>@media (prefers-color-scheme: dark) {{
[style*="fill: {INK}"] {{ fill: #e6edf3 !important }}
[style*="fill: {PAPER}"] {{ fill: #0d1117 !important }}
}}</style>"""


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


def curves(record: Record) -> Figure:
    """Held-out loss over samples and over optimizer steps: of each policy the median over the seeds."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for policy in dict.fromkeys(run["policy"] for run in record["runs"]):
        points = zip(*(run["curve"] for run in record["runs"] if run["policy"] == policy), strict=True)
        samples, steps, losses = zip(
            *([statistics.median(x) for x in zip(*p, strict=True)] for p in points), strict=True
        )
        width = 2.2 if policy.startswith("adaptive") else 1.1
        for axes, x in zip(panels, (samples, steps), strict=True):
            axes.plot(x, losses, linewidth=width, label=policy)
    panels[0].set(xlabel="samples", ylabel="held-out bits per byte")
    panels[1].set(xlabel="optimizer steps", xscale="log")
    panels[1].legend(fontsize=7)
    return figure


def summary() -> Figure:
    """Ours beside others: time over the floor, time beside Lightning, temporary memory; each panel is one run."""
    window, lightning, memory = (
        json.loads((RESULTS / f"{name}.json").read_text())
        for name in ("window-unrolled-h100", "beside_lightning-trainer-h100", "memory-weighted-1.3B-h100")
    )
    medians = lambda case: {side: statistics.median(times) for side, times in case["seconds"].items()}
    steps = medians(window["cases"][0])
    lightnings = next(medians(case) for case in lightning["cases"] if case["n"] == 1)
    temporary = {case["side"]: case["temp"] / 1024 for case in memory["cases"]}
    panels = [
        (
            "time / floor (124M)",
            "{:.2f}",
            {
                'prepare="auto"': (steps["window, auto"] / steps["floor"], OURS),
                "window": (steps["window"] / steps["floor"], OURS),
                "HostDriven": (steps["host driven"] / steps["floor"], OURS),
                "scan by hand": (steps["hand-written scan"] / steps["floor"], OTHERS),
                "optax.microbatch": (steps["optax.microbatch"] / steps["floor"], OTHERS),
                "optax.MultiSteps": (steps["optax.MultiSteps"] / steps["floor"], OTHERS),
            },
        ),
        (
            "time / our Trainer (124M)",
            "{:.2f}",
            {
                "Trainer": (1.0, OURS),
                "Lightning": (lightnings["Lightning, default"] / lightnings["jaxaccum, Trainer"], OTHERS),
            },
        ),
        (
            "temporary GiB (1.3B)",
            "{:.1f}",
            {
                "one gradient": (temporary["gradient"], OTHERS),
                "window": (temporary["window"], OURS),
                'prepare="auto"': (temporary["window, auto"], OURS),
                "scan by hand": (temporary["hand-written scan"], OTHERS),
            },
        ),
    ]
    figure = Figure(figsize=(8.6, 2.3), layout="constrained", facecolor=PAPER)
    for axes, (title, digits, bars) in zip(figure.subplots(1, 3, width_ratios=(6, 4, 4)), panels, strict=True):
        values, colors = zip(*bars.values(), strict=True)
        drawn = axes.barh(list(bars), values, color=colors, height=0.7)
        axes.bar_label(drawn, [digits.format(value) for value in values], padding=3, color=INK, fontsize=9)
        axes.set(xlim=(0, 1.25 * max(values)), ylim=(5.5, -0.5), xticks=[])
        axes.set_title(title, color=INK, fontsize=9.5, loc="left")
        axes.tick_params(axis="y", length=0, labelcolor=INK, labelsize=9)
        axes.set_facecolor("none")
        axes.spines[:].set_visible(False)
    return figure


def main() -> None:
    """Draws the records that the command line names."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("records", nargs="*", type=Path, metavar="FILE.json")
    options.add_argument("--summary", type=Path, metavar="FILE.svg", help="where to draw the figure of the README")
    given = options.parse_args()
    for path in given.records:
        record, kind = json.loads(path.read_text()), path.stem.split("-")[0]
        draw = {"memory": memory, "adaptive": curves}.get(kind)
        figure = draw(record) if draw else times(record, importlib.import_module(kind).COMPARISON.floor)
        with matplotlib.rc_context({"svg.hashsalt": "jaxaccum"}):  # Drawn again, the file is the same.
            figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    if given.summary:
        with matplotlib.rc_context({"svg.hashsalt": "jaxaccum"}):
            summary().savefig(given.summary, metadata={"Date": None})
        given.summary.write_text(given.summary.read_text().replace("<defs>", f"{DARK}<defs>", 1))


if __name__ == "__main__":
    main()
