"""Saves a run's checkpoints asynchronously, as its policies request, and finds them again."""

import contextlib
import dataclasses
import functools
import os
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxaccum import checkpoint
from jaxaccum.callbacks import Callback, TrainerView
from jaxaccum.callbacks.policy import CheckpointPolicy
from jaxaccum.checkpoint import Checkpoint, json_state, orbax_io
from jaxaccum.distributed.process_group import Processes
from jaxaccum.trainer.loop import run_checkpoint
from jaxaccum.trainer.loop.counters import Counters
from jaxaccum.trainer.loop.run_state import Run

TakeNotes = Callable[[Run], dict[str, Any]]
Wanting = Sequence[tuple[CheckpointPolicy, float | None]]  # Policies that request a checkpoint, each with its score.


class FolderCheckpoints:
    """Writes checkpoints to one folder, one at a time, for policies that all save weights only or all save everything.

    It removes the checkpoints that none of its policies keeps.
    Each state of the run is written once. If a policy requests it again after a validation or the end of an epoch, only
    the notes, which `notes` returns, are rewritten. A checkpoint that can't be written only causes a warning. With
    several processes each has its own instance, and all make the same calls.
    """

    def __init__(self, folder: Path, policies: Sequence[CheckpointPolicy], notes: TakeNotes, processes: Processes):
        self.folder, self.policies, self._notes, self._processes = folder, policies, notes, processes
        self._weights_only = policies[0].save_weights_only
        self._writer = orbax_io.Writer()
        self._written: Path | None = None  # The newest checkpoint; `_at` is the run's position then.
        self._at = Counters()
        self._pending: Path | None = None  # The checkpoint that is being written.
        self._warned: set[str] = set()
        self._others: frozenset[str] = frozenset()  # Checkpoints kept by policies that the run no longer has.
        self._date = max(orbax_io.dates(folder), default=0)

    def goes_on(self, path: Path, at: Counters, others: frozenset[str]) -> None:
        """Continues from a checkpoint at `at`, whose state is not written again if it is in this folder."""
        if path.parent == self.folder:
            self._others = others
            if self._weights_only:  # The policies know by now which weights were saved beside it.
                ending = f"micro_step={at.micro_step}-weights"
                names = [name for policy in self.policies for name in policy.names if ending in name]
                path = self.folder / next(iter(names), "")
            if path != self.folder:
                self._written, self._at = path, dataclasses.replace(at)

    def save(self, wanting: Wanting, run: Run) -> None:
        """Starts writing a checkpoint, or rewrites the notes of the newest one if the run's arrays are unchanged."""
        if not wanting:
            return
        self._settle()  # The pending write may fail.
        at, newest = run.at, self._written
        if newest is not None and at.arrays == self._at.arrays and self._is_there(newest):
            if at != self._at or not all(policy.has(newest.name, score) for policy, score in wanting):
                self._annotate(newest, wanting, run)
        else:
            self._write(wanting, run)

    def close(self) -> None:
        """Waits for the pending write and shuts down the writer."""
        with contextlib.closing(self._writer):
            self._settle()

    def _write(self, wanting: Wanting, run: Run) -> None:
        ending = "-weights" if self._weights_only else ""
        path = self._free(f"epoch={run.at.epoch}-micro_step={run.at.micro_step}{ending}")
        self._written = None
        noted = self._noted(path.name, wanting, run)
        arrays = run_checkpoint.arrays(run)
        if self._weights_only:
            arrays = run_checkpoint.weights_of(arrays)
        if not self._fails(path, lambda: self._writer.start(path, arrays, noted)):
            self._written, self._at, self._pending = path, dataclasses.replace(run.at), path

    def _annotate(self, path: Path, wanting: Wanting, run: Run) -> None:
        noted = self._noted(path.name, wanting, run)
        failure = self._failure(lambda: None if self._processes.index else orbax_io.annotate(path, noted))
        if failure:
            self._warn(failure, f"the notes of checkpoint {path} could not be written anew: {failure}.")
        else:
            self._at = dataclasses.replace(run.at)
            self._prune()

    def _noted(self, name: str, wanting: Wanting, run: Run) -> dict[str, Any]:
        """Returns the notes; adds the checkpoint to the policies first, because the notes include their lists."""
        added = [policy for policy, _ in wanting if name not in policy.names]
        for policy, score in wanting:
            policy.add(name, score)
        try:
            taken = self._notes(run)
        except BaseException:
            for policy in added:
                policy.forget(name)
            raise
        # Strictly increasing, even if the clock is not, because it identifies the newest checkpoint.
        self._date = max(time.time_ns(), self._date + 1)
        return {**taken, "saved_at": self._date, "weights_only": self._weights_only}

    def _settle(self) -> None:
        """Waits for the pending write."""
        path, self._pending = self._pending, None
        if path is not None and not self._fails(path, self._writer.wait):
            self._warned.clear()
            self._prune()

    def _prune(self) -> None:
        """Removes the checkpoints that no policy keeps, now that the newest one is complete."""
        outdated = {name for policy in self.policies for name in policy.outdated()}
        for name in outdated.difference(self._others, *(policy.names for policy in self.policies)):
            self._remove(self.folder / name)

    def _is_there(self, path: Path) -> bool:
        """Whether process 0 still finds the checkpoint, which may have been deleted."""
        return self._processes.gather("a complete checkpoint", path.is_dir())[0]

    def _free(self, name: str) -> Path:
        """Returns the first unused name among name, name-v1, name-v2..."""
        version, path = 0, self.folder / name
        while path.exists():
            version += 1
            path = self.folder / f"{name}-v{version}"
        return self.folder / self._processes.gather("a checkpoint's name", path.name)[0]

    def _fails(self, path: Path, write: Callable[[], None]) -> bool:
        """Whether `write` raises in any process; if so, drops and removes `path` with a warning."""
        failure = self._failure(write)
        if failure:
            self._written = None
            for policy in self.policies:
                policy.forget(path.name)
            self._remove(path)
            self._warn(
                failure,
                f"checkpoint {path} could not be written: {failure}. The run goes on, and the checkpoints before "
                "it stay; make room, or give ModelCheckpoint another dirpath. Further failures of this kind are not "
                "reported until a checkpoint has been written.",
            )
        return failure is not None

    def _failure(self, write: Callable[[], None]) -> str | None:
        """Returns the first exception that `write` raises in any process, as text."""
        failure = None
        try:
            write()
        except Exception as error:
            failure = repr(error)
        return next(filter(None, self._processes.gather("a checkpoint", failure)), None)

    def _warn(self, failure: str, text: str) -> None:
        kind = failure.partition("(")[0]  # The exception class.
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(text, stacklevel=3)

    def _remove(self, path: Path) -> None:
        if not self._processes.index:
            orbax_io.remove(path)


class RunCheckpoints:
    """The checkpoints of a run, with one `FolderCheckpoints` per folder; `folder` is the default one."""

    def __init__(self, trainer: TrainerView, callbacks: Sequence[Callback], folder: Path, processes: Processes):
        self._trainer, self._callbacks = trainer, callbacks
        policies: dict[tuple[Path, bool], list[CheckpointPolicy]] = {}
        for policy in policies_of(callbacks):
            place = Path(os.path.realpath(policy.open(folder))), policy.save_weights_only
            policies.setdefault(place, []).append(policy)
        # Weights come first, so that the notes of a whole run tell of those beside it.
        in_order = sorted(policies.items(), key=lambda entry: not entry[0][1])
        self._folders = [FolderCheckpoints(folder, those, self._notes, processes) for (folder, _), those in in_order]
        self._policies = [policy for folder in self._folders for policy in folder.policies]
        self._postponed: set[CheckpointPolicy] = set()
        # In seconds: the intervals of policies with a `train_time_interval`, and when these began.
        intervals = {policy: policy.train_time_interval for policy in self._policies}
        self._intervals = {policy: interval.total_seconds() for policy, interval in intervals.items() if interval}
        self._processes, self._began = processes, dict[CheckpointPolicy, float]()

    @property
    def folders(self) -> list[Path]:
        return [folder.folder for folder in self._folders]

    def restore(self, found: Checkpoint, run: Run) -> None:
        """Same as `run_checkpoint.restore`; the restored state is not saved again."""
        left = run_checkpoint.restore(found, run, self._callbacks)
        # Keep the checkpoints of policies that the run no longer has.
        others = frozenset(name for key, state in left if key.startswith("ModelCheckpoint") for name in state["saved"])
        postponed = found.notes.get("postponed", [])
        self._postponed = {policy for policy in self._policies if policy.state_key in postponed}
        for folder in self._folders:
            folder.goes_on(Path(os.path.realpath(found.path)), run.at, others)

    def save_if_due(self, run: Run, moment: str, micro_steps: int = 1) -> None:
        """Starts the checkpoints that are due after `moment`, as in `ModelCheckpoint.due`."""
        due = {policy for policy in self._policies if policy.due(self._trainer, moment, micro_steps)}
        if moment == "micro_step" and self._intervals:
            due |= self._overdue()
        if not due and not self._postponed:
            return
        if moment == "micro_step" and not run.at.validated:
            # The upcoming validation computes the values that these rank by.
            self._postponed = {policy for policy in due if policy.monitored and policy.monitored.needs_validation}
            due -= self._postponed
        elif moment == "validation":
            due, self._postponed = due | self._postponed, set()
        for folder in self._folders:
            scored = [(policy, policy.score(self._trainer)) for policy in folder.policies if policy in due]
            folder.save([(policy, score) for policy, score in scored if policy.wants(score)], run)

    def _overdue(self) -> set[CheckpointPolicy]:
        """Returns the policies whose `train_time_interval` has passed, which begins again for them."""
        now = self._processes.seconds()
        overdue = {policy for policy, seconds in self._intervals.items() if now - self._began[policy] >= seconds}
        self._began |= dict.fromkeys(overdue, now)
        return overdue

    def save_at_end(self, run: Run) -> None:
        """Starts checkpoints of the run's final state."""
        is_epochs_end = not run.at.batch_idx  # Otherwise the monitored values are outdated.
        score = lambda policy: policy.known_score(self._trainer) if is_epochs_end else None
        for folder in self._folders:
            folder.save([(policy, score(policy)) for policy in folder.policies if policy.wants(None)], run)

    def begin(self) -> None:
        """Starts the intervals; raises TypeError if there are checkpoints and a callback's state can't be saved."""
        self._began = dict.fromkeys(self._intervals, self._processes.seconds())
        for callback in self._callbacks if self._folders else ():
            try:
                state = callback.state_dict()
            except Exception:
                continue  # It may depend on the run's first hooks.
            json_state.dumps(state, callback.state_key)

    def close(self) -> None:
        """Waits for the pending writes."""
        with contextlib.ExitStack() as stack:  # Closes all folders even if one raises.
            for folder in self._folders:
                stack.callback(folder.close)

    def _notes(self, run: Run) -> dict[str, Any]:
        run.metrics.records.write()  # A resumed run won't make these records again.
        postponed = [policy.state_key for policy in self._policies if policy in self._postponed]
        return run_checkpoint.notes(run, self._callbacks) | {"postponed": postponed}


def policies_of(callbacks: Sequence[Callback]) -> list[CheckpointPolicy]:
    """Returns the callbacks that are checkpoint policies."""
    return [callback for callback in callbacks if isinstance(callback, CheckpointPolicy)]


def folders_of(callbacks: Sequence[Callback], default: Path) -> list[Path]:
    """Returns the checkpoint folders of the callbacks; `default` stands in for an unset `dirpath`."""
    return list(dict.fromkeys(policy.folder(default) for policy in policies_of(callbacks)))


class NoLastCheckpointError(FileNotFoundError):
    """There is no checkpoint for "last"."""


def find(
    ckpt_path: str | os.PathLike[str],
    callbacks: Sequence[Callback],
    folder: Path,
    processes: Processes,
    to_resume: bool = False,
) -> Checkpoint:
    """Finds the checkpoint for `ckpt_path`: a path, "last" or "best", that all processes can read.

    With `to_resume`, "last" passes over weights, and "best" prefers the policies that save whole runs.

    Raises:
      TypeError: if `ckpt_path` is no path.
      ValueError: for "last" or "best" without a policy, or for "best" without one that has a monitor.
      OSError: if there is none, or if none of the existing ones can be read.
    """
    if not isinstance(ckpt_path, (str, os.PathLike)):
        raise TypeError(f"ckpt_path must be the path of a checkpoint, 'last' or 'best', got {ckpt_path!r:.60}.")
    if ckpt_path not in ("last", "best"):
        return checkpoint.load(ckpt_path)
    policies = policies_of(callbacks)
    if not policies:
        raise ValueError(
            f"ckpt_path={ckpt_path!r} is a checkpoint of a ModelCheckpoint, but callbacks hold none: add one, or pass "
            "the path of a checkpoint."
        )
    if ckpt_path == "last":
        folders = folders_of(callbacks, folder)
        found = orbax_io.newest(folders, processes, lambda notes: not (to_resume and notes.get("weights_only")))
        if found is None:
            raise NoLastCheckpointError(f"ckpt_path='last' finds no checkpoint in {', '.join(map(str, folders))}.")
        return found
    monitored = [policy for policy in policies if policy.monitored is not None]
    if not monitored:
        raise ValueError("ckpt_path='best' needs a ModelCheckpoint with a monitor, but none of the callbacks has one.")
    policy = min(monitored, key=lambda policy: to_resume and policy.save_weights_only)
    found = orbax_io.best(policy.folder(folder), processes, functools.partial(run_checkpoint.ranked, policy))
    if found is None:
        raise FileNotFoundError(
            f"ckpt_path='best' finds no checkpoint of {policy.state_key} in {policy.folder(folder)}."
        )
    return found
