"""The value that a callback monitors: its name, its current value, and which values are better."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxaccum.callbacks.base import TrainerView


class Monitor(NamedTuple):
    """A monitored value. The Trainer reads it from a callback's `monitored` attribute."""

    name: str  # In `trainer.callback_metrics`.
    mode: str  # "min" or "max": whether lower or higher is better.
    warns: bool = False  # Whether the callback itself warns of a run without a value.

    @classmethod
    def of(cls, callback: Any) -> "Monitor | None":
        """Returns what a callback monitors, or None."""
        found = getattr(callback, "monitored", None)
        return found if isinstance(found, Monitor) else None

    @property
    def needs_validation(self) -> bool:
        """Whether the value is a result of validation."""
        return self.name.startswith("val_")

    @property
    def worst(self) -> float:
        """The value that every other one improves on."""
        return math.inf if self.mode == "min" else -math.inf

    def value(self, trainer: TrainerView) -> float | None:
        """Returns the value; None if the first window, epoch or validation may still provide it.

        Raises:
          ValueError: if the value is missing and will not become available.
        """
        metrics = trainer.callback_metrics
        if self.name in metrics:
            return float(metrics[self.name])
        if self._may_come(trainer, metrics):
            return None
        raise ValueError(
            f"monitor={self.name!r} is not among what is logged: {sorted(metrics)}. Pass one of these, or have a "
            "callback log it with trainer.log before it is looked at."
        )

    def _may_come(self, trainer: TrainerView, metrics: Mapping[str, float]) -> bool:
        """Whether the first window, epoch or validation may still provide the value."""
        kind = "train" if self.name == "grad_norm" else self.name.partition("_")[0]
        if kind == "train" and self.name.endswith("_epoch") and not trainer.current_epoch:
            return True
        return kind in ("train", "val") and not any(name.startswith(f"{kind}_") for name in metrics)


def check_mode(mode: str) -> None:
    """Raises ValueError if `mode` is neither "min" nor "max"."""
    if mode not in ("min", "max"):
        raise ValueError(f"mode must be 'min' or 'max', got {mode!r}.")
