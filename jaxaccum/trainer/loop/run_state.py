"""A run: its fixed parts and its state between micro-steps."""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxaccum import task as _task
from jaxaccum._types import Tree
from jaxaccum.callbacks.average import ParamsAverage
from jaxaccum.distributed.process_group import Processes
from jaxaccum.loggers.records import Records
from jaxaccum.task import Task
from jaxaccum.trainer.input.loader import TrainLoader, ValLoader
from jaxaccum.trainer.input.prefetch import MicroStep
from jaxaccum.trainer.input.strategies import Strategy
from jaxaccum.trainer.loop.counters import Counters
from jaxaccum.trainer.loop.metrics import Metrics
from jaxaccum.trainer.loop.options import Options
from jaxaccum.trainer.loop.warm_start import WarmStart
from jaxaccum.trainer.loop.window_lengths import WindowLengths
from jaxaccum.trainer.programs import window_optimizer
from jaxaccum.trainer.programs.compiled import FitState, Programs
from jaxaccum.trainer.programs.evaluation import Evaluation
from jaxaccum.trainer.programs.step_outputs import Outputs


class Setup(NamedTuple):
    """The parts of a run that don't change."""

    options: Options
    strategy: Strategy
    processes: Processes
    programs: Programs
    evaluation: Evaluation
    loader: TrainLoader
    val_loaders: dict[str, ValLoader]  # By the names of their results; {} for no validation.
    examples: int  # In the run's first loader batch, over all processes.

    @property
    def epoch_micro_steps(self) -> int | float:
        """The expected number of micro-steps per epoch; infinite if unknown."""
        return self.strategy.micro_steps(self.loader.epoch_batches)


@dataclasses.dataclass
class Run:
    """The state of one `fit`."""

    setup: Setup
    state: FitState
    metrics: Metrics
    lengths: WindowLengths
    average: ParamsAverage | None  # Of the parameters.
    at: Counters = dataclasses.field(default_factory=Counters)
    # Micro-steps, with their outputs, that `state` includes and `at` doesn't yet.
    uncounted: collections.deque[tuple[MicroStep, Outputs]] = dataclasses.field(default_factory=collections.deque)
    loader_state: str | None = None  # The training loader's own state after the last micro-step.
    is_resuming: bool = False  # Whether the run was resumed from a checkpoint.
    takes_k: bool = False  # Whether K may be set now.

    @property
    def evaluated_params(self) -> Tree:
        """The parameters that validations use: their average, if there is one."""
        return self.state.params if self.average is None else self.average.params

    @property
    def record_is_due(self) -> bool:
        """Whether the window just closed should be logged. The run's first and each epoch's last always are."""
        at, options = self.at, self.setup.options
        is_first_or_last = at.global_step == 1 or at.ends_epoch or at.global_step >= options.steps
        return not at.window_step and (is_first_or_last or at.global_step % options.log_every_n_steps == 0)


def programs_for(
    task: Task, options: Options, strategy: Strategy, seed: int, total_steps: int | None, last: Run | None
) -> Programs:
    """Returns the programs of the `last` run if they fit, otherwise new ones. `total_steps` may be None."""
    if last is not None and last.setup.programs.fits(task, seed, total_steps):
        return last.setup.programs
    optimizer = _task.optimizer(task, total_steps)
    clipping = options.gradient_clip_val, options.gradient_clip_algorithm
    adaptive, log_noise = options.adaptive, options.noise_scale is not None
    follows_k = adaptive is not None and adaptive.follows_k
    optimizer = window_optimizer.of_window(optimizer, *clipping, options.divides_by_k, follows_k)
    log_weight = log_noise or options.accumulate_grad_batches.by == "tokens"
    logs = options.log_grad_norm, options.log_epoch_means, log_weight, log_noise
    return Programs(task, strategy, optimizer, options.nonfinite, seed, total_steps, *logs)


def begin(
    setup: Setup, loggers: Sequence[Any], average: ParamsAverage | None, warm_start: WarmStart | None = None
) -> Run:
    """Returns a fresh run, whose loader has begun. Only process 0 uses the loggers."""
    if warm_start is None:
        state = setup.programs.initial(setup.loader.first, setup.processes)
    else:
        state = setup.programs.initial(setup.loader.first, setup.processes, warm_start.weights)
        state = state._replace(opt_state=warm_start.opt_state(state.opt_state, setup.strategy))
    metrics = Metrics(Records(() if setup.processes.index else loggers))
    if average is not None:
        average.begin(state.params, step=0)
    options = setup.options
    if options.noise_scale is not None:
        options.noise_scale.begin()
    return Run(setup, state, metrics, WindowLengths(options.accumulate_grad_batches, options.adaptive), average)
