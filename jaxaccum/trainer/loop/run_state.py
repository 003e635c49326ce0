"""The state of a run between micro-steps."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jaxaccum.loggers import records
from jaxaccum.loggers.records import Records
from jaxaccum.task import Task
from jaxaccum.trainer.input.loader import TrainLoader, ValLoader
from jaxaccum.trainer.input.options import Options
from jaxaccum.trainer.input.prefetch import MicroStep
from jaxaccum.trainer.input.progress import Counters
from jaxaccum.trainer.input.strategies import Strategy, length
from jaxaccum.trainer.programs import window_optimizer
from jaxaccum.trainer.programs.compiled import FitState, Programs
from jaxaccum.trainer.programs.evaluation import Evaluation
from jaxaccum.trainer.programs.step_outputs import Outputs

UNFINISHED = 256  # Maximum number of unfinished windows whose means are kept.


@dataclasses.dataclass
class Run:
    """The state of one `fit`.

    Attributes:
      task: the task.
      options: the Trainer's options.
      strategy: the strategy and its devices.
      programs: the compiled training programs.
      evaluation: the validation programs.
      state: the arrays.
      records: the records for the loggers.
      seed: the seed of the keys.
      loader: the training batches.
      val_loader: the validation batches; None for no validation.
      examples: the number of examples in the first loader batch.
      resumed_at: the position of the checkpoint that the run resumed from, or None: its "step" (optimizer steps),
        "micro_step", and the number of "records" made since that micro-step.
      at: the counters.
      uncounted: micro-steps, with their outputs, that `state` includes and `at` doesn't yet.
      takes_k: whether K may be set now.
      means: the last window's means by name; scalars on the device.
      unfinished: the means of windows that the devices may not have finished, including the last one.
      finished: the means of the newest window that is known to be finished.
      metrics: the last validation's results and the values logged by callbacks.
      logged: the values logged by callbacks since the last record.
      loader_state: the training loader's own state after the last micro-step; None without one.
    """

    task: Task
    options: Options
    strategy: Strategy
    programs: Programs
    evaluation: Evaluation
    state: FitState
    records: Records
    seed: int
    loader: TrainLoader
    val_loader: ValLoader | None
    examples: int
    resumed_at: dict[str, int] | None = None
    at: Counters = dataclasses.field(default_factory=Counters)
    uncounted: collections.deque[tuple[MicroStep, Outputs]] = dataclasses.field(default_factory=collections.deque)
    takes_k: bool = False
    means: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    unfinished: list[dict[str, jax.Array]] = dataclasses.field(default_factory=list)
    finished: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)
    logged: dict[str, Any] = dataclasses.field(default_factory=dict)
    loader_state: str | None = None

    @property
    def epoch_micro_steps(self) -> int | float:
        """The expected number of micro-steps per epoch; infinite if unknown."""
        return self.strategy.micro_steps(self.loader.epoch_batches)

    @property
    def is_resuming(self) -> bool:
        """Whether the run was resumed from a checkpoint."""
        return self.resumed_at is not None

    @property
    def record_is_due(self) -> bool:
        """Whether the window just closed should be logged. The run's first and each epoch's last always are."""
        at = self.at
        is_first_or_last = at.global_step == 1 or at.ends_epoch or at.global_step >= self.options.steps
        return not at.window_step and (is_first_or_last or at.global_step % self.options.log_every_n_steps == 0)

    def train_metrics(self) -> dict[str, Any]:
        """Returns the last window's means, with names prefixed by "train_"."""
        return _named(self.means)

    def close_window(self, means: dict[str, jax.Array]) -> None:
        """Stores the means of a closed window."""
        self.means = means
        if len(self.unfinished) == UNFINISHED:
            # The oldest is kept, because the devices finish it first.
            del self.unfinished[1::2]
        self.unfinished.append(means)

    def finished_metrics(self) -> dict[str, float]:
        """Same as `train_metrics`, for the newest window that the devices have finished; empty before the first."""
        if _is_ready(self.means):
            self.finished = self.means
            self.unfinished.clear()
        while self.unfinished and _is_ready(self.unfinished[0]):
            self.finished = self.unfinished.pop(0)
        return {name: float(records.number(mean)) for name, mean in _named(self.finished).items()}

    def record(self, scalars: Mapping[str, Any]) -> None:
        """Records scalars and the values logged by callbacks, without waiting for them."""
        at, logged = self.at, self.logged
        self.logged = {}
        place = {"epoch": at.epoch, "micro_step": at.micro_step, "samples_seen": at.samples_seen}
        self.records.add(at.global_step, {**place, **scalars, **logged})
        at.records += 1


def begin(
    task: Task,
    options: Options,
    strategy: Strategy,
    evaluation: Evaluation,
    loader: TrainLoader,
    val_loader: ValLoader | None,
    loggers: Sequence[Any],
    seed: int,
    last: Run | None,
) -> Run:
    """Returns a fresh run.

    Args:
      task: the task.
      options: the Trainer's options.
      strategy: the strategy and its devices.
      evaluation: the validation programs.
      loader: the training batches; `begin` has been called on it.
      val_loader: the validation batches, or None.
      loggers: the loggers, used in process 0 only.
      seed: the seed of the keys.
      last: the previous run with the same options and devices, or None. Its programs are reused if they fit.
    """
    processes = strategy.processes
    # Before the first collective, which would deadlock if a process had left.
    examples = sum(processes.gather("the number of examples", length(loader.first)))
    if last is not None and last.task is task and last.seed == seed:
        programs = last.programs
    else:
        optimizer = window_optimizer.of_window(task.optimizer, options.gradient_clip_val, options.divides_by_k)
        programs = Programs(task, strategy, optimizer, options.nonfinite, seed)
    return Run(
        task=task,
        options=options,
        strategy=strategy,
        programs=programs,
        evaluation=evaluation,
        state=programs.initial(loader.first),
        records=Records(() if processes.index else loggers),
        seed=seed,
        loader=loader,
        val_loader=val_loader,
        examples=examples,
    )


def _named(means: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {f"train_{name}": mean for name, mean in means.items()}


def _is_ready(means: dict[str, Any]) -> bool:
    return all(mean.is_ready() for mean in means.values())
