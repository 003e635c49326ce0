"""The loop: epochs of micro-steps in windows of K, on one device or several."""

import collections
import functools
import itertools
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxaccum import _accumulator, _arguments, _limits, _optimizer, _outputs, _plot, _saver, _snapshot
from jaxaccum._counters import Counters
from jaxaccum._evaluation import Evaluation
from jaxaccum._feed import MicroStep, fused, micro_steps
from jaxaccum._integers import positive_int
from jaxaccum._options import Options
from jaxaccum._outputs import Outputs
from jaxaccum._processes import said
from jaxaccum._programs import FitState, Programs
from jaxaccum._reader import ONE_SHOT, TrainLoader
from jaxaccum._records import Records
from jaxaccum._run import Run
from jaxaccum._saver import Saver
from jaxaccum._signals import Signals
from jaxaccum._strategy import Strategy, length
from jaxaccum.callbacks import Callback, ModelCheckpoint, ProgressBar
from jaxaccum.task import Task

Tree = Any


class Trainer:
    """Trains a `Task` in windows of K micro-batches, in the vocabulary of PyTorch Lightning.

    A window is K micro-steps, and the last one of an epoch closes it, full or not. Every gradient is the exact weighted
    mean over what the window holds, on one device or several; devices are synchronised once a window.

    Args:
      accumulate_grad_batches: K: an int, a dict from epochs to K, or an `AccumulationSchedule`.
      max_epochs: -1 is without end; None is 1000, with a warning, or without end where `max_steps` is given.
      max_steps: optimizer steps; -1 is without limit.
      strategy: "single": one device. "ddp": each of the P devices takes a loader batch of its own, so that a window has
        P·K. "zero": likewise, with the optimizer's state and its work split over the devices. "dp": a loader batch is
        split over the devices. "auto": "single" on one device, "ddp" on several.
      devices: how many, over all processes, or "auto" for all.
      callbacks: a callback or a sequence of them, run in order.
      limit_train_batches: how many loader batches an epoch has at most, or which fraction of them.
      limit_val_batches: likewise in validation; 0 is none of them.
      val_check_interval: validate every so many micro-steps of an epoch, or after every such fraction of it.
      log_every_n_steps: counts optimizer steps.
      gradient_clip_val: the largest global norm of a window's gradient.
      default_root_dir: where `logger=True` and a `ModelCheckpoint` without a folder write; None is the working
        directory.
      enable_progress_bar: needs tqdm.
      logger: an object with `write_scalars(step, dict)`, or a sequence of them; True: a JSON line for each record, in
        `metrics.jsonl`; False: none.
      seed: of the initialisation, and of the micro-batches' keys.
      partial_window: how an epoch's last window, if it is not full, is divided: "exact", by what it holds, or
        "divide_by_k", as Lightning does.
      flush_on_stop: whether a window that a stop leaves open is closed with what it holds. Else it stays pending.
      fuse_windows: whether each window runs as one call, a loop on the device, where its micro-batches can be stacked:
        all of one shape, and each in one piece (with "ddp" and "zero" batches of one shape, with "dp" one that divides
        over the devices). Any other window runs as it does without. Each number of micro-steps in a window compiles
        once, and all of its batches are on the devices at once. The arithmetic is the same; the hooks are called as
        without, but `on_train_batch_start` of a whole window before it, with the counters of its start, and
        `on_train_batch_end` after it, with counters of their own but with the `state` of its end (see
        `state_is_ahead`). What would fall inside it waits for its end: a validation, a
        checkpoint, a stop.
      nonfinite: "propagate", or "drop": a micro-batch with a NaN or an infinity in its loss or gradient is left out.
      detect_anomaly: whether such a one raises FloatingPointError instead, before it enters the sums. The host then
        waits for the device after every micro-step.

    Raises:
      TypeError, ValueError: for an argument that is none of these, at construction.
      ImportError: for a progress bar without tqdm.

    Example:
      >>> import jax.numpy as jnp, numpy as np, optax, jaxaccum
      >>> task = jaxaccum.Task(
      ...     init=lambda key, batch: jnp.zeros(batch["x"].shape[1]),
      ...     loss=lambda params, batch, key: jnp.mean((batch["x"] @ params - batch["y"]) ** 2),
      ...     optimizer=optax.sgd(0.1),
      ... )
      >>> loader = [{"x": np.ones((4, 2), np.float32), "y": np.ones(4, np.float32)}] * 6
      >>> trainer = jaxaccum.Trainer(
      ...     accumulate_grad_batches={0: 4, 2: 2}, max_epochs=3, strategy="single", enable_progress_bar=False
      ... )
      >>> state = trainer.fit(task, loader)
      >>> trainer.global_step, trainer.micro_step, trainer.samples_seen
      (7, 18, 72)
    """

    def __init__(
        self,
        *,
        accumulate_grad_batches: int | Mapping[int, int] = 1,
        max_epochs: int | None = None,
        max_steps: int = -1,
        strategy: str = "auto",
        devices: int | str = "auto",
        callbacks: Callback | Sequence[Callback] = (),
        limit_train_batches: int | float = 1.0,
        limit_val_batches: int | float = 1.0,
        val_check_interval: int | float = 1.0,
        log_every_n_steps: int = 50,
        gradient_clip_val: float | None = None,
        default_root_dir: str | os.PathLike[str] | None = None,
        enable_progress_bar: bool = True,
        logger: Any = False,
        seed: int = 0,
        partial_window: str = "exact",
        flush_on_stop: bool = False,
        fuse_windows: bool = False,
        nonfinite: str = "propagate",
        detect_anomaly: bool = False,
    ):
        observers = _arguments.callbacks(callbacks)
        self._callbacks = (*observers, ProgressBar()) if enable_progress_bar else observers
        self._policies = [callback for callback in observers if isinstance(callback, ModelCheckpoint)]
        self._options = Options(
            accumulate_grad_batches=_arguments.schedule(accumulate_grad_batches, observers),
            max_epochs=max_epochs,
            max_steps=max_steps,
            limit_train_batches=limit_train_batches,
            limit_val_batches=limit_val_batches,
            val_check_interval=val_check_interval,
            log_every_n_steps=log_every_n_steps,
            gradient_clip_val=gradient_clip_val,
            seed=seed,
            partial_window=partial_window,
            flush_on_stop=flush_on_stop,
            fuse_windows=fuse_windows,
            nonfinite=nonfinite,
            detect_anomaly=detect_anomaly,
        )
        self._strategy = Strategy(strategy, devices)
        root = Path(default_root_dir or ".")
        self._loggers, self._folder = _arguments.loggers(logger, root), root / "checkpoints"
        self._hooks = {name: _overridden(self._callbacks, name) for name in vars(Callback) if name.startswith("on_")}
        self._at = Counters()
        self._run: Run | None = None
        self._savers: list[Saver] = []
        self._signals = Signals(self._strategy.processes)
        self._uncounted: collections.deque[tuple[MicroStep, Outputs]] = collections.deque()
        self._sets_k = False

    def fit(
        self,
        task: Task,
        train_loader: Iterable[Tree],
        val_loader: Iterable[Tree] | None = None,
        ckpt_path: str | os.PathLike[str] | None = None,
    ) -> FitState:
        """Trains, from the start or from a checkpoint.

        From a checkpoint a run goes on after the micro-step that it was saved at, as if it had never ended: parameters
        and all other state come out bit for bit the same. For that the loaders must give the same batches again. One
        whose iterators have `get_state` and `set_state` is put where it was; of any other the batches that were trained
        on are passed over: those of the open epoch, or of the whole run where all epochs are one iterator. The task and
        the Trainer's options are the caller's to pass unchanged; the seed is the checkpoint's, and so is K until the
        epoch ends. On another number of devices what is pending is merged or split, and the open epoch keeps its
        effective batch.

        SIGTERM and SIGINT (Ctrl-C), where fit runs in the main thread, end the run after the micro-step at hand, or
        with `fuse_windows` after the window: it is saved, if there is a `ModelCheckpoint`, and SystemExit with code
        143, or KeyboardInterrupt, is raised. A second one is not waited for. An error of a loader or a callback is
        raised after such a save too.

        The next `fit` of the same `Task` object uses the compiled programs of this one.

        After `jaxaccum.distributed.initialize()` the same script runs in n processes of L devices each, and ends with
        what one process with all P = n·L devices ends with. Every process calls fit, with the loaders of its own
        devices. With "ddp" and "zero" micro-step m of an epoch is loader batches m·P to m·P + P - 1 of the sequence
        that a single process would be given, and process p gives the L of them from m·P + p·L on; with "dp" it gives
        its share of each batch, in the order of the processes. Sizes may differ between processes, and lengths in
        validation; lengths in training, K and the options must not, or all raise. What comes to one process concerns
        all, after the same micro-step: a signal, `should_stop`, a loader's error. Any other exception in one is a
        RuntimeError in the others, without a save. Hooks run in every process, and process 0 alone logs and draws.
        A checkpoint is written by all, to a file system that all of them see, with the callbacks' states of process 0,
        and a run goes on from it in any number of processes. Loaders' own states are of use to the same number alone;
        else the batches that were trained on are passed over, each process its own, which takes a multiple of P.

        Args:
          task: what to train.
          train_loader: an iterable of batches, pytrees whose leaves have one leading length; iterated anew in every
            epoch. A batch that it gave must not be written to.
          val_loader: likewise, or None for no validation.
          ckpt_path: a checkpoint's folder; or "last", the newest complete one of the `ModelCheckpoint`, and a start
            where there is none, with a warning; or None for a start.

        Returns:
          The arrays of the run: `params`, `opt_state`, `model_state`, and what is pending.

        Raises:
          TypeError, ValueError: for a task or a loader that can't be trained, or a checkpoint of another task.
          OSError: for a `ckpt_path` that is no checkpoint.
          FloatingPointError: with `detect_anomaly`.
          RuntimeError: if another process has left the run.
        """
        processes = self._strategy.processes
        processes.begin()
        self._signals = Signals(processes)
        try:
            loader = self._start(task, train_loader, val_loader, ckpt_path)
        except BaseException as error:
            processes.leave(error)
            raise
        with self._signals:
            try:
                self._call("on_fit_start")
                self._call("on_train_start")
                self._meet()
                epochs = loader.epochs()
                if self._at.batch_idx:  # In mid-epoch, or at its end.
                    self._train_epoch(() if self._at.ends_epoch else next(epochs))
                while not self._finished():
                    self._train_epoch(next(epochs))
                if not self._at.batch_idx:
                    self._save_at_end()
                self._call("on_train_end")
                self._call("on_fit_end")
                self._meet()
                self._signals.leave_if_told()
            except BaseException as error:
                self._end_by(error)
                raise
            finally:
                self._running.records.flush(waits=not self._strategy.processes.left)
                for saver in self._savers:
                    saver.close()
        return self.state

    def validate(self, task: Task, val_loader: Iterable[Tree], state: FitState | None = None) -> dict[str, float]:
        """The weighted means of loss and metrics over `val_loader`.

        Args:
          task: what `state` was trained for.
          val_loader: an iterable of batches.
          state: as `fit` returned it; None is that of the last `fit`.

        Returns:
          "val_loss", and the metrics with "val_" before their names.

        Raises:
          ValueError: if the loader is empty.
        """
        return self._evaluate(Evaluation(task, self._strategy), self.state if state is None else state, val_loader)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Draws the run's losses, K and effective batch over the samples seen.

        Args:
          path: where to save the figure, or None.

        Returns:
          The matplotlib figure.

        Raises:
          ImportError: if matplotlib is missing.
        """
        return _plot.draw(self._running.records.history, None if self._strategy.processes.index else path)

    def log(self, name: str, value: float) -> None:
        """Adds a value to `callback_metrics`, and to the next record."""
        self._running.metrics[name] = self._running.logged[name] = value

    @property
    def state(self) -> FitState:
        """The run's arrays after its last micro-step.

        The next one donates them: in a callback they may be read until it returns, and to keep them longer is to keep
        buffers that are deleted. `copy_state` gives arrays to keep.
        """
        return self._running.state

    def copy_state(self) -> FitState:
        """A copy of `state` that no micro-step donates, on the same devices."""
        return jax.tree.map(jnp.copy, self.state)

    @property
    def state_is_ahead(self) -> bool:
        """In `on_train_batch_end`: whether `state` is that of micro-steps which the counters don't have yet.

        So it is with `fuse_windows`, before the last micro-step of a window. Whatever is saved, is saved after it.
        """
        return bool(self._uncounted)

    @property
    def should_stop(self) -> bool:
        """Whether training ends after the micro-step at hand. A callback may set it; each `fit` begins without."""
        return self._strategy.processes.own.stop

    @should_stop.setter
    def should_stop(self, stop: bool) -> None:
        self._strategy.processes.own.stop = bool(stop)

    @property
    def current_epoch(self) -> int:
        """The epoch, from 0; after `fit`, how many were completed."""
        return self._at.epoch

    @property
    def micro_step(self) -> int:
        """The micro-steps made since the run's start."""
        return self._at.micro_step

    @property
    def window_step(self) -> int:
        """The micro-steps in the open window; 0 where none is pending."""
        return self._at.window_step

    @property
    def global_step(self) -> int:
        """The optimizer steps made: the windows closed, even one in which nothing had weight."""
        return self._at.global_step

    @property
    def samples_seen(self) -> int:
        """The examples in all micro-steps made."""
        return self._at.samples_seen

    @property
    def accumulate_grad_batches(self) -> int:
        """K, now. A callback may set it in `on_train_epoch_start`, for that epoch."""
        return self._at.every_k

    @accumulate_grad_batches.setter
    def accumulate_grad_batches(self, k: int) -> None:
        if not self._sets_k:
            raise RuntimeError(
                f"accumulate_grad_batches={k!r} can't be set here: K changes at an epoch's start alone. Set it in a "
                "callback's on_train_epoch_start, or pass the Trainer a dict from epochs to K."
            )
        self._at.every_k = positive_int(k, "accumulate_grad_batches")

    @property
    def effective_batch_size(self) -> int:
        """The examples in a full window, now: P·N·K with "ddp" and "zero", else N·K; N is the first loader batch's.

        With several processes N is the mean of their first loader batches, and with "dp" the sum.
        """
        return self._running.examples * self._strategy.group * self.accumulate_grad_batches

    @property
    def num_training_batches(self) -> int | float:
        """The micro-steps in an epoch; infinite where that is not known."""
        return self._strategy.micro_steps(self._running.epoch_batches)

    @property
    def estimated_stepping_batches(self) -> int | float:
        """The optimizer steps of the run if nothing stops it, with every K of the schedule; may be infinite."""
        micro_steps, epochs, limit = self.num_training_batches, self._options.epochs, self._options.steps
        if isinstance(micro_steps, int) and isinstance(epochs, int):
            return min(self._options.accumulate_grad_batches.optimizer_steps(epochs, micro_steps), limit)
        return limit

    @property
    def callback_metrics(self) -> dict[str, Any]:
        """By name, the last window's means ("train_loss"), arrays on the device, and the last validation's, floats."""
        return self._running.train_metrics() | self._running.metrics

    @property
    def should_log(self) -> bool:
        """In `on_train_batch_end`: whether a record follows."""
        return not self._at.window_step and self._at.global_step % self._options.log_every_n_steps == 0

    # The parts of fit, in the order in which they run.

    def _start(
        self, task: Task, train_loader: Iterable[Tree], val_loader: Iterable[Tree] | None, ckpt_path: Any
    ) -> TrainLoader:
        """Begins a run, and returns what it trains on."""
        options, processes = self._options, self._strategy.processes
        if not isinstance(task, Task):
            raise TypeError(f"task must be a jaxaccum.Task, got {task!r}.")
        if options.max_epochs is None and options.max_steps == -1:
            warnings.warn(
                "max_epochs is not set: training for 1000 epochs. Pass max_epochs=-1 for no end.", stacklevel=3
            )
        loader = TrainLoader(train_loader, options, keeps_state=bool(self._policies))
        val_loader = val_loader if options.limit_val_batches else None
        _arguments.check_monitors(self._callbacks, validates=val_loader is not None)
        self._savers = [Saver(policy, self._folder, processes) for policy in self._policies]
        loader.agree(processes)
        options.agree(
            processes,
            strategy=self._strategy.name,
            devices=self._strategy.size,
            val_loader=val_loader is not None,
            ModelCheckpoint=[str(saver.folder) for saver in self._savers],
        )
        found = _saver.find(ckpt_path, self._savers, processes)
        # Before the devices meet for the first time: there nobody hears of a process that has left.
        examples = sum(processes.gather("the number of examples", length(loader.first)))
        seed = options.seed if found is None else found.notes["seed"]
        programs, evaluation = self._compiled(task, seed)
        self._run = Run(
            task=task,
            programs=programs,
            evaluation=evaluation,
            state=programs.initial(loader.first),
            records=Records(() if processes.index else self._loggers),
            seed=seed,
            val_loader=val_loader,
            examples=examples,
            epoch_batches=loader.epoch_batches,
        )
        self._at = Counters()
        if found is not None:
            self._at = _snapshot.restore(found, self._run, self._strategy, programs, self._callbacks)
            for saver in self._savers:
                saver.goes_on(found.path, self._at)
            own = functools.partial(_snapshot.own_batches, checkpoint=found, strategy=self._strategy)
            loader.go_on(self._at, self._run.loader_state, own)
        return loader

    def _meet(self) -> None:
        """Tells the other processes what hooks and signals may have asked for, and hears theirs."""
        self._strategy.processes.gather("the end of a hook")

    def _compiled(self, task: Task, seed: int) -> tuple[Programs, Evaluation]:
        """The last run's programs, if they serve this one too: then nothing compiles again."""
        last = self._run
        if last is not None and last.task is task and last.seed == seed:
            return last.programs, last.evaluation
        options = self._options
        optimizer = _optimizer.of_window(task.optimizer, options.gradient_clip_val, options.divides_by_k)
        return Programs(task, self._strategy, optimizer, options.nonfinite, seed), Evaluation(task, self._strategy)

    def _train_epoch(self, batches: Iterable[Tree]) -> None:
        at = self._at
        processes = self._strategy.processes
        if not at.batch_idx:
            self._begin_epoch()
        processes.agree(f"epoch {at.epoch}", {"accumulate_grad_batches": at.every_k, "micro_step": at.micro_step})
        self._validate_if_due()
        is_over = at.batch_idx and (at.ends_epoch or self._finished())
        before = at.batches
        for call in () if is_over else self._calls(batches):
            self._signals.leave_if_told()
            if processes.wishes.stop and at.batches != before:
                break  # A hook of the last micro-step asked for it, on whatever process.
            self._train_batches(call)
            self._save_if_due("micro_step", len(call))
            self._validate_if_due()
            self._signals.leave_if_told()
            if self._finished():
                break
        if at.batches == before and not is_over:
            passed = f" after the {before} that the checkpoint was trained on" if before else ""
            raise ValueError(f"train_loader gave no batch in epoch {at.epoch}{passed}. {ONE_SHOT}")
        if not at.ends_epoch:
            self._save_at_end()
        self._flush_if_asked()
        self._call("on_train_epoch_end")
        if at.ends_epoch:
            at.epoch, at.batch_idx, at.batches, at.ends_epoch = at.epoch + 1, 0, 0, False
            self._save_if_due("epoch")
        self._meet()

    def _begin_epoch(self) -> None:
        """Says what K is."""
        self._sets_k = True
        self.accumulate_grad_batches = self._options.accumulate_grad_batches(self._at.epoch)
        self._call("on_train_epoch_start")
        self._sets_k = False

    def _calls(self, batches: Iterable[Tree]) -> Iterator[Sequence[MicroStep]]:
        """The micro-steps to come in the epoch, in lists, each for one call on the devices."""
        steps = micro_steps(batches, self._strategy)
        return fused(steps, self._at.every_k, self._at.window_step) if self._options.fuse_windows else zip(steps)

    def _train_batches(self, micro_steps: Sequence[MicroStep]) -> None:
        """A call on the devices: one micro-step, or all that are left of a window."""
        run, at = self._running, self._at
        for batch_idx, micro_step in enumerate(micro_steps, at.batch_idx):
            for hook in self._hooks["on_train_batch_start"]:
                hook(self, run.task, micro_step.batch, batch_idx)
        window_step = at.window_step + len(micro_steps)
        boundary = micro_steps[-1].last or window_step >= at.every_k
        with jax.profiler.StepTraceAnnotation("train", step_num=at.micro_step):
            share = self._share(window_step) if boundary else None
            pieces = [micro_step.pieces for micro_step in micro_steps]
            run.state, outputs, means = run.programs.run(run.state, pieces, boundary, share)
        # From here to the hooks nothing fails: what is counted is in the state, should a hook raise.
        self._uncounted.extend(zip(micro_steps, outputs, strict=True))
        try:
            while self._uncounted:
                batch_idx = at.batch_idx
                micro_step, outputs = self._count(means)
                if self._options.detect_anomaly:
                    self._refuse_anomaly(outputs)
                for hook in self._hooks["on_train_batch_end"]:
                    hook(self, run.task, outputs, micro_step.batch, batch_idx)
        finally:
            while self._uncounted:  # A hook raised, but the devices have made them all.
                self._count(means)
        if boundary and self.should_log:
            self._record()

    def _share(self, window_step: int) -> jax.Array | None:
        """What to multiply the gradient of a window of so many micro-steps with, if windows are divided by K."""
        share = window_step / self._at.every_k
        return self._strategy.constant(share, _accumulator.weight_dtype()) if self._options.divides_by_k else None

    def _count(self, means: dict[str, jax.Array] | None) -> tuple[MicroStep, Outputs]:
        """Counts the next micro-step that has been made, at a boundary an optimizer step too, and returns it."""
        run, at = self._running, self._at
        micro_step, outputs = self._uncounted.popleft()
        run.loader_state = micro_step.loader_state
        at.window_step += 1
        at.window_samples += micro_step.examples
        at.batches += micro_step.count
        at.all_batches += micro_step.count
        at.ends_epoch = micro_step.last
        at.batch_idx += 1
        at.micro_step += 1
        at.samples_seen += micro_step.examples
        # Of a window's micro-steps an earlier one may have been the one that made a validation due.
        at.validated &= run.val_loader is None or not self._validation_is_due(micro_step.last)
        if means is not None and not self._uncounted:
            self._closed(means)
        return micro_step, outputs

    def _closed(self, means: dict[str, jax.Array]) -> None:
        """Counts an optimizer step."""
        at = self._at
        self._running.means = means
        at.global_step += 1
        at.window_step = 0
        at.effective_batch, at.window_samples = at.window_samples, 0

    def _flush_if_asked(self) -> None:
        """Closes the window that a stop left open."""
        run = self._running
        if self._options.flush_on_stop and self._at.window_step:
            run.state, means = run.programs.flush(run.state, self._share(self._at.window_step))
            self._closed(means)
            if self.should_log:
                self._record()

    def _refuse_anomaly(self, outputs: Mapping[str, float]) -> None:
        """Waits for the device."""
        at = self._at
        dropped = bool(np.any(_outputs.own(self.state.pending.sums.dropped)))
        found = self._strategy.processes.gather("an anomaly", [dropped, outputs["loss"] if dropped else None])
        losses = {process: loss for process, (dropped, loss) in enumerate(found) if dropped}
        if losses:
            error = FloatingPointError(
                f"micro-step {at.batch_idx - 1} of epoch {at.epoch} has a NaN or an infinity in its loss "
                f"({said(losses) if len(found) > 1 else losses[0]}) or in its gradient. It was left out of its window; "
                "nonfinite='drop' leaves out all such micro-batches and goes on."
            )
            self._strategy.processes.fail(error)

    def _record(self) -> None:
        """Logs the last window, without waiting for it."""
        run, at = self._running, self._at
        scalars = self._place() | {"accumulate_grad_batches": at.every_k, "effective_batch_size": at.effective_batch}
        run.records.add(at.global_step, scalars | run.train_metrics() | run.logged)
        run.logged = {}

    def _place(self) -> dict[str, int]:
        """Where in the run a record was made."""
        at = self._at
        return {"epoch": at.epoch, "micro_step": at.micro_step, "samples_seen": at.samples_seen}

    def _validation_is_due(self, last: bool) -> bool:
        interval = _limits.validation_interval(self._options.val_check_interval, self.num_training_batches)
        return last if math.isinf(interval) else self._at.batch_idx % interval == 0

    def _validate_if_due(self) -> None:
        """A validation in fit; what is pending stays so."""
        run, at = self._running, self._at
        if at.validated or run.val_loader is None:
            return
        self._call("on_validation_start")
        results = self._evaluate(run.evaluation, run.state, run.val_loader, self._signals.leave_if_told)
        run.metrics |= results
        run.records.add(self.global_step, self._place() | results)
        self._call("on_validation_epoch_end")
        self._call("on_validation_end")
        self._meet()
        at.validated = True
        self._save_if_due("validation")

    def _evaluate(
        self,
        evaluation: Evaluation,
        state: FitState,
        val_loader: Iterable[Tree],
        look: Callable[[], None] = lambda: None,
    ) -> dict[str, float]:
        limit = _limits.batches(val_loader, self._options.limit_val_batches, "limit_val_batches")
        return evaluation.run(state.params, state.model_state, itertools.islice(val_loader, limit), look)

    def _save_if_due(self, moment: str, micro_steps: int = 1) -> None:
        for saver in self._savers:
            saver.save_if_due(self, moment, self._at, self._take, micro_steps)

    def _save_at_end(self) -> None:
        for saver in self._savers:
            saver.save_at_end(self._at, self._take)

    def _take(self) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        """What a checkpoint holds."""
        run = self._running
        run.records.write()  # The resume won't make these records again.
        return _snapshot.arrays(run.state), _snapshot.notes(run, self._at, self._strategy, self._callbacks)

    def _end_by(self, error: BaseException) -> None:
        """What is done before an error goes on its way."""
        if self._signals.came_again(error):
            self._strategy.processes.leave(error)
            for saver in self._savers:
                saver.abandon()
        else:
            self._rescue(error)
        self._call("on_exception", error)

    def _rescue(self, error: BaseException) -> None:
        """Saves what the last whole micro-step left."""
        processes = self._strategy.processes
        processes.leave(error)  # If the others are elsewhere: they don't come to a save.
        if any(x.is_deleted() for x in jax.tree.leaves(self.state)):
            return  # It was donated to a program that failed.
        if processes.are_together(error):
            try:
                self._save_at_end()
            except Exception as failure:
                warnings.warn(f"the run could not be saved when it met {error!r}: {failure!r}.", stacklevel=2)
        if isinstance(error, (KeyboardInterrupt, SystemExit)) and processes.are_together(error):
            self._flush_if_asked()

    def _finished(self) -> bool:
        at = self._at
        is_done = at.global_step >= self._options.steps or at.epoch >= self._options.epochs
        return is_done or self._strategy.processes.wishes.stop

    @property
    def _running(self) -> Run:
        if self._run is None:
            raise RuntimeError("this is known once fit has been called.")
        return self._run

    def _call(self, hook: str, *args: Any) -> None:
        for function in self._hooks[hook]:
            function(self, self._running.task, *args)


def _overridden(callbacks: Sequence[Callback], name: str) -> list[Callable[..., None]]:
    """The callbacks' own methods of that name: a hook that nobody fills costs nothing."""
    return [
        getattr(callback, name)
        for callback in callbacks
        if getattr(type(callback), name) is not getattr(Callback, name)
    ]
