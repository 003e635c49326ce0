"""The training loop: epochs, calls on the devices, and validations and checkpoints between calls."""

import warnings
from collections.abc import Iterator, Sequence

import jax

from jaxaccum.trainer.input.prefetch import MicroStep, fused, micro_steps
from jaxaccum.trainer.loop.hooks import Hooks
from jaxaccum.trainer.loop.run_state import Run
from jaxaccum.trainer.loop.saving import RunCheckpoints
from jaxaccum.trainer.loop.signals import Signals
from jaxaccum.trainer.loop.validation import Validation
from jaxaccum.trainer.loop.windows import Windows


class Loop:
    """Trains a run epoch by epoch.

    Args:
      run: the run.
      hooks: the callbacks' hooks.
      checkpoints: the checkpoints of the run.
      signals: end the run after the current micro-step.

    Raises:
      ValueError: as `Validation`.
    """

    def __init__(self, run: Run, hooks: Hooks, checkpoints: RunCheckpoints, signals: Signals):
        self._run, self._hooks, self._checkpoints, self._signals = run, hooks, checkpoints, signals
        self._validation = Validation(run, hooks, checkpoints, signals)
        self._windows = Windows(run, hooks, self._validation)
        self._epochs, self._steps = run.options.epochs, run.options.steps

    def check_validation(self) -> None:
        """Runs the sanity-check validation, see `Validation.check`."""
        self._validation.check()

    def train(self) -> None:
        """Trains to the end of the run and saves it."""
        self._windows.record_if_due()
        if self._run.at.batch_idx:  # Resuming in the middle or at the end of an epoch.
            self._train_epoch()
        while not self._are_over():
            self._train_epoch()
        if not self._run.at.batch_idx:
            self._checkpoints.save_at_end(self._run)
        if not self._hooks.watch_validation:
            self._validation.warn_if_none()

    def _are_over(self) -> bool:
        """Whether the run has reached its last epoch or optimizer step, or was asked to stop."""
        at = self._run.at
        return at.global_step >= self._steps or at.epoch >= self._epochs or self._run.strategy.processes.wishes.stop

    def _train_epoch(self) -> None:
        """Trains the rest of an epoch, or until the run is over."""
        run, at, processes = self._run, self._run.at, self._run.strategy.processes
        if not at.batch_idx:
            self._begin()
        processes.agree(f"epoch {at.epoch}", {"accumulate_grad_batches": at.every_k, "micro_step": at.micro_step})
        self._validation.run_if_due()
        is_over = at.batch_idx and (at.ends_epoch or self._are_over())
        before = at.batches
        for call in () if is_over else self._calls():
            self._signals.leave_if_told()
            if processes.wishes.stop and at.batches != before:
                break  # A hook of the last micro-step requested it, in any process.
            self._windows.train(call)
            self._checkpoints.save_if_due(run, "micro_step", len(call))
            self._validation.run_if_due()
            self._signals.leave_if_told()
            if self._are_over():
                break
        if at.batches == before and not is_over:
            passed = f" after the {before} that the checkpoint was trained on" if before else ""
            raise ValueError(
                f"train_loader gave no batch in epoch {at.epoch}{passed}. Pass something that can be iterated again, "
                "such as a list; or, for an iterator, options that ask for no more batches than it has."
            )
        if not at.ends_epoch:
            self._checkpoints.save_at_end(run)
        self._windows.flush_if_asked()
        self._hooks.call("on_train_epoch_end")
        if run.logged:
            run.record({})
        if at.ends_epoch:
            self._validation.end_epoch()
            at.epoch, at.batch_idx, at.batches, at.ends_epoch = at.epoch + 1, 0, 0, False
            self._checkpoints.save_if_due(run, "epoch")
        processes.share_wishes()

    def _begin(self) -> None:
        """Sets K for the epoch."""
        run = self._run
        run.at.every_k = run.options.accumulate_grad_batches(run.at.epoch)
        run.takes_k = True
        self._hooks.call("on_train_epoch_start")
        run.takes_k = False

    def _calls(self) -> Iterator[Sequence[MicroStep]]:
        """Returns the epoch's remaining micro-steps in lists, one list per call on the devices."""
        run, at = self._run, self._run.at
        batches = run.loader.epoch(at.epoch)
        self._validation.begin_epoch()
        if run.loader.is_stream:  # Don't consume more batches than `max_steps` needs.
            batches.stop_after(((self._steps - at.global_step) * at.every_k - at.window_step) * run.strategy.group)
        steps = micro_steps(batches, run.strategy)
        return fused(steps, at.every_k, at.window_step) if run.options.fuse_windows else zip(steps)

    def end_by(self, error: BaseException) -> None:
        """Saves the state after the last complete micro-step when `error` ends the run; not for a second signal."""
        run, processes = self._run, self._run.strategy.processes
        processes.leave(error)  # Tells the other processes unless they met the same error.
        if self._signals.came_again(error):
            return
        if any(x.is_deleted() for x in jax.tree.leaves(run.state)):
            return  # The state was donated to a program that failed.
        if processes.are_together(error):
            try:
                self._checkpoints.save_at_end(run)
            except Exception as failure:
                warnings.warn(f"the run could not be saved when it met {error!r}: {failure!r}.", stacklevel=2)
        if isinstance(error, (KeyboardInterrupt, SystemExit)) and processes.are_together(error):
            try:
                self._windows.flush_if_asked()
            except Exception as failure:
                error.add_note(f"The open window could not be flushed: {failure!r}.")
