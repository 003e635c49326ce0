"""When to save checkpoints and which of them to keep."""

import datetime
import math
import os
from pathlib import Path
from typing import Any

from jaxaccum import _extras, _paths
from jaxaccum._integers import as_int, positive_int
from jaxaccum.callbacks.base import Callback, TrainerView
from jaxaccum.callbacks.monitor import Monitor, check_mode


class ModelCheckpoint(Callback):
    """Saves checkpoints, from which `fit(..., ckpt_path="last")` resumes bit-for-bit.

    A checkpoint is saved when it is due, after everything else that happens at that moment, regardless of this
    callback's position in the list. One more is saved when the run ends: at its last epoch, by a stop, a signal or an
    error. Checkpoints are written asynchronously, and older ones are removed only once the new one is complete.

    At most one of the four intervals may be given; the default is every epoch.

    Example:
      >>> ModelCheckpoint("run", monitor="val_loss", save_top_k=3).every_n_epochs
      1

    Args:
      dirpath: the folder, for one run at a time and the same in all of its processes; None is "checkpoints" in the
        Trainer's `default_root_dir`.
      every_n_micro_steps: save every n micro-steps, even in the middle of a window; with `fuse_windows`, at the end of
        the window that contains the micro-step.
      every_n_train_steps: save every n optimizer steps.
      every_n_epochs: save at the end of every n epochs; with a `monitor` that starts with "val_", after each validation
        in them.
      train_time_interval: a `datetime.timedelta`; save after the micro-step in which this time has passed since the run
        started or the last interval ended. With several processes the clock is that of process 0.
      monitor: the name in `trainer.callback_metrics` by which to rank checkpoints; None ranks by age, newest first. It
        is an error if the value is missing when a checkpoint is due, unless the first window, epoch or validation may
        still provide it.
      mode: "min" or "max": whether lower or higher is better.
      save_top_k: how many of the best checkpoints to keep; -1 keeps all. Without a `monitor` it must be -1, 0 or 1.
      save_last: whether to also keep the newest checkpoint, for a resume. False saves only checkpoints that rank in the
        top k and, unless `save_top_k` is 0, the end of the run.
      save_weights_only: whether to save the parameters, the model state and the average of an `EMA` alone, under names
        that end in "-weights". A run can't resume from them, and `ckpt_path="last"` passes over them; `validate`,
        `jaxaccum.checkpoint.load` and `fit(init_from=)` take them.

    Raises:
      TypeError, ValueError: for an invalid argument.
      ImportError: if orbax is missing.
    """

    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None = None,
        *,
        every_n_micro_steps: int | None = None,
        every_n_train_steps: int | None = None,
        every_n_epochs: int | None = None,
        train_time_interval: datetime.timedelta | None = None,
        monitor: str | None = None,
        mode: str = "min",
        save_top_k: int = 1,
        save_last: bool = True,
        save_weights_only: bool = False,
    ):
        _extras.require("orbax.checkpoint", "training", "ModelCheckpoint")
        intervals = {
            "every_n_micro_steps": every_n_micro_steps,
            "every_n_train_steps": every_n_train_steps,
            "every_n_epochs": every_n_epochs,
        }
        given: dict[str, Any] = {
            name: positive_int(value, name, note="") for name, value in intervals.items() if value is not None
        }
        if train_time_interval is not None:
            if not isinstance(train_time_interval, datetime.timedelta) or train_time_interval <= datetime.timedelta():
                raise ValueError(
                    "train_time_interval must be a datetime.timedelta above 0, such as timedelta(minutes=30), got "
                    f"{train_time_interval!r}."
                )
            given["train_time_interval"] = train_time_interval
        if len(given) > 1:
            raise ValueError(f"ModelCheckpoint saves at one interval, got {given}; add another ModelCheckpoint.")
        check_mode(mode)
        save_top_k = as_int(save_top_k, "save_top_k", "an int of at least -1")
        if save_top_k < -1 or (monitor is None and save_top_k > 1):
            raise ValueError(f"save_top_k must be -1, 0 or 1, or with a monitor more, got {save_top_k}.")
        self.dirpath = None if dirpath is None else _paths.absolute(dirpath)
        self.every_n_micro_steps = given.get("every_n_micro_steps")
        self.every_n_train_steps = given.get("every_n_train_steps")
        self.every_n_epochs = given.get("every_n_epochs") if given else 1
        self.train_time_interval: datetime.timedelta | None = given.get("train_time_interval")
        self.monitor, self.mode, self.save_top_k, self.save_last = monitor, mode, save_top_k, save_last
        if not isinstance(save_weights_only, bool):
            raise TypeError(f"save_weights_only must be True or False, got {save_weights_only!r}.")
        self.save_weights_only = save_weights_only
        self.monitored = None if monitor is None else Monitor(monitor, mode)
        self._saved: dict[str, float | None] = {}  # Folder name -> monitored value, oldest first.

    @property
    def last_model_path(self) -> Path | None:
        """The newest checkpoint, which may still be being written; None before the first."""
        return self.dirpath / next(reversed(self._saved)) if self.dirpath and self._saved else None

    @property
    def best_model_path(self) -> Path | None:
        """The best checkpoint; None before the first."""
        ranked = self.ranked(self._saved)
        return self.dirpath / ranked[0] if self.dirpath and ranked else None

    @property
    def names(self) -> list[str]:
        """The folder names of the kept checkpoints, oldest first."""
        return list(self._saved)

    def folder(self, default: Path) -> Path:
        """Returns the checkpoint folder: `dirpath`, or else `default`."""
        return self.dirpath or default

    def open(self, default: Path) -> Path:
        """Starts a new run and returns its folder."""
        self.dirpath = self.folder(default)
        self._saved = {}
        return self.dirpath

    def due(self, trainer: TrainerView, moment: str, micro_steps: int = 1) -> bool:
        """Whether to save now that a `moment` has ended: "micro_step", "validation" or "epoch".

        With `fuse_windows` all `micro_steps` of a window end at once.
        """
        if moment == "micro_step":
            in_window = trainer.window_step > 0
            return _divides(self.every_n_micro_steps, trainer.micro_step, micro_steps) or (
                not in_window and _divides(self.every_n_train_steps, trainer.global_step)
            )
        by_validation = self.monitored is not None and self.monitored.needs_validation
        if moment == "validation":
            return by_validation and _divides(self.every_n_epochs, trainer.current_epoch + 1)
        return not by_validation and _divides(self.every_n_epochs, trainer.current_epoch)

    def score(self, trainer: TrainerView) -> float | None:
        """Returns the current monitored value, the worst value if there is none yet, or None without a monitor.

        Raises:
          ValueError: if the value is missing and will never be available.
        """
        if self.monitored is None:
            return None
        value = self.monitored.value(trainer)
        return self.monitored.worst if value is None or math.isnan(value) else value

    def known_score(self, trainer: TrainerView) -> float | None:
        """Returns the monitored value if it is available."""
        if self.monitored is None:
            return None
        value = trainer.callback_metrics.get(self.monitored.name)
        return self.monitored.worst if value is not None and math.isnan(value) else value

    def wants(self, score: float | None) -> bool:
        """Whether a checkpoint with this score would be kept."""
        if self.save_last or score is None:
            return self.save_last or self.save_top_k != 0
        return "" in self.ranked({**self._saved, "": score})

    def has(self, name: str, score: float | None) -> bool:
        """Whether the checkpoint is kept with this score; None matches any score."""
        return name in self._saved and score in (None, self._saved[name])

    def add(self, name: str, score: float | None) -> None:
        """Records a checkpoint that is complete or being written; a `score` of None keeps its earlier score."""
        self._saved[name] = self._saved.get(name) if score is None else score

    def forget(self, name: str) -> None:
        """Drops a checkpoint that could not be written."""
        self._saved.pop(name, None)

    def outdated(self) -> list[str]:
        """Drops and returns the checkpoints to remove, now that the newest one is complete."""
        kept = {*self.ranked(self._saved), *list(self._saved)[-1:]}
        outdated = [name for name in self._saved if name not in kept]
        for name in outdated:
            del self._saved[name]
        return outdated

    @property
    def state_key(self) -> str:
        """Distinguishes policies, so that one doesn't rank or remove the checkpoints of another."""
        names = ["monitor", "mode", "every_n_micro_steps", "every_n_train_steps", "every_n_epochs"]
        newer = ("train_time_interval", "save_weights_only")  # Named only if set, as version 0.1 doesn't name them.
        names += [name for name in newer if getattr(self, name)]
        return f"ModelCheckpoint({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"

    def state_dict(self) -> dict[str, Any]:
        return {"saved": dict(self._saved)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = {
            name: score
            for name, score in state_dict["saved"].items()
            if self.dirpath and (self.dirpath / name).is_dir()
        }

    def ranked(self, saved: dict[str, float | None]) -> list[str]:
        """Returns the top `save_top_k` of the checkpoints in `saved`, best first; the newest wins ties."""
        newest_first = list(reversed(saved.items()))
        if self.monitored is not None:
            sign, worst = (1 if self.mode == "min" else -1), self.monitored.worst
            newest_first.sort(key=lambda entry: sign * (worst if entry[1] is None else entry[1]))
        return [name for name, _ in newest_first][: None if self.save_top_k == -1 else self.save_top_k]


def _divides(interval: int | None, count: int, last: int = 1) -> bool:
    """Whether one of the `last` counts up to `count` is a multiple of `interval`."""
    return interval is not None and count % interval < last
