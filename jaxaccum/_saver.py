"""Writes the checkpoints that a `ModelCheckpoint` asks for, behind the run's back."""

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxaccum import checkpoint
from jaxaccum._counters import Counters
from jaxaccum._processes import Processes
from jaxaccum.callbacks import ModelCheckpoint

if TYPE_CHECKING:
    from jaxaccum.trainer import Trainer

Take = Callable[[], tuple[Mapping[str, Any], dict[str, Any]]]


class Saver:
    """One checkpoint at a time is on its way to disk. What it takes the place of is removed once it is complete.

    A checkpoint that can't be written costs the run nothing but a warning.

    Args:
      policy: when to save, and what to keep.
      folder: where, if the policy doesn't say.
      processes: those of the run; each has a saver, and all save alike.
    """

    def __init__(self, policy: ModelCheckpoint, folder: Path, processes: Processes):
        self.policy, self._processes = policy, processes
        self._folder = policy.open(folder)
        self._writer = checkpoint.Writer()
        self._on_its_way: Path | None = None
        self._last: Counters | None = None
        self._is_abandoned = False

    @property
    def folder(self) -> Path:
        """Where it writes."""
        return self._folder

    def goes_on(self, path: Path, at: Counters) -> None:
        """The run goes on from `path`, at `at`: here it need not be saved once more."""
        if path.parent == self._folder:
            self._last = dataclasses.replace(at)

    def save_if_due(self, trainer: "Trainer", moment: str, at: Counters, take: Take, micro_steps: int) -> None:
        """Begins a checkpoint if the policy asks for one.

        Args:
          trainer: for the policy to look at.
          moment: of which this is the end: "micro_step", "validation" or "epoch".
          at: the place in the run.
          take: gives what the run consists of: arrays by name, and notes.
          micro_steps: how many ended at once.
        """
        if self.policy.due(trainer, moment, micro_steps):
            score = self.policy.score(trainer)
            if self.policy.wants(score):
                self._save(at, score, take)

    def save_at_end(self, at: Counters, take: Take) -> None:
        """Begins a checkpoint of the last place in the run, whether it is due or not."""
        if self.policy.wants(None):
            self._save(at, None, take)

    def _save(self, at: Counters, score: float | None, take: Take) -> None:
        if at == self._last:
            return
        self._settle()
        path = self._free(f"epoch={at.epoch}-micro_step={at.micro_step}")
        self.policy.add(path.name, score)  # First: the checkpoint holds a list of checkpoints with itself in it.
        try:
            arrays, notes = take()
        except BaseException:
            self.policy.forget(path.name)
            raise
        if not self._fails(path, lambda: self._writer.start(path, arrays, notes)):
            self._on_its_way, self._last = path, dataclasses.replace(at)

    def _settle(self) -> None:
        """Waits for the checkpoint on its way."""
        path, self._on_its_way = self._on_its_way, None
        if path is None:
            return
        if not self._fails(path, self._writer.wait):
            for name in self.policy.outdated():
                self._remove(self._folder / name)

    def close(self) -> None:
        """Waits, and ends the writer."""
        if not self._is_abandoned:
            self._settle()
            self._writer.close()

    def abandon(self) -> None:
        """Leaves the checkpoint on its way to itself: `close` won't wait for it."""
        self._is_abandoned = True

    def _free(self, name: str) -> Path:
        """The first of name, name-v1, name-v2... that is not taken, as an earlier run may have done."""
        version, path = 0, self._folder / name
        while path.exists():
            version += 1
            path = self._folder / f"{name}-v{version}"
        return self._folder / self._processes.gather("a checkpoint's name", path.name)[0]

    def _fails(self, path: Path, write: Callable[[], None]) -> bool:
        """Whether `write` raises, on any process; then `path` is given up."""
        failure = None
        try:
            write()
        except Exception as error:
            failure = repr(error)
        failures = [text for text in self._processes.gather("a checkpoint", failure) if text is not None]
        if failures:
            self._last = None
            self.policy.forget(path.name)
            self._remove(path)
            warnings.warn(
                f"checkpoint {path} could not be written: {failures[0]}. The run goes on, and the checkpoints before "
                "it stay; make room, or give ModelCheckpoint another dirpath.",
                stacklevel=3,
            )
        return bool(failures)

    def _remove(self, path: Path) -> None:
        if not self._processes.index:
            checkpoint.remove(path)
