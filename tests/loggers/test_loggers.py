"""The built-in loggers: when they write, and what happens when one fails."""

import csv
import json
import os
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training import Logged, Recorder, ones, single, slope

import jaxaccum
from jaxaccum import loggers
from jaxaccum.callbacks import Callback, ModelCheckpoint
from jaxaccum.loggers import CSVLogger, JSONLLogger, TensorBoardLogger
from jaxaccum.loggers.records import Records
from jaxaccum.trainer.programs.compiled import WindowLogs


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


class Keeps:
    """A logger."""

    def __init__(self):
        self.steps, self.places, self.flushes = [], [], 0

    def begin(self, place):
        self.places.append(place)

    def write_scalars(self, step, scalars):
        self.steps.append(step)

    def flush(self):
        self.flushes += 1


def failing(method, error):
    """A logger whose method raises."""

    def fail(self, *args):
        raise error

    return type("Fails", (Keeps,), {method: fail})()


def test_a_run_writes_a_json_line_for_each_record(tmp_path):
    """Catches a last record that is never written."""
    t = single(logger=True, default_root_dir=tmp_path / "new", log_every_n_steps=2, accumulate_grad_batches=2)
    t.fit(slope(), ones(*[2] * 9), ones(2))
    lines = lines_of(tmp_path / "new/metrics.jsonl")
    assert [(line["step"], line["micro_step"]) for line in lines] == [(1, 2), (2, 4), (4, 8), (5, 9), (5, 9)]
    assert ["val_loss" in line for line in lines] == [False, False, False, False, True]
    assert lines[1]["train_loss"] == -1


@pytest.mark.parametrize("method", ["write_scalars", "flush"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyError("mine")])
def test_a_logger_that_fails_costs_the_run_nothing(method, error):
    """Catches a logger that ends the run, or takes the records of others with it, and a warning a record."""
    before, after = Keeps(), Keeps()
    t = single(logger=[before, failing(method, error), after], log_every_n_steps=1, max_epochs=2)
    with pytest.warns(UserWarning, match=f"Fails failed in {method}: {type(error).__name__}") as caught:
        t.fit(slope(), ones(2, 2, 2))
    assert len(caught) == 1 and t.current_epoch == 2
    assert before.steps == after.steps == [1, 2, 3, 4, 5, 6] and before.flushes == after.flushes == 1
    assert [record["step"] for record in t._running.metrics.records.history] == before.steps


def test_each_kind_of_failure_is_told_once():
    """Catches a second error that is hidden by the first."""

    class Fails:
        def write_scalars(self, step, scalars):
            raise [OSError, ValueError][step % 2](step)

    records = Records([Fails(), Fails()])
    with pytest.warns(UserWarning) as caught:
        for step in range(6):
            records.add(step, {"a": 1.0})
        records.flush()
    assert len(caught) == 4


def test_a_logger_begins_where_the_run_does():
    """Catches a logger that must have begin, and one whose begin takes the others' away."""
    keeps, old = Keeps(), type("Old", (), {"write_scalars": lambda self, step, scalars: None})()
    records = Records([old, failing("begin", OSError("gone")), keeps])
    with pytest.warns(UserWarning, match=r"Fails failed in begin: OSError"):
        for place in (None, {"step": 2, "micro_step": 4}):
            records.begin(place)
    assert keeps.places == [None, {"step": 2, "micro_step": 4}]


def test_an_interrupt_in_a_logger_is_one():
    """Catches a KeyboardInterrupt that is taken for a logger's failure."""
    with pytest.raises(KeyboardInterrupt):
        single(logger=failing("write_scalars", KeyboardInterrupt())).fit(slope(), ones(2))


def test_a_logger_that_changes_its_dict_changes_no_others():
    """Catches one dict for all loggers and the history."""

    class Pops(Keeps):
        def write_scalars(self, step, scalars):
            scalars.popitem()
            scalars["train_loss"] = "mine"

    seen = type("Sees", (), {"write_scalars": lambda self, step, scalars: got.append(scalars)})()
    got = []
    t = single(logger=[Pops(), seen])
    t.fit(slope(), ones(2))
    assert got[0]["train_loss"] == t._running.metrics.records.history[0]["train_loss"] == 0


@pytest.mark.parametrize(("logger", "name"), [(JSONLLogger, "metrics.jsonl"), (CSVLogger, "metrics.csv")])
def test_a_fresh_run_sets_the_former_ones_file_aside(logger, name, tmp_path):
    """Catches runs mixed in one file, one that is overwritten, and columns of the former run."""
    path = tmp_path / name
    logger(path).begin(None)
    path.touch()
    logger(path).begin(None)
    for i in range(3):
        log = logger(path)
        log.begin(None)
        log.write_scalars(i, {f"a{i}": 1.5})
    again = logger(path)
    again.write_scalars(3, {"a2": 1.5})
    again.begin(None)
    again.write_scalars(4, {"b": 1.5})
    numbered = [path, *(path.with_stem(f"metrics-{i}") for i in (1, 2, 3))]
    assert sorted(tmp_path.iterdir()) == sorted(numbered)
    texts = [file.read_text() for file in numbered]
    assert "a" not in texts[0].replace("step", "") and all(f"a{i}" in texts[i + 1] for i in range(3))


RECORDS = [
    {"step": 1, "micro_step": 2, "train_loss": 0.5},
    {"step": 2, "micro_step": 4, "train_loss": 0.25},
    {"step": 2, "mine": 1.0},
    {"step": 2, "micro_step": 4, "val_loss": 0.75},
    {"step": 2, "micro_step": 5, "val_loss": 0.75},
    {"step": 3, "micro_step": 4, "train_loss": 0.125},
    {"step": 3, "mine": 1.0},
    {"step": 3, "micro_step": 6, "train_loss": 0.125},
]


def written(logger, path):
    """What a file holds that got RECORDS and lost the end of its last line."""
    log = logger(path)
    for record in RECORDS:
        log.write_scalars(record["step"], {name: value for name, value in record.items() if name != "step"})
    path.write_bytes(path.read_bytes()[:-3])
    return logger(path)


def records_of(path):
    """Its records, with numbers."""
    if path.suffix == ".jsonl":
        return lines_of(path)
    rows = csv.DictReader(path.read_text().splitlines())
    return [{name: float(value) for name, value in row.items() if value} for row in rows]


@pytest.mark.parametrize(("logger", "name"), [(JSONLLogger, "m.jsonl"), (CSVLogger, "m.csv")])
@pytest.mark.parametrize(
    ("place", "kept"),
    [
        ({"step": 2, "micro_step": 4}, RECORDS[:4]),
        ({"step": 2, "micro_step": 4, "records": 2}, RECORDS[:4]),
        ({"step": 2, "micro_step": 4, "records": 1}, RECORDS[:3]),
        ({"step": 0, "micro_step": 1}, []),
        ({"step": 9, "micro_step": 9}, RECORDS[:7]),
    ],
)
def test_a_resume_drops_what_came_after_its_checkpoint(logger, name, place, kept, tmp_path):
    """Catches a step that is there twice, a half line that stays, and earlier records that are lost."""
    log = written(logger, tmp_path / name)
    log.begin(place)
    assert records_of(tmp_path / name) == kept
    log.write_scalars(3, {"micro_step": 6, "new": 2.0})
    assert records_of(tmp_path / name) == [*kept, {"step": 3, "micro_step": 6, "new": 2.0}]
    assert [file.name for file in tmp_path.iterdir()] == [name]
    logger(tmp_path / f"other-{name}").begin(place)  # A resume with a logger that the run did not have.
    assert not (tmp_path / f"other-{name}").exists()


@pytest.mark.parametrize(("logger", "name"), [(JSONLLogger, "m.jsonl"), (CSVLogger, "m.csv")])
def test_a_resume_drops_lines_that_are_none(logger, name, tmp_path):
    """Catches a line in the middle that was cut off, in words or in numbers, or that a crash filled with zeros."""
    path = tmp_path / name
    log = written(logger, path)
    first, *lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([first, lines[0][:-2] + "\n", "\0\0\0\n", "12\n", *lines]))
    log.begin({"step": 2, "micro_step": 4})
    assert [record for record in records_of(path) if record not in RECORDS[:4]] == []


def test_a_number_that_was_cut_off_is_dropped(tmp_path):
    """Catches a row with all of its columns, whose last number is another one."""
    path = tmp_path / "m.csv"
    log = CSVLogger(path)
    log.write_scalars(8, {"train_loss": 0.5})
    log.write_scalars(9, {"train_loss": 0.25})
    path.write_text(path.read_text().removesuffix("5\n"))
    CSVLogger(path).begin({"step": 9, "micro_step": 9})
    assert records_of(path) == [{"step": 8, "train_loss": 0.5}]


@pytest.mark.parametrize(("logger", "name"), [(JSONLLogger, "m.jsonl"), (CSVLogger, "m.csv")])
def test_a_line_that_was_cut_off_gets_none_glued_to_it(logger, name, tmp_path):
    """Catches a record that is lost because another one was, in a file that is taken up or by one logger."""
    log = written(logger, tmp_path / name)
    for i in (1, 2):
        log.write_scalars(8, {"micro_step": i})
        log.write_scalars(9, {"micro_step": i})
        text = (tmp_path / name).read_text()
        assert text.endswith(f'{{"step": 9, "micro_step": {i}}}\n' if name == "m.jsonl" else f"9,{i},,,\n")
        (tmp_path / name).write_text(text[:-2])
    assert sum(line.startswith(("8", '{"step": 8')) for line in text.splitlines()) == 2


@pytest.mark.parametrize("logger", [JSONLLogger, CSVLogger, TensorBoardLogger])
def test_a_file_stays_where_it_was_meant_to_be(logger, tmp_path, monkeypatch):
    """Catches a path that moves with the working directory, and a folder named ~."""
    if logger is TensorBoardLogger:
        pytest.importorskip("tensorboardX")
    for folder in ("home", "here", "there"):
        (tmp_path / folder).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    loggers = [logger(Path("~/log")), logger("log")]
    os.chdir(tmp_path / "there")
    for log in loggers:
        log.write_scalars(1, {"a": 1.0})
        getattr(log, "flush", lambda: None)()
    assert [len(list((tmp_path / folder).iterdir())) for folder in ("home", "here", "there")] == [1, 1, 0]


def test_a_table_gets_a_column_for_every_name(tmp_path):
    """Catches values under the wrong heading, and rows lost when a column is added or a file is taken up again."""
    path = tmp_path / "a" / "metrics.csv"
    CSVLogger(path).write_scalars(1, {"a": 1.5})
    logger = CSVLogger(path)
    logger.write_scalars(2, {"b": 2.5, "a": 3.0})
    logger.write_scalars(3, {"b": 4.0})
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert [tuple(row.items()) for row in rows] == [
        (("step", "1"), ("a", "1.5"), ("b", "")),
        (("step", "2"), ("a", "3.0"), ("b", "2.5")),
        (("step", "3"), ("a", ""), ("b", "4.0")),
    ]
    assert [file.name for file in path.parent.iterdir()] == ["metrics.csv"]


def events_of(folder):
    """(step, what it is) of all events in the files of a folder, in the order of the files."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    found = []
    for file in sorted(folder.iterdir(), key=lambda file: int(file.name.rpartition(".")[2])):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            if event.HasField("session_log"):
                found.append((event.step, "start"))
            found += [(event.step, value.tag) for value in event.summary.value]
    return found


def test_tensorboard_gets_a_point_for_every_value(tmp_path):
    """Catches a writer that is not flushed at the run's end, and runs in one second that overwrite each other."""
    pytest.importorskip("tensorboardX")
    logger = TensorBoardLogger(tmp_path / "tb")
    assert not (tmp_path / "tb").exists()
    t = single(logger=[logger, JSONLLogger(tmp_path / "m")], log_every_n_steps=1)
    for _ in range(2):
        t.fit(slope(), ones(2, 2))
    names = [step_and_name for step_and_name in events_of(tmp_path / "tb") if step_and_name[1] == "train_loss"]
    assert names == [(1, "train_loss"), (2, "train_loss")] * 2


def test_tensorboard_hides_what_came_after_the_checkpoint(tmp_path):
    """Catches curves that go back, what is hidden at a fresh start, and what a flush hides once more."""
    pytest.importorskip("tensorboardX")
    logger = TensorBoardLogger(tmp_path)
    logger.begin(None)
    for place in (None, {"step": 2, "micro_step": 4}):
        logger.begin(place)
        for step in (3, 4):
            logger.write_scalars(step, {"a": 1.0})
            logger.flush()
    assert events_of(tmp_path) == [(3, "a"), (4, "a"), (3, "start"), (3, "a"), (4, "a")]


def test_tensorboard_says_when_it_cannot_write(tmp_path, monkeypatch):
    """Catches a thread that dies unnoticed, so that the run waits for ever; and points not yet on disk."""
    writer = pytest.importorskip("tensorboardX.record_writer")
    logger = TensorBoardLogger(tmp_path)
    logger.write_scalars(1, {"a": 1.0})
    assert events_of(tmp_path) == [(1, "a")]

    def full(*args):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(writer.RecordWriter, "write", full)
        for step in range(2, 30):
            with pytest.raises(OSError, match="disk full"):
                logger.write_scalars(step, {"a": 1.0})
    logger.flush()


@pytest.mark.parametrize(
    ("module", "use", "extra"),
    [
        ("tensorboardX", TensorBoardLogger, "logs"),
        ("matplotlib.figure", lambda folder: fitted().plot(), "plots"),
    ],
)
def test_a_missing_extra_says_what_to_install(module, use, extra, monkeypatch, tmp_path):
    """Catches an ImportError that names a module only."""
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(ImportError, match=rf'pip install "jaxaccum\[{extra}\]"'):
        use(tmp_path)


def fitted():
    trainer = jaxaccum.Trainer(enable_progress_bar=False, max_epochs=1, strategy="single")
    trainer.fit(slope(), ones(2))
    return trainer


def test_logging_does_not_wait_for_the_device():
    """Catches a record that is fetched in the step that makes it."""
    log = Logged()
    written = lambda: tuple(record["step"] for record in log.records)

    class Reads(jaxaccum.callbacks.Callback):
        seen = ()

        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
            self.seen += (written(),)

    reads = Reads()
    single(logger=log, log_every_n_steps=1, callbacks=reads).fit(slope(), ones(2, 2, 2, 2))
    assert reads.seen == ((), (), (1,), (1, 2)) and written() == (1, 2, 3, 4)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, [1, 5, 10]),
        ({"max_steps": 3}, [1, 3]),
        ({"max_steps": 7}, [1, 5, 7]),
        ({"log_every_n_steps": 4}, [1, 4, 5, 8, 10]),
        ({"fuse_windows": True}, [1, 5, 10]),
    ],
)
def test_the_first_window_and_each_epochs_last_one_are_recorded(options, steps):
    """Catches a short run that logs nothing, and a should_log that doesn't know of it."""
    said = Recorder(lambda t: (t.global_step, t.should_log))
    log = Logged()
    single(accumulate_grad_batches=2, max_epochs=2, callbacks=said, logger=log, **options).fit(slope(), ones(*[2] * 9))
    assert [record["step"] for record in log.records] == steps
    assert [step for step, should_log in said.seen if should_log] == steps


@pytest.mark.parametrize("validates", [False, True])
def test_the_plot_of_a_short_run_has_a_curve_and_that_of_no_run_none(validates):
    """Catches a plot of nothing, and one that raises where there is nothing."""
    pytest.importorskip("matplotlib")
    t = single()
    t.fit(slope(), ones(*[2] * 9), ones(2) if validates else None)
    curves = {line.get_label(): len(line.get_data()[0]) for line in t.plot().axes[0].lines}
    assert curves == {"train_loss": 2} | ({"val_loss": 1} if validates else {})

    class Stops(Callback):
        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
            trainer.should_stop = True

    t = single(accumulate_grad_batches=2, callbacks=Stops())
    t.fit(slope(), ones(2, 2))
    assert not any(axes.lines for axes in t.plot().axes)


class Logs(Callback):
    """Logs what `value(trainer)` gives."""

    def __init__(self, value):
        self.value = value

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        trainer.log("mine", self.value(trainer))


@pytest.mark.parametrize(
    "value",
    [
        lambda t: 2,
        lambda t: 2.0,
        lambda t: np.float32(2),
        lambda t: np.array([2]),
        lambda t: jnp.full((), 2, jnp.bfloat16),
        lambda t: jnp.full(1, 2),
        lambda t: -t.state.params + 2 - t.global_step,
    ],
)
def test_callback_metrics_are_floats(value, tmp_path):
    """Catches device arrays, numpy's scalars and ints among them, in any order of epochs and validations."""
    seen = Recorder(lambda t: dict(t.callback_metrics))
    t = single(callbacks=[Logs(value), seen], logger=JSONLLogger(tmp_path / "m"), log_every_n_steps=1)
    t.fit(slope(), ones(2, 2), ones(2))
    assert seen.seen[0] == {"train_loss": 0.0, "mine": 2.0}
    assert t.callback_metrics == {"train_loss": -1.0, "mine": 2.0, "val_loss": -2.0}
    assert {type(x) for metrics in (*seen.seen, t.callback_metrics) for x in metrics.values()} == {float}
    assert [line.get("mine") for line in lines_of(tmp_path / "m")] == [2.0, 2.0, None]


@pytest.mark.parametrize(
    "value",
    [
        lambda t: None,
        lambda t: "2.0",
        lambda t: np.str_("2"),
        lambda t: [2.0],
        lambda t: 2j,
        lambda t: 10**400,
        lambda t: np.ones(2),
        lambda t: jnp.ones(2),
        lambda t: jnp.ones((), jnp.complex64),
        lambda t: jax.random.key(0),
    ],
)
def test_what_is_no_number_is_not_logged(value):
    """Catches a bad value that raises a record later, where its origin is unknown, or never."""
    t = single(callbacks=Logs(value))
    with pytest.raises(TypeError, match=r"trainer.log\('mine', ...\) takes a real number"):
        t.fit(slope(), ones(2, 2))
    assert t.micro_step == 1


def test_a_tracer_is_not_logged():
    """Catches one that leaks out of a jitted function."""
    t = fitted()
    with pytest.raises(TypeError, match=r"trainer.log\('mine'"):
        jax.jit(lambda x: t.log("mine", x))(1.0)


def test_an_array_of_the_state_may_be_logged(tmp_path):
    """Catches a value that the next micro-step donates before it is written."""
    t = single(callbacks=Logs(lambda t: t.state.params), logger=JSONLLogger(tmp_path / "m"), log_every_n_steps=3)
    t.fit(slope(), ones(*[2] * 6))
    assert [line["mine"] for line in lines_of(tmp_path / "m")] == [-1, -3, -6]


def test_nans_are_logged_as_they_are(tmp_path):
    """Catches a logger that passes over the very values one looks for."""
    t = single(callbacks=Logs(lambda t: float("nan")), logger=JSONLLogger(tmp_path / "m"))
    t.fit(slope(), ones(2))
    (line,) = lines_of(tmp_path / "m")
    assert np.isnan(line["mine"]) and np.isnan(t.callback_metrics["mine"])


class OnDevice:
    """An array that a device may still be computing."""

    def __init__(self, value, ready=False):
        self.value, self.ready = value, ready

    def is_ready(self):
        return self.ready

    def __array__(self, dtype=None, copy=None):
        assert self.ready, "waited for"
        return np.asarray(self.value, dtype)


def test_progress_bar_metrics_are_the_newest_that_are_ready():
    """Catches a wait, and a value that stays as it was as long as the device is behind."""
    t = fitted()
    assert t.progress_bar_metrics == {"train_loss": 0.0}
    means = [OnDevice(float(i)) for i in range(1000)]
    for i, mean in enumerate(means):
        t._running.metrics.close_window(WindowLogs({"train_loss": mean}, None, None))
        if i >= 100:
            means[i - 100].ready = True
            assert t.progress_bar_metrics == {"train_loss": i - 100}
    means[-1].ready = True
    assert t.progress_bar_metrics == {"train_loss": 999.0} and not t._running.metrics._unfinished


def test_few_means_are_kept_however_far_the_device_is_behind():
    """Catches a queue without end, and one whose oldest entry goes before the device has come to it."""
    t = fitted()
    _ = t.progress_bar_metrics
    means = [OnDevice(float(i + 1)) for i in range(10_000)]
    for mean in means:
        t._running.metrics.close_window(WindowLogs({"train_loss": mean}, None, None))
    assert len(t._running.metrics._unfinished) <= 256
    assert t.progress_bar_metrics == {"train_loss": 0.0}
    for finished, least in [(1, 1), (9_900, 9_000)]:
        for mean in means[:finished]:
            mean.ready = True
        assert least <= t.progress_bar_metrics["train_loss"] <= finished


def test_progress_bar_metrics_are_none_before_the_first_window():
    """Catches a NaN, and what callbacks log or a validation gives among the windows' means."""
    seen = Recorder(lambda t: (t.window_step, jax.block_until_ready(t.state) and t.progress_bar_metrics))
    t = single(accumulate_grad_batches=2, callbacks=[Logs(lambda t: 1.0), seen], val_check_interval=1)
    t.fit(slope(), ones(2, 2, 2), ones(2))
    assert seen.seen == [(1, {}), (0, {"train_loss": 0.0}), (0, {"train_loss": -1.0})]


def test_a_table_that_could_not_get_a_column_is_as_it_was(tmp_path, monkeypatch):
    """Catches rows with more values than the table has columns, after a write that failed once."""
    path = tmp_path / "metrics.csv"
    logger = CSVLogger(path)
    logger.write_scalars(1, {"a": 1.0})
    with monkeypatch.context() as full, pytest.raises(OSError, match="No space"):
        full.setattr(loggers, "_replace", lambda *_: (_ for _ in ()).throw(OSError("No space")))
        logger.write_scalars(2, {"b": 2.0})
    logger.write_scalars(3, {"a": 3.0, "b": 3.0})
    assert path.read_text() == "step,a,b\n1,1.0,\n3,3.0,3.0\n"


def test_what_is_logged_in_the_last_hooks_is_recorded(tmp_path):
    """Catches values of an epoch's end that wait for a record which never comes, or under the next epoch's name."""

    class Logs(Callback):
        def on_validation_end(self, trainer, task):
            trainer.log("of_validation", trainer.current_epoch)

        def on_train_epoch_end(self, trainer, task):
            trainer.log("of_epoch", trainer.current_epoch)

    path = tmp_path / "m.jsonl"
    saves = ModelCheckpoint(tmp_path / "saved", every_n_micro_steps=1, save_top_k=-1)
    run = lambda *callbacks: single(max_epochs=2, logger=JSONLLogger(path), callbacks=[Logs(), *callbacks])
    run(saves).fit(slope(), ones(2, 2), ones(2))
    want = lines_of(path)
    for name in ("of_validation", "of_epoch"):
        assert [(line["epoch"], line["micro_step"], line[name]) for line in want if name in line] == [
            (0, 2, 0),
            (1, 4, 1),
        ]
    for checkpoint in (tmp_path / "saved").iterdir():
        run().fit(slope(), ones(2, 2), ones(2), ckpt_path=checkpoint)
        assert lines_of(path) == want


def test_a_hook_may_be_set_on_a_callback():
    """Catches a hook that is looked for in the class alone."""
    seen = []
    callback = Callback()
    callback.on_train_batch_end = lambda trainer, *_: seen.append(trainer.micro_step)
    single(callbacks=callback).fit(slope(), ones(2, 2))
    assert seen == [1, 2]


def test_what_was_logged_before_a_checkpoint_is_in_the_resumed_run(tmp_path):
    """Catches a value that waits for its record and is lost with the run, or that every later record repeats."""

    class Logs(Callback):
        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
            if trainer.micro_step == 1:
                trainer.log("mine", 7.0)

    def run(log, *callbacks, **options):
        t = single(accumulate_grad_batches=2, log_every_n_steps=1, logger=log, callbacks=[Logs(), *callbacks])
        t.fit(slope(), ones(2, 2, 2, 2), **options)
        return t

    first, saves = Logged(), ModelCheckpoint(tmp_path, every_n_micro_steps=1, save_top_k=-1)
    whole = run(first, saves)
    assert [record.get("mine") for record in first.records] == [7.0, None]
    for at in range(1, 5):
        rest = Logged()
        resumed = run(rest, ckpt_path=tmp_path / f"epoch=0-micro_step={at}")
        assert rest.records == first.records[at // 2 :]
        assert resumed.callback_metrics == whole.callback_metrics


def test_a_checkpoint_leaves_no_record_behind(tmp_path):
    """Catches a record that waits for the device when a checkpoint counts it: a run that dies then has lost it."""
    path, seen = tmp_path / "m.jsonl", []
    counts = Callback()
    counts.on_train_batch_start = lambda *_: seen.append(len(lines_of(path)) if path.exists() else 0)
    saves = ModelCheckpoint(tmp_path, every_n_micro_steps=1)
    single(log_every_n_steps=1, logger=JSONLLogger(path), callbacks=[counts, saves]).fit(slope(), ones(2, 2, 2))
    assert seen == [0, 1, 2]


def test_what_the_devices_never_finish_is_not_waited_for():
    """Catches a run that hangs in its last record after another process has gone."""

    class Never:
        def is_ready(self):
            return False

        def __array__(self, *args, **kwargs):
            raise AssertionError("was waited for")

    log = Logged()
    kept = Records([log])
    kept.add(1, {"loss": 1.0})
    kept.add(2, {"rate": 0.1, "loss": Never()})
    kept.flush(waits=False)
    assert log.records == kept.history == [{"step": 1, "loss": 1.0}]


def test_a_run_waits_for_its_last_records(monkeypatch):
    """Catches records that are dropped at the end because the devices have not finished them."""

    class Late(float):
        def is_ready(self):
            return False

    flush, log = Records.flush, Logged()

    def late(self, waits=True):
        self._waiting = [(step, {**scalars, "late": Late(1.0)}) for step, scalars in self._waiting]
        flush(self, waits)

    monkeypatch.setattr(Records, "flush", late)
    single(log_every_n_steps=1, logger=log).fit(slope(), ones(2))
    assert [record.get("late") for record in log.records] == [1.0]
