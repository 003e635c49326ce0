"""Checks and normalises the Trainer's arguments."""

import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from jaxaccum._integers import positive_int
from jaxaccum._schedule import AccumulationSchedule
from jaxaccum._sums import numeric
from jaxaccum.callbacks import AdaptiveAccumulation, Callback, EarlyStopping, NoiseScaleMonitor
from jaxaccum.callbacks.average import ParamsAverage
from jaxaccum.callbacks.monitor import Monitor
from jaxaccum.callbacks.policy import CheckpointPolicy
from jaxaccum.callbacks.scheduler import offered_schedule
from jaxaccum.loggers import JSONLLogger
from jaxaccum.task import Task

T = TypeVar("T")

_K = "K is accumulate_grad_batches"
_LENGTH = "pass fewer batches, such as itertools.islice(loader, n)"
_SEED = "a run is a function of its seed= and its batches"
# What to do in place of passing an argument that Lightning's Trainer, or our other drivers, have.
REMEDIES = {
    "accelerator": "jax finds the devices",
    "num_nodes": "jaxaccum.distributed.initialize() joins processes",
    "precision": "dtypes are those of the parameters and the loss",
    "plugins": "dtypes are those of the parameters and the loss",
    "enable_checkpointing": "pass callbacks=jaxaccum.callbacks.ModelCheckpoint(...)",
    "limit_test_batches": _LENGTH,
    "limit_predict_batches": _LENGTH,
    "deterministic": _SEED,
    "benchmark": _SEED,
    "use_distributed_sampler": "each process passes the loader of its own devices",
    "profiler": "jax.profiler.trace shows each micro-step",
    "sync_batchnorm": "pass Task model_state=True",
    "reload_dataloaders_every_n_epochs": "a loader's set_epoch(epoch) is called before each epoch",
    "num_micro_batches": _K,
    "every_k_schedule": _K,
    "every_k": _K,
}


def task(value: Any) -> Task:
    """Checks a task."""
    if not isinstance(value, Task):
        raise TypeError(f"task must be a jaxaccum.Task, got {numeric.kind(value)}.")
    return value


def callbacks(value: Any) -> tuple[Callback, ...]:
    """Returns the callbacks as a tuple; at most one may set K by a schedule, average, or measure the noise scale."""
    found = (value,) if isinstance(value, Callback) else value
    if not isinstance(found, Sequence) or not all(isinstance(callback, Callback) for callback in found):
        raise TypeError(f"callbacks must be a jaxaccum.callbacks.Callback or a sequence of them, got {value!r}.")
    if sum(offered_schedule(callback) is not None for callback in found) > 1:
        raise ValueError(f"callbacks hold more than one GradientAccumulationScheduler: {found!r}; merge them into one.")
    if sum(isinstance(callback, ParamsAverage) for callback in found) > 1:
        raise ValueError(f"callbacks hold more than one EMA: {found!r}; validations use one of them, so pass one.")
    if sum(isinstance(callback, NoiseScaleMonitor) for callback in found) > 1:
        raise ValueError(
            f"callbacks hold more than one NoiseScaleMonitor or AdaptiveAccumulation, which is one too: {found!r}; "
            "pass one."
        )
    return tuple(found)


def one_of(kind: type[T], callbacks: Sequence[Callback]) -> T | None:
    """Returns the first callback of this kind, or None."""
    return next((callback for callback in callbacks if isinstance(callback, kind)), None)


def of_dev_run(callbacks: Sequence[Callback]) -> tuple[Callback, ...]:
    """Returns the callbacks that also run in a `fast_dev_run`: they neither save nor stop early."""
    return tuple(callback for callback in callbacks if not isinstance(callback, (CheckpointPolicy, EarlyStopping)))


def schedule(
    accumulate_grad_batches: Any, target_batch_size: int | None, callbacks: Sequence[Callback]
) -> AccumulationSchedule:
    """Returns the schedule of K, from the argument or from a callback; with "auto", K is 1 until there is a loader."""
    is_auto = isinstance(accumulate_grad_batches, str) and accumulate_grad_batches == "auto"
    if is_auto != (target_batch_size is not None):
        raise ValueError(
            f"accumulate_grad_batches={accumulate_grad_batches!r} and target_batch_size={target_batch_size!r}: "
            '"auto" needs the size of a window in examples, which is for "auto" alone.'
        )
    if is_auto:
        positive_int(target_batch_size, "target_batch_size", note="")
        if any(offered_schedule(callback) is not None for callback in callbacks):
            raise ValueError('accumulate_grad_batches="auto" and a GradientAccumulationScheduler both set K: give one.')
        return AccumulationSchedule({0: 1})
    if isinstance(accumulate_grad_batches, Mapping):
        given = AccumulationSchedule(accumulate_grad_batches)
    else:
        given = AccumulationSchedule({0: positive_int(accumulate_grad_batches, "accumulate_grad_batches")})
    offered = next(filter(None, map(offered_schedule, callbacks)), None)
    if offered is not None and given != {0: 1}:
        raise ValueError(
            f"accumulate_grad_batches={accumulate_grad_batches!r} and a GradientAccumulationScheduler both say what K "
            "is: give one of them."
        )
    chosen = given if offered is None else offered
    if one_of(AdaptiveAccumulation, callbacks) is not None and (chosen.by != "epoch" or list(chosen) != [0]):
        raise ValueError(
            f"AdaptiveAccumulation sets K, and so does {chosen!r}: pass the K to start with, or one of them."
        )
    return chosen


def exit_signals(value: Any) -> tuple[int, ...]:
    """Returns the numbers of the signals, each of which a process can catch."""
    found = tuple(value) if isinstance(value, Sequence) else (value,)
    uncaught = [getattr(signal, name, None) for name in ("SIGKILL", "SIGSTOP")]
    for number in found:
        if isinstance(number, bool) or number not in signal.valid_signals() or number in uncaught:
            raise ValueError(
                "exit_signals must be a sequence of signals that a process can catch, such as (signal.SIGTERM, "
                f"signal.SIGUSR1), or () for none, got {number!r} in {value!r}."
            )
    return found


def loggers(value: Any, root: Path) -> tuple[Any, ...]:
    """Returns the loggers as a tuple. `value` is a logger, a sequence, True for a file under `root`, or False."""
    if isinstance(value, bool):
        return (JSONLLogger(root / "metrics.jsonl"),) if value else ()
    found = tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
    for logger in found:
        if not callable(getattr(logger, "write_scalars", None)):
            raise TypeError(
                "logger must be True, False, or an object (or a sequence of them) with write_scalars(step, dict), such "
                f"as jaxaccum.loggers.JSONLLogger(path), got {logger!r}."
            )
    return found


def check_monitors(callbacks: Sequence[Callback], validates: bool) -> None:
    """Raises ValueError if a callback monitors a validation result but the run doesn't validate."""
    for callback in callbacks:
        monitor = Monitor.of(callback)
        if monitor is not None and monitor.needs_validation and not validates:
            raise ValueError(
                f"{type(callback).__name__}(monitor={monitor.name!r}) needs a validation: pass fit a val_loader, and "
                "limit_val_batches other than 0."
            )
