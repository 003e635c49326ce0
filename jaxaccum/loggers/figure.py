"""Plots a run."""

import itertools
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxaccum import _extras


def draw(history: Sequence[dict[str, float]], path: str | os.PathLike[str] | None) -> Any:
    """Plots losses, K and effective batch size over the samples seen; saves the figure if `path` is given.

    If the noise scale was logged, it is drawn with the windows' weight, which has its units, instead of the batch size.
    """
    figure = _extras.require("matplotlib.figure", "plots", "plot").Figure(figsize=(8, 6), layout="constrained")
    panels = figure.subplots(3, sharex=True, height_ratios=(3, 1, 1))
    names = dict.fromkeys(itertools.chain.from_iterable(history))
    for name in (name for name in names if name.endswith("loss")):
        _curve(panels[0], history, name, label=name)
    _curve(panels[1], history, "accumulate_grad_batches", label="K", drawstyle="steps-pre")
    panels[1].set(ylabel="micro-batches", ylim=(0, None))
    if "noise_scale" in names:
        _noise_scale(panels[2], [record for record in history if "noise_scale" in record])
    else:
        _curve(panels[2], history, "effective_batch_size", label="effective batch", drawstyle="steps-pre")
        panels[2].set(ylabel="examples", ylim=(0, None))
    panels[0].set_ylabel("loss")
    for axes, place in zip(panels, ("best", "lower right", "lower right"), strict=True):
        if axes.lines:
            axes.legend(loc=place)
    panels[2].set_xlabel("examples seen")
    if path is not None:
        figure.savefig(path)
    return figure


def _noise_scale(axes: Any, history: Sequence[dict[str, float]]) -> None:
    """Draws the weight of a window and the noise scale, with the part of its interval that these span."""
    _curve(axes, history, "window_weight", label="window", drawstyle="steps-pre")
    _curve(axes, history, "noise_scale", label="noise scale")
    axes.set(ylabel="weight", yscale="log")
    axes.set_ylim(axes.get_ylim())  # The upper end may be infinite.
    columns = ("samples_seen", "noise_scale_low", "noise_scale_high")
    samples, low, high = ([record[name] for record in history] for name in columns)
    axes.fill_between(samples, *np.clip([low, high], *axes.get_ylim()), color=axes.lines[-1].get_color(), alpha=0.2)


def _curve(axes: Any, history: Sequence[dict[str, float]], name: str, **style: Any) -> None:
    points = [(record["samples_seen"], record[name]) for record in history if name in record]
    if points:
        axes.plot(*zip(*points, strict=True), marker=".", **style)
