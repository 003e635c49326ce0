"""Looks up the value that a callback monitors."""

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
