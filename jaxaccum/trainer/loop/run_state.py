"""A run: its fixed parts and its state between micro-steps."""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxaccum.distributed.process_group import Processes
from jaxaccum.loggers.records import Records
from jaxaccum.task import Task
from jaxaccum.trainer.input.batches import length
from jaxaccum.trainer.input.loader import TrainLoader, ValLoader
from jaxaccum.trainer.input.prefetch import MicroStep
from jaxaccum.trainer.input.strategies import Strategy
from jaxaccum.trainer.loop.counters import Counters
from jaxaccum.trainer.loop.metrics import Metrics
from jaxaccum.trainer.loop.options import Options
from jaxaccum.trainer.programs import window_optimizer
from jaxaccum.trainer.programs.compiled import FitState, Programs
from jaxaccum.trainer.programs.evaluation import Evaluation
from jaxaccum.trainer.programs.step_outputs import Outputs


class Setup(NamedTuple):
    """The parts of a run that don't change.

    Attributes:
      options: the Trainer's options.
      strategy: the strategy and its devices.
      processes: the processes of the run.
      programs: the compiled training programs.
      evaluation: the validation programs.
      loader: the training batches.
      val_loader: the validation batches; None for no validation.
      examples: the number of examples in the first loader batch, over all processes.
    """

    options: Options
    strategy: Strategy
    processes: Processes
    programs: Programs
    evaluation: Evaluation
    loader: TrainLoader
    val_loader: ValLoader | None
    examples: int

    @property
    def epoch_micro_steps(self) -> int | float:
        """The expected number of micro-steps per epoch; infinite if unknown."""
        return self.strategy.micro_steps(self.loader.epoch_batches)


@dataclasses.dataclass
class Run:
    """The state of one `fit`.

    Attributes:
      setup: the fixed parts.
      state: the arrays.
      metrics: the numbers to log.
      at: the counters.
      uncounted: micro-steps, with their outputs, that `state` includes and `at` doesn't yet.
      loader_state: the training loader's own state after the last micro-step; None without one.
      is_resuming: whether the run was resumed from a checkpoint.
      takes_k: whether K may be set now.
    """

    setup: Setup
    state: FitState
    metrics: Metrics
    at: Counters = dataclasses.field(default_factory=Counters)
    uncounted: collections.deque[tuple[MicroStep, Outputs]] = dataclasses.field(default_factory=collections.deque)
    loader_state: str | None = None
    is_resuming: bool = False
    takes_k: bool = False

    @property
    def record_is_due(self) -> bool:
        """Whether the window just closed should be logged. The run's first and each epoch's last always are."""
        at, options = self.at, self.setup.options
        is_first_or_last = at.global_step == 1 or at.ends_epoch or at.global_step >= options.steps
        return not at.window_step and (is_first_or_last or at.global_step % options.log_every_n_steps == 0)


def begin(
    task: Task,
    options: Options,
    strategy: Strategy,
    processes: Processes,
    evaluation: Evaluation,
    loaders: tuple[TrainLoader, ValLoader | None],
    loggers: Sequence[Any],
    seed: int,
    last: Run | None,
) -> Run:
    """Returns a fresh run.

    Args:
      task: the task.
      options: the Trainer's options.
      strategy: the strategy and its devices.
      processes: the processes of the run.
      evaluation: the validation programs.
      loaders: the training batches, on which `begin` has been called, and the validation batches or None.
      loggers: the loggers, used in process 0 only.
      seed: the seed of the keys.
      last: the previous run with the same options and devices, or None. Its programs are reused if they fit.
    """
    loader, val_loader = loaders
    # Before the first collective, which would deadlock if a process had left.
    examples = sum(processes.gather("the number of examples", length(loader.first)))
    if last is not None and last.setup.programs.fits(task, seed):
        programs = last.setup.programs
    else:
        optimizer = window_optimizer.of_window(task.optimizer, options.gradient_clip_val, options.divides_by_k)
        programs = Programs(task, strategy, optimizer, options.nonfinite, seed)
    setup = Setup(options, strategy, processes, programs, evaluation, loader, val_loader, examples)
    state = programs.initial(loader.first, processes)
    return Run(setup, state, Metrics(Records(() if processes.index else loggers)))
