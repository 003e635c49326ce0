"""A tqdm progress bar."""

import contextlib
import math
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax

from jaxaccum import _extras
from jaxaccum.callbacks.base import Callback, TrainerView
from jaxaccum.task import Task


class ProgressBar(Callback):
    """A tqdm progress bar with epoch, window step, optimizer step, effective batch size, samples per second and loss.

    The loss is that of the last window that the device has finished. The bar never waits for the device, and shows no
    loss before the first window has finished. Only process 0 draws. If the bar can't be written, the run continues
    without it.

    Args:
      interval: the minimum time between two updates, in seconds.

    Raises:
      ImportError: if tqdm is missing.
    """

    def __init__(self, interval: float = 0.1):
        self._tqdm = _extras.require("tqdm", "training", "the progress bar (else enable_progress_bar=False)").tqdm
        self._interval = interval
        self._bar: Any = None
        self._draws = False
        self._next_draw = 0.0
        self._started = (0.0, 0)  # The epoch's start time and the samples seen before it.
        self._done = 0

    def on_train_start(self, trainer: TrainerView, task: Task) -> None:
        self._close()
        self._draws = jax.process_index() == 0 and sys.stderr is not None
        self._begin_epoch(trainer)  # A run may resume in the middle of an epoch.

    def on_train_batch_start(self, trainer: TrainerView, task: Task, batch: Any, batch_idx: int) -> None:
        if not batch_idx:
            self._begin_epoch(trainer)
            if self._bar is not None:
                self._draw(trainer, begins_epoch=True)

    def on_train_batch_end(
        self, trainer: TrainerView, task: Task, outputs: Mapping[str, float], batch: Any, batch_idx: int
    ) -> None:
        self._done = batch_idx + 1
        now = time.monotonic()
        if now >= self._next_draw:
            self._next_draw = now + self._interval
            self._draw(trainer)

    def on_train_epoch_end(self, trainer: TrainerView, task: Task) -> None:
        if self._done:
            self._draw(trainer)

    def on_train_end(self, trainer: TrainerView, task: Task) -> None:
        self._close()

    def on_exception(self, trainer: TrainerView, task: Task, error: BaseException) -> None:
        self._close()

    def _begin_epoch(self, trainer: TrainerView) -> None:
        self._started = time.monotonic(), trainer.samples_seen
        self._done = 0
        self._next_draw = 0.0

    def _draw(self, trainer: TrainerView, begins_epoch: bool = False) -> None:
        if not self._draws:
            return
        epoch, total, text = f"epoch {trainer.current_epoch}", self._total(trainer), self._text(trainer)
        try:
            if self._bar is None:
                # The delay keeps tqdm from drawing an empty bar on creation.
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

    def _total(self, trainer: TrainerView) -> int | float | None:
        """Returns the number of micro-steps in the epoch; None if unknown."""
        total = trainer.num_training_batches
        if math.isinf(total):  # `max_steps` may still bound the run.
            steps = trainer.estimated_stepping_batches - trainer.global_step
            total = self._done + steps * trainer.accumulate_grad_batches - trainer.window_step
        return None if math.isinf(total) else total

    def _text(self, trainer: TrainerView) -> str:
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
