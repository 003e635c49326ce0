"""Where a `Trainer` writes its scalars.

A logger is any object with `write_scalars(step, dict)`. It may have `flush()`, which is called where a run ends, and
`begin(place)`, which is called before training. `place` is None where a run starts; where it goes on from a checkpoint
it is a dict of the checkpoint's "step" (optimizer steps), "micro_step", and "records": how many were made after that
micro-step and before the checkpoint. A logger that raises an exception costs the run nothing but a warning.
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

    def begin(self, place: Place | None) -> None:
        """Makes the file ready for a run.

        Args:
          place: None: a file that is there is renamed, `metrics.jsonl` to `metrics-1.jsonl` or the next free number. A
            dict: the lines up to that "step" and "micro_step" stay, and later ones are dropped.
        """
        if place is None:
            _set_aside(self._path)
        elif self._path.exists():
            _replace(self._path, lambda file: file.writelines(_before(self._records(), place)))

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Appends a line."""
        _append(self._path, json.dumps({"step": step, **scalars}) + "\n")

    def _records(self) -> Iterator[tuple[bytes, dict[str, Any]]]:
        """The file's lines, and what they say."""
        with self._path.open("rb") as file:
            for line in file:
                try:
                    record = json.loads(line)
                except ValueError:  # It was cut off in mid-write.
                    continue
                if isinstance(record, dict):
                    yield line.rstrip(b"\n") + b"\n", record


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
        self._columns, _ = self._table()

    def begin(self, place: Place | None) -> None:
        """As `JSONLLogger.begin`, with rows in the place of lines."""
        if place is None:
            _set_aside(self._path)
            self._columns = []
        elif self._path.exists():
            columns, rows = self._table()
            if not _ends_line(self._path):
                rows = rows[:-1]  # It was cut off in mid-write, perhaps in the middle of a number.
            is_whole = lambda row: None not in row and None not in row.values()
            self._write(columns, _before(((row, _record(row)) for row in rows if is_whole(row)), place))

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Appends a row; writes the file anew where a name is new."""
        row = {"step": step, **scalars}
        new = [name for name in row if name not in self._columns]
        if new:
            _, rows = self._table()
            self._write([*self._columns, *new], rows)
        line = io.StringIO()
        csv.DictWriter(line, self._columns, lineterminator="\n").writerow(row)
        _append(self._path, line.getvalue())

    def _table(self) -> tuple[list[str], list[dict[str, Any]]]:
        """The columns and the rows that the file has."""
        if not self._path.exists():
            return [], []
        with self._path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            return list(reader.fieldnames or ()), list(reader)

    def _write(self, columns: list[str], rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes the file anew."""
        table = io.StringIO()
        writer = csv.DictWriter(table, columns, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        _replace(self._path, lambda file: file.write(table.getvalue().encode()))
        self._columns = columns  # Only now that the file has them.


class TensorBoardLogger:
    """TensorBoard's event files, by tensorboardX: `pip install "jaxaccum[logs]"`.

    Args:
      directory: where they go.

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
        """Begins a further file; for a run that goes on, one that has TensorBoard hide what came after `place`."""
        self.flush()
        self._purge_step = None if place is None else place["step"] + 1

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Adds a point to each curve, and writes it to disk."""
        summary = _extras.require("tensorboardX.summary", "logs", "TensorBoardLogger")
        if self._file is None:
            self._file = self._opened()
        file = self._file
        for name, value in scalars.items():
            file.write_event(_event(step=step, summary=summary.scalar(name, value)))
        file.flush()

    def flush(self) -> None:
        """Closes the file; what comes later goes to a further one."""
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _opened(self) -> Any:
        # Not a SummaryWriter, which hands its events to a thread: once a write fails, that thread is gone, and the
        # calls after it wait for ever. Nor does it keep two files of the same second apart.
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
    """Renames a file that has something in it."""
    if path.exists() and path.stat().st_size:
        names = (path.with_name(f"{path.stem}-{n}{path.suffix}") for n in itertools.count(1))
        path.rename(next(name for name in names if not name.exists()))


def _replace(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Writes a file anew: first into another one, so that a process which ends in mid-write loses nothing."""
    temporary = path.with_name(path.name + ".new")
    with temporary.open("wb") as file:
        write(file)
    temporary.replace(path)


def _append(path: Path, line: str) -> None:
    """Appends a line, below one that was cut off in mid-write."""
    start = "" if _ends_line(path) else "\n"
    with path.open("ab") as file:
        file.write((start + line).encode())


def _ends_line(path: Path) -> bool:
    """Whether a file is empty, missing, or ends with a whole line."""
    if not path.exists() or not path.stat().st_size:
        return True
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def _record(row: Mapping[str, str]) -> dict[str, Any]:
    """What the row has a value for; its counters as numbers, infinite where they can't be read."""
    record: dict[str, Any] = {name: value for name, value in row.items() if value}
    for name in ("step", "micro_step"):
        if name in record:
            try:
                record[name] = float(record[name])
            except ValueError:
                record[name] = math.inf
    return record


def _before(records: Iterable[tuple[Any, Mapping[str, Any]]], place: Place) -> Iterator[Any]:
    """Of pairs of a thing and its record, the things that a run which goes on from `place` will not make again."""
    left = place.get("records", math.inf)
    for thing, record in records:
        if any(record.get(name, 0) > place[name] for name in ("step", "micro_step")):
            continue
        if record.get("micro_step") == place["micro_step"]:
            left -= 1
            if left < 0:
                continue
        yield thing
