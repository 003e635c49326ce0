"""The `Trainer`: its arguments, methods and properties, and how a run starts and ends."""

import contextlib
import datetime
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxaccum import _calls, _paths
from jaxaccum import task as _task
from jaxaccum._choosing.planner import check_loader, target
from jaxaccum._integers import positive_int
from jaxaccum._schedule import AccumulationSchedule
from jaxaccum._types import Tree
from jaxaccum.callbacks import Callback, NoiseScaleMonitor, ProgressBar
from jaxaccum.callbacks.average import ParamsAverage
from jaxaccum.callbacks.time_limit import TimeLimit
from jaxaccum.checkpoint import Checkpoint, orbax_io
from jaxaccum.distributed.process_group import Processes
from jaxaccum.loggers import figure
from jaxaccum.loggers.records import Records
from jaxaccum.task import Task
from jaxaccum.trainer.input.batches import length
from jaxaccum.trainer.input.loader import Start, TrainLoader, ValLoader, val_loaders
from jaxaccum.trainer.input.strategies import Strategy
from jaxaccum.trainer.loop import arguments, run_checkpoint, run_state, saving
from jaxaccum.trainer.loop.counters import Counters
from jaxaccum.trainer.loop.hooks import Hooks
from jaxaccum.trainer.loop.loop import Loop
from jaxaccum.trainer.loop.metrics import Metrics
from jaxaccum.trainer.loop.options import Options
from jaxaccum.trainer.loop.run_state import Run, Setup
from jaxaccum.trainer.loop.saving import RunCheckpoints
from jaxaccum.trainer.loop.signals import EXIT_SIGNALS, Signals
from jaxaccum.trainer.loop.warm_start import WarmStart
from jaxaccum.trainer.programs.compiled import FitState
from jaxaccum.trainer.programs.evaluation import Evaluation

Loaders = Iterable[Tree] | Mapping[str, Iterable[Tree]]


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
        iterator may be read up to 3 micro-steps beyond `max_steps`. "auto": the K with which a window has
        `target_batch_size` examples, given those of the run's first batch. On devices that report their memory `fit`
        also compiles what `jaxaccum.plan` would, once, and refuses batches that don't fit.
      target_batch_size: the examples of a window, for "auto": a multiple of P·N with "ddp" and "zero", else of N.
        `jaxaccum.plan` finds the largest N that fits in memory, for the loader.
      max_epochs: the number of epochs; -1 for no limit. None means 1000, with a warning, or no limit if `max_steps` or
        `max_time` is given.
      max_steps: the number of optimizer steps; -1 for no limit.
      min_epochs: the number of epochs before which `should_stop` and `max_time` don't stop the run; they take effect
        then. None for no minimum.
      min_steps: the same in optimizer steps.
      max_time: stop once `fit` has taken this long, counted over the run's resumes: a `datetime.timedelta`, a dict of
        its arguments, or "DD:HH:MM:SS". None for no limit.
      strategy: "single": one device. "ddp": each of the P devices takes its own loader batch, so a window has P·K of
        them. "zero": like "ddp", with the optimizer state and update sharded over the devices. "dp": each loader batch
        is split over the devices. "auto": "single" on one device, "ddp" on several.
      devices: the number of devices over all processes, or "auto" for all of them.
      callbacks: a callback or a sequence of callbacks, which run in order.
      fast_dev_run: to find errors quickly: run this many micro-steps (True: one) of training, and then of validation,
        without loggers, checkpoints and early stopping, and without the other limits of a run's length. `test` and
        `predict` stop after as many. `fit` starts afresh, and "last" and "best" mean its final state.
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
      log_grad_norm: whether to log "grad_norm" with each window: the global norm of its mean gradient, before clipping.
      log_epoch_means: whether to log, at each epoch's end, the weighted means of the loss and the metrics over the
        epoch: "train_loss_epoch" and so on, over what the windows counted. The host then waits for the devices there.
      gradient_clip_val: the maximum of a window's mean gradient; None for no clipping.
      gradient_clip_algorithm: "norm" scales the gradient down to a global norm of `gradient_clip_val`; "value" clips
        each entry to [-gradient_clip_val, gradient_clip_val].
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

    @_calls.explains(**arguments.REMEDIES)
    def __init__(
        self,
        *,
        accumulate_grad_batches: int | str | Mapping[int, int] | AccumulationSchedule = 1,
        target_batch_size: int | None = None,
        max_epochs: int | None = None,
        max_steps: int = -1,
        min_epochs: int | None = None,
        min_steps: int | None = None,
        max_time: str | datetime.timedelta | Mapping[str, int] | None = None,
        strategy: str = "auto",
        devices: int | str = "auto",
        callbacks: Callback | Sequence[Callback] = (),
        fast_dev_run: bool | int = False,
        limit_train_batches: int | float = 1.0,
        limit_val_batches: int | float = 1.0,
        overfit_batches: int | float = 0,
        num_sanity_val_steps: int = 2,
        check_val_every_n_epoch: int | None = 1,
        val_check_interval: int | float = 1.0,
        log_every_n_steps: int = 50,
        log_grad_norm: bool = False,
        log_epoch_means: bool = False,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str = "norm",
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
        self._average = arguments.one_of(ParamsAverage, observers)
        self._options = Options(
            accumulate_grad_batches=arguments.schedule(accumulate_grad_batches, target_batch_size, observers),
            target_batch_size=target_batch_size,
            max_epochs=max_epochs,
            max_steps=max_steps,
            min_epochs=min_epochs,
            min_steps=min_steps,
            max_time=max_time,
            fast_dev_run=fast_dev_run,
            limit_train_batches=limit_train_batches,
            limit_val_batches=limit_val_batches,
            overfit_batches=overfit_batches,
            num_sanity_val_steps=num_sanity_val_steps,
            check_val_every_n_epoch=check_val_every_n_epoch,
            val_check_interval=val_check_interval,
            log_every_n_steps=log_every_n_steps,
            gradient_clip_val=gradient_clip_val,
            gradient_clip_algorithm=gradient_clip_algorithm,
            log_grad_norm=log_grad_norm,
            log_epoch_means=log_epoch_means,
            seed=seed,
            partial_window=partial_window,
            flush_on_stop=flush_on_stop,
            fuse_windows=fuse_windows,
            nonfinite=nonfinite,
            detect_anomaly=detect_anomaly,
            noise_scale=arguments.one_of(NoiseScaleMonitor, observers),
        )
        self._callbacks = arguments.of_dev_run(observers) if self._options.fast_dev_run else observers
        if self._options.max_time is not None:
            self._callbacks += (TimeLimit(self._options.max_time),)
        if enable_progress_bar:
            self._callbacks += (ProgressBar(),)
        self._exit_signals = arguments.exit_signals(exit_signals)
        self._strategy, self._processes = Strategy(strategy, devices), Processes()
        if target_batch_size is None:  # Otherwise K is not known yet.
            self._options.check_noise_scale(self._strategy.size)
        root = _paths.absolute(default_root_dir or ".")
        loggers = arguments.loggers(logger, root)
        self._loggers, self._folder = () if self._options.fast_dev_run else loggers, root / "checkpoints"
        self._run: Run | None = None
        self._evaluation: Evaluation | None = None

    @_calls.explains(train_dataloaders="it is train_loader here", val_dataloaders="it is val_loader here")
    def fit(
        self,
        task: Task,
        train_loader: Iterable[Tree],
        val_loader: Loaders | None = None,
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
          val_loader: an iterable of batches, or None for no validation. An iterator is not restored on resume. With a
            dict of several, by name, each has results of its own, such as "val_loss/name".
          ckpt_path: the folder of a checkpoint; "last" for the newest checkpoint in the folders of the
            `ModelCheckpoint`s, or a fresh start with a warning if there is none; "best" for the best checkpoint of the
            newest run on disk, ranked by the first `ModelCheckpoint` with a monitor, if possible one that saves whole
            runs; or None for a fresh start.
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

    @_calls.explains(dataloaders="it is val_loader here")
    def validate(
        self,
        task: Task,
        val_loader: Loaders,
        state: FitState | None = None,
        ckpt_path: str | os.PathLike[str] | None = None,
    ) -> dict[str, float]:
        """Computes the weighted means of the loss and the metrics over `val_loader`.

        With an `EMA` among the callbacks, the parameters are the average of the last `fit` or of the checkpoint. A
        `state` is used as it is.

        Args:
          task: the task that was trained.
          val_loader: an iterable of batches, or a dict of several by name, as in `fit`.
          state: the state that `fit` returned. None uses the state of the last `fit`, unless `ckpt_path` is given.
          ckpt_path: the checkpoint to validate: its folder, "last" or "best", as in `fit`, and weights alone too. It
            doesn't require a `fit` in this process; `Task.init` is called on the first batch.

        Returns:
          A dict with "val_loss" and the metrics, whose names are prefixed with "val_"; with several loaders their names
          are appended, such as "val_loss/name".

        Raises:
          ValueError: if the loader is empty or `limit_val_batches` is 0, if both `state` and `ckpt_path` are given, or
            for a checkpoint of another task.
          OSError: if `ckpt_path` is not a checkpoint.
          RuntimeError: if neither is given and `fit` has not been called.
        """
        if self._val_limit == 0:
            raise ValueError("limit_val_batches=0 means no validation: validate needs a Trainer with another limit.")
        loaders = val_loaders(val_loader, self._val_limit)
        params, model_state, _ = self._weights(task, loaders, state, ckpt_path)
        return self._evaluation_of(task).run(params, model_state, loaders)

    @_calls.explains(dataloaders="it is test_loader here")
    def test(
        self,
        task: Task,
        test_loader: Loaders,
        state: FitState | None = None,
        ckpt_path: str | os.PathLike[str] | None = None,
    ) -> dict[str, float]:
        """Computes the weighted means of the loss and the metrics over `test_loader`, and passes them to the loggers.

        Example:
          >>> import numpy as np, optax, jaxaccum
          >>> task = jaxaccum.Task(lambda key, batch: np.ones(()), lambda w, x, key: w * x.mean(), optax.sgd(0.5))
          >>> trainer = jaxaccum.Trainer(max_epochs=1, strategy="single", enable_progress_bar=False)
          >>> _ = trainer.fit(task, [np.ones(2, np.float32)])
          >>> trainer.test(task, {"a": [np.ones(2, np.float32)], "b": [np.full(2, 3, np.float32)]})
          {'test_loss/a': 0.5, 'test_loss/b': 1.5}

        Args:
          task: the task that was trained.
          test_loader: an iterable of batches, or a dict of several by name, as `val_loader` in `fit`.
          state: as in `validate`.
          ckpt_path: as in `validate`.

        Returns:
          A dict with "test_loss" and the metrics, whose names are prefixed with "test_"; otherwise as `validate`.

        Raises:
          As `validate`.
        """
        loaders = val_loaders(test_loader, self._limit(1.0), "test_loader")
        params, model_state, at = self._weights(task, loaders, state, ckpt_path)
        results = self._evaluation_of(task).run(params, model_state, loaders, stage="test")
        records = Records(() if self._processes.index else self._loggers)
        Metrics(records).record(at, results)
        records.flush()
        return results

    @_calls.explains(dataloaders="it is predict_loader here")
    def predict(
        self,
        task: Task,
        predict_loader: Iterable[Tree],
        state: FitState | None = None,
        ckpt_path: str | os.PathLike[str] | None = None,
    ) -> list[Tree]:
        """Calls `task.predict` on each batch of `predict_loader`, on the training devices.

        Example:
          >>> import numpy as np, optax, jaxaccum
          >>> task = jaxaccum.Task(
          ...     lambda key, batch: np.ones(()),
          ...     lambda w, x, key: w * x.mean(),
          ...     optax.sgd(0.5),
          ...     predict=lambda w, x: w * x,
          ... )
          >>> trainer = jaxaccum.Trainer(max_epochs=1, strategy="single", enable_progress_bar=False)
          >>> _ = trainer.fit(task, [np.ones(2, np.float32)])
          >>> trainer.predict(task, [np.array([2.0, 4.0], np.float32)])
          [array([1., 2.], dtype=float32)]

        Args:
          task: the task that was trained.
          predict_loader: an iterable of batches. With several processes, each passes those of its own devices.
          state: as in `validate`.
          ckpt_path: as in `validate`.

        Returns:
          What `predict` returned for each batch of this process, in order, in NumPy arrays. With "dp" the arrays have
          one entry for each example.

        Raises:
          ValueError: if the task has no `predict`; otherwise as `validate`.
        """
        if arguments.task(task).predict is None:
            raise ValueError("task has no predict: pass Task(predict=lambda params, batch: ...).")
        batches = ValLoader(predict_loader, self._limit(1.0), "predict_loader")
        params, model_state, _ = self._weights(task, {"": batches}, state, ckpt_path)
        return self._evaluation_of(task).prediction.run(params, model_state, batches)

    def estimate_optimizer_steps(self, train_loader: Iterable[Tree]) -> int:
        """Returns the number of optimizer steps that `fit` is expected to take with this loader, without reading it.

        It follows the schedule of K and the limits, as `estimated_stepping_batches` does in a run, and takes the
        loader's `len` as given. Early stops are not foreseen.

        Example:
          >>> import jaxaccum
          >>> trainer = jaxaccum.Trainer(
          ...     accumulate_grad_batches={0: 4, 2: 2}, max_epochs=3, strategy="single", enable_progress_bar=False
          ... )
          >>> trainer.estimate_optimizer_steps([None] * 6)
          7

        Args:
          train_loader: as for `fit`.

        Returns:
          The number.

        Raises:
          ValueError: if it can't be known, such as for a loader without a length and without `max_steps`, or with
            `accumulate_grad_batches="auto"`, which needs the first batch.
        """
        if self._options.target_batch_size is not None:
            raise ValueError(
                'accumulate_grad_batches="auto" needs the first batch, which only fit reads: pass K as a number, '
                "target_batch_size divided by the examples of a micro-step."
            )
        batches = self._train_loader(train_loader).epoch_batches
        return self._options.total_steps(self._strategy.micro_steps(batches))

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
        """Whether to stop training after the current micro-step. Callbacks may set it; each `fit` resets it.

        It takes effect once `min_epochs` and `min_steps` are reached.
        """
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

        With an `AccumulationSchedule` by steps, samples or tokens, or `AdaptiveAccumulation`, it can't be set.
        """
        return self._at.every_k

    @accumulate_grad_batches.setter
    def accumulate_grad_batches(self, k: int) -> None:
        if self._run is None or not self._run.takes_k:
            raise RuntimeError(
                f"accumulate_grad_batches={k!r} can't be set here: K changes at an epoch's start alone, or follows an "
                "AccumulationSchedule by steps, samples or tokens, or AdaptiveAccumulation. Without these, set it in a "
                "callback's on_train_epoch_start, or pass the Trainer a dict from epochs to K."
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

        It has the last window's "grad_norm" with `log_grad_norm`, and the last epoch's means with `log_epoch_means`.
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
        val_loader: Loaders | None,
        ckpt_path: Any,
        init_from: FitState | Tree | None,
    ) -> tuple[Run, RunCheckpoints]:
        """Returns a run, fresh or restored from a checkpoint, and its checkpoints."""
        options, processes = self._options, self._processes
        arguments.task(task)
        if init_from is not None and ckpt_path not in (None, "last"):
            raise ValueError(
                f"init_from starts a fresh run, and ckpt_path={ckpt_path!r} resumes one: pass one of them. With "
                "ckpt_path='last', init_from is used if there is no checkpoint."
            )
        if options.has_default_length:
            warnings.warn(
                "max_epochs is not set: training for 1000 epochs. Pass max_epochs=-1 for no end.", stacklevel=4
            )
        loaders: dict[str, ValLoader] = {}
        if val_loader is not None and options.limit_val_batches != 0:
            loaders = val_loaders(val_loader, self._val_limit)
        arguments.check_monitors(self._callbacks, bool(loaders))
        checkpoints = RunCheckpoints(self, self._callbacks, self._folder, processes)
        loader = self._train_loader(train_loader, keeps_state=bool(checkpoints.folders))
        loader.agree(processes)
        options.agree(
            processes,
            strategy=self._strategy.name,
            devices=self._strategy.size,
            val_loader=list(loaders),
            ModelCheckpoint=[str(folder) for folder in checkpoints.folders],
        )
        found = None if ckpt_path is None or options.fast_dev_run else self._resumed(ckpt_path)
        seed, epoch_micro_steps = options.seed, self._strategy.micro_steps(loader.epoch_batches)
        # The loader is first read here, once the position in the run is known.
        if found is None:
            loader.begin(Start())
        else:
            seed = found.notes["seed"]
            run_checkpoint.begin(found, loader, self._strategy)
        # Before the first collective, which would deadlock if a process had left.
        examples = sum(processes.gather("the number of examples", length(loader.first)))
        if found is not None:  # The first batch after a resume may be another one.
            examples = run_checkpoint.examples(found, self._strategy) or examples
        micro_step = examples * self._strategy.group
        if options.target_batch_size is not None:
            every_k = target.split(options.target_batch_size, micro_step, "the examples of a micro-step")
            options.accumulate_grad_batches = AccumulationSchedule({0: every_k})
            options.check_noise_scale(self._strategy.size)
            self._check_memory(task, loader.first, micro_step)
        total_steps = options.total_steps(epoch_micro_steps, micro_step) if _task.needs_total_steps(task) else None
        setup = Setup(
            options=options,
            strategy=self._strategy,
            processes=processes,
            examples=examples,
            programs=run_state.programs_for(task, options, self._strategy, seed, total_steps, self._run),
            evaluation=self._evaluation_of(task),
            loader=loader,
            val_loaders=loaders,
        )
        warm_start = None if init_from is None or found is not None else WarmStart(init_from)
        self._run = run = run_state.begin(setup, self._loggers, self._average, warm_start)
        if found is not None:
            checkpoints.restore(found, run)
        return run, checkpoints

    def _check_memory(self, task: Task, batch: Tree, micro_step: int) -> None:
        """Raises ValueError if micro-steps of so many examples need more memory than the devices report."""
        strategy, window = self._strategy, self._options.target_batch_size
        assert window is not None
        # The most batches on the devices: those of a window, or the present one and the next.
        held = window if self._options.fuse_windows else 2
        sharing = strategy.size // strategy.batches
        n, window = -(-micro_step // strategy.batches), window // strategy.batches
        check_loader(task, strategy.read(batch).arrays, n, window, strategy.sync, sharing, held)

    def _resumed(self, ckpt_path: str | os.PathLike[str]) -> Checkpoint | None:
        """Returns the checkpoint to resume from; None, with a warning, for "last" if there is none."""
        orbax_io.remove_cut_off(saving.folders_of(self._callbacks, self._folder), self._processes)
        try:
            return saving.find(ckpt_path, self._callbacks, self._folder, self._processes, to_resume=True)
        except saving.NoLastCheckpointError as error:
            warnings.warn(f"{error} The run starts afresh.", stacklevel=5)
            return None

    def _weights(
        self, task: Task, loaders: Mapping[str, ValLoader], state: FitState | None, ckpt_path: Any
    ) -> tuple[Tree, Tree, Counters]:
        """Returns parameters, model state and position of `state`, of a checkpoint, or of the last `fit`."""
        arguments.task(task)
        if state is None and ckpt_path is None and self._run is None:
            raise RuntimeError("there is no state yet: call fit first, or pass state= or ckpt_path=.")
        if ckpt_path is None or (self._options.fast_dev_run and ckpt_path in ("last", "best") and state is None):
            params = self._running.evaluated_params if state is None else state.params
            return params, (self.state if state is None else state).model_state, self._at
        if state is not None:
            raise ValueError(f"pass either state or ckpt_path={ckpt_path!r}, not both.")
        found = saving.find(ckpt_path, self._callbacks, self._folder, self._processes)
        first = next(iter(loaders.values()))
        for batch in first.first(1):
            key, arrays = jax.random.key(found.notes["seed"]), self._strategy.read(batch).arrays
            initial = _task.initial(task, key, arrays)
            params, _, model_state, _ = run_checkpoint.weights(found, *initial, averaged=self._average is not None)
            return params, model_state, run_checkpoint.place(found, self._strategy)
        raise ValueError(f"{first.name} gave no batch.")

    def _train_loader(self, loader: Iterable[Tree], keeps_state: bool = False) -> TrainLoader:
        options = self._options
        return TrainLoader(
            loader,
            limit_train_batches=self._limit(options.limit_train_batches),
            overfit_batches=options.overfit_batches,
            epochs=options.epochs,
            steps=options.steps,
            keeps_state=keeps_state,
        )

    def _limit(self, value: int | float) -> int | float:
        """Returns a limit of loader batches, which `fast_dev_run` replaces."""
        return self._options.fast_dev_run * self._strategy.group or value

    @property
    def _val_limit(self) -> int | float:
        return self._limit(self._options.overfit_batches or self._options.limit_val_batches)

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
