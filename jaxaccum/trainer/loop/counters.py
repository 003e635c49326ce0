"""The counters of a run, on the host."""

import dataclasses
from typing import Any

from jaxaccum.trainer.input.loader import Start


@dataclasses.dataclass
class Counters:
    """The part of a run's state that is not an array. `dataclasses.asdict` converts it to a dict of ints and bools.

    Attributes:
      epoch: the current epoch, from 0.
      batch_idx: the number of micro-steps in the current epoch.
      micro_step: the number of micro-steps in the run.
      global_step: the number of closed windows, which is the number of optimizer steps.
      samples_seen: the number of examples in all micro-steps.
      window_step: the number of micro-steps in the open window.
      window_samples: the number of examples in the open window.
      effective_batch: the number of examples in the last closed window.
      every_k: K.
      batches: the number of loader batches in the current epoch, over all processes.
      all_batches: the number of loader batches in the run, over all processes.
      ends_epoch: whether the last micro-step was the epoch's last and the end of the epoch is still to be processed.
      validated: whether no validation is due.
      records: the number of records made since the last micro-step.
      recorded: whether no window record is due. If a hook raises, the record may be left to the resumed run.
      toward_validation: the number of micro-steps counted for `val_check_interval`.
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
        """Reads the counters of a checkpoint. Version 0.1 counted towards a validation within each epoch only."""
        return cls(**{"toward_validation": notes["batch_idx"], **notes})

    def count(self, examples: int, batches: int, ends_epoch: bool) -> None:
        """Counts a micro-step.

        Args:
          examples: its number of examples.
          batches: its number of loader batches.
          ends_epoch: whether it is the epoch's last.
        """
        self.records = 0
        self.batch_idx += 1
        self.micro_step += 1
        self.window_step += 1
        self.samples_seen += examples
        self.window_samples += examples
        self.batches += batches
        self.all_batches += batches
        self.ends_epoch = ends_epoch

    def close_window(self) -> None:
        """Counts an optimizer step."""
        self.global_step += 1
        self.window_step = 0
        self.effective_batch, self.window_samples = self.window_samples, 0

    def end_epoch(self) -> None:
        """Counts an epoch."""
        self.epoch += 1
        self.batch_idx = self.batches = 0
        self.ends_epoch = False

    @property
    def start(self) -> Start:
        """Where a train loader starts to continue from here."""
        return Start(self.epoch, self.batches, self.all_batches, self.ends_epoch)

    @property
    def resumed(self) -> dict[str, int]:
        """What the loggers need to know of a checkpoint's position."""
        return {"step": self.global_step, "micro_step": self.micro_step, "records": self.records}

    @property
    def arrays(self) -> tuple[int, int, int]:
        """Identifies the run's arrays: they are equal at two positions with equal values."""
        return self.micro_step, self.global_step, self.window_step

    def regrouped(self, before: int, now: int) -> "Counters":
        """Converts the counters from micro-steps of `before` loader batches to micro-steps of `now`.

        In the open epoch K and `window_step` are scaled so that a window holds the same number of loader batches,
        rounded up to whole micro-steps.
        """
        up = lambda micro_steps: -(-micro_steps * before // now)
        return dataclasses.replace(
            self,
            batch_idx=-(-self.batches // now),
            window_step=up(self.window_step),
            every_k=up(self.every_k),
            toward_validation=up(self.toward_validation),
        )
