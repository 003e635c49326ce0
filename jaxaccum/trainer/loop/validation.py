"""When validations are due, and whether one can be."""

import math
import warnings

from jaxaccum.trainer.input.loader import ValLoader
from jaxaccum.trainer.loop.counters import Counters
from jaxaccum.trainer.loop.run_state import Setup

REMEDY = (
    "Pass a smaller int val_check_interval, which counts micro-steps, or no val_loader, or limit_val_batches=0 for no "
    "validation."
)


class Interval:
    """The number of micro-steps between validations, counted within each epoch or across epochs that are shorter."""

    micro_steps: int | float  # Infinite for a validation at the epoch's end only.

    def __init__(self, setup: Setup):
        self._setup = setup
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """Updates an interval that is a fraction of the epoch's length; raises ValueError if that is unknown."""
        value, epoch = self._setup.options.val_check_interval, self._setup.epoch_micro_steps
        if isinstance(value, int):
            self.micro_steps = value
        elif value == 1.0:
            self.micro_steps = math.inf
        elif math.isinf(epoch):
            raise ValueError(
                f"val_check_interval={value} is a fraction of an epoch whose length is not known; pass an int."
            )
        else:
            self.micro_steps = max(1, int(epoch * value))

    def count(self, at: Counters) -> None:
        """Counts the last micro-step, which may make a validation due."""
        at.toward_validation += 1
        every_n_epochs = self._setup.options.check_val_every_n_epoch or 1
        is_due = at.ends_epoch if math.isinf(self.micro_steps) else at.toward_validation % self.micro_steps == 0
        # An earlier micro-step of the same call may have made it due already.
        at.validated &= not is_due or (at.epoch + 1) % every_n_epochs != 0

    def end_epoch(self, at: Counters) -> None:
        """Resets the count, unless the interval is longer than the epoch."""
        if self._setup.options.check_val_every_n_epoch is not None and at.batch_idx >= self.micro_steps:
            at.toward_validation = 0

    def check_falls_due(self, k_may_change: bool) -> None:
        """Raises ValueError if no validation can become due in the run, counted from its start."""
        setup, options = self._setup, self._setup.options
        most = math.inf if k_may_change else options.steps * options.largest_k
        every_n_epochs = options.check_val_every_n_epoch or 1

        def is_reached(shortest: int | float, longest: int | float) -> bool:
            """Whether a validation is reached with epochs of this many micro-steps."""
            at_end = every_n_epochs * shortest
            first = at_end if math.isinf(self.micro_steps) else max(self.micro_steps, at_end - shortest + 1)
            return every_n_epochs <= options.epochs and first <= min(most, options.epochs * longest)

        words = (
            f"val_check_interval={options.val_check_interval} with check_val_every_n_epoch="
            f"{options.check_val_every_n_epoch} in a run of max_epochs={options.max_epochs} and max_steps="
            f"{options.max_steps}, "
        )
        if not is_reached(*setup.loader.epoch_bounds(setup.strategy.group)):
            raise ValueError(f"no validation can fall due: {words}on this train_loader. {REMEDY}")
        expected = setup.epoch_micro_steps
        if not math.isinf(expected) and not is_reached(expected, expected):
            warnings.warn(
                f"no validation will fall due: {words}where train_loader says that an epoch has "
                f"{expected} micro-steps. {REMEDY}",
                stacklevel=5,
            )

    def check_lasts(self, val_loader: ValLoader) -> None:
        """Raises ValueError if an iterator may be needed for a second validation."""
        options = self._setup.options
        one = options.epochs < 2 * (options.check_val_every_n_epoch or 1) and math.isinf(self.micro_steps)
        if val_loader.lasts_for_one and not one:
            raise ValueError(
                f"{val_loader.name} is an iterator, which gives its batches once, but there may be several "
                "validations: pass something that can be iterated again, such as a list, or an int limit_val_batches "
                "if it has no end."
            )
