"""Runs the micro-steps of each window, counts them and logs the window."""

from collections.abc import Mapping, Sequence

import jax
import numpy as np

from jaxaccum._sums import weighted_sum
from jaxaccum.distributed.process_group import said
from jaxaccum.trainer.input.prefetch import MicroStep
from jaxaccum.trainer.loop.hooks import Hooks
from jaxaccum.trainer.loop.run_state import Run
from jaxaccum.trainer.loop.validation import Validation
from jaxaccum.trainer.programs import step_outputs
from jaxaccum.trainer.programs.step_outputs import Outputs


class Windows:
    """Trains in windows of K micro-steps.

    Args:
      run: the run, whose state and counters are updated.
      hooks: called before and after each micro-step.
      validation: counts the micro-steps.
    """

    def __init__(self, run: Run, hooks: Hooks, validation: Validation):
        self._run, self._hooks, self._validation = run, hooks, validation

    def train(self, micro_steps: Sequence[MicroStep]) -> None:
        """Makes one call on the devices: a single micro-step, or the rest of a window."""
        run, at = self._run, self._run.at
        for batch_idx, micro_step in enumerate(micro_steps, at.batch_idx):
            self._hooks.call("on_train_batch_start", micro_step.batch, batch_idx)
        window_step = at.window_step + len(micro_steps)
        boundary = micro_steps[-1].last or window_step >= at.every_k
        with jax.profiler.StepTraceAnnotation("train", step_num=at.micro_step):
            share = self._share(window_step) if boundary else None
            run.state, outputs, means = run.programs.run(run.state, micro_steps, boundary, share)
        # Nothing fails between here and the hooks, so the counters match the state even if a hook raises.
        run.uncounted.extend(zip(micro_steps, outputs, strict=True))
        try:
            while run.uncounted:
                batch_idx = at.batch_idx
                micro_step, outputs = self._count(means)
                if run.options.detect_anomaly:
                    self._refuse_anomaly(outputs)
                self._hooks.call("on_train_batch_end", outputs, micro_step.batch, batch_idx)
        finally:
            while run.uncounted:  # A hook raised, but all of them have been dispatched.
                self._count(means)
        if boundary:
            self.record_if_due()

    def flush_if_asked(self) -> None:
        """Closes a window that a stop left open, with `flush_on_stop`."""
        run = self._run
        if run.options.flush_on_stop and run.at.window_step:
            run.state, means = run.programs.flush(run.state, self._share(run.at.window_step))
            self._close(means)
            self.record_if_due()

    def _share(self, window_step: int) -> jax.Array | None:
        """Returns the factor for the gradient of a window of this many micro-steps; None unless windows are divided by
        K.
        """
        if not self._run.options.divides_by_k:
            return None
        return self._run.strategy.constant(window_step / self._run.at.every_k, weighted_sum.weight_dtype())

    def _count(self, means: dict[str, jax.Array] | None) -> tuple[MicroStep, Outputs]:
        """Counts and returns the next dispatched micro-step; at a boundary also counts an optimizer step."""
        run, at = self._run, self._run.at
        micro_step, outputs = run.uncounted.popleft()
        run.loader_state = micro_step.loader_state
        at.records = 0
        at.window_step += 1
        at.window_samples += micro_step.examples
        at.batches += micro_step.count
        at.all_batches += micro_step.count
        at.ends_epoch = micro_step.last
        at.batch_idx += 1
        at.micro_step += 1
        at.samples_seen += micro_step.examples
        self._validation.count()
        if means is not None and not run.uncounted:
            self._close(means)
        return micro_step, outputs

    def _close(self, means: dict[str, jax.Array]) -> None:
        """Counts an optimizer step."""
        run, at = self._run, self._run.at
        run.close_window(means)
        at.global_step += 1
        at.window_step = 0
        at.recorded = not run.record_is_due
        at.effective_batch, at.window_samples = at.window_samples, 0

    def _refuse_anomaly(self, outputs: Mapping[str, float]) -> None:
        """Raises FloatingPointError if the micro-step was dropped. Waits for the device."""
        at, processes = self._run.at, self._run.strategy.processes
        dropped = bool(np.any(step_outputs.own(self._run.state.pending.sums.dropped)))
        found = processes.gather("an anomaly", [dropped, outputs["loss"] if dropped else None])
        losses = {process: loss for process, (dropped, loss) in enumerate(found) if dropped}
        if losses:
            error = FloatingPointError(
                f"micro-step {at.batch_idx - 1} of epoch {at.epoch} has a NaN or an infinity in its loss "
                f"({said(losses) if len(found) > 1 else losses[0]}) or in its gradient. It was left out of its window; "
                "nonfinite='drop' leaves out all such micro-batches and goes on."
            )
            processes.fail(error)

    def record_if_due(self) -> None:
        """Logs the last window if that is due, without waiting for it."""
        run, at = self._run, self._run.at
        if not at.recorded:
            sizes = {"accumulate_grad_batches": at.every_k, "effective_batch_size": at.effective_batch}
            run.record(sizes | run.train_metrics())
            at.recorded = True
