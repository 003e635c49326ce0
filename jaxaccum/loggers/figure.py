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
    for axes, name, label in (
        (panels[1], "accumulate_grad_batches", "K"),
        (panels[2], "effective_batch_size", "batch"),
    ):
        _curve(axes, history, name, drawstyle="steps-pre")
        axes.set_ylabel(label)
    panels[0].set_ylabel("loss")
    if panels[0].lines:
        panels[0].legend()
    panels[2].set_xlabel("samples seen")
    if path is not None:
        figure.savefig(path)
    return figure


def _curve(axes: Any, history: Sequence[dict[str, float]], name: str, **style: Any) -> None:
    points = [(record["samples_seen"], record[name]) for record in history if name in record]
    if points:
        axes.plot(*zip(*points, strict=True), marker=".", **style)
