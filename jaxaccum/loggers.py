"""Where a `Trainer` writes its scalars. A logger is any object with `write_scalars(step, dict)`."""

import csv
import json
import os
from collections.abc import Mapping
from pathlib import Path

from jaxaccum import _extras


class JSONLLogger:
    r"""One JSON object a line, appended to a file: `{"step": 8, "train_loss": 0.5, ...}`.

    Args:
      path: the file; its folder is made.

    Example:
      >>> import tempfile, pathlib
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "metrics.jsonl"
      >>> JSONLLogger(path).write_scalars(8, {"train_loss": 0.5})
      >>> path.read_text()
      '{"step": 8, "train_loss": 0.5}\n'
    """

    def __init__(self, path: str | os.PathLike[str]):
        self._path = _made(path)

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Appends a line."""
        with self._path.open("a") as file:
            file.write(json.dumps({"step": step, **scalars}) + "\n")


class CSVLogger:
    """A table: a row for each call, a column for each name, empty where a call has none.

    Args:
      path: the file; its folder is made, and rows are appended to what is there.

    Example:
      >>> import tempfile, pathlib
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "metrics.csv"
      >>> logger = CSVLogger(path)
      >>> logger.write_scalars(8, {"train_loss": 0.5})
      >>> logger.write_scalars(8, {"val_loss": 0.75})
      >>> print(path.read_text(), end="")
      step,train_loss,val_loss
      8,0.5,
      8,,0.75
    """

    def __init__(self, path: str | os.PathLike[str]):
        self._path = _made(path)
        self._columns: list[str] = []
        if self._path.exists():
            with self._path.open(newline="") as file:
                self._columns = next(csv.reader(file), [])

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Appends a row; writes the file anew where a name is new."""
        row = {"step": step, **scalars}
        new = [name for name in row if name not in self._columns]
        if new:
            self._widen(new)
        with self._path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns, lineterminator="\n").writerow(row)

    def _widen(self, new: list[str]) -> None:
        rows = []
        if self._path.exists():
            with self._path.open(newline="") as file:
                rows = list(csv.DictReader(file))
        self._columns += new
        # Into another file first: one that is cut off in mid-write takes no rows with it.
        temporary = self._path.with_name(self._path.name + ".new")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        temporary.replace(self._path)


class TensorBoardLogger:
    """TensorBoard's event files, by tensorboardX: `pip install "jaxaccum[logs]"`.

    Args:
      directory: where they go.

    Raises:
      ImportError: if tensorboardX is missing.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        tensorboard = _extras.require("tensorboardX", "logs", "TensorBoardLogger")
        self._writer = tensorboard.SummaryWriter(os.fspath(directory))

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Adds a point to each curve."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """Writes everything to disk; what comes later goes to a further file."""
        self._writer.close()  # Its own flush passes over what its thread has not taken up yet.


def _made(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
