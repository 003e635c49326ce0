"""Plots a run."""

import itertools
import os
from collections.abc import Sequence
from typing import Any

from jaxaccum import _extras


def draw(history: Sequence[dict[str, float]], path: str | os.PathLike[str] | None) -> Any:
    """Plots losses, K and effective batch size over the samples seen; saves the figure if `path` is given."""
    figure = _extras.require("matplotlib.figure", "plots", "plot").Figure(figsize=(8, 6), layout="constrained")
    panels = figure.subplots(3, sharex=True, height_ratios=(3, 1, 1))
    names = dict.fromkeys(itertools.chain.from_iterable(history))
    for name in (name for name in names if name.endswith("loss")):
        _curve(panels[0], history, name, label=name)
    for axes, name, label, unit in (
        (panels[1], "accumulate_grad_batches", "K", "micro-batches"),
        (panels[2], "effective_batch_size", "effective batch", "examples"),
    ):
        _curve(axes, history, name, label=label, drawstyle="steps-pre")
        axes.set(ylabel=unit, ylim=(0, None))
    panels[0].set_ylabel("loss")
    for axes, place in zip(panels, ("best", "lower right", "lower right"), strict=True):
        if axes.lines:
            axes.legend(loc=place)
    panels[2].set_xlabel("examples seen")
    if path is not None:
        figure.savefig(path)
    return figure


def _curve(axes: Any, history: Sequence[dict[str, float]], name: str, **style: Any) -> None:
    points = [(record["samples_seen"], record[name]) for record in history if name in record]
    if points:
        axes.plot(*zip(*points, strict=True), marker=".", **style)
