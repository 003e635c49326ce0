"""Logs the learning rate."""

from collections.abc import Callable, Mapping
from typing import Any

import optax

from jaxaccum.callbacks.base import Callback, TrainerView
from jaxaccum.task import Task


class LearningRateMonitor(Callback):
    """Logs the learning rate as "lr" with every record.

    The run raises ValueError before training if no learning rate can be found.

    Args:
      schedule: the optimizer's schedule, a function of the optimizer step. None reads the rate from the optimizer
        state, where `optax.inject_hyperparams` stores it.
    """

    def __init__(self, schedule: Callable[[int], Any] | None = None):
        self._schedule = schedule

    def on_train_start(self, trainer: TrainerView, task: Task) -> None:
        if self._schedule is None and not self._found(trainer):
            raise ValueError(
                "LearningRateMonitor finds no learning_rate in the optimizer's state; wrap the optimizer in "
                "optax.inject_hyperparams, or pass LearningRateMonitor its schedule."
            )

    def on_train_batch_end(
        self, trainer: TrainerView, task: Task, outputs: Mapping[str, float], batch: Any, batch_idx: int
    ) -> None:
        if trainer.should_log:
            step = trainer.global_step - 1
            trainer.log("lr", self._found(trainer)[0] if self._schedule is None else self._schedule(step))

    def _found(self, trainer: TrainerView) -> list[Any]:
        """Returns the learning rates in the optimizer state."""
        return [rate for _, rate in optax.tree_utils.tree_get_all_with_path(trainer.state.opt_state, "learning_rate")]
