"""The callbacks that are built in."""

import io
import math
import re

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tqdm
from training import Recorder, ones, single, slope

import jaxaccum
from jaxaccum.callbacks import Callback, EarlyStopping, LearningRateMonitor, ModelCheckpoint, ProgressBar

pytestmark = pytest.mark.usefixtures("compiled_once")


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
        ([5, 4, 3, 2, 1, 0], {}, 6),
    ],
)
def test_early_stopping_stops_when_nothing_improves(values, options, epochs):
    """Catches an improvement that doesn't reset the wait, a stop one epoch late, and a NaN that is waited out."""
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


def test_early_stopping_waits_for_the_first_window():
    """Catches a stop in the first window that turns into an error about the monitor."""

    class Stops(Callback):
        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
            trainer.should_stop = True

    t = single(accumulate_grad_batches=2, callbacks=[EarlyStopping("train_loss"), Stops()])
    t.fit(slope(), ones(2, 2))
    assert (t.micro_step, t.global_step) == (1, 0)


def test_the_learning_rate_is_logged_with_every_record():
    """Catches the rate of the next step, and a record without one."""
    rates = [1.0, 0.5, 0.25]
    schedule = lambda step: jnp.array(rates)[step]
    for monitor, optimizer in [
        (LearningRateMonitor(schedule), optax.sgd(schedule)),
        (LearningRateMonitor(), optax.inject_hyperparams(optax.sgd)(schedule)),
    ]:
        t = single(log_every_n_steps=1, callbacks=monitor, accumulate_grad_batches=2, gradient_clip_val=9.0)
        t.fit(slope(optimizer), ones(*[2] * 6))
        assert [record["lr"] for record in t._running.records.history] == rates
    with pytest.raises(ValueError, match=r"inject_hyperparams.*schedule"):
        single(log_every_n_steps=1, callbacks=LearningRateMonitor()).fit(slope(), ones(2))


def test_the_progress_bar_says_where_the_run_is(monkeypatch):
    """Catches a bar that lags, counts other things than its unit, or draws too often."""
    file, draws = io.StringIO(), []

    class Bar(tqdm.tqdm):
        def __init__(self, **options):
            super().__init__(file=file, ascii=True, ncols=200, **options)

        def refresh(self, *args, **kwargs):
            draws.append(self.n)
            return super().refresh(*args, **kwargs)

    monkeypatch.setattr(tqdm, "tqdm", Bar)
    t = single(accumulate_grad_batches=4, max_epochs=2, callbacks=ProgressBar(interval=60.0))
    t.fit(slope(), ones(*[2] * 6))
    assert len([n for n in draws if n]) <= 6  # the first batch and the end of each epoch, with tqdm's own
    last = re.split(r"[\r\n]+", file.getvalue().strip())[-1]
    for words in ("epoch 1", "6/6", "window 0/4", "optimizer step 4", "batch 8", "samples/s", "loss"):
        assert words in last, last


def test_the_progress_bar_does_not_wait_for_the_device():
    """Catches a bar that fetches a loss which is not ready."""

    class Waits:
        def is_ready(self):
            return False

        def __float__(self):
            raise AssertionError("fetched")

    class Trainer:
        current_epoch = window_step = global_step = samples_seen = 0
        accumulate_grad_batches = effective_batch_size = num_training_batches = 1
        callback_metrics = {"train_loss": Waits()}  # noqa: RUF012

    bar = ProgressBar()
    bar._tqdm = lambda **options: tqdm.tqdm(file=io.StringIO(), **options)
    bar.on_train_start(Trainer(), None)
    bar.on_train_epoch_start(Trainer(), None)
    bar.on_train_batch_end(Trainer(), None, {}, None, 0)
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
