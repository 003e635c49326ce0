"""Loggers for the scalars of a `Trainer`.

A logger is any object with `write_scalars(step, dict)`. It may also define `flush()`, which is called when `fit` or
`test` ends, and `begin(place)`, which is called before training, but not before a test. `place` is None for a fresh
run. For a resumed run it is a dict with the checkpoint's "step" (optimizer steps), "micro_step" and "records": the
number of records made between that micro-step and the checkpoint. An exception in a logger only causes a warning.
"""

import csv
import io
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from jaxaccum import _extras, _paths

Place = Mapping[str, int]

_event_files = itertools.count()


class JSONLLogger:
    r"""Appends one JSON object per line to a file: `{"step": 8, "train_loss": 0.5, ...}`.

    Example:
      >>> import tempfile, pathlib
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "metrics.jsonl"
      >>> JSONLLogger(path).write_scalars(8, {"train_loss": 0.5})
      >>> path.read_text()
      '{"step": 8, "train_loss": 0.5}\n'

    Args:
      path: the file; its parent folder is created.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self._path = _made(path)

    def begin(self, place: Place | None) -> None:
        """Prepares the file for a run.

        Args:
          place: None renames an existing file, `metrics.jsonl` to `metrics-1.jsonl` or the next free number. A dict
            keeps the lines up to its "step" and "micro_step" and drops later ones.
        """
        if place is None:
            _set_aside(self._path)
        elif self._path.exists():
            _replace(self._path, lambda file: file.writelines(_before(self._records(), place)))

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Appends a line."""
        _append(self._path, json.dumps({"step": step, **scalars}) + "\n")

    def _records(self) -> Iterator[tuple[bytes, dict[str, Any]]]:
        """Yields each line of the file with its parsed record."""
        with self._path.open("rb") as file:
            for line in file:
                try:
                    record = json.loads(line)
                except ValueError:  # A truncated line.
                    continue
                if isinstance(record, dict):
                    yield line.rstrip(b"\n") + b"\n", record


class CSVLogger:
    """Writes a CSV table with a row per call and a column per name. Missing values are left empty.

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

    Args:
      path: the file; its parent folder is created. Rows are appended to an existing file.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self._path = _made(path)
        self._columns, _ = self._table()

    def begin(self, place: Place | None) -> None:
        """Same as `JSONLLogger.begin`, for rows instead of lines."""
        if place is None:
            _set_aside(self._path)
            self._columns = []
        elif self._path.exists():
            columns, rows = self._table()
            if not _ends_line(self._path):
                rows = rows[:-1]  # The last row is truncated, perhaps in the middle of a number.
            is_whole = lambda row: None not in row and None not in row.values()
            self._write(columns, _before(((row, _record(row)) for row in rows if is_whole(row)), place))

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Appends a row. A new name adds a column, for which the file is rewritten."""
        row = {"step": step, **scalars}
        new = [name for name in row if name not in self._columns]
        if new:
            _, rows = self._table()
            self._write([*self._columns, *new], rows)
        line = io.StringIO()
        csv.DictWriter(line, self._columns, lineterminator="\n").writerow(row)
        _append(self._path, line.getvalue())

    def _table(self) -> tuple[list[str], list[dict[str, Any]]]:
        if not self._path.exists():
            return [], []
        with self._path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            return list(reader.fieldnames or ()), list(reader)

    def _write(self, columns: list[str], rows: Iterable[Mapping[str, Any]]) -> None:
        """Rewrites the file."""
        table = io.StringIO()
        writer = csv.DictWriter(table, columns, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        _replace(self._path, lambda file: file.write(table.getvalue().encode()))
        self._columns = columns  # Set only after the write has succeeded.


class TensorBoardLogger:
    """Writes TensorBoard event files with tensorboardX: `pip install "jaxaccum[logs]"`.

    Args:
      directory: the folder for the event files.

    Raises:
      ImportError: if tensorboardX is missing.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        _extras.require("tensorboardX", "logs", "TensorBoardLogger")
        name = os.fspath(directory)
        self._directory = name if "://" in name else str(_paths.absolute(name))
        self._purge_step: int | None = None
        self._file: Any = None

    def begin(self, place: Place | None) -> None:
        """Starts a new event file. On resume, it tells TensorBoard to hide the steps after `place`."""
        self.flush()
        self._purge_step = None if place is None else place["step"] + 1

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Adds a point to each curve and flushes it to disk."""
        summary = _extras.require("tensorboardX.summary", "logs", "TensorBoardLogger")
        if self._file is None:
            self._file = self._opened()
        file = self._file
        for name, value in scalars.items():
            file.write_event(_event(step=step, summary=summary.scalar(name, value)))
        file.flush()

    def flush(self) -> None:
        """Closes the file; later scalars go to a new one."""
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _opened(self) -> Any:
        # SummaryWriter is not used: it writes from a thread that dies when a write fails, after which calls block
        # forever. It also gives two files created in the same second the same name.
        files = _extras.require("tensorboardX.event_file_writer", "logs", "TensorBoardLogger")
        files.directory_check(self._directory)
        suffix = f".{os.getpid()}.{next(_event_files)}"
        file = files.EventsWriter(os.path.join(self._directory, "events"), suffix)
        if self._purge_step is not None:
            start = files.event_pb2.SessionLog(status=files.event_pb2.SessionLog.START)
            file.write_event(_event(step=self._purge_step, session_log=start))
            self._purge_step = None
        return file


def _event(**content: Any) -> Any:
    events = _extras.require("tensorboardX.proto.event_pb2", "logs", "TensorBoardLogger")
    return events.Event(wall_time=time.time(), **content)


def _made(path: str | os.PathLike[str]) -> Path:
    path = _paths.absolute(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _set_aside(path: Path) -> None:
    """Renames a non-empty file."""
    if path.exists() and path.stat().st_size:
        names = (path.with_name(f"{path.stem}-{n}{path.suffix}") for n in itertools.count(1))
        path.rename(next(name for name in names if not name.exists()))


def _replace(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Rewrites a file via a temporary one, so that an interrupted write loses nothing."""
    temporary = path.with_name(path.name + ".new")
    with temporary.open("wb") as file:
        write(file)
    temporary.replace(path)


def _append(path: Path, line: str) -> None:
    """Appends a line, starting a new one if the last line was truncated."""
    start = "" if _ends_line(path) else "\n"
    with path.open("ab") as file:
        file.write((start + line).encode())


def _ends_line(path: Path) -> bool:
    """Whether a file is missing, empty or ends with a newline."""
    if not path.exists() or not path.stat().st_size:
        return True
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def _record(row: Mapping[str, str]) -> dict[str, Any]:
    """Returns the non-empty values of a row, with its counters as floats; unreadable counters are infinite."""
    record: dict[str, Any] = {name: value for name, value in row.items() if value}
    for name in ("step", "micro_step"):
        if name in record:
            try:
                record[name] = float(record[name])
            except ValueError:
                record[name] = math.inf
    return record


def _before(records: Iterable[tuple[Any, Mapping[str, Any]]], place: Place) -> Iterator[Any]:
    """Yields the items whose records a run resumed at `place` will not make again; takes (item, record) pairs."""
    left = place.get("records", math.inf)
    for thing, record in records:
        if any(record.get(name, 0) > place[name] for name in ("step", "micro_step")):
            continue
        if record.get("micro_step") == place["micro_step"]:
            left -= 1
            if left < 0:
                continue
        yield thing
