"""Sets K by a schedule."""

from collections.abc import Mapping
from typing import Any

from jaxaccum._schedule import AccumulationSchedule
from jaxaccum.callbacks.base import Callback


class GradientAccumulationScheduler(Callback):
    """Sets K by epoch, or by the unit of a schedule.

    Example:
      >>> GradientAccumulationScheduler(scheduling={0: 8, 4: 4}).schedule(5)
      4

    Args:
      scheduling: a dict from epoch to K, which is not modified, or an `AccumulationSchedule`.

    Raises:
      TypeError, ValueError: as `AccumulationSchedule`.
    """

    def __init__(self, scheduling: Mapping[int, int] | AccumulationSchedule):
        self.schedule = AccumulationSchedule(scheduling)


def offered_schedule(callback: Any) -> AccumulationSchedule | None:
    """Returns the schedule of K that a callback offers as `schedule`; None without one."""
    found = getattr(callback, "schedule", None)
    return found if isinstance(found, AccumulationSchedule) else None
