"""Stops a run when its time is up; `Trainer(max_time=)` adds it."""

import time
from collections.abc import Mapping
from typing import Any

from jaxaccum.callbacks.base import Callback, TrainerView
from jaxaccum.task import Task


class TimeLimit(Callback):
    """Stops a run after `seconds` of `fit`, counted over its resumes."""

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._start = time.monotonic()
        self._earlier = 0.0  # What the checkpoint's run had taken.

    def on_fit_start(self, trainer: TrainerView, task: Task) -> None:
        self._start = time.monotonic() - (self._earlier if trainer.is_resuming else 0.0)
        self._earlier = 0.0

    def on_train_start(self, trainer: TrainerView, task: Task) -> None:
        self._look(trainer)

    def on_train_batch_end(
        self, trainer: TrainerView, task: Task, outputs: Mapping[str, float], batch: Any, batch_idx: int
    ) -> None:
        self._look(trainer)

    def _look(self, trainer: TrainerView) -> None:
        if time.monotonic() - self._start >= self._seconds:
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": time.monotonic() - self._start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._earlier = state_dict["seconds"]
