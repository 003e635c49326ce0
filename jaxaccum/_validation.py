"""The validations of a run, as they fall due."""

import math

from jaxaccum import _limits
from jaxaccum._hooks import Hooks
from jaxaccum._run import Run
from jaxaccum._savers import Savers
from jaxaccum._signals import Signals


class Validation:
    """Validates every so many micro-steps of an epoch, or at its end; what is pending stays so.

    Args:
      run: says how often, and on what.
      hooks: are called.
      savers: save after it.
      signals: are looked at during it.

    Raises:
      ValueError: if it would be due after a fraction of an epoch whose length is not known.
    """

    def __init__(self, run: Run, hooks: Hooks, savers: Savers, signals: Signals):
        self._run, self._hooks, self._savers, self._signals = run, hooks, savers, signals
        self._interval: int | float = math.inf
        if run.val_loader is not None:
            self._interval = _limits.validation_interval(run.options.val_check_interval, run.epoch_micro_steps)

    def is_due(self) -> bool:
        """Whether the last micro-step makes one due."""
        run = self._run
        if run.val_loader is None:
            return False
        return run.at.ends_epoch if math.isinf(self._interval) else run.at.batch_idx % self._interval == 0

    def run_if_due(self) -> None:
        """Validates, if a micro-step has made that due since the last one."""
        run = self._run
        if run.at.validated or run.val_loader is None:
            return
        self._hooks.call("on_validation_start")
        params, _, model_state, _ = run.state
        results = run.evaluation.run(params, model_state, run.val_loader, self._signals.leave_if_told)
        run.metrics |= results
        run.records.add(run.at.global_step, run.place() | results)
        self._hooks.call("on_validation_epoch_end")
        self._hooks.call("on_validation_end")
        run.strategy.processes.share_wishes()
        run.at.validated = True
        self._savers.save_if_due(run, "validation")
