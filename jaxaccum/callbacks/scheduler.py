"""Sets K by epoch."""

from collections.abc import Mapping
from typing import Any

from jaxaccum._schedule import AccumulationSchedule
from jaxaccum.callbacks.base import Callback, TrainerView
from jaxaccum.task import Task


class GradientAccumulationScheduler(Callback):
    """Sets K by epoch.

    Args:
      scheduling: a dict from epoch to K, as in `AccumulationSchedule`; it is not modified.

    Raises:
      TypeError, ValueError: as `AccumulationSchedule`.

    Example:
      >>> GradientAccumulationScheduler(scheduling={0: 8, 4: 4}).schedule(5)
      4
    """

    def __init__(self, scheduling: Mapping[int, int]):
        self.schedule = AccumulationSchedule(scheduling)

    def on_train_epoch_start(self, trainer: TrainerView, task: Task) -> None:
        trainer.accumulate_grad_batches = self.schedule(trainer.current_epoch)


def offered_schedule(callback: Any) -> AccumulationSchedule | None:
    """Returns the schedule of K that a callback offers as `schedule`; None without one."""
    found = getattr(callback, "schedule", None)
    return found if isinstance(found, AccumulationSchedule) else None
