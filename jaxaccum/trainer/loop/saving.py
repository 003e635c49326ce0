"""The checkpoints of a run: what each of its `ModelCheckpoint`s asks for."""

import contextlib
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxaccum import checkpoint
from jaxaccum.callbacks import Callback, ModelCheckpoint, TrainerView
from jaxaccum.checkpoint import Checkpoint, orbax_io
from jaxaccum.distributed.process_group import Processes
from jaxaccum.trainer.loop import run_checkpoint
from jaxaccum.trainer.loop.run_state import Run
from jaxaccum.trainer.loop.saver import Saver, Wanting


class Savers:
    """A saver for each folder that a `ModelCheckpoint` names.

    Args:
      trainer: for the policies to look at.
      callbacks: the run's; checkpoints hold their states.
      folder: where to save, if a policy doesn't say.
      processes: those of the run.
    """

    def __init__(self, trainer: TrainerView, callbacks: Sequence[Callback], folder: Path, processes: Processes):
        self._trainer, self._callbacks = trainer, callbacks
        policies: dict[Path, list[ModelCheckpoint]] = {}
        for policy in policies_of(callbacks):
            policies.setdefault(Path(os.path.realpath(policy.open(folder))), []).append(policy)
        self._savers = [Saver(folder, those, processes) for folder, those in policies.items()]
        self._policies = [policy for saver in self._savers for policy in saver.policies]
        self._postponed: set[ModelCheckpoint] = set()

    @property
    def folders(self) -> list[Path]:
        """Where they write."""
        return [saver.folder for saver in self._savers]

    def restore(self, found: Checkpoint, run: Run) -> None:
        """As `run_checkpoint.restore`; where a checkpoint left it, a run need not be saved once more."""
        left = run_checkpoint.restore(found, run, self._callbacks)
        # Also of the checkpoints that are not kept by any policy which there is now.
        others = frozenset(name for key, state in left if key.startswith("ModelCheckpoint") for name in state["saved"])
        postponed = found.notes.get("postponed", [])
        self._postponed = {policy for policy in self._policies if policy.state_key in postponed}
        for saver in self._savers:
            saver.goes_on(Path(os.path.realpath(found.path)), run.at, others)

    def save_if_due(self, run: Run, moment: str, micro_steps: int = 1) -> None:
        """Begins the checkpoints that are due.

        Args:
          run: the run.
          moment: of which this is the end: "micro_step", "validation" or "epoch".
          micro_steps: how many ended at once.
        """
        due = {policy for policy in self._policies if policy.due(self._trainer, moment, micro_steps)}
        if not due and not self._postponed:
            return
        if moment == "micro_step" and not run.at.validated:
            # The value that these rank by is about to be computed.
            self._postponed = {policy for policy in due if (policy.monitor or "").startswith("val_")}
            due -= self._postponed
        elif moment == "validation":
            due, self._postponed = due | self._postponed, set()
        for saver in self._savers:
            scored = [(policy, policy.score(self._trainer)) for policy in saver.policies if policy in due]
            self._save(saver, run, [(policy, score) for policy, score in scored if policy.wants(score)])

    def save_at_end(self, run: Run) -> None:
        """Begins checkpoints of the last place in the run."""
        is_epochs_end = not run.at.batch_idx  # Else the monitored values are those of an earlier place.
        for saver in self._savers:
            wanting = [policy for policy in saver.policies if policy.wants(None)]
            score = lambda policy: policy.known_score(self._trainer) if is_epochs_end else None
            self._save(saver, run, [(policy, score(policy)) for policy in wanting])

    def check(self) -> None:
        """Whether checkpoints can hold what the callbacks tell of themselves.

        Raises:
          TypeError: if not.
        """
        if self._savers:
            run_checkpoint.check_callbacks(self._callbacks)

    def close(self) -> None:
        """Waits for what is on its way."""
        with contextlib.ExitStack() as stack:  # All of them, even if one raises.
            for saver in self._savers:
                stack.callback(saver.close)

    def _save(self, saver: Saver, run: Run, wanting: Wanting) -> None:
        if wanting:
            saver.save(wanting, run.at, lambda: run_checkpoint.arrays(run.state), functools.partial(self._notes, run))

    def _notes(self, run: Run) -> dict[str, Any]:
        run.records.write()  # The resume won't make these records again.
        postponed = [policy.state_key for policy in self._policies if policy in self._postponed]
        return run_checkpoint.notes(run, self._callbacks) | {"postponed": postponed}


def policies_of(callbacks: Sequence[Callback]) -> list[ModelCheckpoint]:
    """The callbacks that say when to save."""
    return [callback for callback in callbacks if isinstance(callback, ModelCheckpoint)]


def folders_of(callbacks: Sequence[Callback], default: Path) -> list[Path]:
    """Where the checkpoints of these callbacks are, if not in `default`."""
    return list(dict.fromkeys(policy.folder(default) for policy in policies_of(callbacks)))


def find(
    ckpt_path: str | os.PathLike[str], callbacks: Sequence[Callback], folder: Path, processes: Processes
) -> Checkpoint | None:
    """The checkpoint that `ckpt_path` names: a path, or "last" or "best" of what lies on disk.

    Args:
      ckpt_path: what `Trainer.fit` or `Trainer.validate` was passed.
      callbacks: their `ModelCheckpoint`s say in which folders to look, and what is best.
      folder: where to look, if they don't say.
      processes: all of which must be able to read it.

    Returns:
      None for "last" where there is none.

    Raises:
      ValueError: for "last" without a `ModelCheckpoint`, or "best" without one that has a monitor.
      OSError: if it can't be read, or none of those that there are; for "best" also if there is none.
    """
    if ckpt_path not in ("last", "best"):
        return checkpoint.load(ckpt_path)
    policies = policies_of(callbacks)
    if not policies:
        raise ValueError(
            f"ckpt_path={ckpt_path!r} is a checkpoint of a ModelCheckpoint, but callbacks hold none: add one, or pass "
            "the path of a checkpoint."
        )
    folders = folders_of(callbacks, folder)
    if ckpt_path == "last":
        return orbax_io.newest(folders, processes)
    policy = next((policy for policy in policies if policy.monitor is not None), None)
    if policy is None:
        raise ValueError("ckpt_path='best' needs a ModelCheckpoint with a monitor, but none of the callbacks has one.")
    found = orbax_io.best(policy.folder(folder), processes, functools.partial(run_checkpoint.ranked, policy))
    if found is None:
        raise FileNotFoundError(
            f"ckpt_path='best' finds no checkpoint of {policy.state_key} in {policy.folder(folder)}."
        )
    return found
