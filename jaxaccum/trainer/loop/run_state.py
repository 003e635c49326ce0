"""A run: what a `fit` has between two micro-steps."""

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

UNFINISHED = 256  # windows at the most whose means are kept until the devices have finished them


@dataclasses.dataclass
class Run:
    """One `fit`.

    Attributes:
      task: what it trains.
      options: how.
      strategy: the devices that it is on.
      programs: of its micro-steps.
      evaluation: of its validation.
      state: its arrays.
      records: what it logs.
      seed: of its keys.
      loader: what it trains on.
      val_loader: what it validates on; None for no validation.
      examples: in its first loader batch.
      resumed_at: where a checkpoint left it, if it goes on from one: its "step", which counts optimizer steps, its
        "micro_step", and how many "records" were made since that micro-step.
      at: where it stands.
      uncounted: the micro-steps that `state` is of and `at` not yet, with their outputs.
      takes_k: whether K may be set now.
      means: the last window's, by name: scalars on the device.
      unfinished: the means of windows, the last one's among them, that the devices may not have finished.
      finished: the means of the newest window that is known to be finished.
      metrics: the last validation's, and what callbacks log.
      logged: what callbacks have logged since the last record.
      loader_state: where the training loader stands after the last micro-step, by its own account; None without.
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
        """The micro-steps that an epoch is expected to have; infinite where that is not known."""
        return self.strategy.micro_steps(self.loader.epoch_batches)

    @property
    def is_resuming(self) -> bool:
        """Whether it goes on from a checkpoint."""
        return self.resumed_at is not None

    @property
    def record_is_due(self) -> bool:
        """Whether a window was closed that is to be logged, as the run's first and each epoch's last always are."""
        at = self.at
        is_first_or_last = at.global_step == 1 or at.ends_epoch or at.global_step >= self.options.steps
        return not at.window_step and (is_first_or_last or at.global_step % self.options.log_every_n_steps == 0)

    def train_metrics(self) -> dict[str, Any]:
        """The last window's means, with "train_" before their names."""
        return _named(self.means)

    def close_window(self, means: dict[str, jax.Array]) -> None:
        """Takes the means of a window that was closed."""
        self.means = means
        if len(self.unfinished) == UNFINISHED:
            # The oldest stays: it is finished first, however far behind the devices are.
            del self.unfinished[1::2]
        self.unfinished.append(means)

    def finished_metrics(self) -> dict[str, float]:
        """As `train_metrics`, of the newest window that the devices have finished; empty before the first."""
        if _is_ready(self.means):
            self.finished = self.means
            self.unfinished.clear()
        while self.unfinished and _is_ready(self.unfinished[0]):
            self.finished = self.unfinished.pop(0)
        return {name: float(records.number(mean)) for name, mean in _named(self.finished).items()}

    def record(self, scalars: Mapping[str, Any]) -> None:
        """Makes a record of scalars, and of what callbacks have logged, without waiting for them."""
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
    """A run at its start.

    Args:
      task: what to train.
      options: how.
      strategy: the devices.
      evaluation: validates.
      loader: what to train on; it has begun.
      val_loader: what to validate on, or None.
      loggers: for process 0 to log to.
      seed: of the keys.
      last: the run before, of the same options and devices. If its programs serve this one too, nothing compiles again.
    """
    processes = strategy.processes
    # Before the devices meet for the first time: there nobody hears of a process that has left.
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
