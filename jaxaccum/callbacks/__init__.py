"""Callbacks: they observe a `Trainer`, ask it to stop, or ask for K. They never touch the sums of a window."""

import contextlib
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import optax

from jaxaccum import _extras, _paths
from jaxaccum._integers import as_int, positive_int
from jaxaccum._schedule import AccumulationSchedule

if TYPE_CHECKING:
    from jaxaccum.task import Task
    from jaxaccum.trainer.trainer import Trainer


class Callback:
    """Hooks of a run, under Lightning's names; where Lightning passes its module, the `Task` is passed.

    Hooks run in the order of the callbacks, in every process. The arrays of `trainer.state` are donated by the next
    micro-step: to keep them longer, ask for `trainer.copy_state()`.
    """

    def on_fit_start(self, trainer: "Trainer", task: "Task") -> None:
        """Before anything else; the parameters exist."""

    def on_fit_end(self, trainer: "Trainer", task: "Task") -> None:
        """After everything else, if nothing was raised."""

    def on_train_start(self, trainer: "Trainer", task: "Task") -> None:
        """Before the first epoch."""

    def on_train_end(self, trainer: "Trainer", task: "Task") -> None:
        """After the last epoch, whether it was complete or not."""

    def on_train_epoch_start(self, trainer: "Trainer", task: "Task") -> None:
        """Before an epoch's first batch. Here and nowhere else `trainer.accumulate_grad_batches` may be set.

        It is not called where a run goes on in the middle of an epoch.
        """

    def on_train_epoch_end(self, trainer: "Trainer", task: "Task") -> None:
        """After an epoch's last batch and the validation that follows it, or where training stops in mid-epoch."""

    def on_train_batch_start(self, trainer: "Trainer", task: "Task", batch: Any, batch_idx: int) -> None:
        """Before a micro-step.

        Args:
          trainer: the trainer.
          task: the task.
          batch: what the loader gave; with strategy "ddp" or "zero" a list of such batches, up to one for each device
            of this process.
          batch_idx: the micro-step's number in its epoch.
        """

    def on_train_batch_end(
        self, trainer: "Trainer", task: "Task", outputs: Mapping[str, float], batch: Any, batch_idx: int
    ) -> None:
        """After a micro-step has been dispatched; the counters include it.

        Args:
          trainer: the trainer.
          task: the task.
          outputs: the micro-step's "loss", not divided by K, and its metrics, on this process' devices. Reading one
            waits for them.
          batch: as for `on_train_batch_start`.
          batch_idx: likewise.
        """

    def on_validation_start(self, trainer: "Trainer", task: "Task") -> None:
        """Before a validation."""

    def on_validation_epoch_end(self, trainer: "Trainer", task: "Task") -> None:
        """After its last batch; `trainer.callback_metrics` has its results."""

    def on_validation_end(self, trainer: "Trainer", task: "Task") -> None:
        """After a validation."""

    def on_exception(self, trainer: "Trainer", task: "Task", error: BaseException) -> None:
        """Something was raised, and will go on its way; `trainer.state` is that of the last whole micro-step."""

    @property
    def state_key(self) -> str:
        """Which callback's state a checkpoint's is: by default the class' name."""
        return type(self).__qualname__

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of the callback."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""


class GradientAccumulationScheduler(Callback):
    """K by epoch, as a callback.

    Args:
      scheduling: epoch -> K, as for `AccumulationSchedule`; it is not changed.

    Raises:
      TypeError, ValueError: as `AccumulationSchedule`.

    Example:
      >>> GradientAccumulationScheduler(scheduling={0: 8, 4: 4}).schedule(5)
      4
    """

    def __init__(self, scheduling: Mapping[int, int]):
        self.schedule = AccumulationSchedule(scheduling)

    def on_train_epoch_start(self, trainer: "Trainer", task: "Task") -> None:
        trainer.accumulate_grad_batches = self.schedule(trainer.current_epoch)


class EarlyStopping(Callback):
    """Stops a run whose monitored value no longer improves, or is no longer finite.

    A name that starts with "val_" is looked at after every validation, any other at the end of every epoch. Each fit
    begins anew, but for one that goes on from a checkpoint with this callback's state. A run that ends without a value
    to look at ends with a warning.

    Args:
      monitor: a name in `trainer.callback_metrics`, such as "val_loss".
      min_delta: a change of no more than this is no improvement.
      patience: after how many looks without improvement to stop.
      mode: "min" or "max", what an improvement is.

    Raises:
      TypeError, ValueError: for an argument that is none of these.

    Example:
      >>> EarlyStopping("val_loss", patience=2).state_dict()
      {'best': inf, 'wait': 0, 'stopped_epoch': None}
    """

    def __init__(self, monitor: str, min_delta: float = 0.0, patience: int = 3, mode: str = "min"):
        if mode not in ("min", "max"):
            raise ValueError(f"mode must be 'min' or 'max', got {mode!r}.")
        self.monitor, self.min_delta, self.mode = monitor, abs(min_delta), mode
        self.patience = positive_int(patience, "patience")
        self._is_restored = False
        self._reset()

    def _reset(self) -> None:
        self.best = self._worst()
        self.wait = 0
        self.stopped_epoch: int | None = None

    def _worst(self) -> float:
        return math.inf if self.mode == "min" else -math.inf

    def on_fit_start(self, trainer: "Trainer", task: "Task") -> None:
        if not (trainer.is_resuming and self._is_restored):
            self._reset()
        self._is_restored = False

    def on_train_start(self, trainer: "Trainer", task: "Task") -> None:
        if self.wait >= self.patience:  # In the checkpoint that the run goes on from.
            trainer.should_stop = True

    def on_validation_end(self, trainer: "Trainer", task: "Task") -> None:
        if self.monitor.startswith("val_"):
            self._look(trainer)

    def on_train_epoch_end(self, trainer: "Trainer", task: "Task") -> None:
        if not self.monitor.startswith("val_"):
            self._look(trainer)

    def on_train_end(self, trainer: "Trainer", task: "Task") -> None:
        if self.best == self._worst() and not trainer.should_stop:
            warnings.warn(
                f"EarlyStopping(monitor={self.monitor!r}) had nothing to look at in this run. What was logged: "
                f"{sorted(trainer.callback_metrics)}. Pass one of these, or have a validation fall due before the "
                "run's end.",
                stacklevel=2,
            )

    def _look(self, trainer: "Trainer") -> None:
        value = _monitored(trainer, self.monitor)
        if value is None:  # The run stopped in its first window.
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


class ModelCheckpoint(Callback):
    """Has the `Trainer` save checkpoints, from which `fit(..., ckpt_path="last")` goes on bit for bit.

    One is saved whenever it is due, after everything else that belongs to that moment, whatever this callback's place
    in the list; and one more where the run ends, be it by its last epoch, a stop, a signal or an error. It is written
    while training goes on, and what it takes the place of is removed only when it is complete.

    At most one of the three intervals may be given; without one it is every epoch.

    Args:
      dirpath: the folder, for one run at a time, and the same for all of its processes; None is "checkpoints" in the
        Trainer's `default_root_dir`.
      every_n_micro_steps: save after every so many micro-steps, in the middle of windows too; with
        `fuse_windows` at the end of the window that they fall in.
      every_n_train_steps: save after every so many optimizer steps.
      every_n_epochs: save at the end of every so many epochs; with a `monitor` that starts with "val_", after each
        validation in them.
      monitor: a name in `trainer.callback_metrics`, by which checkpoints are ranked; None: by age, the newest first.
        A name that isn't there when a checkpoint is due, nor comes with the first window or validation, is an error.
      mode: "min" or "max", what is better.
      save_top_k: how many of the first in rank to keep; -1 is all, and without a `monitor` 1 is the most else.
      save_last: whether the newest is kept besides, which a resume needs. False saves
        what is in rank and, unless `save_top_k` is 0, the end.

    Raises:
      TypeError, ValueError: for an argument that is none of these.
      ImportError: if orbax is missing.

    Example:
      >>> ModelCheckpoint("run", monitor="val_loss", save_top_k=3).every_n_epochs
      1
    """

    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None = None,
        *,
        every_n_micro_steps: int | None = None,
        every_n_train_steps: int | None = None,
        every_n_epochs: int | None = None,
        monitor: str | None = None,
        mode: str = "min",
        save_top_k: int = 1,
        save_last: bool = True,
    ):
        _extras.require("orbax.checkpoint", "training", "ModelCheckpoint")
        intervals = {
            "every_n_micro_steps": every_n_micro_steps,
            "every_n_train_steps": every_n_train_steps,
            "every_n_epochs": every_n_epochs,
        }
        given = {name: positive_int(value, name) for name, value in intervals.items() if value is not None}
        if len(given) > 1:
            raise ValueError(f"ModelCheckpoint saves at one interval, got {given}; add another ModelCheckpoint.")
        if mode not in ("min", "max"):
            raise ValueError(f"mode must be 'min' or 'max', got {mode!r}.")
        save_top_k = as_int(save_top_k, "save_top_k", "an int of at least -1")
        if save_top_k < -1 or (monitor is None and save_top_k > 1):
            raise ValueError(f"save_top_k must be -1, 0 or 1, or with a monitor more, got {save_top_k}.")
        self.dirpath = None if dirpath is None else _paths.absolute(dirpath)
        self.every_n_micro_steps = given.get("every_n_micro_steps")
        self.every_n_train_steps = given.get("every_n_train_steps")
        self.every_n_epochs = given.get("every_n_epochs") if given else 1
        self.monitor, self.mode, self.save_top_k, self.save_last = monitor, mode, save_top_k, save_last
        self._saved: dict[str, float | None] = {}  # Folder names, the oldest first, and their monitored values.

    @property
    def last_model_path(self) -> Path | None:
        """The newest checkpoint, which may still be on its way; None before the first."""
        return self.dirpath / next(reversed(self._saved)) if self.dirpath and self._saved else None

    @property
    def best_model_path(self) -> Path | None:
        """The first in rank; None before there is one."""
        ranked = self.ranked(self._saved)
        return self.dirpath / ranked[0] if self.dirpath and ranked else None

    @property
    def names(self) -> list[str]:
        """The folder names of the checkpoints that are kept, the oldest first."""
        return list(self._saved)

    def folder(self, default: Path) -> Path:
        """Where the checkpoints are: `dirpath`, or else `default`."""
        return self.dirpath or default

    def open(self, default: Path) -> Path:
        """Begins a new run; returns its folder."""
        self.dirpath = self.folder(default)
        self._saved = {}
        return self.dirpath

    def due(self, trainer: "Trainer", moment: str, micro_steps: int = 1) -> bool:
        """Whether to save now.

        Args:
          trainer: the trainer.
          moment: "micro_step", "validation" or "epoch", of which this is the end.
          micro_steps: how many ended at once: with `fuse_windows` those of a window.
        """
        if moment == "micro_step":
            in_window = trainer.window_step > 0
            return _divides(self.every_n_micro_steps, trainer.micro_step, micro_steps) or (
                not in_window and _divides(self.every_n_train_steps, trainer.global_step)
            )
        by_validation = (self.monitor or "").startswith("val_")
        if moment == "validation":
            return by_validation and _divides(self.every_n_epochs, trainer.current_epoch + 1)
        return not by_validation and _divides(self.every_n_epochs, trainer.current_epoch)

    def score(self, trainer: "Trainer") -> float | None:
        """The monitored value now, the worst where there is none so far; None without a monitor.

        Raises:
          ValueError: if there will be none.
        """
        if self.monitor is None:
            return None
        value = _monitored(trainer, self.monitor)
        return self._worst() if value is None or math.isnan(value) else value

    def known_score(self, trainer: "Trainer") -> float | None:
        """The monitored value, if there is one."""
        value = None if self.monitor is None else trainer.callback_metrics.get(self.monitor)
        return self._worst() if value is not None and math.isnan(value) else value

    def wants(self, score: float | None) -> bool:
        """Whether a checkpoint of this score would be kept."""
        if self.save_last or score is None:
            return self.save_last or self.save_top_k != 0
        return self.save_top_k != 0 and "" in self.ranked({**self._saved, "": score})

    def has(self, name: str, score: float | None) -> bool:
        """Whether a checkpoint is among those kept, and has this score; None is any."""
        return name in self._saved and score in (None, self._saved[name])

    def add(self, name: str, score: float | None) -> None:
        """A checkpoint is on its way, or complete; one that had a score keeps it where `score` is None."""
        self._saved[name] = self._saved.get(name) if score is None else score

    def forget(self, name: str) -> None:
        """It did not arrive."""
        self._saved.pop(name, None)

    def outdated(self) -> list[str]:
        """The checkpoints that are not to be kept, now that the newest is complete; they are none of its any more."""
        kept = {*self.ranked(self._saved), *list(self._saved)[-1:]}
        outdated = [name for name in self._saved if name not in kept]
        for name in outdated:
            del self._saved[name]
        return outdated

    @property
    def state_key(self) -> str:
        """Tells policies apart: what one has kept is not for another to rank or to remove."""
        names = ("monitor", "mode", "every_n_micro_steps", "every_n_train_steps", "every_n_epochs")
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
        """The first `save_top_k` of checkpoints with these scores, the best first, and of equals the newest."""
        newest_first = list(reversed(saved.items()))
        if self.monitor is not None:
            sign = 1 if self.mode == "min" else -1
            worst = self._worst()
            newest_first.sort(key=lambda entry: sign * (worst if entry[1] is None else entry[1]))
        return [name for name, _ in newest_first][: None if self.save_top_k == -1 else self.save_top_k]

    def _worst(self) -> float:
        return math.inf if self.mode == "min" else -math.inf


def _monitored(trainer: "Trainer", monitor: str) -> float | None:
    """The value of that name now; None before the first window or validation that may give it.

    Raises:
      ValueError: if it isn't there and isn't to come.
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


def _divides(interval: int | None, count: int, last: int = 1) -> bool:
    """Whether one of the `last` counts up to `count` is a multiple of `interval`."""
    return interval is not None and count % interval < last


class LearningRateMonitor(Callback):
    """Logs the learning rate as "lr" with every record.

    Without a rate to log the run raises ValueError before it trains.

    Args:
      schedule: the optimizer's schedule, a function of the optimizer step. None: the rate is read from the optimizer's
        state, where `optax.inject_hyperparams` keeps it.
    """

    def __init__(self, schedule: Callable[[int], Any] | None = None):
        self._schedule = schedule

    def on_train_start(self, trainer: "Trainer", task: "Task") -> None:
        if self._schedule is None and not self._found(trainer):
            raise ValueError(
                "LearningRateMonitor finds no learning_rate in the optimizer's state; wrap the optimizer in "
                "optax.inject_hyperparams, or pass LearningRateMonitor its schedule."
            )

    def on_train_batch_end(
        self, trainer: "Trainer", task: "Task", outputs: Mapping[str, float], batch: Any, batch_idx: int
    ) -> None:
        if trainer.should_log:
            step = trainer.global_step - 1
            trainer.log("lr", self._found(trainer)[0] if self._schedule is None else self._schedule(step))

    def _found(self, trainer: "Trainer") -> list[Any]:
        """The rates in the optimizer's state."""
        return [rate for _, rate in optax.tree_utils.tree_get_all_with_path(trainer.state.opt_state, "learning_rate")]


class ProgressBar(Callback):
    """A line by tqdm: epoch, micro-step in the window, optimizer step, effective batch, samples a second, loss.

    The loss is that of the last window that the device has finished: the bar never waits for it, and shows none before
    there is one. Process 0 alone draws. Where the bar can't be written, the run goes on without it.

    Args:
      interval: seconds between two draws, at the least.

    Raises:
      ImportError: if tqdm is missing.
    """

    def __init__(self, interval: float = 0.1):
        self._tqdm = _extras.require("tqdm", "training", "the progress bar (else enable_progress_bar=False)").tqdm
        self._interval = interval
        self._bar: Any = None
        self._draws = False
        self._next_draw = 0.0
        self._started = (0.0, 0)  # when the epoch did, and the samples seen by then
        self._done = 0

    def on_train_start(self, trainer: "Trainer", task: "Task") -> None:
        self._close()
        self._draws = jax.process_index() == 0 and sys.stderr is not None
        self._begin_epoch(trainer)  # A run may go on in the middle of an epoch.

    def on_train_epoch_start(self, trainer: "Trainer", task: "Task") -> None:
        self._begin_epoch(trainer)
        if self._bar is not None:
            self._draw(trainer, begins_epoch=True)

    def on_train_batch_end(
        self, trainer: "Trainer", task: "Task", outputs: Mapping[str, float], batch: Any, batch_idx: int
    ) -> None:
        self._done = batch_idx + 1
        now = time.monotonic()
        if now >= self._next_draw:
            self._next_draw = now + self._interval
            self._draw(trainer)

    def on_train_epoch_end(self, trainer: "Trainer", task: "Task") -> None:
        if self._done:
            self._draw(trainer)

    def on_train_end(self, trainer: "Trainer", task: "Task") -> None:
        self._close()

    def on_exception(self, trainer: "Trainer", task: "Task", error: BaseException) -> None:
        self._close()

    def _begin_epoch(self, trainer: "Trainer") -> None:
        self._started = time.monotonic(), trainer.samples_seen
        self._done = 0
        self._next_draw = 0.0

    def _draw(self, trainer: "Trainer", begins_epoch: bool = False) -> None:
        if not self._draws:
            return
        epoch, total, text = f"epoch {trainer.current_epoch}", self._total(trainer), self._text(trainer)
        try:
            if self._bar is None:
                # With a delay tqdm draws nothing by itself before there is something to show.
                self._bar = self._tqdm(unit=" micro-step", initial=self._done, delay=1e-9)
                self._bar.delay = 0
            self._bar.total, self._bar.n = total, self._done
            self._bar.set_description(epoch, refresh=False)
            self._bar.set_postfix_str(text, refresh=False)
            if begins_epoch:
                self._bar.initial = 0
                self._bar.reset()
            else:
                self._bar.refresh()
        except (OSError, ValueError):  # The terminal is gone.
            self._draws = False
            self._close()

    def _total(self, trainer: "Trainer") -> int | float | None:
        """The micro-steps of the epoch; None where they are not known."""
        total = trainer.num_training_batches
        if math.isinf(total):  # The steps that are left may still say where the run ends.
            steps = trainer.estimated_stepping_batches - trainer.global_step
            total = self._done + steps * trainer.accumulate_grad_batches - trainer.window_step
        return None if math.isinf(total) else total

    def _text(self, trainer: "Trainer") -> str:
        start, samples = self._started
        rate = (trainer.samples_seen - samples) / max(time.monotonic() - start, 1e-9)
        text = (
            f"window {trainer.window_step}/{trainer.accumulate_grad_batches}, optimizer step {trainer.global_step}, "
            f"batch {trainer.effective_batch_size}, {rate:.3g} samples/s"
        )
        loss = trainer.progress_bar_metrics.get("train_loss")
        return text if loss is None else f"{text}, loss {loss:.4g}"

    def _close(self) -> None:
        bar, self._bar = self._bar, None
        if bar is not None:
            with contextlib.suppress(OSError, ValueError):
                bar.close()
