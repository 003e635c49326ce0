"""Writes the checkpoints of a folder while the run goes on."""

import contextlib
import dataclasses
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxaccum.callbacks import ModelCheckpoint
from jaxaccum.checkpoint import orbax_io
from jaxaccum.distributed.process_group import Processes
from jaxaccum.trainer.input.progress import Counters

TakeArrays = Callable[[], Mapping[str, Any]]
TakeNotes = Callable[[], dict[str, Any]]
Wanting = Sequence[tuple[ModelCheckpoint, float | None]]


class Saver:
    """Writes one checkpoint at a time, for all policies of its folder; removes what none of them keeps.

    A state of the run is written once. Where a policy asks for it after something else has happened, such as a
    validation or the end of an epoch, only the notes are written anew. A checkpoint that can't be written costs the run
    nothing but a warning.

    Args:
      folder: where to write.
      policies: what to keep.
      processes: those of the run; each has a saver, and all save alike.
    """

    def __init__(self, folder: Path, policies: Sequence[ModelCheckpoint], processes: Processes):
        self.folder, self.policies, self._processes = folder, policies, processes
        self._writer = orbax_io.Writer()
        self._written: Path | None = None  # The newest checkpoint, and where the run was then.
        self._at = Counters()
        self._is_on_its_way = False
        self._warned: set[str] = set()
        self._others: frozenset[str] = frozenset()
        self._date = max(orbax_io.dates(folder), default=0)

    def goes_on(self, path: Path, at: Counters, others: frozenset[str]) -> None:
        """The run goes on from a checkpoint.

        Args:
          path: the checkpoint; if it is in this folder, that state need not be written once more.
          at: the place in the run.
          others: the names of checkpoints that policies kept which the run has no longer: they stay.
        """
        if path.parent == self.folder:
            self._written, self._at, self._others = path, dataclasses.replace(at), others

    def save(self, wanting: Wanting, at: Counters, arrays: TakeArrays, notes: TakeNotes) -> None:
        """Begins a checkpoint, or writes the notes of the newest one anew if the run's arrays are the same.

        Args:
          wanting: the policies that ask for it, each with its score.
          at: the place in the run.
          arrays: gives the run's arrays by name.
          notes: gives all else.
        """
        self._settle()  # What is on its way may fail.
        newest = self._written
        if newest is not None and at.arrays == self._at.arrays and self._is_there(newest):
            if at != self._at or not all(policy.has(newest.name, score) for policy, score in wanting):
                self._annotate(newest, wanting, at, notes)
        else:
            self._write(self._free(f"epoch={at.epoch}-micro_step={at.micro_step}"), wanting, at, arrays, notes)

    def close(self) -> None:
        """Waits for the checkpoint on its way, and ends the writer."""
        with contextlib.closing(self._writer):
            self._settle()

    def _write(self, path: Path, wanting: Wanting, at: Counters, arrays: TakeArrays, notes: TakeNotes) -> None:
        self._written = None
        noted = self._noted(path.name, wanting, notes)
        if not self._fails(path, lambda: self._writer.start(path, arrays(), noted)):
            self._written, self._at, self._is_on_its_way = path, dataclasses.replace(at), True

    def _annotate(self, path: Path, wanting: Wanting, at: Counters, notes: TakeNotes) -> None:
        noted = self._noted(path.name, wanting, notes)
        failures = self._failures(lambda: None if self._processes.index else orbax_io.annotate(path, noted))
        if failures:
            self._warn(failures[0], f"the notes of checkpoint {path} could not be written anew: {failures[0]}.")
        else:
            self._at = dataclasses.replace(at)
            self._prune()

    def _noted(self, name: str, wanting: Wanting, notes: TakeNotes) -> dict[str, Any]:
        """The notes of a checkpoint, which all policies that want it have now: their lists are among the notes."""
        added = [policy for policy, _ in wanting if name not in policy.names]
        for policy, score in wanting:
            policy.add(name, score)
        try:
            taken = notes()
        except BaseException:
            for policy in added:
                policy.forget(name)
            raise
        # Each date is later than the one before, whatever the clock says: the newest checkpoint is found by it.
        self._date = max(time.time_ns(), self._date + 1)
        return {**taken, "saved_at": self._date}

    def _settle(self) -> None:
        """Waits for the checkpoint on its way."""
        if self._is_on_its_way and self._written is not None:
            self._is_on_its_way = False
            if not self._fails(self._written, self._writer.wait):
                self._warned.clear()
                self._prune()

    def _prune(self) -> None:
        """Removes what no policy keeps, now that the newest is complete."""
        outdated = {name for policy in self.policies for name in policy.outdated()}
        for name in outdated.difference(self._others, *(policy.names for policy in self.policies)):
            self._remove(self.folder / name)

    def _is_there(self, path: Path) -> bool:
        """Whether the first process finds a checkpoint that is complete: someone may have removed it."""
        return self._processes.gather("a complete checkpoint", path.is_dir())[0]

    def _free(self, name: str) -> Path:
        """The first of name, name-v1, name-v2... that is not taken, as an earlier run may have done."""
        version, path = 0, self.folder / name
        while path.exists():
            version += 1
            path = self.folder / f"{name}-v{version}"
        return self.folder / self._processes.gather("a checkpoint's name", path.name)[0]

    def _fails(self, path: Path, write: Callable[[], None]) -> bool:
        """Whether `write` raises, on any process; then `path` is given up."""
        failures = self._failures(write)
        if failures:
            self._written = None
            for policy in self.policies:
                policy.forget(path.name)
            self._remove(path)
            self._warn(
                failures[0],
                f"checkpoint {path} could not be written: {failures[0]}. The run goes on, and the checkpoints before "
                "it stay; make room, or give ModelCheckpoint another dirpath. Further failures of this kind are not "
                "reported until a checkpoint has been written.",
            )
        return bool(failures)

    def _failures(self, write: Callable[[], None]) -> list[str]:
        failure = None
        try:
            write()
        except Exception as error:
            failure = repr(error)
        failures = self._processes.gather("a checkpoint", failure)
        return [text for text in failures if text is not None]

    def _warn(self, failure: str, text: str) -> None:
        kind = failure.partition("(")[0]  # The exception's class.
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(text, stacklevel=3)

    def _remove(self, path: Path) -> None:
        if not self._processes.index:
            orbax_io.remove(path)
