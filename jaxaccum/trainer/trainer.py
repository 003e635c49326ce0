"""The `Trainer`: its arguments, methods and properties, and how a run starts and ends."""

import contextlib
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxaccum import _paths
from jaxaccum import task as _task
from jaxaccum._integers import positive_int
from jaxaccum._schedule import AccumulationSchedule
from jaxaccum._types import Tree
from jaxaccum.callbacks import Callback, ProgressBar
from jaxaccum.checkpoint import Checkpoint, orbax_io
from jaxaccum.distributed.process_group import Processes
from jaxaccum.loggers import figure
from jaxaccum.task import Task
from jaxaccum.trainer.input.batches import length
from jaxaccum.trainer.input.loader import Start, TrainLoader, ValLoader
from jaxaccum.trainer.input.strategies import Strategy
from jaxaccum.trainer.loop import arguments, run_checkpoint, run_state, saving
from jaxaccum.trainer.loop.counters import Counters
from jaxaccum.trainer.loop.hooks import Hooks
from jaxaccum.trainer.loop.loop import Loop
from jaxaccum.trainer.loop.options import Options
from jaxaccum.trainer.loop.run_state import Run, Setup
from jaxaccum.trainer.loop.saving import RunCheckpoints
from jaxaccum.trainer.loop.signals import EXIT_SIGNALS, Signals
from jaxaccum.trainer.loop.warm_start import WarmStart
from jaxaccum.trainer.programs.compiled import FitState
from jaxaccum.trainer.programs.evaluation import Evaluation


class Trainer:
    """Trains a `Task` with exact gradient accumulation. Argument names follow PyTorch Lightning.

    A window is K micro-steps. The last micro-step of an epoch closes the window even if it is not full. Every gradient
    is the exact weighted mean over the window's examples, on one device or several. Devices synchronise once per
    window.

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

    Args:
      accumulate_grad_batches: K: an int, a dict from epoch to K, or an `AccumulationSchedule`, by epoch or by optimizer
        step, samples or tokens. K changes only at the start of a window. With a schedule by samples or tokens, an
        iterator may be read up to 3 micro-steps beyond `max_steps`.
      max_epochs: the number of epochs; -1 for no limit. None means 1000, with a warning, or no limit if `max_steps` is
        given.
      max_steps: the number of optimizer steps; -1 for no limit.
      strategy: "single": one device. "ddp": each of the P devices takes its own loader batch, so a window has P·K of
        them. "zero": like "ddp", with the optimizer state and update sharded over the devices. "dp": each loader batch
        is split over the devices. "auto": "single" on one device, "ddp" on several.
      devices: the number of devices over all processes, or "auto" for all of them.
      callbacks: a callback or a sequence of callbacks, which run in order.
      limit_train_batches: the maximum number of loader batches per epoch (int), or a fraction of the epoch (float).
      limit_val_batches: the same for validation; 0 disables validation.
      overfit_batches: train only on this many batches (int), or on this fraction of an epoch (float). They are read
        once and repeated in the same order every epoch. Validation uses the same limit. 0 is off.
      num_sanity_val_steps: the number of validation micro-steps to run before training, so that errors in validation
        show up early. Their results are not recorded. -1 runs all of them, 0 none.
      check_val_every_n_epoch: validate every n epochs. None: `val_check_interval` counts across epochs.
      val_check_interval: validate every this many micro-steps of an epoch (int), or after this fraction of an epoch
        (float). An int larger than an epoch counts across epochs.
      log_every_n_steps: log every n optimizer steps. The first step of the run, the last step of each epoch and the
        step that reaches `max_steps` are always logged.
      gradient_clip_val: the maximum global norm of a window's gradient.
      default_root_dir: where `logger=True` and a `ModelCheckpoint` without a `dirpath` write; None is the working
        directory.
      enable_progress_bar: whether to show a progress bar; requires tqdm.
      logger: an object with `write_scalars(step, dict)`, or a sequence of them. True writes one JSON line per record to
        `metrics.jsonl`; False disables logging.
      seed: the seed for the initialisation and for the micro-batches' keys.
      partial_window: how to normalise an epoch's last window if it is not full: "exact" divides by the total weight of
        its examples, "divide_by_k" matches Lightning.
      flush_on_stop: whether to close an open window with an optimizer step when training stops. If False, the window
        stays pending.
      fuse_windows: whether to run each window as one call that loops on the device. This requires that the window's
        micro-batches can be stacked: all have the same shape and each is in one piece (with "ddp" and "zero", batches
        of one shape; with "dp", a batch that divides over the devices). Other windows run one micro-step at a time. The
        arithmetic is the same. The program compiles once for each number of micro-steps in a window, and all batches of
        the window are on the devices at once. `on_train_batch_start` runs for all micro-steps before the call, with
        the counters at the window's start. `on_train_batch_end` runs after it, with each micro-step's own counters but
        with the `state` at the window's end (see `state_is_ahead`). A validation, checkpoint or stop that would fall
        inside the window is delayed to its end.
      nonfinite: "propagate", or "drop" to leave out a micro-batch with a NaN or an infinity in its loss or gradient.
      detect_anomaly: whether to raise FloatingPointError for such a micro-batch, before it enters the sums. The host
        then waits for the device after every micro-step.
      exit_signals: the signals that end `fit` after a save; by default SIGTERM, SIGINT, SIGUSR1 and SIGHUP. A signal
        that is ignored, as SIGHUP is under nohup, or that has a handler of the user's, is left alone.

    Raises:
      TypeError, ValueError: for an invalid argument, at construction.
      ImportError: for a progress bar without tqdm.
    """

    def __init__(
        self,
        *,
        accumulate_grad_batches: int | Mapping[int, int] | AccumulationSchedule = 1,
        max_epochs: int | None = None,
        max_steps: int = -1,
        strategy: str = "auto",
        devices: int | str = "auto",
        callbacks: Callback | Sequence[Callback] = (),
        limit_train_batches: int | float = 1.0,
        limit_val_batches: int | float = 1.0,
        overfit_batches: int | float = 0,
        num_sanity_val_steps: int = 2,
        check_val_every_n_epoch: int | None = 1,
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
        exit_signals: Sequence[int] = EXIT_SIGNALS,
    ):
        observers = arguments.callbacks(callbacks)
        self._callbacks = (*observers, ProgressBar()) if enable_progress_bar else observers
        self._average = arguments.average(observers)
        self._options = Options(
            accumulate_grad_batches=arguments.schedule(accumulate_grad_batches, observers),
            max_epochs=max_epochs,
            max_steps=max_steps,
            limit_train_batches=limit_train_batches,
            limit_val_batches=limit_val_batches,
            overfit_batches=overfit_batches,
            num_sanity_val_steps=num_sanity_val_steps,
            check_val_every_n_epoch=check_val_every_n_epoch,
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
        self._exit_signals = arguments.exit_signals(exit_signals)
        self._strategy, self._processes = Strategy(strategy, devices), Processes()
        root = _paths.absolute(default_root_dir or ".")
        self._loggers, self._folder = arguments.loggers(logger, root), root / "checkpoints"
        self._run: Run | None = None
        self._evaluation: Evaluation | None = None

    def fit(
        self,
        task: Task,
        train_loader: Iterable[Tree],
        val_loader: Iterable[Tree] | None = None,
        ckpt_path: str | os.PathLike[str] | None = None,
        *,
        init_from: FitState | Tree | None = None,
    ) -> FitState:
        """Trains from scratch or resumes from a checkpoint.

        A resumed run continues after the micro-step at which the checkpoint was saved. Parameters and all other state
        are bit-for-bit the same as in an uninterrupted run, provided that the loaders yield the same batches again. A
        loader with `get_state` and `set_state`, or with `state_dict` and `load_state_dict`, or whose iterators have
        them, is restored to its saved position. For any other loader the batches already trained on are skipped: those
        of the open epoch, or of the whole run if all epochs share one iterator. Anything that a loader's state leaves
        out, such as the contents of a shuffle buffer, is lost. Pass the same task and the same Trainer options as
        before; the seed, and K for the rest of the epoch, come from the checkpoint. On a different number of devices
        the pending sums are merged or split, and the open epoch keeps its effective batch size; with K by
        steps, samples or tokens, the open window does.

        If `fit` runs in the main thread, the `exit_signals`, such as SIGTERM, SIGINT (Ctrl-C) and SLURM's SIGUSR1, end
        the run after the current micro-step, or after the current window with `fuse_windows`. The run is saved if there
        is a `ModelCheckpoint`, and then KeyboardInterrupt is raised after SIGINT, or SystemExit with code 128 + the
        signal's number. A second signal has its default effect immediately, without a save; after a second Ctrl-C the
        process still waits for a checkpoint that is already being written. An error in a loader or a callback is also
        raised after a save.

        The next `fit` of the same `Task` object reuses the compiled programs.

        After `jaxaccum.distributed.initialize()` the same script runs in n processes with L devices each. The result is
        the same as that of one process with all P = n·L devices. Every process calls `fit` with the loaders for its own
        devices. With "ddp" and "zero", micro-step m of an epoch consists of loader batches m·P to m·P + P - 1 of the
        sequence that a single process would read, and process p yields L of them, starting at m·P + p·L. With "dp" each
        process yields its share of each batch, in process order. Batch sizes may differ between processes, and so may
        the lengths of validation loaders. The lengths of training loaders, K and the options must be equal, or all
        processes raise. A signal, `should_stop` or a loader error in one process takes effect in all of them, after the
        same micro-step. Any other exception in one process raises RuntimeError in the others, without a save. Hooks run
        in every process; only process 0 logs and draws. All processes write each checkpoint, to a file system that they
        share, with the callback states of process 0. A run can resume with any number of processes. Loader states are
        only used if the number of processes is unchanged; otherwise each process skips the batches that it trained on.
        With "ddp" and "zero" the total number of loader batches trained on must then be a multiple of P.

        Args:
          task: what to train.
          train_loader: an iterable of batches, which are pytrees of arrays. It is iterated once per epoch, after
            `set_epoch(epoch)` is called on the loader, its sampler and its dataset if they define it. In the first
            epoch of a `fit` iteration starts before `on_train_epoch_start`, in later epochs after it. Its `len` is an
            estimate, not a limit. Batches must not be modified or deleted after they are yielded.
          val_loader: an iterable of batches, or None for no validation. An iterator is not restored on resume.
          ckpt_path: the folder of a checkpoint; "last" for the newest checkpoint in the folders of the
            `ModelCheckpoint`s, or a fresh start with a warning if there is none; "best" for the best checkpoint of the
            newest run on disk, ranked by the first `ModelCheckpoint` with a monitor; or None for a fresh start.
          init_from: what a fresh run starts from in place of what `Task.init` returns: parameters, for example of
            `jaxaccum.checkpoint.load(path, like=params)`, with a fresh optimizer state; or a `FitState`, whose
            parameters, optimizer state and model state are taken. They are copied. All counters start at 0. With
            `ckpt_path="last"` it is used if there is no checkpoint.

        Returns:
          The run's arrays: `params`, `opt_state`, `model_state` and the `pending` sums.

        Raises:
          TypeError, ValueError: for a task or a loader that can't be trained, a validation that would never run, a
            checkpoint or an `init_from` of another task, or for both of these.
          OSError: if `ckpt_path` is not a checkpoint, or if none of the existing checkpoints can be read.
          FloatingPointError: with `detect_anomaly`.
          RuntimeError: if another process has left the run.
        """
        processes = self._processes
        processes.begin()
        signals = Signals(processes, self._exit_signals)
        try:
            run, checkpoints = self._start(task, train_loader, val_loader, ckpt_path, init_from)
            hooks = Hooks(self, task, self._callbacks)
            loop = Loop(run, hooks, checkpoints, signals)
            checkpoints.begin()
            loop.check_validation()
            run.metrics.records.begin(run.at.resumed if run.is_resuming else None)
        except BaseException as error:
            processes.leave(error)
            raise
        with signals:
            try:
                hooks.call("on_fit_start")
                hooks.call("on_train_start")
                processes.share_wishes()
                loop.train()
                hooks.call("on_train_end")
                hooks.call("on_fit_end")
                processes.share_wishes()
                signals.leave_if_told()
            except BaseException as error:
                loop.end_by(error)
                hooks.call_on_exception(error)
                raise
            finally:
                with contextlib.closing(checkpoints):  # Runs even if the flush raises.
                    run.metrics.records.flush(waits=not processes.left)
        return run.state

    def validate(
        self,
        task: Task,
        val_loader: Iterable[Tree],
        state: FitState | None = None,
        ckpt_path: str | os.PathLike[str] | None = None,
    ) -> dict[str, float]:
        """Computes the weighted means of the loss and the metrics over `val_loader`.

        With an `EMA` among the callbacks, the parameters are the average of the last `fit` or of the checkpoint. A
        `state` is used as it is.

        Args:
          task: the task that was trained.
          val_loader: an iterable of batches.
          state: the state that `fit` returned. None uses the state of the last `fit`, unless `ckpt_path` is given.
          ckpt_path: the checkpoint to validate, as in `fit`. It doesn't require a `fit` in this process.

        Returns:
          A dict with "val_loss" and the metrics, whose names are prefixed with "val_".

        Raises:
          ValueError: if the loader is empty, if both `state` and `ckpt_path` are given, or for a checkpoint of another
            task.
          OSError: if `ckpt_path` is not a checkpoint.
          RuntimeError: if neither is given and `fit` has not been called.
        """
        batches = ValLoader(val_loader, self._options.limit_val_batches)
        if state is not None and ckpt_path is not None:
            raise ValueError(f"pass either state or ckpt_path={ckpt_path!r} to validate, not both.")
        if ckpt_path is not None:
            state = self._saved(task, batches, ckpt_path)
        elif state is None:
            state = self.state._replace(params=self._running.evaluated_params)
        return self._evaluation_of(task).run(state.params, state.model_state, batches)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Plots the run's losses, K and effective batch size over the samples seen.

        Args:
          path: where to save the figure, or None.

        Returns:
          The matplotlib figure.

        Raises:
          ImportError: if matplotlib is missing.
        """
        return figure.draw(self._running.metrics.records.history, None if self._processes.index else path)

    def log(self, name: str, value: float) -> None:
        """Adds a value to `callback_metrics` and to the next record.

        Args:
          name: the key in both.
          value: a number or a scalar array. A device array is copied without waiting for it.

        Raises:
          TypeError: if the value is not a real number.
        """
        self._running.metrics.log(name, value)

    @property
    def state(self) -> FitState:
        """The run's arrays after its last micro-step.

        The next micro-step donates them. A callback may read them until it returns, but must not keep references to
        them: their buffers will be deleted. Use `copy_state` for arrays to keep.
        """
        return self._running.state

    def copy_state(self) -> FitState:
        """Returns a copy of `state`, on the same devices, that no micro-step donates."""
        return jax.tree.map(jnp.copy, self.state)

    @property
    def is_resuming(self) -> bool:
        """Whether the run was resumed from a checkpoint."""
        return self._run is not None and self._run.is_resuming

    @property
    def state_is_ahead(self) -> bool:
        """In `on_train_batch_end`: whether `state` includes micro-steps that the counters don't include yet.

        This is the case with `fuse_windows`, before the last micro-step of a window. Checkpoints are saved after it.
        """
        return bool(self._running.uncounted)

    @property
    def should_stop(self) -> bool:
        """Whether to stop training after the current micro-step. Callbacks may set it; each `fit` resets it."""
        return self._processes.own.stop

    @should_stop.setter
    def should_stop(self, stop: bool) -> None:
        self._processes.own.stop = bool(stop)

    @property
    def current_epoch(self) -> int:
        """The current epoch, from 0; after `fit`, the number of completed epochs."""
        return self._at.epoch

    @property
    def micro_step(self) -> int:
        """The number of micro-steps since the start of the run."""
        return self._at.micro_step

    @property
    def window_step(self) -> int:
        """The number of micro-steps in the open window; 0 if none is pending."""
        return self._at.window_step

    @property
    def global_step(self) -> int:
        """The number of optimizer steps, which is the number of closed windows, including those of weight 0."""
        return self._at.global_step

    @property
    def samples_seen(self) -> int:
        """The number of examples in all micro-steps so far."""
        return self._at.samples_seen

    @property
    def accumulate_grad_batches(self) -> int:
        """The current K. A callback may set it in `on_train_epoch_start`, for that epoch.

        With an `AccumulationSchedule` by steps, samples or tokens it can't be set.
        """
        return self._at.every_k

    @accumulate_grad_batches.setter
    def accumulate_grad_batches(self, k: int) -> None:
        if self._run is None or not self._run.takes_k:
            raise RuntimeError(
                f"accumulate_grad_batches={k!r} can't be set here: K changes at an epoch's start alone, or follows an "
                "AccumulationSchedule by steps, samples or tokens. Without one, set it in a callback's "
                "on_train_epoch_start, or pass the Trainer a dict from epochs to K."
            )
        self._run.at.every_k = positive_int(k, "accumulate_grad_batches")

    @property
    def effective_batch_size(self) -> int:
        """The number of examples in a full window: P·N·K with "ddp" and "zero", else N·K.

        N is the size of the first loader batch. With several processes it is the mean over their first batches, or with
        "dp" the sum.
        """
        return self._running.setup.examples * self._strategy.group * self.accumulate_grad_batches

    @property
    def num_training_batches(self) -> int | float:
        """The expected number of micro-steps per epoch; infinite if the loader has no length."""
        return self._running.setup.epoch_micro_steps

    @property
    def estimated_stepping_batches(self) -> int | float:
        """The run's expected number of optimizer steps, following the schedule of K; may be infinite.

        With a schedule by "samples" it assumes batches of the size of the first one; by "tokens" it is `max_steps`.
        """
        examples = self._running.setup.examples * self._strategy.group
        return self._options.optimizer_steps(self.num_training_batches, examples)

    @property
    def callback_metrics(self) -> dict[str, float]:
        """The last window's means ("train_loss"), the last validation's results and the values logged by callbacks.

        Reading it waits for the devices to finish that window.
        """
        return self._running.metrics.all()

    @property
    def progress_bar_metrics(self) -> dict[str, float]:
        """The means ("train_loss") of the newest window that the devices have finished; {} before the first.

        Reading it does not wait.
        """
        return self._running.metrics.finished()

    @property
    def should_log(self) -> bool:
        """In `on_train_batch_end`: whether this step is logged.

        Steps are logged every `log_every_n_steps` optimizer steps, at the first step of the run, at the last step of
        each epoch and at the step that reaches `max_steps`.
        """
        return self._running.record_is_due

    def _start(
        self,
        task: Task,
        train_loader: Iterable[Tree],
        val_loader: Iterable[Tree] | None,
        ckpt_path: Any,
        init_from: FitState | Tree | None,
    ) -> tuple[Run, RunCheckpoints]:
        """Returns a run, fresh or restored from a checkpoint, and its checkpoints."""
        options, processes = self._options, self._processes
        if not isinstance(task, Task):
            raise TypeError(f"task must be a jaxaccum.Task, got {task!r}.")
        if init_from is not None and ckpt_path not in (None, "last"):
            raise ValueError(
                f"init_from starts a fresh run, and ckpt_path={ckpt_path!r} resumes one: pass one of them. With "
                "ckpt_path='last', init_from is used if there is no checkpoint."
            )
        if options.max_epochs is None and options.max_steps == -1:
            warnings.warn(
                "max_epochs is not set: training for 1000 epochs. Pass max_epochs=-1 for no end.", stacklevel=3
            )
        if options.limit_val_batches == 0:
            val_loader = None
        arguments.check_monitors(self._callbacks, val_loader is not None)
        checkpoints = RunCheckpoints(self, self._callbacks, self._folder, processes)
        loader = TrainLoader(
            train_loader,
            limit_train_batches=options.limit_train_batches,
            overfit_batches=options.overfit_batches,
            epochs=options.epochs,
            steps=options.steps,
            keeps_state=bool(checkpoints.folders),
        )
        loader.agree(processes)
        options.agree(
            processes,
            strategy=self._strategy.name,
            devices=self._strategy.size,
            val_loader=val_loader is not None,
            ModelCheckpoint=[str(folder) for folder in checkpoints.folders],
        )
        found = None if ckpt_path is None else self._resumed(ckpt_path)
        seed = options.seed
        # The loader is first read here, once the position in the run is known.
        if found is None:
            loader.begin(Start())
        else:
            seed = found.notes["seed"]
            run_checkpoint.begin(found, loader, self._strategy)
        val_limit = options.overfit_batches or options.limit_val_batches
        setup = Setup(
            options=options,
            strategy=self._strategy,
            processes=processes,
            # Before the first collective, which would deadlock if a process had left.
            examples=sum(processes.gather("the number of examples", length(loader.first))),
            programs=run_state.programs_for(task, options, self._strategy, seed, self._run),
            evaluation=self._evaluation_of(task),
            loader=loader,
            val_loader=None if val_loader is None else ValLoader(val_loader, val_limit),
        )
        warm_start = None if init_from is None or found is not None else WarmStart(init_from)
        self._run = run = run_state.begin(setup, self._loggers, self._average, warm_start)
        if found is not None:
            checkpoints.restore(found, run)
        return run, checkpoints

    def _resumed(self, ckpt_path: str | os.PathLike[str]) -> Checkpoint | None:
        """Returns the checkpoint to resume from; None, with a warning, for "last" if there is none."""
        orbax_io.remove_cut_off(saving.folders_of(self._callbacks, self._folder), self._processes)
        try:
            return saving.find(ckpt_path, self._callbacks, self._folder, self._processes, to_resume=True)
        except saving.NoLastCheckpointError as error:
            warnings.warn(f"{error} The run starts afresh.", stacklevel=4)
            return None

    def _saved(self, task: Task, val_loader: ValLoader, ckpt_path: str | os.PathLike[str]) -> FitState:
        """Returns the parameters and the model state of a checkpoint."""
        found = saving.find(ckpt_path, self._callbacks, self._folder, self._processes)
        for batch in val_loader.first(1):
            like = _task.initial(task, jax.random.key(found.notes["seed"]), batch)
            return run_checkpoint.weights(found, *like, averaged=self._average is not None)
        raise ValueError("val_loader gave no batch.")

    def _evaluation_of(self, task: Task) -> Evaluation:
        """Returns the validation programs for `task`, reusing those of the last call for the same task."""
        if self._evaluation is None or self._evaluation.task is not task:
            self._evaluation = Evaluation(task, self._strategy, self._processes)
        return self._evaluation

    @property
    def _at(self) -> Counters:
        return Counters() if self._run is None else self._run.at

    @property
    def _running(self) -> Run:
        if self._run is None:
            raise RuntimeError("this is known once fit has been called.")
        return self._run
