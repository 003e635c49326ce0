"""The `Trainer`: what its user passes, calls and reads, and the course of a run."""

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
from jaxaccum._types import Tree
from jaxaccum.callbacks import Callback, ProgressBar
from jaxaccum.checkpoint import Checkpoint, orbax_io
from jaxaccum.loggers import figure, records
from jaxaccum.task import Task
from jaxaccum.trainer.input import arguments
from jaxaccum.trainer.input.loader import TrainLoader, ValLoader
from jaxaccum.trainer.input.options import Options
from jaxaccum.trainer.input.progress import Counters
from jaxaccum.trainer.input.strategies import Strategy
from jaxaccum.trainer.loop import run_checkpoint, run_state, saving
from jaxaccum.trainer.loop.hooks import Hooks
from jaxaccum.trainer.loop.loop import Loop
from jaxaccum.trainer.loop.run_state import Run
from jaxaccum.trainer.loop.saving import RunCheckpoints
from jaxaccum.trainer.loop.signals import Signals
from jaxaccum.trainer.programs.compiled import FitState
from jaxaccum.trainer.programs.evaluation import Evaluation


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
      overfit_batches: train on the first so many batches of an epoch alone, or on the first such fraction of them, read
        once and in the same order in every epoch; and validate on as many; 0 is off.
      num_sanity_val_steps: micro-steps of validation before training, which are recorded nowhere, so that what is wrong
        with it is met at once; -1 is all of them, 0 none.
      check_val_every_n_epoch: validate in every so many epochs; None: `val_check_interval` counts across epochs.
      val_check_interval: validate every so many micro-steps of an epoch, or after every such fraction of it. An int
        that is larger than an epoch counts across epochs.
      log_every_n_steps: counts optimizer steps. The run's first one, each epoch's last one and the one that reaches
        `max_steps` are logged besides.
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
    ):
        observers = arguments.callbacks(callbacks)
        self._callbacks = (*observers, ProgressBar()) if enable_progress_bar else observers
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
        self._strategy = Strategy(strategy, devices)
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
    ) -> FitState:
        """Trains, from the start or from a checkpoint.

        From a checkpoint a run goes on after the micro-step that it was saved at, as if it had never ended: parameters
        and all other state come out bit for bit the same. For that the loaders must give the same batches again. A
        loader with `get_state` and `set_state`, or with `state_dict` and `load_state_dict`, or whose iterators have
        them, is put where it was; of any other the batches that were trained on are passed over: those of the open
        epoch, or of the whole run where all epochs are one iterator. A state that leaves something out, such as the
        contents of a shuffle buffer, loses it. The task and the Trainer's options are the caller's to pass unchanged;
        the seed is the checkpoint's, and so is K until the epoch ends. On another number of devices what is pending is
        merged or split, and the open epoch keeps its effective batch.

        SIGTERM and SIGINT (Ctrl-C), where fit runs in the main thread, end the run after the micro-step at hand, or
        with `fuse_windows` after the window: it is saved, if there is a `ModelCheckpoint`, and SystemExit with code
        143, or KeyboardInterrupt, is raised. A second one is raised at once, and nothing is saved: only the checkpoint
        that is on its way is waited for, as the process can't end without it. An error of a loader or a callback is
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
          train_loader: an iterable of batches, pytrees of arrays; iterated anew in every epoch, after
            `set_epoch(epoch)` of the loader, its sampler and its dataset, where they have one. The first epoch of a
            `fit` is begun before `on_train_epoch_start` is called, any other one after it. Its `len` is an estimate,
            not a limit. A batch that it gave must not be written to.
          val_loader: an iterable of batches, or None for no validation. An iterator is not put back on a resume.
          ckpt_path: a checkpoint's folder; or "last", the newest one in the folders of the `ModelCheckpoint`s, and a
            start where there is none, with a warning; or "best", by the first of them that has a monitor, in the newest
            run that is there; or None for a start.

        Returns:
          The arrays of the run: `params`, `opt_state`, `model_state`, and what is pending.

        Raises:
          TypeError, ValueError: for a task or a loader that can't be trained, a validation that can't fall due, or a
            checkpoint of another task.
          OSError: for a `ckpt_path` that is no checkpoint, or if none of those that are there can be read.
          FloatingPointError: with `detect_anomaly`.
          RuntimeError: if another process has left the run.
        """
        processes = self._strategy.processes
        processes.begin()
        signals = Signals(processes)
        try:
            run, checkpoints = self._start(task, train_loader, val_loader, ckpt_path)
            hooks = Hooks(self, task, self._callbacks)
            loop = Loop(run, hooks, checkpoints, signals)
            checkpoints.check()
            loop.check_validation()
            run.records.begin(run.resumed_at)
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
                with contextlib.closing(checkpoints):  # Whatever happens to the records.
                    run.records.flush(waits=not processes.left)
        return run.state

    def validate(
        self,
        task: Task,
        val_loader: Iterable[Tree],
        state: FitState | None = None,
        ckpt_path: str | os.PathLike[str] | None = None,
    ) -> dict[str, float]:
        """The weighted means of loss and metrics over `val_loader`.

        Args:
          task: what was trained.
          val_loader: an iterable of batches.
          state: as `fit` returned it; None is that of the last `fit`, unless `ckpt_path` is given.
          ckpt_path: the checkpoint to validate, as for `fit`; no `fit` need have run in this process.

        Returns:
          "val_loss", and the metrics with "val_" before their names.

        Raises:
          ValueError: if the loader is empty, for both `state` and `ckpt_path`, or for a checkpoint of another task.
          OSError: for a `ckpt_path` that is no checkpoint.
          RuntimeError: without either, before the first `fit`.
        """
        batches = ValLoader(val_loader, self._options.limit_val_batches)
        if ckpt_path is None:
            params, _, model_state, _ = self.state if state is None else state
        elif state is not None:
            raise ValueError(f"pass either state or ckpt_path={ckpt_path!r} to validate, not both.")
        else:
            params, _, model_state, _ = self._saved(task, batches, ckpt_path)
        return self._evaluation_of(task).run(params, model_state, batches)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Draws the run's losses, K and effective batch over the samples seen.

        Args:
          path: where to save the figure, or None.

        Returns:
          The matplotlib figure.

        Raises:
          ImportError: if matplotlib is missing.
        """
        return figure.draw(self._running.records.history, None if self._strategy.processes.index else path)

    def log(self, name: str, value: float) -> None:
        """Adds a value to `callback_metrics`, and to the next record.

        Args:
          name: in both of them.
          value: a number, or an array of one; of an array on a device a copy is kept, and not waited for.

        Raises:
          TypeError: if it is no real number.
        """
        self._running.metrics[name] = self._running.logged[name] = records.loggable(name, value)

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
    def is_resuming(self) -> bool:
        """Whether the run goes on from a checkpoint; False in a fresh one."""
        return self._run is not None and self._run.is_resuming

    @property
    def state_is_ahead(self) -> bool:
        """In `on_train_batch_end`: whether `state` is that of micro-steps which the counters don't have yet.

        So it is with `fuse_windows`, before the last micro-step of a window. Whatever is saved, is saved after it.
        """
        return bool(self._running.uncounted)

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
        if self._run is None or not self._run.takes_k:
            raise RuntimeError(
                f"accumulate_grad_batches={k!r} can't be set here: K changes at an epoch's start alone. Set it in a "
                "callback's on_train_epoch_start, or pass the Trainer a dict from epochs to K."
            )
        self._run.at.every_k = positive_int(k, "accumulate_grad_batches")

    @property
    def effective_batch_size(self) -> int:
        """The examples in a full window, now: P·N·K with "ddp" and "zero", else N·K; N is the first loader batch's.

        With several processes N is the mean of their first loader batches, and with "dp" the sum.
        """
        return self._running.examples * self._strategy.group * self.accumulate_grad_batches

    @property
    def num_training_batches(self) -> int | float:
        """The micro-steps in an epoch, as far as the loader's length tells; infinite where it has none."""
        return self._running.epoch_micro_steps

    @property
    def estimated_stepping_batches(self) -> int | float:
        """The optimizer steps of the run if nothing stops it, with every K of the schedule; may be infinite."""
        return self._options.optimizer_steps(self.num_training_batches)

    @property
    def callback_metrics(self) -> dict[str, float]:
        """By name, the last window's means ("train_loss"), the last validation's, and what callbacks have logged.

        Reading it waits until the devices have finished that window.
        """
        metrics = self._running.train_metrics() | self._running.metrics
        return {name: float(records.number(value)) for name, value in metrics.items()}

    @property
    def progress_bar_metrics(self) -> dict[str, float]:
        """The means ("train_loss") of the newest window that the devices have finished; {} before there is one.

        Reading it does not wait.
        """
        return self._running.finished_metrics()

    @property
    def should_log(self) -> bool:
        """In `on_train_batch_end`: whether a record follows.

        It does every `log_every_n_steps` optimizer steps, and at the run's first one, each epoch's last one and the one
        that reaches `max_steps`.
        """
        return self._running.record_is_due

    def _start(
        self, task: Task, train_loader: Iterable[Tree], val_loader: Iterable[Tree] | None, ckpt_path: Any
    ) -> tuple[Run, RunCheckpoints]:
        """A run, at its start or where a checkpoint left it, and its checkpoints."""
        options, processes = self._options, self._strategy.processes
        if not isinstance(task, Task):
            raise TypeError(f"task must be a jaxaccum.Task, got {task!r}.")
        if options.max_epochs is None and options.max_steps == -1:
            warnings.warn(
                "max_epochs is not set: training for 1000 epochs. Pass max_epochs=-1 for no end.", stacklevel=3
            )
        validates = val_loader is not None and options.limit_val_batches != 0
        arguments.check_monitors(self._callbacks, validates)
        checkpoints = RunCheckpoints(self, self._callbacks, self._folder, processes)
        loader = TrainLoader(train_loader, options, keeps_state=bool(checkpoints.folders))
        loader.agree(processes)
        options.agree(
            processes,
            strategy=self._strategy.name,
            devices=self._strategy.size,
            val_loader=validates,
            ModelCheckpoint=[str(folder) for folder in checkpoints.folders],
        )
        found = self._found(ckpt_path)
        seed = options.seed
        # Only now that the place in the run is known is anything asked of the loader.
        if found is None:
            loader.begin(Counters())
        else:
            seed = found.notes["seed"]
            run_checkpoint.begin(found, loader, self._strategy)
        run = run_state.begin(
            task,
            options,
            self._strategy,
            self._evaluation_of(task),
            loader,
            ValLoader(val_loader, options.val_limit) if val_loader is not None and validates else None,
            self._loggers,
            seed,
            last=self._run,
        )
        self._run = run
        if found is not None:
            checkpoints.restore(found, run)
        return run, checkpoints

    def _found(self, ckpt_path: str | os.PathLike[str] | None) -> Checkpoint | None:
        """The checkpoint to go on from; None for a start."""
        if ckpt_path is None:
            return None
        processes = self._strategy.processes
        folders = saving.folders_of(self._callbacks, self._folder)
        orbax_io.remove_cut_off(folders, processes)
        found = saving.find(ckpt_path, self._callbacks, self._folder, processes)
        if found is None:
            warnings.warn(
                f"ckpt_path='last' finds no checkpoint in {', '.join(map(str, folders))}: the run starts afresh.",
                stacklevel=4,
            )
        return found

    def _saved(self, task: Task, val_loader: ValLoader, ckpt_path: str | os.PathLike[str]) -> FitState:
        """The parameters and the model state of a checkpoint."""
        found = saving.find(ckpt_path, self._callbacks, self._folder, self._strategy.processes)
        if found is None:
            folders = saving.folders_of(self._callbacks, self._folder)
            raise FileNotFoundError(f"ckpt_path='last' finds no checkpoint in {', '.join(map(str, folders))}.")
        for batch in val_loader.first(1):
            return run_checkpoint.weights(found, *_task.initial(task, jax.random.key(found.notes["seed"]), batch))
        raise ValueError("val_loader gave no batch.")

    def _evaluation_of(self, task: Task) -> Evaluation:
        """The programs that validate `task`; those of the last call, if it was for the same one."""
        if self._evaluation is None or self._evaluation.task is not task:
            self._evaluation = Evaluation(task, self._strategy)
        return self._evaluation

    @property
    def _at(self) -> Counters:
        return Counters() if self._run is None else self._run.at

    @property
    def _running(self) -> Run:
        if self._run is None:
            raise RuntimeError("this is known once fit has been called.")
        return self._run
