"""The validations of a run, as they fall due."""

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
    """Validates every so many micro-steps, or at an epoch's end; what is pending stays so.

    Micro-steps are counted within each epoch, but across epochs that are shorter than the interval.

    Args:
      run: says how often, and on what.
      hooks: are called.
      checkpoints: save after it.
      signals: are looked at during it.

    Raises:
      ValueError: if it would be due after a fraction of an epoch whose length is not known, or never.
    """

    def __init__(self, run: Run, hooks: Hooks, checkpoints: RunCheckpoints, signals: Signals):
        self._run, self._hooks, self._checkpoints, self._signals = run, hooks, checkpoints, signals
        self._interval: int | float = math.inf
        self.begin_epoch()
        if run.val_loader is not None:
            self._check_falls_due(hooks.may_set_k)
            self._check_lasts(run.val_loader)

    def begin_epoch(self) -> None:
        """Reads the length of an epoch, for an interval that is a fraction of it."""
        run = self._run
        if run.val_loader is not None:
            self._interval = _interval_of(run.options.val_check_interval, run.epoch_micro_steps)

    def check(self) -> None:
        """Validates on the first batches, to meet before training what would fail after it; records nothing."""
        run = self._run
        micro_steps = run.options.num_sanity_val_steps
        if run.val_loader is None or not micro_steps:
            return
        params, _, model_state, _ = run.state
        batches = run.val_loader.first(None if micro_steps == -1 else micro_steps * run.strategy.group)
        run.evaluation.run(params, model_state, batches)

    def count(self) -> None:
        """Counts a micro-step that has been made: it may make a validation due."""
        run, at = self._run, self._run.at
        if run.val_loader is None:
            return
        at.toward_validation += 1
        every_n_epochs = run.options.check_val_every_n_epoch or 1
        is_due = at.ends_epoch if math.isinf(self._interval) else at.toward_validation % self._interval == 0
        # Of several micro-steps that are made in one call an earlier one may have made it due.
        at.validated &= not is_due or (at.epoch + 1) % every_n_epochs != 0

    def end_epoch(self) -> None:
        """Begins to count anew, unless the interval is longer than the epoch was."""
        at = self._run.at
        if self._run.options.check_val_every_n_epoch is not None and at.batch_idx >= self._interval:
            at.toward_validation = 0

    def run_if_due(self) -> None:
        """Validates, if a micro-step has made that due since the last one."""
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
        # Now: a run that goes on from a checkpoint before this line validates, and records it, once more.
        run.record(results)
        run.at.validated = True
        self._checkpoints.save_if_due(run, "validation")

    def warn_if_none(self) -> None:
        """Says that a run which is over, and was not told to stop, has never validated."""
        run = self._run
        has_none = not any(name.startswith("val_") for name in run.metrics)
        if run.val_loader is not None and has_none and not run.strategy.processes.wishes.stop:
            warnings.warn(
                f"no validation fell due in the {run.at.micro_step} micro-steps of this run: "
                f"val_check_interval={run.options.val_check_interval} was never reached. {_REMEDY}",
                stacklevel=4,
            )

    def _check_falls_due(self, k_may_change: bool) -> None:
        """Whether any micro-step of the run, from its start, may make a validation due.

        Raises:
          ValueError: if none can.
        """
        run, options = self._run, self._run.options
        most = math.inf if k_may_change else options.micro_steps
        every_n_epochs = options.check_val_every_n_epoch or 1

        def is_reached(shortest: int | float, longest: int | float) -> bool:
            """Whether it is by epochs of so many micro-steps."""
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
        """Whether a loader that lasts for one validation is not needed for a second one.

        Raises:
          ValueError: if it is.
        """
        options = self._run.options
        one = options.epochs < 2 * (options.check_val_every_n_epoch or 1) and math.isinf(self._interval)
        if val_loader.lasts_for_one and not one:
            raise ValueError(
                "val_loader is an iterator, which gives its batches once, but there may be several validations: pass "
                "something that can be iterated again, such as a list, or an int limit_val_batches if it has no end."
            )


def _interval_of(value: int | float, epoch: int | float) -> int | float:
    """Every how many micro-steps validation is due, in an epoch of `epoch` micro-steps; infinite: at its end alone.

    Raises:
      ValueError: if `value` is a fraction of a length that is not known.
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
