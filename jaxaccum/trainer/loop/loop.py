"""The training loop: epochs, calls on the devices, and validations and checkpoints between calls."""

import warnings
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np

from jaxaccum._sums import weighted_sum
from jaxaccum.distributed.process_group import said
from jaxaccum.trainer.input.prefetch import MicroStep, fused, micro_steps
from jaxaccum.trainer.loop import validation
from jaxaccum.trainer.loop.hooks import Hooks
from jaxaccum.trainer.loop.run_state import Run
from jaxaccum.trainer.loop.saving import RunCheckpoints
from jaxaccum.trainer.loop.signals import Signals
from jaxaccum.trainer.programs import step_outputs
from jaxaccum.trainer.programs.compiled import WindowLogs
from jaxaccum.trainer.programs.step_outputs import Outputs


class Loop:
    """Trains a run epoch by epoch. Raises ValueError if its validations can't fall due as the options say."""

    def __init__(self, run: Run, hooks: Hooks, checkpoints: RunCheckpoints, signals: Signals):
        self._run, self._hooks, self._checkpoints, self._signals = run, hooks, checkpoints, signals
        self._setup, self._options, self._processes = run.setup, run.setup.options, run.setup.processes
        self._interval: validation.Interval | None = None
        if run.setup.val_loaders:
            self._interval = validation.Interval(run.setup)
            self._interval.check_falls_due(hooks.may_set_k)
            for val_loader in run.setup.val_loaders.values():
                self._interval.check_lasts(val_loader)

    def check_validation(self) -> None:
        """Validates on the first batches, to find errors before training; records nothing."""
        setup, count = self._setup, self._options.num_sanity_val_steps
        if setup.val_loaders and count:
            batches = None if count == -1 else count * setup.strategy.group
            first = {name: val_loader.first(batches) for name, val_loader in setup.val_loaders.items()}
            setup.evaluation.run(self._run.evaluated_params, self._run.state.model_state, first)

    def train(self) -> None:
        """Trains to the end of the run and saves it."""
        at = self._run.at
        self._run.metrics.record_window(at)  # A hook that raised may have left it to the resumed run.
        resumes_in_epoch = at.batch_idx > 0  # Or at its end.
        while resumes_in_epoch or not self._is_over():
            resumes_in_epoch = False
            self._begin_epoch()
            self._validate_if_due()
            for call in self._calls():
                self._run_on_devices(call)
                self._checkpoints.save_if_due(self._run, "micro_step", len(call))
                self._validate_if_due()
            self._end_epoch()
        if not at.batch_idx:
            self._checkpoints.save_at_end(self._run)
        self._warn_if_never_validated()

    def _is_over(self) -> bool:
        """Whether the run has reached its last epoch or optimizer step, or was asked to stop."""
        at, options = self._run.at, self._options
        is_stopped = self._processes.wishes.stop and options.may_stop(at)
        return at.global_step >= options.steps or at.epoch >= options.epochs or is_stopped

    def _begin_epoch(self) -> None:
        """Sets K, unless the run resumes in the epoch."""
        run, at = self._run, self._run.at
        if not at.batch_idx:
            at.every_k = run.lengths.every_k(at)
            run.takes_k = not run.lengths.change_with_windows
            self._hooks.call("on_train_epoch_start")
            run.takes_k = False
        self._processes.agree(f"epoch {at.epoch}", {"accumulate_grad_batches": at.every_k, "micro_step": at.micro_step})

    def _calls(self) -> Iterator[Sequence[MicroStep]]:
        """Yields the epoch's remaining micro-steps in lists, one per call on the devices, until the run is over."""
        at, before = self._run.at, self._run.at.batches
        if at.batch_idx and (at.ends_epoch or self._is_over()):
            return
        for call in self._remaining():
            self._signals.leave_if_told()
            if self._processes.wishes.stop and at.batches != before and self._is_over():
                return  # A hook of the last micro-step requested it, in any process.
            yield call
            self._signals.leave_if_told()
            if self._is_over():
                return
        if at.batches == before:
            passed = f" after the {before} that the checkpoint was trained on" if before else ""
            raise ValueError(
                f"train_loader gave no batch in epoch {at.epoch}{passed}. Pass something that can be iterated again, "
                "such as a list; or, for an iterator, options that ask for no more batches than it has."
            )

    def _remaining(self) -> Iterator[Sequence[MicroStep]]:
        """Returns the epoch's remaining micro-steps, prefetched, in lists."""
        at, setup, options = self._run.at, self._setup, self._options
        batches = setup.loader.epoch(at.epoch)
        if self._interval is not None:
            self._interval.begin_epoch()
        if setup.loader.is_stream:  # Don't consume more batches than `max_steps` needs.
            left = self._run.lengths.most_micro_steps(at, options.steps)
            batches.stop_after(left * setup.strategy.group)
        steps = micro_steps(batches, setup.strategy, self._processes)
        if self._run.lengths.change_with_windows:
            steps = self._in_windows(steps)
        return fused(steps, lambda: at.every_k, at.window_step) if options.fuse_windows else zip(steps)

    def _in_windows(self, steps: Iterator[MicroStep]) -> Iterator[MicroStep]:
        """Yields the micro-steps, and sets K when one starts a window."""
        run, at = self._run, self._run.at
        for micro_step in steps:
            if not at.window_step:  # With `fuse_windows`, so do the next ones, until the window has run.
                at.every_k = run.lengths.every_k(at)
            yield micro_step

    def _run_on_devices(self, call: Sequence[MicroStep]) -> None:
        """Makes one call on the devices: a single micro-step, or the rest of a window."""
        run, at = self._run, self._run.at
        for batch_idx, micro_step in enumerate(call, at.batch_idx):
            self._hooks.call("on_train_batch_start", micro_step.batch, batch_idx)
        window_step = at.window_step + len(call)
        boundary = call[-1].last or window_step >= at.every_k
        if boundary:
            self._hooks.call("on_before_optimizer_step")
        with jax.profiler.StepTraceAnnotation("train", step_num=at.micro_step):
            extra_args = self._extra_args(window_step) if boundary else {}
            run.state, outputs, of_window = self._setup.programs.run(
                run.state, call, starts=not at.window_step, boundary=boundary, extra_args=extra_args
            )
        # Nothing fails between here and the hooks, so the counters match the state even if a hook raises.
        run.uncounted.extend(zip(call, outputs, strict=True))
        try:
            while run.uncounted:
                batch_idx = at.batch_idx
                micro_step, outputs = self._count(of_window)
                if self._options.detect_anomaly:
                    self._refuse_anomaly(outputs)
                self._hooks.call("on_train_batch_end", outputs, micro_step.batch, batch_idx)
        finally:
            while run.uncounted:  # A hook raised, but all of them have been dispatched.
                self._count(of_window)
        if boundary:
            run.metrics.record_window(at)

    def _count(self, of_window: WindowLogs | None) -> tuple[MicroStep, Outputs]:
        """Counts and returns the next dispatched micro-step; at a boundary also counts an optimizer step."""
        run = self._run
        micro_step, outputs = run.uncounted.popleft()
        run.loader_state = micro_step.loader_state
        run.at.count(micro_step.examples, micro_step.count, micro_step.last)
        if self._interval is not None:
            self._interval.count(run.at)
        if of_window is not None and not run.uncounted:
            self._close_window(of_window)
        return micro_step, outputs

    def _close_window(self, logs: WindowLogs) -> None:
        run = self._run
        run.metrics.close_window(logs)
        if self._options.noise_scale is not None:
            self._options.noise_scale.close_window(logs.weight, logs.two_sizes)
        if logs.weight is not None and run.lengths.change_with_windows:
            run.lengths.close(logs.weight, run.at.window_step)
        run.at.close_window()
        run.at.recorded = not run.record_is_due

    def _extra_args(self, window_step: int) -> dict[str, jax.Array]:
        """Returns the extra args of `window_optimizer` for a window of this many micro-steps."""
        options, factors = self._options, dict[str, float]()
        if options.divides_by_k:
            factors["share"] = window_step / self._run.at.every_k
        if options.adaptive is not None and options.adaptive.follows_k:
            factors["learning_rate_factor"] = options.adaptive.learning_rate_factor
        constant = self._setup.strategy.constant
        return {name: constant(factor, weighted_sum.weight_dtype()) for name, factor in factors.items()}

    def _refuse_anomaly(self, outputs: Mapping[str, float]) -> None:
        """Raises FloatingPointError if the micro-step was dropped. Waits for the device."""
        at, processes = self._run.at, self._processes
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

    def _validate_if_due(self) -> None:
        """Runs a validation if one is due. The pending sums are not affected."""
        run, setup = self._run, self._setup
        if run.at.validated or not setup.val_loaders:
            return
        self._hooks.call("on_validation_start")
        args = run.evaluated_params, run.state.model_state, setup.val_loaders, self._signals.leave_if_told
        results = setup.evaluation.run(*args)
        run.metrics.results |= results
        self._hooks.call("on_validation_epoch_end")
        self._hooks.call("on_validation_end")
        self._processes.share_wishes()
        # A run resumed from a checkpoint before this line repeats the validation and its record.
        run.metrics.record(run.at, results)
        run.at.validated = True
        self._checkpoints.save_if_due(run, "validation")

    def _end_epoch(self) -> None:
        """Ends an epoch, or the run in the middle of one."""
        run, at = self._run, self._run.at
        if not at.ends_epoch:
            self._checkpoints.save_at_end(run)
        self._flush_if_asked()
        if at.ends_epoch:
            for name, mean in run.metrics.epoch.means().items():
                run.metrics.log(name, mean)
        self._hooks.call("on_train_epoch_end")
        if run.metrics.logged:
            run.metrics.record(at, {})
        if at.ends_epoch:
            if self._interval is not None:
                self._interval.end_epoch(at)
            at.end_epoch()
            run.metrics.epoch.begin({})
            self._checkpoints.save_if_due(run, "epoch")
        self._processes.share_wishes()

    def _flush_if_asked(self) -> None:
        """Closes a window that a stop left open, with `flush_on_stop`."""
        run = self._run
        if self._options.flush_on_stop and run.at.window_step:
            self._hooks.call("on_before_optimizer_step")
            run.state, of_window = self._setup.programs.flush(run.state, self._extra_args(run.at.window_step))
            self._close_window(of_window)
            run.metrics.record_window(run.at)

    def _warn_if_never_validated(self) -> None:
        """Warns if the run should have validated but never did, unless it was stopped or a callback warns of it."""
        run = self._run
        if self._interval is None or self._hooks.warn_of_no_validation or self._processes.wishes.stop:
            return
        if not any(name.startswith("val_") for name in run.metrics.results):
            warnings.warn(
                f"no validation fell due in the {run.at.micro_step} micro-steps of this run: "
                f"val_check_interval={self._options.val_check_interval} was never reached. {validation.REMEDY}",
                stacklevel=5,
            )

    def end_by(self, error: BaseException) -> None:
        """Saves the state after the last complete micro-step when `error` ends the run; not for a second signal."""
        run, processes = self._run, self._processes
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
                self._flush_if_asked()
            except Exception as failure:
                error.add_note(f"The open window could not be flushed: {failure!r}.")
