"""Reads and writes orbax checkpoints. Writes are asynchronous and atomic."""

import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import jax
import numpy as np

from jaxaccum import _extras, _paths
from jaxaccum._types import Tree
from jaxaccum.checkpoint import named_arrays
from jaxaccum.distributed.process_group import Processes

CUT_OFF = ".orbax-checkpoint-tmp"  # Part of the name of a folder that is being written or removed.
_NOTES = "notes.json"
_PENDING = 100  # Maximum number of errors to drain from a checkpointer on close.
_PARTS = ("arrays", "notes", "_CHECKPOINT_METADATA")  # The contents of a checkpoint folder.


class Checkpoint(NamedTuple):
    """The contents of a checkpoint.

    Attributes:
      path: its folder.
      arrays: NumPy arrays by their path in the run's state, such as ".params['w']".
      notes: everything that is not an array: counters, K, seed, metrics, and the states of callbacks and loaders.
    """

    path: Path
    arrays: dict[str, np.ndarray]
    notes: dict[str, Any]


@overload
def load(path: str | os.PathLike[str]) -> Checkpoint: ...


@overload
def load(path: str | os.PathLike[str], like: Tree) -> Tree: ...


def load(path: str | os.PathLike[str], like: Tree | None = None) -> Any:
    """Reads a checkpoint, or the parameters in it, into host memory. The devices that saved it need not be available.

    Example:
      >>> import tempfile, jax.numpy as jnp, numpy as np, optax, jaxaccum
      >>> task = jaxaccum.Task(lambda key, batch: {"w": jnp.ones(2)}, lambda p, x, key: p["w"] @ x[0], optax.sgd(1.0))
      >>> saved = jaxaccum.callbacks.ModelCheckpoint(tempfile.mkdtemp())
      >>> trainer = jaxaccum.Trainer(max_epochs=1, strategy="single", callbacks=saved, enable_progress_bar=False)
      >>> _ = trainer.fit(task, [np.full((1, 2), 3, np.float32)])
      >>> jaxaccum.checkpoint.load(saved.last_model_path).arrays[".params['w']"]
      array([-2., -2.], dtype=float32)
      >>> jaxaccum.checkpoint.load(saved.last_model_path, like={"w": jnp.ones(2)})
      {'w': array([-2., -2.], dtype=float32)}

    Args:
      path: its folder.
      like: parameters with the tree, shapes and dtypes of those in the checkpoint, as arrays or
        `jax.ShapeDtypeStruct`s; None reads the whole checkpoint.

    Returns:
      The `Checkpoint`. Arrays keep their saved dtypes. The pending arrays of a window that was open on P > 1 devices
      have a leading axis of size P. With `like`, the parameters, as NumPy arrays in that tree.

    Raises:
      ValueError: if the parameters are not like `like`; the message names the first array that differs.
      OSError: if there is no checkpoint at `path`, or it can't be read.
      ImportError: if orbax is missing.
    """
    orbax = _orbax()
    path = _paths.absolute(path)
    if not path.is_dir():
        raise FileNotFoundError(f"there is no checkpoint at {path}.")
    try:
        notes = _notes(path)
        leaves = notes["leaves"].items()
        wanted = {name: orbax.RestoreArgs(restore_type=np.ndarray) for name, (shape, _) in leaves if 0 not in shape}
        alone = {jax.process_index()}  # Each process reads on its own, without a barrier.
        restored = _checkpointer(orbax.Checkpointer, alone).restore(
            path, args=orbax.args.Composite(arrays=orbax.args.PyTreeRestore(restore_args=wanted))
        )["arrays"]
    except Exception as error:
        if held := [found.name for found, _ in _found([path])[0]]:
            raise OSError(f"{path} holds checkpoints, the newest {held[0]!r}: pass the path of one of them.") from error
        raise OSError(f"{path} can't be read as a checkpoint: {error}.") from error
    empty = {name: np.zeros(shape, dtype) for name, (shape, dtype) in leaves if 0 in shape}
    found = Checkpoint(path, {**restored, **empty}, notes)
    return found if like is None else _params(found, like)


def newest(
    folders: Sequence[Path], processes: Processes, wants: Callable[[Mapping[str, Any]], bool] = lambda notes: True
) -> Checkpoint | None:
    """Returns the newest checkpoint in the folders that all processes can read; None if there are none.

    `wants(notes)` says whether a checkpoint is looked for.

    Warns about each checkpoint that it skips because it can't be read.

    Raises:
      OSError: if there are checkpoints but none can be read; the message gives the reason for each.
    """
    return _first_readable(folders, processes, lambda found: [path for path, notes in found if wants(notes)])


def best(
    folder: Path, processes: Processes, ranked: Callable[[Mapping[str, Any]], Sequence[str] | None]
) -> Checkpoint | None:
    """Returns the best checkpoint in a folder that all processes can read; raises as `newest`.

    `ranked` returns the names that a checkpoint's notes rank, best first, or None. The newest ranking counts; without
    one the result is None.
    """

    def order(found: Sequence[tuple[Path, dict[str, Any]]]) -> list[Path]:
        paths = {path.name: path for path, _ in found}
        known = (names for _, notes in found if (names := ranked(notes)) is not None)
        return [paths[name] for name in next(known, []) if name in paths]

    return _first_readable([folder], processes, order)


def remove_cut_off(folders: Sequence[Path], processes: Processes) -> None:
    """Removes checkpoints whose writing was interrupted, with a warning for each."""
    for folder in () if processes.index else folders:
        for path in sorted(folder.glob(f"*{CUT_OFF}*")):
            warnings.warn(f"{path} was cut off while it was written: it is passed over and removed.", stacklevel=6)
            shutil.rmtree(path, ignore_errors=True)


def _first_readable(
    folders: Sequence[Path],
    processes: Processes,
    order: Callable[[Sequence[tuple[Path, dict[str, Any]]]], Sequence[Path]],
) -> Checkpoint | None:
    """Returns the first checkpoint in an order that all processes can read; raises as `newest`.

    `order` receives the checkpoints with readable notes as (path, notes), newest first.
    """
    names, broken = [], []
    if not processes.index:
        found, broken = _found(folders)
        names = [str(path) for path in order(found)]
    names, broken = processes.gather("the checkpoints", [names, broken])[0]
    result = None
    for name in names:
        failure = None
        try:
            result = load(name)
        except OSError as error:
            failure = str(error)
        failures = [text for text in processes.gather("a checkpoint", failure) if text is not None]
        if not failures:
            break
        result = None
        broken.append(failures[0])
    if result is None and broken:
        raise OSError(
            f"none of the {len(broken)} checkpoints in {', '.join(map(str, folders))} can be used: {' '.join(broken)} "
            "Mend or remove them; without any, ckpt_path='last' starts afresh."
        )
    for text in broken:
        warnings.warn(f"{text} It is passed over.", stacklevel=7)
    return result


def _params(checkpoint: Checkpoint, like: Tree) -> Tree:
    """Returns the parameters in the tree of `like`."""
    prefix = ".params"
    saved = {name.removeprefix(prefix): x for name, x in checkpoint.arrays.items() if name.startswith(prefix)}
    kinds = named_arrays.kinds(saved), named_arrays.kinds(named_arrays.arrays(like))
    named_arrays.check_same(*kinds, str(checkpoint.path), "Pass `like` with the parameters' tree, shapes and dtypes.")
    return named_arrays.unnamed(saved, like)


class Writer:
    """Writes checkpoints asynchronously, one at a time.

    With several processes each has a writer for the shards on its own devices, and all must make the same calls.

    Raises:
      ImportError: if orbax is missing.
    """

    def __init__(self):
        self._orbax = _orbax()
        self._checkpointer: Any = None  # Owns threads that must be shut down.

    def start(self, path: Path, arrays: Mapping[str, Any], notes: Mapping[str, Any]) -> None:
        """Starts writing a checkpoint to the new folder `path`. The arrays may be donated once this returns.

        The JSON-serialisable notes include "saved_at", an int that increases from checkpoint to checkpoint.
        """
        leaves = {name: (list(x.shape), x.dtype.name) for name, x in arrays.items()}
        full = {name: x for name, x in arrays.items() if x.size}  # Orbax rejects empty arrays.
        args = self._orbax.args
        path.parent.mkdir(parents=True, exist_ok=True)
        if self._checkpointer is None:
            self._checkpointer = _checkpointer(self._orbax.AsyncCheckpointer, set(range(jax.process_count())))
        try:
            self._checkpointer.save(
                path,
                args=args.Composite(arrays=args.PyTreeSave(full), notes=args.JsonSave({**notes, "leaves": leaves})),
            )
        except Exception:
            self.close()
            raise

    def wait(self) -> None:
        """Waits until the checkpoint is complete; re-raises errors from the write."""
        try:
            self._checkpointer.wait_until_finished()
        except Exception:
            self.close()
            raise

    def close(self) -> None:
        """Shuts down the writer's threads. Errors still pending are of checkpoints that have already failed."""
        checkpointer, self._checkpointer = self._checkpointer, None
        for _ in range(_PENDING if checkpointer is not None else 0):
            try:
                checkpointer.close()
                return
            except Exception:
                continue  # Orbax raises one error per call.


def remove(path: Path) -> None:
    """Removes a checkpoint or its remains. It is renamed first, so that it is never read half-removed."""
    doomed = path.with_name(path.name + CUT_OFF)
    if path.is_dir() and not doomed.exists():
        path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def annotate(path: Path, notes: Mapping[str, Any]) -> None:
    """Atomically replaces the notes of a complete checkpoint."""
    file = path / "notes" / _NOTES
    new = file.with_name(file.name + ".new")
    new.write_text(json.dumps({**notes, "leaves": _notes(path)["leaves"]}))
    os.replace(new, file)


def dates(folder: Path) -> list[int]:
    """Returns the `saved_at` values of the complete checkpoints in a folder."""
    return [notes["saved_at"] for _, notes in _found([folder])[0]]


def _found(folders: Sequence[Path]) -> tuple[list[tuple[Path, dict[str, Any]]], list[str]]:
    """Returns the checkpoints with their notes, newest first, and an error text for each with unreadable notes."""
    found, broken = [], []
    for path in (path for folder in folders if folder.is_dir() for path in folder.iterdir()):
        if CUT_OFF in path.name or not any((path / part).exists() for part in _PARTS):
            continue
        try:
            notes = _notes(path)
            found.append((notes["saved_at"], path, notes))
        except (OSError, ValueError, KeyError) as error:
            broken.append(f"{path} can't be read as a checkpoint: {error!r}.")
    found.sort(key=lambda entry: entry[0], reverse=True)
    return [(path, notes) for _, path, notes in found], broken


def _notes(path: Path) -> dict[str, Any]:
    return json.loads((path / "notes" / _NOTES).read_text())


def _orbax() -> Any:
    return _extras.require("orbax.checkpoint", "training", "a checkpoint")


def _checkpointer(kind: Any, processes: set[int]) -> Any:
    """Returns an orbax checkpointer of class `kind` for these processes; the lowest is the primary host.

    Without an explicit set of processes, orbax synchronises them with collectives on the devices.
    """
    orbax = _orbax()
    options = orbax.options.MultiprocessingOptions(primary_host=min(processes), active_processes=processes)
    handler = orbax.CompositeCheckpointHandler(
        composite_options=orbax.CompositeOptions(multiprocessing_options=options),
        arrays=orbax.PyTreeCheckpointHandler(multiprocessing_options=options),
        notes=orbax.JsonCheckpointHandler(filename=_NOTES, multiprocessing_options=options),
    )
    return kind(handler, multiprocessing_options=options)
