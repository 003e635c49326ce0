"""Early stopping."""

import math
import warnings
from typing import Any

from jaxaccum._integers import is_number, positive_int
from jaxaccum.callbacks.base import Callback, TrainerView
from jaxaccum.callbacks.monitor import Monitor, check_mode
from jaxaccum.task import Task


class EarlyStopping(Callback):
    """Stops a run when the monitored value stops improving, reaches a threshold or becomes non-finite.

    A name that starts with "val_" is checked after every validation, any other name at the end of every epoch. The
    counters reset in each `fit`, except when it resumes from a checkpoint with this callback's state. A run without a
    value to check ends with a warning.

    Example:
      >>> EarlyStopping("val_loss", patience=2).state_dict()
      {'best': inf, 'wait': 0, 'stopped_epoch': None}

    Args:
      monitor: a name in `trainer.callback_metrics`, such as "val_loss".
      min_delta: the minimum change that counts as an improvement; it must be exceeded.
      patience: the number of checks without improvement after which to stop.
      mode: "min" or "max": whether lower or higher is better.
      check_finite: whether to stop at a NaN or an infinity. If False, they count as checks without improvement.
      stopping_threshold: stop once the value is this good or better; None for no threshold.

    Raises:
      TypeError, ValueError: for an invalid argument.
    """

    def __init__(
        self,
        monitor: str,
        min_delta: float = 0.0,
        patience: int = 3,
        mode: str = "min",
        check_finite: bool = True,
        stopping_threshold: float | None = None,
    ):
        check_mode(mode)
        self.monitor, self.min_delta, self.mode = monitor, abs(min_delta), mode
        self.monitored = Monitor(monitor, mode, warns=True)
        self.patience = positive_int(patience, "patience", note="")
        if not isinstance(check_finite, bool):
            raise TypeError(f"check_finite must be True or False, got {check_finite!r}.")
        if stopping_threshold is not None and not (is_number(stopping_threshold) and math.isfinite(stopping_threshold)):
            raise ValueError(
                f"stopping_threshold must be a finite number, or None for no threshold, got {stopping_threshold!r}."
            )
        self.check_finite, self.stopping_threshold = check_finite, stopping_threshold
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
        if self._is_over(self.best):  # The run had already stopped when the checkpoint was saved.
            trainer.should_stop = True

    def on_validation_end(self, trainer: TrainerView, task: Task) -> None:
        if self.monitored.needs_validation:
            self._look(trainer)

    def on_train_epoch_end(self, trainer: TrainerView, task: Task) -> None:
        if not self.monitored.needs_validation:
            self._look(trainer)

    def on_train_end(self, trainer: TrainerView, task: Task) -> None:
        if self.best == self.monitored.worst and not self.wait and not trainer.should_stop:
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
        if self._is_over(value) or (self.check_finite and not math.isfinite(value)):
            self.stopped_epoch = trainer.current_epoch
            trainer.should_stop = True

    def _is_over(self, value: float) -> bool:
        """Whether patience has run out, or `value` has reached the threshold."""
        is_reached = False
        if self.stopping_threshold is not None:
            is_reached = value <= self.stopping_threshold if self.mode == "min" else value >= self.stopping_threshold
        return is_reached or self.wait >= self.patience

    @property
    def state_key(self) -> str:
        return f"{type(self).__qualname__}(monitor={self.monitor!r}, mode={self.mode!r})"

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "wait": self.wait, "stopped_epoch": self.stopped_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.wait, self.stopped_epoch = (state_dict[name] for name in ("best", "wait", "stopped_epoch"))
        self._is_restored = True
