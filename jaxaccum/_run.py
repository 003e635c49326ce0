"""What a `fit` has between two micro-steps, beside its counters."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax

from jaxaccum._evaluation import Evaluation
from jaxaccum._programs import FitState, Programs
from jaxaccum._records import Records
from jaxaccum.task import Task


@dataclasses.dataclass
class Run:
    """One `fit`.

    Attributes:
      task: what it trains.
      programs: of its micro-steps.
      evaluation: of its validation.
      state: its arrays.
      records: what it logs.
      seed: of its keys.
      val_loader: what it validates on; None for no validation.
      examples: in its first loader batch.
      epoch_batches: the loader batches of an epoch; None where that is all, and their number is not known.
      means: the last window's, by name: scalars on the device.
      metrics: the last validation's, and what callbacks log.
      logged: what callbacks have logged since the last record.
      loader_state: where the training loader stands after the last micro-step, by its own account; None without.
    """

    task: Task
    programs: Programs
    evaluation: Evaluation
    state: FitState
    records: Records
    seed: int
    val_loader: Iterable[Any] | None
    examples: int
    epoch_batches: int | None
    means: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    logged: dict[str, float] = dataclasses.field(default_factory=dict)
    loader_state: str | None = None

    def train_metrics(self) -> dict[str, Any]:
        """The last window's means, with "train_" before their names."""
        return {f"train_{name}": mean for name, mean in self.means.items()}
