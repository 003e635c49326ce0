"""Early stopping."""

import math
import warnings
from typing import Any

from jaxaccum._integers import positive_int
from jaxaccum.callbacks.base import Callback, TrainerView
from jaxaccum.callbacks.monitor import Monitor, check_mode
from jaxaccum.task import Task


class EarlyStopping(Callback):
    """Stops a run when the monitored value stops improving or becomes non-finite.

    A name that starts with "val_" is checked after every validation, any other name at the end of every epoch. The
    counters reset in each `fit`, except when it resumes from a checkpoint with this callback's state. A run without a
    value to check ends with a warning.

    Args:
      monitor: a name in `trainer.callback_metrics`, such as "val_loss".
      min_delta: the minimum change that counts as an improvement; it must be exceeded.
      patience: the number of checks without improvement after which to stop.
      mode: "min" or "max": whether lower or higher is better.

    Raises:
      TypeError, ValueError: for an invalid argument.

    Example:
      >>> EarlyStopping("val_loss", patience=2).state_dict()
      {'best': inf, 'wait': 0, 'stopped_epoch': None}
    """

    def __init__(self, monitor: str, min_delta: float = 0.0, patience: int = 3, mode: str = "min"):
        check_mode(mode)
        self.monitor, self.min_delta, self.mode = monitor, abs(min_delta), mode
        self.monitored = Monitor(monitor, mode, warns=True)
        self.patience = positive_int(patience, "patience")
        self._is_restored = False
        self._reset()

    def _reset(self) -> None:
        self.best = self.monitored.worst
        self.wait = 0
        self.stopped_epoch: int | None = None

    def on_fit_start(self, trainer: TrainerView, task: Task) -> None:
        if not (trainer.is_resuming and self._is_restored):
            self._reset()
        self._is_restored = False

    def on_train_start(self, trainer: TrainerView, task: Task) -> None:
        if self.wait >= self.patience:  # The run had already stopped when the checkpoint was saved.
            trainer.should_stop = True

    def on_validation_end(self, trainer: TrainerView, task: Task) -> None:
        if self.monitored.needs_validation:
            self._look(trainer)

    def on_train_epoch_end(self, trainer: TrainerView, task: Task) -> None:
        if not self.monitored.needs_validation:
            self._look(trainer)

    def on_train_end(self, trainer: TrainerView, task: Task) -> None:
        if self.best == self.monitored.worst and not trainer.should_stop:
            warnings.warn(
                f"EarlyStopping(monitor={self.monitor!r}) had nothing to look at in this run. What was logged: "
                f"{sorted(trainer.callback_metrics)}. Pass one of these, or have a validation fall due before the "
                "run's end.",
                stacklevel=2,
            )

    def _look(self, trainer: TrainerView) -> None:
        value = self.monitored.value(trainer)
        if value is None:  # The run stopped in its first window, before there was a value.
            return
        gain = self.best - value if self.mode == "min" else value - self.best
        if gain > self.min_delta:
            self.best, self.wait = value, 0
        else:
            self.wait += 1
        if self.wait >= self.patience or not math.isfinite(value):
            self.stopped_epoch = trainer.current_epoch
            trainer.should_stop = True

    @property
    def state_key(self) -> str:
        return f"{type(self).__qualname__}(monitor={self.monitor!r}, mode={self.mode!r})"

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "wait": self.wait, "stopped_epoch": self.stopped_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.wait, self.stopped_epoch = (state_dict[name] for name in ("best", "wait", "stopped_epoch"))
        self._is_restored = True
