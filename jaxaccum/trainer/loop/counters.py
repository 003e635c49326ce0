"""The counters of a run, on the host."""

import dataclasses

from jaxaccum.trainer.input.loader import Start


@dataclasses.dataclass
class Counters:
    """The part of a run's state that is not an array. `dataclasses.asdict` converts it to a dict of ints and bools."""

    epoch: int = 0  # From 0.
    batch_idx: int = 0  # Micro-steps in the current epoch.
    micro_step: int = 0  # Micro-steps in the run.
    global_step: int = 0  # Closed windows, which are the optimizer steps.
    samples_seen: int = 0  # Examples in all micro-steps.
    window_step: int = 0  # Micro-steps in the open window.
    window_samples: int = 0  # Examples in the open window.
    effective_batch: int = 0  # Examples in the last closed window.
    every_k: int = 1
    batches: int = 0  # Loader batches in the current epoch, over all processes.
    all_batches: int = 0  # Loader batches in the run, over all processes.
    ends_epoch: bool = False  # Whether the last micro-step was the epoch's last, and its end is still to be processed.
    validated: bool = True  # Whether no validation is due.
    records: int = 0  # Records made since the last micro-step.
    recorded: bool = True  # Whether no window record is due. If a hook raises, it may be left to the resumed run.
    toward_validation: int = 0  # Micro-steps counted for `val_check_interval`.

    def count(self, examples: int, batches: int, ends_epoch: bool) -> None:
        """Counts a micro-step; `ends_epoch`: whether it is the epoch's last."""
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
