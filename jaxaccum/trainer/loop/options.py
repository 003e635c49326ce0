"""The Trainer's options."""

import dataclasses
import datetime
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxaccum._integers import as_int, positive_int
from jaxaccum._schedule import AccumulationSchedule
from jaxaccum._sums import norms
from jaxaccum.callbacks import AdaptiveAccumulation, NoiseScaleMonitor
from jaxaccum.distributed.process_group import Processes
from jaxaccum.trainer.input import batch_limits
from jaxaccum.trainer.loop.counters import Counters

# Options that may differ between processes: no process waits for another because of them.
_OWN = ("limit_train_batches", "limit_val_batches", "overfit_batches", "log_every_n_steps")

# The minimum int for arguments that are an int or a fraction.
_LEAST = {"limit_train_batches": 1, "limit_val_batches": 0, "overfit_batches": 0, "val_check_interval": 1}


@dataclasses.dataclass
class Options:
    """The Trainer's arguments of the same names, checked; `accumulate_grad_batches` is a schedule.

    Raises:
      TypeError, ValueError: for an invalid argument, or for two that exclude each other.
    """

    accumulate_grad_batches: AccumulationSchedule
    target_batch_size: int | None
    max_epochs: int | None
    max_steps: int
    min_epochs: int | None
    min_steps: int | None
    max_time: Any  # Converted to seconds.
    fast_dev_run: int  # The number of micro-steps; 0 is off.
    limit_train_batches: int | float
    limit_val_batches: int | float
    overfit_batches: int | float
    num_sanity_val_steps: int
    check_val_every_n_epoch: int | None
    val_check_interval: int | float
    log_every_n_steps: int
    gradient_clip_val: float | None
    gradient_clip_algorithm: str
    log_grad_norm: bool
    log_epoch_means: bool
    seed: int
    partial_window: str
    flush_on_stop: bool
    fuse_windows: bool
    nonfinite: str
    detect_anomaly: bool
    noise_scale: NoiseScaleMonitor | None  # The callback that measures it.

    def __post_init__(self):
        self._check_length()
        self._check_batches()
        self._check_windows()
        if self.fast_dev_run:
            # No window is shorter than a micro-step.
            self.max_epochs, self.max_steps, self.max_time = 1, int(self.fast_dev_run), None
            self.min_epochs = self.min_steps = None
            self.overfit_batches = self.num_sanity_val_steps = 0
            self.check_val_every_n_epoch, self.val_check_interval = 1, 1.0

    def _check_length(self) -> None:
        if self.max_epochs is not None:
            self.max_epochs = batch_limits.count_or_endless(self.max_epochs, "max_epochs")
        self.max_steps = batch_limits.count_or_endless(self.max_steps, "max_steps")
        for what in ("epochs", "steps"):
            name, wanted = f"min_{what}", f"None, or an integer from 0 to max_{what}={getattr(self, f'max_{what}')}"
            if getattr(self, name) is None:
                continue
            least = as_int(getattr(self, name), name, wanted)
            if not 0 <= least <= getattr(self, what):
                raise ValueError(f"{name} must be {wanted}, got {least}.")
            setattr(self, name, least)
        self.max_time = _seconds(self.max_time)

    def _check_batches(self) -> None:
        if not isinstance(self.fast_dev_run, bool):
            wanted = "True, False or the number of micro-steps"
            self.fast_dev_run = as_int(self.fast_dev_run, "fast_dev_run", wanted)
            if self.fast_dev_run < 0:
                raise ValueError(f"fast_dev_run must be {wanted}, got {self.fast_dev_run}.")
        for name, least in _LEAST.items():
            setattr(self, name, batch_limits.count_or_fraction(getattr(self, name), name, least))
        self.num_sanity_val_steps = batch_limits.count_or_endless(
            self.num_sanity_val_steps, "num_sanity_val_steps", least=0
        )
        if self.check_val_every_n_epoch is not None:
            self.check_val_every_n_epoch = positive_int(
                self.check_val_every_n_epoch, "check_val_every_n_epoch", note=""
            )
        elif isinstance(self.val_check_interval, float):
            raise ValueError(
                f"check_val_every_n_epoch=None counts micro-steps across epochs, and val_check_interval="
                f"{self.val_check_interval} is a fraction of one; pass an int val_check_interval."
            )
        self.log_every_n_steps = positive_int(self.log_every_n_steps, "log_every_n_steps", note="")

    def _check_windows(self) -> None:
        clip = self.gradient_clip_val
        if clip is not None and (isinstance(clip, (bool, str)) or not clip > 0):
            raise ValueError(f"gradient_clip_val must be None or a number above 0, got {clip!r}.")
        _check_choice(self.gradient_clip_algorithm, "gradient_clip_algorithm", ("norm", "value"))
        if clip is None and self.gradient_clip_algorithm == "value":
            raise ValueError("gradient_clip_algorithm='value' clips to gradient_clip_val, which is None: pass it, too.")
        for name in ("log_grad_norm", "log_epoch_means"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}.")
        self.seed = as_int(self.seed, "seed", "an integer")
        _check_choice(self.partial_window, "partial_window", ("exact", "divide_by_k"))
        _check_choice(self.nonfinite, "nonfinite", ("propagate", "drop"))
        if self.detect_anomaly:
            if self.nonfinite == "drop":
                raise ValueError("detect_anomaly=True raises where nonfinite='drop' goes on: choose one of them.")
            if self.fuse_windows:
                raise ValueError(
                    "detect_anomaly=True looks at every micro-step before the next, and fuse_windows=True runs a "
                    "window of them in one call: choose one of them."
                )
            self.nonfinite = "drop"  # Keeps the anomaly out of the sums, so that the state stays valid.

    @property
    def has_default_length(self) -> bool:
        """Whether no argument says how long to train."""
        return self.max_epochs is None and self.max_steps == -1 and self.max_time is None

    @property
    def epochs(self) -> int | float:
        """`max_epochs` with its default; infinite for no limit."""
        if self.max_epochs is None:
            return 1000 if self.has_default_length else math.inf
        return math.inf if self.max_epochs == -1 else self.max_epochs

    @property
    def steps(self) -> int | float:
        """`max_steps`; infinite for no limit."""
        return math.inf if self.max_steps == -1 else self.max_steps

    def may_stop(self, at: Counters) -> bool:
        """Whether a run has its minimum length, so that it may be stopped."""
        return at.epoch >= (self.min_epochs or 0) and at.global_step >= (self.min_steps or 0)

    @property
    def adaptive(self) -> AdaptiveAccumulation | None:
        """The callback that adapts K."""
        return self.noise_scale if isinstance(self.noise_scale, AdaptiveAccumulation) else None

    @property
    def largest_k(self) -> int:
        """The largest K that the run may take, unless a callback sets it."""
        return self.adaptive.rule.max_k if self.adaptive else max(self.accumulate_grad_batches.values())

    @property
    def divides_by_k(self) -> bool:
        return self.partial_window == "divide_by_k"

    def optimizer_steps(self, micro_steps: int | float, examples: int | None = None) -> int | float:
        """Returns the run's optimizer steps, given the micro-steps per epoch; may be infinite.

        If K adapts, or is by "tokens", or by "samples" and the `examples` in a micro-step are not known, it is `steps`.
        """
        schedule = self.accumulate_grad_batches
        is_known = schedule.by != "tokens" and (schedule.by != "samples" or examples is not None) and not self.adaptive
        if is_known and isinstance(self.epochs, int) and isinstance(micro_steps, int):
            return min(schedule.optimizer_steps(self.epochs, micro_steps, examples), self.steps)
        return self.steps

    def total_steps(self, micro_steps: int | float, examples: int | None = None) -> int:
        """Returns `optimizer_steps`; raises ValueError if they are not known."""
        steps = self.optimizer_steps(micro_steps, examples)
        if math.isinf(steps):
            by = "the noise scale" if self.adaptive else repr(self.accumulate_grad_batches.by)
            raise ValueError(
                f"the number of optimizer steps is not known with max_epochs={self.max_epochs}, max_steps="
                f"{self.max_steps}, K by {by} and a train_loader of {micro_steps} "
                "micro-steps per epoch: pass max_steps, or max_epochs and a loader with a length or an int "
                "limit_train_batches, and K by epoch or step."
            )
        return int(steps)

    def check_noise_scale(self, devices: int) -> None:
        """Raises ValueError if K is 1 on one device, where such a window tells nothing of the noise."""
        if self.adaptive is not None:
            norms.check_two_sizes("min_k", self.adaptive.rule.min_k, devices, "AdaptiveAccumulation")
        elif self.noise_scale is not None:
            norms.check_two_sizes("accumulate_grad_batches", self.largest_k, devices, "NoiseScaleMonitor")

    def agree(self, processes: Processes, **others: Any) -> None:
        """Raises ValueError in all processes if these options, but for those that may differ, or `others` differ."""
        common = {name: value for name, value in vars(self).items() if name not in _OWN}
        schedule = self.accumulate_grad_batches
        common["accumulate_grad_batches"] = [*schedule.items(), *([schedule.by] if schedule.by != "epoch" else [])]
        common["noise_scale"] = self.noise_scale and self.noise_scale.settings
        common["gradient_clip_val"] = str(self.gradient_clip_val)  # It may not be JSON-serialisable.
        processes.agree("options", common | others)


def _seconds(max_time: Any) -> float | None:
    """Converts Lightning's forms of a duration: a timedelta, its arguments as a dict, or "DD:HH:MM:SS"."""
    if max_time is None:
        return None
    given = max_time
    try:
        if isinstance(max_time, str):
            given = dict(zip(("days", "hours", "minutes", "seconds"), map(int, max_time.split(":")), strict=True))
        if isinstance(given, Mapping):
            given = datetime.timedelta(**given)
        if given > datetime.timedelta():
            return given.total_seconds()
    except (TypeError, ValueError):
        pass
    raise ValueError(
        "max_time must be None or longer than 0: a datetime.timedelta, a dict of its arguments such as "
        f"{{'hours': 4}}, or a string 'DD:HH:MM:SS', got {max_time!r}."
    )


def _check_choice(value: Any, name: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {tuple(choices)}, got {value!r}.")
