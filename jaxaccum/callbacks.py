"""Callbacks: they observe a `Trainer`, ask it to stop, or ask for K. They never touch the sums of a window."""

import math
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import optax

from jaxaccum import _extras
from jaxaccum._integers import positive_int
from jaxaccum._schedule import AccumulationSchedule

if TYPE_CHECKING:
    from jaxaccum.task import Task
    from jaxaccum.trainer import Trainer


class Callback:
    """Hooks of a run, under Lightning's names; where Lightning passes its module, the `Task` is passed.

    Hooks run in the order of the callbacks. The arrays of `trainer.state` are donated by the next micro-step: to keep
    them longer, copy them (`jax.tree.map(jnp.copy, trainer.state.params)`).
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
        """Before an epoch's first batch. Here and nowhere else `trainer.accumulate_grad_batches` may be set."""

    def on_train_epoch_end(self, trainer: "Trainer", task: "Task") -> None:
        """After an epoch's last batch and the validation that follows it, or where training stops in mid-epoch."""

    def on_train_batch_start(self, trainer: "Trainer", task: "Task", batch: Any, batch_idx: int) -> None:
        """Before a micro-step.

        Args:
          trainer: the trainer.
          task: the task.
          batch: what the loader gave; with strategy "ddp" or "zero" a list of up to P such batches.
          batch_idx: the micro-step's number in its epoch.
        """

    def on_train_batch_end(
        self, trainer: "Trainer", task: "Task", outputs: Mapping[str, float], batch: Any, batch_idx: int
    ) -> None:
        """After a micro-step has been dispatched; the counters include it.

        Args:
          trainer: the trainer.
          task: the task.
          outputs: the micro-step's "loss", not divided by K, and its metrics. Reading one waits for the device.
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

    A name that starts with "val_" is looked at after every validation, any other at the end of every epoch.

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
        self.best = math.inf if mode == "min" else -math.inf
        self.wait = 0
        self.stopped_epoch: int | None = None

    def on_validation_end(self, trainer: "Trainer", task: "Task") -> None:
        if self.monitor.startswith("val_"):
            self._look(trainer)

    def on_train_epoch_end(self, trainer: "Trainer", task: "Task") -> None:
        if not self.monitor.startswith("val_"):
            self._look(trainer)

    def _look(self, trainer: "Trainer") -> None:
        metrics = trainer.callback_metrics
        if self.monitor not in metrics:
            raise ValueError(f"monitor={self.monitor!r} is not among what is logged: {sorted(metrics)}.")
        value = float(metrics[self.monitor])
        gain = self.best - value if self.mode == "min" else value - self.best
        if gain > self.min_delta:
            self.best, self.wait = value, 0
        else:
            self.wait += 1
        if self.wait >= self.patience or not math.isfinite(value):
            self.stopped_epoch = trainer.current_epoch
            trainer.should_stop = True

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "wait": self.wait, "stopped_epoch": self.stopped_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.wait, self.stopped_epoch = (state_dict[name] for name in ("best", "wait", "stopped_epoch"))


class LearningRateMonitor(Callback):
    """Logs the learning rate as "lr" with every record.

    Args:
      schedule: the optimizer's schedule, a function of the optimizer step. None: the rate is read from the optimizer's
        state, where `optax.inject_hyperparams` keeps it.
    """

    def __init__(self, schedule: Callable[[int], Any] | None = None):
        self._schedule = schedule

    def on_train_batch_end(
        self, trainer: "Trainer", task: "Task", outputs: Mapping[str, float], batch: Any, batch_idx: int
    ) -> None:
        if trainer.should_log:
            trainer.log("lr", self._rate(trainer))

    def _rate(self, trainer: "Trainer") -> Any:
        if self._schedule is not None:
            return float(self._schedule(trainer.global_step - 1))
        found = [rate for _, rate in optax.tree_utils.tree_get_all_with_path(trainer.state.opt_state, "learning_rate")]
        if not found:
            raise ValueError(
                "LearningRateMonitor finds no learning_rate in the optimizer's state; wrap the optimizer in "
                "optax.inject_hyperparams, or pass LearningRateMonitor its schedule."
            )
        return float(np.asarray(found[0]))


class ProgressBar(Callback):
    """A line by tqdm: epoch, micro-step in the window, optimizer step, effective batch, samples a second, loss.

    The loss is that of the last window that the device has finished: the bar never waits for it.

    Args:
      interval: seconds between two draws, at the least.

    Raises:
      ImportError: if tqdm is missing.
    """

    def __init__(self, interval: float = 0.1):
        self._tqdm = _extras.require("tqdm", "training", "the progress bar (else enable_progress_bar=False)").tqdm
        self._interval = interval
        self._bar: Any = None
        self._loss = math.nan
        self._next_draw = 0.0
        self._started = (0.0, 0)  # when the epoch did, and the samples seen by then
        self._done = 0

    def on_train_start(self, trainer: "Trainer", task: "Task") -> None:
        self._bar = self._tqdm(unit="micro-step")

    def on_train_epoch_start(self, trainer: "Trainer", task: "Task") -> None:
        total = trainer.num_training_batches
        self._bar.reset(None if math.isinf(total) else total)
        self._started = time.monotonic(), trainer.samples_seen
        self._done = 0
        self._next_draw = 0.0

    def on_train_batch_end(
        self, trainer: "Trainer", task: "Task", outputs: Mapping[str, float], batch: Any, batch_idx: int
    ) -> None:
        self._done = batch_idx + 1
        now = time.monotonic()
        if now >= self._next_draw:
            self._next_draw = now + self._interval
            self._draw(trainer, now)

    def on_train_epoch_end(self, trainer: "Trainer", task: "Task") -> None:
        self._draw(trainer, time.monotonic())

    def on_train_end(self, trainer: "Trainer", task: "Task") -> None:
        self._close()

    def on_exception(self, trainer: "Trainer", task: "Task", error: BaseException) -> None:
        self._close()

    def _draw(self, trainer: "Trainer", now: float) -> None:
        loss = trainer.callback_metrics.get("train_loss")
        if loss is not None and loss.is_ready():
            self._loss = float(loss)
        start, samples = self._started
        rate = (trainer.samples_seen - samples) / max(now - start, 1e-9)
        k = trainer.accumulate_grad_batches
        self._bar.set_description(f"epoch {trainer.current_epoch}", refresh=False)
        self._bar.set_postfix_str(
            f"window {trainer.window_step}/{k}, optimizer step {trainer.global_step}, "
            f"batch {trainer.effective_batch_size}, {rate:.3g} samples/s, loss {self._loss:.4g}",
            refresh=False,
        )
        self._bar.n = self._done
        self._bar.refresh()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
