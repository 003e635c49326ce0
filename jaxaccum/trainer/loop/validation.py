"""Runs validations when they are due."""

import math
import warnings

from jaxaccum.trainer.input.loader import ValLoader
from jaxaccum.trainer.loop.hooks import Hooks
from jaxaccum.trainer.loop.run_state import Run
from jaxaccum.trainer.loop.saving import RunCheckpoints
from jaxaccum.trainer.loop.signals import Signals

_REMEDY = (
    "Pass a smaller int val_check_interval, which counts micro-steps, or no val_loader, or limit_val_batches=0 for no "
    "validation."
)


class Validation:
    """Validates every few micro-steps or at an epoch's end. The pending sums are not affected.

    Micro-steps are counted within each epoch, or across epochs that are shorter than the interval.

    Args:
      run: the run, with the interval and the validation batches.
      hooks: the callbacks' hooks.
      checkpoints: saved after a validation.
      signals: checked during a validation.

    Raises:
      ValueError: if the interval is a fraction of an epoch of unknown length, or if validation would never be due.
    """

    def __init__(self, run: Run, hooks: Hooks, checkpoints: RunCheckpoints, signals: Signals):
        self._run, self._hooks, self._checkpoints, self._signals = run, hooks, checkpoints, signals
        self._interval: int | float = math.inf
        self.begin_epoch()
        if run.val_loader is not None:
            self._check_falls_due(hooks.may_set_k)
            self._check_lasts(run.val_loader)

    def begin_epoch(self) -> None:
        """Updates an interval that is a fraction of the epoch's length."""
        run = self._run
        if run.val_loader is not None:
            self._interval = _interval_of(run.options.val_check_interval, run.epoch_micro_steps)

    def check(self) -> None:
        """Validates on the first batches, to find errors before training; records nothing."""
        run = self._run
        micro_steps = run.options.num_sanity_val_steps
        if run.val_loader is None or not micro_steps:
            return
        params, _, model_state, _ = run.state
        batches = run.val_loader.first(None if micro_steps == -1 else micro_steps * run.strategy.group)
        run.evaluation.run(params, model_state, batches)

    def count(self) -> None:
        """Counts a micro-step, which may make a validation due."""
        run, at = self._run, self._run.at
        if run.val_loader is None:
            return
        at.toward_validation += 1
        every_n_epochs = run.options.check_val_every_n_epoch or 1
        is_due = at.ends_epoch if math.isinf(self._interval) else at.toward_validation % self._interval == 0
        # An earlier micro-step of the same call may have made it due already.
        at.validated &= not is_due or (at.epoch + 1) % every_n_epochs != 0

    def end_epoch(self) -> None:
        """Resets the count, unless the interval is longer than the epoch."""
        at = self._run.at
        if self._run.options.check_val_every_n_epoch is not None and at.batch_idx >= self._interval:
            at.toward_validation = 0

    def run_if_due(self) -> None:
        """Validates if a validation is due."""
        run = self._run
        if run.at.validated or run.val_loader is None:
            return
        self._hooks.call("on_validation_start")
        params, _, model_state, _ = run.state
        results = run.evaluation.run(params, model_state, run.val_loader, self._signals.leave_if_told)
        run.metrics |= results
        self._hooks.call("on_validation_epoch_end")
        self._hooks.call("on_validation_end")
        run.strategy.processes.share_wishes()
        # A run resumed from a checkpoint before this line repeats the validation and its record.
        run.record(results)
        run.at.validated = True
        self._checkpoints.save_if_due(run, "validation")

    def warn_if_none(self) -> None:
        """Warns if the run ended without a validation and was not stopped."""
        run = self._run
        has_none = not any(name.startswith("val_") for name in run.metrics)
        if run.val_loader is not None and has_none and not run.strategy.processes.wishes.stop:
            warnings.warn(
                f"no validation fell due in the {run.at.micro_step} micro-steps of this run: "
                f"val_check_interval={run.options.val_check_interval} was never reached. {_REMEDY}",
                stacklevel=4,
            )

    def _check_falls_due(self, k_may_change: bool) -> None:
        """Checks that a validation can become due in the run, counted from its start.

        Raises:
          ValueError: if none can.
        """
        run, options = self._run, self._run.options
        most = math.inf if k_may_change else options.micro_steps
        every_n_epochs = options.check_val_every_n_epoch or 1

        def is_reached(shortest: int | float, longest: int | float) -> bool:
            """Whether a validation is reached with epochs of this many micro-steps."""
            at_end = every_n_epochs * shortest
            first = at_end if math.isinf(self._interval) else max(self._interval, at_end - shortest + 1)
            return every_n_epochs <= options.epochs and first <= min(most, options.epochs * longest)

        words = (
            f"val_check_interval={options.val_check_interval} with check_val_every_n_epoch="
            f"{options.check_val_every_n_epoch} in a run of max_epochs={options.max_epochs} and max_steps="
            f"{options.max_steps}, "
        )
        if not is_reached(*run.loader.epoch_bounds(run.strategy.group)):
            raise ValueError(f"no validation can fall due: {words}on this train_loader. {_REMEDY}")
        if not is_reached(run.epoch_micro_steps, run.epoch_micro_steps) and not math.isinf(run.epoch_micro_steps):
            warnings.warn(
                f"no validation will fall due: {words}where train_loader says that an epoch has "
                f"{run.epoch_micro_steps} micro-steps. {_REMEDY}",
                stacklevel=6,
            )

    def _check_lasts(self, val_loader: ValLoader) -> None:
        """Checks that an iterator is not needed for a second validation.

        Raises:
          ValueError: if it may be.
        """
        options = self._run.options
        one = options.epochs < 2 * (options.check_val_every_n_epoch or 1) and math.isinf(self._interval)
        if val_loader.lasts_for_one and not one:
            raise ValueError(
                "val_loader is an iterator, which gives its batches once, but there may be several validations: pass "
                "something that can be iterated again, such as a list, or an int limit_val_batches if it has no end."
            )


def _interval_of(value: int | float, epoch: int | float) -> int | float:
    """Returns the number of micro-steps between validations, in an epoch of `epoch` micro-steps; infinite: at its end
    only.

    Raises:
      ValueError: if `value` is a fraction of an epoch of unknown length.
    """
    if isinstance(value, int):
        return value
    if value == 1.0:
        return math.inf
    if math.isinf(epoch):
        raise ValueError(
            f"val_check_interval={value} is a fraction of an epoch whose length is not known; pass an int."
        )
    return max(1, int(epoch * value))
