"""The built-in callbacks."""

import gc
import io
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tqdm
from training import Logged, Recorder, Unsized, ones, single, slope

import jaxaccum
from jaxaccum.callbacks import Callback, EarlyStopping, LearningRateMonitor, ModelCheckpoint, ProgressBar


def losing(values):
    """A task whose validation loss is each of `values` in turn, and whose training loss is 1."""
    table = jnp.array(values)
    loss = lambda w, batch, key: jnp.mean(batch) + 0 * w if key is not None else table[jnp.int32(w)] + 0 * batch.mean()
    count = optax.GradientTransformation(lambda p: (), lambda g, s, p=None: (jnp.ones(()), ()))
    return jaxaccum.Task(lambda key, batch: -jnp.ones(()), loss, count)


@pytest.mark.parametrize(
    ("values", "options", "epochs"),
    [
        ([5, 4, 4, 4, 1, 1], {"patience": 2}, 4),
        ([5, 4, 4, 3, 3, 3], {"patience": 2}, 6),
        ([5, 4.9, 4.8, 1, 1, 1], {"patience": 2, "min_delta": 0.5}, 3),
        ([1, 2, 3, 3, 3, 9], {"patience": 2, "mode": "max"}, 5),
        ([5, 4, math.nan, 1, 1, 1], {"patience": 9}, 3),
        ([5, 4, -math.inf, 1, 1, 1], {"patience": 9}, 3),
        ([5, 4, 3, 2, 1, 0], {}, 6),
        ([5, math.nan, math.inf, 4, math.nan, math.nan], {"patience": 3, "check_finite": False}, 6),
        ([math.nan, 5, math.nan, math.nan, 4, 4], {"patience": 2, "check_finite": False}, 4),
        ([5, 4, 3, 2, 1, 0], {"stopping_threshold": 3}, 3),
        ([1, 2, 3, 4, 4, 4], {"stopping_threshold": 2.5, "mode": "max"}, 3),
        ([5, 4.5, 3, 2, 1, 0], {"stopping_threshold": 4.5, "min_delta": 1}, 2),
    ],
)
def test_early_stopping_stops_when_nothing_improves(values, options, epochs):
    """Catches an improvement that doesn't reset the wait, a stop one epoch late, and what is no number waited out."""
    stopping = EarlyStopping("val_loss", **options)
    t = single(max_epochs=6, callbacks=stopping)
    t.fit(losing(values), ones(2), ones(2))
    assert t.current_epoch == epochs
    again = EarlyStopping("val_loss", **options)
    again.load_state_dict(stopping.state_dict())
    assert again.state_dict() == stopping.state_dict()


def test_early_stopping_looks_at_the_training_loss_at_an_epochs_end():
    """Catches a monitor that is never looked at, or is looked at before it exists."""
    t = single(max_epochs=9, callbacks=EarlyStopping("train_loss", patience=2))
    t.fit(losing([0]), ones(2, 2))
    assert t.current_epoch == 3
    with pytest.raises(ValueError, match=r"mode must be .*'least'"):
        EarlyStopping("val_loss", mode="least")
    with pytest.raises(ValueError, match="patience"):
        EarlyStopping("val_loss", patience=0)
    with pytest.raises(TypeError, match="check_finite must be True or False, got 1"):
        EarlyStopping("val_loss", check_finite=1)
    for bad in ("3", True, math.nan):
        with pytest.raises(ValueError, match=f"stopping_threshold must be a finite number, or None.*{bad!r}"):
            EarlyStopping("val_loss", stopping_threshold=bad)


@pytest.mark.parametrize("monitors", [EarlyStopping, lambda monitor: ModelCheckpoint(monitor=monitor)])
@pytest.mark.parametrize(
    ("monitor", "there"), [("val_f1", "val_loss"), ("train_los", "train_loss"), ("loss", "train_loss")]
)
def test_a_misspelt_monitor_is_met_at_the_first_look_in_words(monitors, monitor, there, tmp_path):
    """Catches a run that is never stopped, or is ranked by nothing."""
    t = single(max_epochs=2, callbacks=monitors(monitor), default_root_dir=tmp_path)
    with pytest.raises(ValueError, match=f"monitor='{monitor}' is not among .*'{there}'.*trainer.log"):
        t.fit(slope(), ones(2), ones(2))
    assert t.micro_step == 1
    if monitor == "val_f1":
        for options, validation in [({}, None), ({"limit_val_batches": 0}, ones(2))]:
            with pytest.raises(ValueError, match=r"\(monitor='val_f1'\) needs a validation.*val_loader"):
                single(callbacks=monitors(monitor), **options).fit(slope(), ones(2), validation)


@pytest.mark.parametrize("monitor", ["train_loss_epoch", "grad_norm"])
def test_a_value_of_a_windows_or_an_epochs_end_is_waited_for(tmp_path, monitor):
    """Catches a stop, or a checkpoint, in the first window or epoch that turns into an error about the monitor."""

    class Stops(Callback):
        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
            trainer.should_stop = trainer.micro_step == stop

    for stop in (1, 3):
        saves = ModelCheckpoint(tmp_path / str(stop), monitor=monitor, every_n_micro_steps=1)
        options = {"log_epoch_means": True, "log_grad_norm": True, "accumulate_grad_batches": 2}
        t = single(callbacks=[Stops(), saves, EarlyStopping(monitor)], **options)
        t.fit(slope(), ones(2, 2, 2, 2))
        assert t.micro_step == stop
    t = single(max_epochs=3, callbacks=ModelCheckpoint(tmp_path, monitor=monitor))
    with pytest.raises(ValueError, match=f"monitor='{monitor}' is not among .*'train_loss'"):
        t.fit(slope(), ones(2, 2))
    assert t.micro_step == 2


def test_early_stopping_waits_for_the_first_window():
    """Catches a stop in the first window that turns into an error about the monitor."""

    class Stops(Callback):
        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
            trainer.should_stop = True

    t = single(accumulate_grad_batches=2, callbacks=[EarlyStopping("train_loss"), Stops()])
    t.fit(slope(), ones(2, 2))
    assert (t.micro_step, t.global_step) == (1, 0)


def fields(stopping):
    return stopping.best, stopping.wait, stopping.stopped_epoch


@pytest.mark.parametrize("mode", ["min", "max"])
def test_early_stopping_begins_anew_in_every_fit(mode):
    """Catches a second fit that trains nothing, and best values that a fold hands on to the next one."""
    stopping, the_task = EarlyStopping("val_loss", patience=1, mode=mode), losing([5, 5, 1, 1])
    t = single(max_epochs=4, callbacks=stopping)
    for _ in range(2):
        t.fit(the_task, ones(2), ones(2))
        assert t.current_epoch == 2 and fields(stopping) == (5, 1, 1)
    other = single(max_epochs=1, callbacks=stopping)
    other.fit(losing([9]), ones(2), ones(2))
    assert fields(stopping) == (9, 0, None)


def test_early_stopping_goes_on_from_its_checkpoint_and_from_no_other(tmp_path):
    """Catches a resume that waits anew, one that keeps what this object had before, and a stop that is forgotten."""
    the_task, batches = losing([5, 6, 7, 8, 9]), (ones(2), ones(2))
    saves = lambda folder: ModelCheckpoint(tmp_path / folder, save_top_k=-1)
    first = EarlyStopping("val_loss", patience=3)
    single(max_epochs=9, callbacks=[first, saves("with")]).fit(the_task, *batches)
    assert fields(first) == (5, 3, 3)
    single(max_epochs=2, callbacks=saves("without")).fit(the_task, *batches)

    used = EarlyStopping("val_loss", patience=3)
    t = single(max_epochs=9, callbacks=used)
    t.fit(the_task, *batches, ckpt_path=tmp_path / "with" / "epoch=2-micro_step=2")
    assert t.is_resuming and t.current_epoch == 4 and fields(used) == (5, 3, 3)
    t.fit(the_task, *batches, ckpt_path=tmp_path / "without" / "epoch=2-micro_step=2")
    assert t.is_resuming and t.current_epoch == 6 and fields(used) == (7, 3, 5)
    t.fit(the_task, *batches)
    assert not t.is_resuming and t.current_epoch == 4 and fields(used) == (5, 3, 3)
    t.fit(the_task, *batches, ckpt_path=tmp_path / "with" / "epoch=4-micro_step=4")
    assert t.current_epoch == 4  # It was stopped there.


def test_a_run_that_reached_its_threshold_stays_stopped_on_a_resume(tmp_path):
    """Catches a threshold that is looked at in validations alone, and NaNs taken for a run without a value."""
    the_task, batches = losing([5, 3, 2, 1]), (ones(2), ones(2))
    stopping = EarlyStopping("val_loss", stopping_threshold=3)
    single(max_epochs=4, callbacks=[stopping, ModelCheckpoint(tmp_path)]).fit(the_task, *batches)
    t = single(max_epochs=4, callbacks=[stopping, ModelCheckpoint(tmp_path)])
    t.fit(the_task, *batches, ckpt_path="last")
    assert t.current_epoch == 2 and fields(stopping) == (3, 0, 1)
    single(callbacks=EarlyStopping("val_loss", check_finite=False)).fit(losing([math.nan]), *batches)


def test_a_fresh_fit_takes_no_state_that_was_loaded_before_it():
    """Catches the state of a checkpoint that was read for a fit which then failed."""
    stopping = EarlyStopping("val_loss", patience=2)
    stopping.load_state_dict({"best": 1.0, "wait": 1, "stopped_epoch": None})
    t = single(max_epochs=4, callbacks=stopping)
    t.fit(losing([5, 6, 7, 8]), ones(2), ones(2))
    assert t.current_epoch == 3 and stopping.best == 5


@pytest.mark.parametrize("monitor", ["val_loss", "val_f1"])
def test_early_stopping_says_when_it_had_nothing_to_look_at(monitor):
    """Catches a run that nothing could have stopped, and a name that one has to guess."""
    t = single(callbacks=EarlyStopping(monitor), max_steps=1)
    with pytest.warns(UserWarning, match=rf"EarlyStopping\(monitor='{monitor}'\).*\['train_loss'\]"):
        t.fit(losing([5, 5, 5]), Unsized(ones(2, 2, 2)), ones(2))


def test_early_stopping_does_not_speak_of_what_it_looked_at_before_a_resume(tmp_path):
    """Catches a warning in the last part of a run, in which no validation was due any more."""
    batches, the_task = (Unsized(ones(2, 2, 2)), ones(2)), losing([5, 5, 5, 5])
    part = lambda steps, **options: single(
        callbacks=[EarlyStopping("val_loss"), ModelCheckpoint(tmp_path)], max_steps=steps, **options
    )
    part(1, val_check_interval=1).fit(the_task, *batches)
    part(2).fit(the_task, *batches, ckpt_path="last")


def test_the_learning_rate_is_logged_with_every_record():
    """Catches the rate of the next step, and a record without one."""
    rates = [1.0, 0.5, 0.25]
    schedule = lambda step: jnp.array(rates)[step]
    for monitor, optimizer in [
        (LearningRateMonitor(schedule), optax.sgd(schedule)),
        (LearningRateMonitor(), optax.inject_hyperparams(optax.sgd)(schedule)),
    ]:
        log, options = Logged(), {"accumulate_grad_batches": 2, "gradient_clip_val": 9.0}
        single(log_every_n_steps=1, callbacks=monitor, logger=log, **options).fit(slope(optimizer), ones(*[2] * 6))
        assert [record["lr"] for record in log.records] == rates


def test_a_learning_rate_that_is_nowhere_is_missed_before_training():
    """Catches a run that logs no rate and doesn't say so, or says so when a record is due."""
    t = single(callbacks=LearningRateMonitor(), accumulate_grad_batches=4)
    with pytest.raises(ValueError, match=r"inject_hyperparams.*schedule"):
        t.fit(slope(), ones(2))
    assert t.micro_step == 0


def drawing(monkeypatch, file):
    """Has tqdm write to `file`; the micro-steps of each draw."""
    draws = []

    class Bar(tqdm.std.tqdm):
        def __init__(self, **options):
            super().__init__(file=file, ascii=True, ncols=200, **options)

        def refresh(self, *args, **kwargs):
            draws.append(self.n)
            return super().refresh(*args, **kwargs)

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    return draws


def lines_in(file):
    return re.split(r"[\r\n]+", file.getvalue().strip())


def test_the_progress_bar_says_where_the_run_is(monkeypatch):
    """Catches a bar that lags, counts other things than its unit, or draws too often."""
    file = io.StringIO()
    draws = drawing(monkeypatch, file)
    t = single(accumulate_grad_batches=4, max_epochs=2, callbacks=ProgressBar(interval=60.0))
    t.fit(slope(), ones(*[2] * 6))
    assert len([n for n in draws if n]) <= 6  # the first batch and the end of each epoch, with tqdm's own
    last = lines_in(file)[-1]
    for words in ("epoch 1", "6/6", "window 0/4", "optimizer step 4", "batch 8", "samples/s", "loss"):
        assert words in last, last
    assert 0 < float(re.search(r"(\S+) samples/s", last)[1]) < 1e6


class Waits(Callback):
    """Waits for the device after every micro-step."""

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        jax.block_until_ready(trainer.state)


def shown(line):
    """The micro-steps and the loss in a line of the bar."""
    done, loss = re.search(r"^epoch \d: .* (\d+)/3 ", line)[1], re.search(r"loss (\S+)\]", line)
    return done, loss and float(loss[1])


def test_the_progress_bar_shows_no_value_before_there_is_one(monkeypatch):
    """Catches "loss nan", a line of 0 micro-steps, one without words, and a value that is old."""
    file = io.StringIO()
    drawing(monkeypatch, file)
    t = single(accumulate_grad_batches=2, max_epochs=2, callbacks=[Waits(), ProgressBar(interval=0.0)])
    for _ in range(2):
        t.fit(slope(), ones(2, 2, 2))
        drawn = [shown(line) for line in lines_in(file)]
        assert drawn[:3] == [("1", None), ("2", 0.0), ("3", -1.0)]
        assert drawn[3:-1] == [("3", -1), ("0", -1), ("1", -1), ("2", -2), ("3", -3), ("3", -3)]
        file.seek(0)
        file.truncate()


def test_the_progress_bar_knows_the_end_of_a_stream_with_max_steps(monkeypatch):
    """Catches a bar without a total where the number of steps is known, one that moves, and one where it is not."""

    class Stream:
        def __iter__(self):
            yield from ones(*[2] * 7)

    totals = []
    for options in ({"max_steps": 5, "max_epochs": 9}, {"max_epochs": 2}):
        file = io.StringIO()
        drawing(monkeypatch, file)
        t = single(accumulate_grad_batches=3, callbacks=[ProgressBar(interval=0.0)], **options)
        t.fit(slope(), Stream())
        assert " micro-step/s" in file.getvalue()
        totals.append([re.search(r"\b(\d+)/(\d+) \[|\b(\d+) micro-step \[", line) for line in lines_in(file)])
    # The first epoch has 7 micro-steps, whose windows are of 3, 3 and 1; 2 windows are left for the second one.
    assert {int(found[2]) for found in totals[0][:6]} == {15}
    assert [found[1] for found in totals[0][-2:]] == [found[2] for found in totals[0][-2:]] == ["6", "6"]
    assert all(found[3] for found in totals[1])


def test_the_progress_bar_goes_on_in_mid_epoch(monkeypatch, tmp_path):
    """Catches a resumed bar that counts from 0, or whose rate counts what was done before."""
    saves = ModelCheckpoint(tmp_path, every_n_micro_steps=4, save_top_k=-1)
    single(callbacks=saves, accumulate_grad_batches=3).fit(slope(), ones(*[2] * 6))
    file = io.StringIO()
    drawing(monkeypatch, file)
    t = single(callbacks=ProgressBar(interval=0.0), accumulate_grad_batches=3)
    t.fit(slope(), ones(*[2] * 6), ckpt_path=tmp_path / "epoch=0-micro_step=4")
    assert "5/6" in lines_in(file)[0] and "?" in lines_in(file)[0].partition("micro-step/s")[0]
    assert "6/6" in lines_in(file)[-1]


def broken(*, after, error):
    """A file that takes so many writes."""

    class Broken(io.StringIO):
        left = after

        def write(self, text):
            self.left -= 1
            if self.left < 0:
                raise error
            return super().write(text)

    return Broken()


@pytest.mark.parametrize("error", [BrokenPipeError(32, "pipe"), OSError(5, "terminal"), ValueError("closed file")])
@pytest.mark.parametrize("after", [0, 1, 5, 9, 13])
def test_a_bar_that_cannot_be_written_does_not_end_the_run(monkeypatch, after, error):
    """Catches a run that a closed terminal ends, at the bar's first draw, a later one or its end."""
    drawing(monkeypatch, broken(after=after, error=error))
    t = single(max_epochs=2, callbacks=ProgressBar(interval=0.0))
    for _ in range(2):
        t.fit(slope(), ones(2, 2))
        assert t.micro_step == 4
    gc.collect()  # What tqdm leaves behind would raise here.


@pytest.mark.parametrize("stderr", [None, "closed"])
def test_a_process_without_stderr_trains(monkeypatch, stderr):
    """Catches a bar that is written to nothing."""
    file = io.StringIO()
    file.close()
    monkeypatch.setattr("sys.stderr", stderr and file)
    t = single(enable_progress_bar=True)
    t.fit(slope(), ones(2, 2))
    assert t.micro_step == 2


def test_an_error_of_the_trainer_is_not_taken_for_the_bars():
    """Catches a ValueError from elsewhere that silently stops the bar."""

    class Breaks:
        samples_seen = 0
        current_epoch = property(lambda self: int("mine"))

    bar = ProgressBar()
    bar.on_train_start(Breaks(), None)
    with pytest.raises(ValueError, match="mine"):
        bar.on_train_batch_end(Breaks(), None, {}, None, 0)


def test_the_progress_bar_reads_public_properties_and_does_not_wait_for_the_device():
    """Catches a bar that fetches a loss which is not ready."""

    class Trainer:
        current_epoch = window_step = global_step = samples_seen = 0
        accumulate_grad_batches = effective_batch_size = num_training_batches = 1
        progress_bar_metrics = {}  # noqa: RUF012

        @property
        def callback_metrics(self):
            raise AssertionError("fetched")

    bar = ProgressBar()
    bar._tqdm = lambda **options: tqdm.tqdm(file=io.StringIO(), **options)
    bar.on_train_start(Trainer(), None)
    bar.on_train_epoch_start(Trainer(), None)
    bar.on_train_batch_end(Trainer(), None, {}, None, 0)
    bar.on_train_epoch_end(Trainer(), None)
    bar.on_train_end(Trainer(), None)


def test_a_progress_bar_without_tqdm_says_what_to_install(monkeypatch):
    """Catches an ImportError that names a module only."""
    monkeypatch.setitem(__import__("sys").modules, "tqdm", None)
    with pytest.raises(ImportError, match=r'progress bar.*pip install "jaxaccum\[training\]"'):
        jaxaccum.Trainer()
    single().fit(slope(), ones(2))


def test_callbacks_may_keep_a_copy_of_the_state():
    """Catches a copy that shares its buffers with what the next step donates."""
    kept = Recorder(lambda t: jnp.copy(t.state.params))
    single(callbacks=kept).fit(slope(), ones(2, 2, 2))
    np.testing.assert_array_equal(kept.seen, [-1, -2, -3])
