"""The value that a callback monitors: its name, its current value, and which values are better."""

import math

from jaxaccum.callbacks.base import TrainerView


def monitored(trainer: TrainerView, monitor: str) -> float | None:
    """Returns the monitored value; None if the first window or validation may still provide it.

    Raises:
      ValueError: if the value is missing and will not become available.
    """
    metrics, kind = trainer.callback_metrics, monitor.partition("_")[0]
    if monitor in metrics:
        return float(metrics[monitor])
    if kind in ("train", "val") and not any(name.startswith(f"{kind}_") for name in metrics):
        return None
    raise ValueError(
        f"monitor={monitor!r} is not among what is logged: {sorted(metrics)}. Pass one of these, or have a callback "
        "log it with trainer.log before it is looked at."
    )


def needs_validation(monitor: str | None) -> bool:
    """Whether the monitored value is a result of validation."""
    return monitor is not None and monitor.startswith("val_")


def check_mode(mode: str) -> None:
    """Raises ValueError if `mode` is neither "min" nor "max"."""
    if mode not in ("min", "max"):
        raise ValueError(f"mode must be 'min' or 'max', got {mode!r}.")


def worst(mode: str) -> float:
    """Returns the value that every other one improves on."""
    return math.inf if mode == "min" else -math.inf
