"""Checkpoints on disk, by orbax: written in the background, and there as a whole or not at all."""

import json
import os
import shutil
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxaccum import _extras
from jaxaccum._processes import Processes

CUT_OFF = ".orbax-checkpoint-tmp"  # in the name of a folder that is being written, or removed
_NOTES = "notes.json"


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
    path = Path(path).absolute()
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

    Warns of each that is passed over, because its writing was cut off or because it can't be read. What was cut off is
    removed.
    """
    names: list[str] = []
    if not processes.index:
        for path in sorted(path for folder in folders for path in folder.glob(f"*{CUT_OFF}*")):
            warnings.warn(f"{path} was cut off while it was written: it is passed over and removed.", stacklevel=5)
            shutil.rmtree(path, ignore_errors=True)
        dated = {path: date for folder in folders for path, date in _dated(folder).items()}
        names = [str(path) for path in sorted(dated, key=dated.__getitem__, reverse=True)]
    for name in processes.gather("the checkpoints", names)[0]:
        found, failure = None, None
        try:
            found = load(name)
        except OSError as error:
            failure = str(error)
        failures = [text for text in processes.gather("a checkpoint", failure) if text is not None]
        if not failures:
            return found
        warnings.warn(f"{failures[0]} It is passed over for the one before.", stacklevel=5)
    return None


class Writer:
    """Writes one checkpoint after another, each in the background.

    With several processes each has one, and all call it alike: each writes what lies on its own devices.

    Raises:
      ImportError: if orbax is missing.
    """

    def __init__(self):
        self._orbax = _orbax()
        everyone = set(range(jax.process_count()))
        self._checkpointer = _checkpointer(self._orbax.AsyncCheckpointer, everyone)

    def start(self, path: Path, arrays: Mapping[str, Any], notes: Mapping[str, Any]) -> None:
        """Begins a checkpoint; the arrays are the caller's again when this returns.

        Args:
          path: a folder that does not exist; it will, once everything is in it.
          arrays: by name.
          notes: what JSON can hold.

        Raises:
          OSError, or what else orbax meets.
        """
        leaves = {name: (list(x.shape), x.dtype.name) for name, x in arrays.items()}
        # Orbax refuses arrays without elements.
        full = {name: x for name, x in arrays.items() if x.size}
        args = self._orbax.args
        path.parent.mkdir(parents=True, exist_ok=True)
        self._checkpointer.save(
            path,
            args=args.Composite(
                arrays=args.PyTreeSave(full),
                notes=args.JsonSave({**notes, "leaves": leaves, "saved_at": time.time_ns()}),
            ),
        )

    def wait(self) -> None:
        """Returns when the checkpoint is complete; raises what its writing met."""
        self._checkpointer.wait_until_finished()

    def close(self) -> None:
        """Ends the writer's threads."""
        self._checkpointer.close()


def remove(path: Path) -> None:
    """Removes a checkpoint, or what is left of one; it is none any more from the first moment."""
    doomed = path.with_name(path.name + CUT_OFF)
    if path.is_dir() and not doomed.exists():
        path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _dated(folder: Path) -> dict[Path, int]:
    """The complete checkpoints in a folder, and when each was saved."""
    found = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        if CUT_OFF not in path.name and (path / "notes" / _NOTES).is_file():
            try:
                found[path] = _notes(path)["saved_at"]
            except (OSError, ValueError, KeyError):
                found[path] = 0  # `newest` says so if it comes to that.
    return found


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
