"""Where a run stands, as the host counts it."""

import dataclasses
from typing import Any


@dataclasses.dataclass
class Counters:
    """All that a run's state has besides its arrays; `dataclasses.asdict` makes it a dict of ints and bools.

    Attributes:
      epoch: the epoch, from 0.
      batch_idx: the micro-steps made in it.
      micro_step: the micro-steps made.
      global_step: the windows closed: the optimizer steps made.
      samples_seen: the examples in them.
      window_step: the micro-steps in the open window.
      window_samples: the examples in it.
      effective_batch: the examples in the last window that was closed.
      every_k: K.
      batches: the loader batches in the epoch's micro-steps, of all processes.
      all_batches: the loader batches in all of them.
      ends_epoch: whether the last micro-step was its epoch's last; the epoch's end is still to come.
      validated: whether no validation is outstanding after it.
      records: how many records were made since its last micro-step.
      recorded: whether no record of a window is outstanding: a hook that raises leaves one to the resume.
      toward_validation: the micro-steps that `val_check_interval` has counted.
    """

    epoch: int = 0
    batch_idx: int = 0
    micro_step: int = 0
    global_step: int = 0
    samples_seen: int = 0
    window_step: int = 0
    window_samples: int = 0
    effective_batch: int = 0
    every_k: int = 1
    batches: int = 0
    all_batches: int = 0
    ends_epoch: bool = False
    validated: bool = True
    records: int = 0
    recorded: bool = True
    toward_validation: int = 0

    @classmethod
    def of_notes(cls, notes: dict[str, Any]) -> "Counters":
        """The counters of a checkpoint; version 0.1 counted towards a validation within each epoch alone."""
        return cls(**{"toward_validation": notes["batch_idx"], **notes})

    @property
    def arrays(self) -> tuple[int, int, int]:
        """What tells the run's arrays apart: at two places that are equal in this, they are the same."""
        return self.micro_step, self.global_step, self.window_step

    def regrouped(self, before: int, now: int) -> "Counters":
        """The same place for micro-steps of `now` loader batches, where so far they had `before`.

        The open epoch keeps its windows: K and the place in the window are so many micro-steps that they hold what they
        held, or the next more where that is no whole number.
        """
        up = lambda micro_steps: -(-micro_steps * before // now)
        return dataclasses.replace(
            self,
            batch_idx=-(-self.batches // now),
            window_step=up(self.window_step),
            every_k=up(self.every_k),
            toward_validation=up(self.toward_validation),
        )
