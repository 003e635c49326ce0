"""Checkpoints on disk, by orbax: written in the background, and there as a whole or not at all."""

import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxaccum import _extras, _paths
from jaxaccum.distributed.process_group import Processes

CUT_OFF = ".orbax-checkpoint-tmp"  # in the name of a folder that is being written, or removed
_NOTES = "notes.json"
_PENDING = 100  # errors of one checkpoint that are waited for
_PARTS = ("arrays", "notes", "_CHECKPOINT_METADATA")  # of a checkpoint's folder


class Checkpoint(NamedTuple):
    """What a checkpoint holds.

    Attributes:
      path: its folder.
      arrays: NumPy arrays by their path in the run's state, such as ".params['w']".
      notes: all that is not an array: counters, K, seed, metrics, the states of callbacks and of the loader.
    """

    path: Path
    arrays: dict[str, np.ndarray]
    notes: dict[str, Any]


def load(path: str | os.PathLike[str]) -> Checkpoint:
    """Reads a checkpoint into the host's memory, wherever it was written.

    Args:
      path: its folder.

    Returns:
      The `Checkpoint`. Its arrays have the dtypes that they were saved with; what an open window held on P devices has
      a leading axis of P.

    Raises:
      OSError: if there is none, or it can't be read.
      ImportError: if orbax is missing.

    Example:
      >>> import tempfile, jax.numpy as jnp, numpy as np, optax, jaxaccum
      >>> task = jaxaccum.Task(lambda key, batch: {"w": jnp.ones(2)}, lambda p, x, key: p["w"] @ x[0], optax.sgd(1.0))
      >>> saved = jaxaccum.callbacks.ModelCheckpoint(tempfile.mkdtemp())
      >>> trainer = jaxaccum.Trainer(max_epochs=1, strategy="single", callbacks=saved, enable_progress_bar=False)
      >>> _ = trainer.fit(task, [np.full((1, 2), 3, np.float32)])
      >>> jaxaccum.checkpoint.load(saved.last_model_path).arrays[".params['w']"]
      array([-2., -2.], dtype=float32)
    """
    orbax = _orbax()
    path = _paths.absolute(path)
    if not path.is_dir():
        raise FileNotFoundError(f"there is no checkpoint at {path}.")
    try:
        notes = _notes(path)
        wanted = {
            name: orbax.RestoreArgs(restore_type=np.ndarray)
            for name, (shape, _) in notes["leaves"].items()
            if 0 not in shape
        }
        alone = {jax.process_index()}  # Each process reads for itself, and waits for none.
        restored = _checkpointer(orbax.Checkpointer, alone).restore(
            path, args=orbax.args.Composite(arrays=orbax.args.PyTreeRestore(restore_args=wanted))
        )["arrays"]
    except Exception as error:
        raise OSError(f"{path} can't be read as a checkpoint: {error}.") from error
    empty = {name: np.zeros(shape, dtype) for name, (shape, dtype) in notes["leaves"].items() if 0 in shape}
    return Checkpoint(path, {**restored, **empty}, notes)


def newest(folders: Sequence[Path], processes: Processes) -> Checkpoint | None:
    """The newest checkpoint in the folders that all processes can read; None where there is none.

    Warns of each that is passed over because it can't be read.

    Raises:
      OSError: if there are checkpoints, but none can be read; it names each, and says why.
    """
    return _first_readable(folders, processes, lambda found: [path for path, _ in found])


def best(
    folder: Path, processes: Processes, ranked: Callable[[Mapping[str, Any]], Sequence[str] | None]
) -> Checkpoint | None:
    """The best checkpoint in a folder by what the newest one says; None where it says nothing.

    Args:
      folder: where to look.
      processes: all of which must be able to read it.
      ranked: of a checkpoint's notes, the names of those that it knows, the best first; None where it knows of none.

    Raises:
      OSError: as `newest`.
    """

    def order(found: Sequence[tuple[Path, dict[str, Any]]]) -> list[Path]:
        paths = {path.name: path for path, _ in found}
        known = (names for _, notes in found if (names := ranked(notes)) is not None)
        return [paths[name] for name in next(known, []) if name in paths]

    return _first_readable([folder], processes, order)


def remove_cut_off(folders: Sequence[Path], processes: Processes) -> None:
    """Removes the checkpoints in the folders whose writing was cut off, with a warning for each."""
    for folder in () if processes.index else folders:
        for path in sorted(folder.glob(f"*{CUT_OFF}*")):
            warnings.warn(f"{path} was cut off while it was written: it is passed over and removed.", stacklevel=6)
            shutil.rmtree(path, ignore_errors=True)


def _first_readable(
    folders: Sequence[Path],
    processes: Processes,
    order: Callable[[Sequence[tuple[Path, dict[str, Any]]]], Sequence[Path]],
) -> Checkpoint | None:
    """The first checkpoint in an order that all processes can read.

    Args:
      folders: where to look.
      processes: all of them.
      order: of those whose notes can be read, each with its notes, the newest first.

    Raises:
      OSError: if there are checkpoints, but none can be read.
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
        warnings.warn(f"{text} It is passed over.", stacklevel=6)
    return result


class Writer:
    """Writes one checkpoint after another, each in the background.

    With several processes each has one, and all call it alike: each writes what lies on its own devices.

    Raises:
      ImportError: if orbax is missing.
    """

    def __init__(self):
        self._orbax = _orbax()
        self._checkpointer: Any = None  # It has threads of its own, which must be ended.

    def start(self, path: Path, arrays: Mapping[str, Any], notes: Mapping[str, Any]) -> None:
        """Begins a checkpoint; the arrays are the caller's again when this returns.

        Args:
          path: a folder that does not exist; it will, once everything is in it.
          arrays: by name.
          notes: what JSON can hold; "saved_at" among it, an int that is larger for a later one.

        Raises:
          OSError, or what else orbax meets.
        """
        leaves = {name: (list(x.shape), x.dtype.name) for name, x in arrays.items()}
        # Orbax refuses arrays without elements.
        full = {name: x for name, x in arrays.items() if x.size}
        args = self._orbax.args
        path.parent.mkdir(parents=True, exist_ok=True)
        if self._checkpointer is None:
            self._checkpointer = _checkpointer(self._orbax.AsyncCheckpointer, set(range(jax.process_count())))
        try:
            self._checkpointer.save(
                path,
                args=args.Composite(
                    arrays=args.PyTreeSave(full),
                    notes=args.JsonSave({**notes, "leaves": leaves}),
                ),
            )
        except Exception:
            self.close()
            raise

    def wait(self) -> None:
        """Returns when the checkpoint is complete; raises what its writing met."""
        try:
            self._checkpointer.wait_until_finished()
        except Exception:
            self.close()
            raise

    def close(self) -> None:
        """Ends the writer's threads. The errors that they still hold are of checkpoints that have failed already."""
        checkpointer, self._checkpointer = self._checkpointer, None
        for _ in range(_PENDING if checkpointer is not None else 0):
            try:
                checkpointer.close()
                return
            except Exception:
                continue  # Orbax raises one error at a time.


def remove(path: Path) -> None:
    """Removes a checkpoint, or what is left of one; it is none any more from the first moment."""
    doomed = path.with_name(path.name + CUT_OFF)
    if path.is_dir() and not doomed.exists():
        path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def annotate(path: Path, notes: Mapping[str, Any]) -> None:
    """Writes the notes of a complete checkpoint anew; it has the former ones until it has these.

    Raises:
      OSError: if they can't be written.
    """
    file = path / "notes" / _NOTES
    new = file.with_name(file.name + ".new")
    new.write_text(json.dumps({**notes, "leaves": _notes(path)["leaves"]}))
    os.replace(new, file)


def dates(folder: Path) -> list[int]:
    """When the complete checkpoints in a folder were saved."""
    return [notes["saved_at"] for _, notes in _found([folder])[0]]


def _found(folders: Sequence[Path]) -> tuple[list[tuple[Path, dict[str, Any]]], list[str]]:
    """The checkpoints in the folders with their notes, the newest first; and what is wrong with those without notes."""
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
    """An orbax checkpointer of `kind` for these processes, the first of which does what is to be done once.

    Where orbax is not told which processes there are, they wait for each other by collectives on the devices.
    """
    orbax = _orbax()
    options = orbax.options.MultiprocessingOptions(primary_host=min(processes), active_processes=processes)
    handler = orbax.CompositeCheckpointHandler(
        composite_options=orbax.CompositeOptions(multiprocessing_options=options),
        arrays=orbax.PyTreeCheckpointHandler(multiprocessing_options=options),
        notes=orbax.JsonCheckpointHandler(filename=_NOTES, multiprocessing_options=options),
    )
    return kind(handler, multiprocessing_options=options)
