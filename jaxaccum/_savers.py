"""The checkpoints of a run: what each of its `ModelCheckpoint`s asks for."""

import functools
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from jaxaccum import _snapshot, checkpoint
from jaxaccum._processes import Processes
from jaxaccum._reader import TrainLoader
from jaxaccum._run import Run
from jaxaccum._saver import Saver
from jaxaccum.callbacks import Callback, ModelCheckpoint
from jaxaccum.checkpoint import Checkpoint

if TYPE_CHECKING:
    from jaxaccum.trainer import Trainer


class Savers:
    """A saver for each `ModelCheckpoint`.

    Args:
      trainer: for the policies to look at.
      callbacks: the run's; checkpoints hold their states.
      folder: where to save, if a policy doesn't say.
      processes: those of the run.
    """

    def __init__(self, trainer: "Trainer", callbacks: Sequence[Callback], folder: Path, processes: Processes):
        self._trainer, self._callbacks, self._processes = trainer, callbacks, processes
        policies = [callback for callback in callbacks if isinstance(callback, ModelCheckpoint)]
        self._savers = [Saver(policy, folder, processes) for policy in policies]

    @property
    def folders(self) -> list[Path]:
        """Where they write."""
        return [saver.folder for saver in self._savers]

    def find(self, ckpt_path: str | os.PathLike[str] | None) -> Checkpoint | None:
        """The checkpoint that `Trainer.fit` is to go on from; None for a start.

        Raises:
          ValueError: for "last" without a `ModelCheckpoint`.
          OSError: for a path that is no checkpoint.
        """
        if ckpt_path is None:
            return None
        if ckpt_path != "last":
            return checkpoint.load(ckpt_path)
        if not self._savers:
            raise ValueError(
                "ckpt_path='last' is the newest checkpoint of a ModelCheckpoint, but callbacks hold none: add one, or "
                "pass the path of a checkpoint."
            )
        found = checkpoint.newest(self.folders, self._processes)
        if found is None:
            folders = ", ".join(map(str, self.folders))
            warnings.warn(f"ckpt_path='last' finds no checkpoint in {folders}: the run starts afresh.", stacklevel=4)
        return found

    def restore(self, found: Checkpoint, run: Run, loader: TrainLoader) -> None:
        """As `_snapshot.restore`; where a checkpoint left it, a run need not be saved once more."""
        _snapshot.restore(found, run, loader, self._callbacks)
        for saver in self._savers:
            saver.goes_on(found.path, run.at)

    def save_if_due(self, run: Run, moment: str, micro_steps: int = 1) -> None:
        """Begins the checkpoints that are due.

        Args:
          run: the run.
          moment: of which this is the end: "micro_step", "validation" or "epoch".
          micro_steps: how many ended at once.
        """
        for saver in self._savers:
            saver.save_if_due(self._trainer, moment, run.at, functools.partial(self._take, run), micro_steps)

    def save_at_end(self, run: Run) -> None:
        """Begins checkpoints of the last place in the run."""
        for saver in self._savers:
            saver.save_at_end(run.at, functools.partial(self._take, run))

    def close(self) -> None:
        """Waits for what is on its way."""
        for saver in self._savers:
            saver.close()

    def abandon(self) -> None:
        """Leaves what is on its way to itself: `close` won't wait for it."""
        for saver in self._savers:
            saver.abandon()

    def _take(self, run: Run) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        """What a checkpoint holds."""
        run.records.write()  # The resume won't make these records again.
        return _snapshot.arrays(run.state), _snapshot.notes(run, self._callbacks)
