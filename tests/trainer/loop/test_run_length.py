"""How long a run is: its minimum, its time, and a fast run for development."""

import datetime
import types

import pytest
from training import Logged, assert_same, ones, single, slope, trainer

from jaxaccum.callbacks import Callback, EarlyStopping, ModelCheckpoint, time_limit

DEVICES = pytest.mark.parametrize("devices", [1, 4])


def run(devices, callbacks, **options):
    strategy = "single" if devices == 1 else "ddp"
    return trainer(strategy=strategy, devices=devices, callbacks=callbacks, **options)


class StopsAt(Callback):
    """Asks for a stop after one micro-step."""

    def __init__(self, micro_step):
        self.micro_step = micro_step

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        trainer.should_stop |= trainer.micro_step == self.micro_step


@DEVICES
@pytest.mark.parametrize(
    ("options", "asked", "end"),
    [
        ({}, 1, 1),
        ({"min_steps": 0, "min_epochs": 0}, 1, 1),
        ({"min_steps": 2}, 1, 4),
        ({"min_steps": 1}, 3, 3),
        ({"min_epochs": 2}, 1, 10),
        ({"min_epochs": 1, "min_steps": 4}, 1, 7),
    ],
)
def test_a_stop_waits_for_the_minimum(tmp_path, devices, options, asked, end):
    """Catches a stop that comes before the minimum, that is forgotten until then, or in a checkpoint made meanwhile."""
    batches = ones(*[2] * 5 * devices)
    saves = ModelCheckpoint(tmp_path, every_n_micro_steps=1, save_top_k=-1)
    options |= {"accumulate_grad_batches": 2, "max_epochs": 4}
    whole = run(devices, [StopsAt(asked), saves], **options)
    want = whole.fit(slope(), batches)
    assert whole.micro_step == end
    if end > asked:
        resumed = run(devices, StopsAt(asked), **options)
        path = tmp_path / f"epoch=0-micro_step={asked}"
        assert_same(resumed.fit(slope(), batches, ckpt_path=path), want)
        assert resumed.micro_step == end


class Clock(Callback):
    """Each micro-step takes a second."""

    def __init__(self):
        self.now = 1000.0

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        self.now += 1


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time_limit, "time", types.SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_a_stop_before_an_epoch_takes_effect_after_its_first_micro_step():
    """Catches a stop that is forgotten until the epoch's end, and an epoch without a batch."""

    class Stops(Callback):
        def on_train_epoch_start(self, trainer, task):
            trainer.should_stop = trainer.current_epoch == 1

    t = single(max_epochs=4, callbacks=Stops())
    t.fit(slope(), ones(2, 2, 2))
    assert (t.micro_step, t.current_epoch) == (4, 1)


@DEVICES
def test_max_time_counts_over_resumes(tmp_path, devices, clock):
    """Catches a limit that each resume begins anew, or that a second fit goes on with; 5 seconds are 5 micro-steps."""
    batches, options = ones(*[2] * 3 * devices), {"accumulate_grad_batches": 3, "max_time": {"seconds": 5}}
    saves = ModelCheckpoint(tmp_path, every_n_micro_steps=1, save_top_k=-1)
    whole = run(devices, [clock, saves], max_epochs=None, **options)
    want = whole.fit(slope(), batches)
    assert (whole.micro_step, whole.global_step) == (5, 1)
    clock.now += 1000
    resumed = run(devices, [clock], max_epochs=None, **options)
    assert_same(resumed.fit(slope(), batches, ckpt_path=tmp_path / "epoch=1-micro_step=4"), want)
    assert resumed.micro_step == 5
    resumed.fit(slope(), batches, ckpt_path=tmp_path / "epoch=1-micro_step=5")
    assert resumed.micro_step == 5  # The time is up.
    resumed.fit(slope(), batches)
    assert resumed.micro_step == 5


def test_the_minimum_comes_before_max_time(clock):
    """Catches a time that ends a run before its minimum."""
    t = single(callbacks=clock, max_time="00:00:00:03", min_epochs=3, max_epochs=9)
    t.fit(slope(), ones(2, 2))
    assert t.micro_step == 6


@pytest.mark.parametrize(
    ("max_time", "seconds"),
    [
        ("01:02:03:04", 93784),
        ({"hours": 1, "minutes": 2}, 3720),
        (datetime.timedelta(days=1, seconds=5), 86405),
    ],
)
def test_max_time_takes_lightnings_forms(max_time, seconds, clock):
    """Catches a part of a duration that is taken for another one."""
    t = single(callbacks=Jumps(clock, seconds), max_time=max_time, max_epochs=None)
    t.fit(slope(), ones(2))
    assert t.micro_step == 2


class Jumps(Callback):
    """The first micro-step takes a second less than `seconds`, the next one a second."""

    def __init__(self, clock, seconds):
        self.clock, self.steps = clock, [seconds - 1, 1]

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        self.clock.now += self.steps.pop(0)


@DEVICES
@pytest.mark.parametrize(("fast", "micro_steps"), [(True, 1), (3, 3), (False, 10), (0, 10)])
def test_a_fast_run_is_a_few_micro_steps_and_leaves_nothing_behind(tmp_path, devices, fast, micro_steps):
    """Catches batches counted in place of micro-steps, and a run that is long, or saves, stops or logs.

    Windows are of two micro-steps, and each takes 1 from w.
    """
    log, batches = Logged(), ones(*[2] * 5 * devices)
    saves = ModelCheckpoint(tmp_path / "saves", monitor="val_loss")
    t = run(
        devices,
        [saves, EarlyStopping("val_loss", stopping_threshold=99.0)],
        fast_dev_run=fast,
        max_epochs=2,
        min_epochs=2,
        accumulate_grad_batches=2,
        val_check_interval=2,
        logger=log,
    )
    state = t.fit(slope(), batches, batches, ckpt_path="last") if fast else t.fit(slope(), batches, batches)
    assert t.micro_step == micro_steps and t.window_step == 0
    assert float(state.params) == -t.global_step == -{1: 1, 3: 2, 10: 6}[micro_steps]
    seen = []
    counted = (seen.append(1) or batch for batch in batches)
    assert t.test(slope(), counted, ckpt_path="best" if fast else None) == {"test_loss": -t.global_step}
    assert len(seen) == (fast or 5) * devices
    assert t.callback_metrics["val_loss"] == -(t.global_step if fast else 5)
    assert (bool(log.records), (tmp_path / "saves").exists()) == (not fast, not fast)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"min_epochs": 3, "max_epochs": 2}, ValueError, "min_epochs must be .*from 0 to max_epochs=2, got 3"),
        ({"min_steps": 3, "max_steps": 2}, ValueError, "min_steps must be .*from 0 to max_steps=2, got 3"),
        ({"min_steps": -1}, ValueError, "min_steps must be .*from 0.*got -1"),
        ({"fast_dev_run": -1}, ValueError, "fast_dev_run must be True, False or the number of micro-steps, got -1"),
        ({"fast_dev_run": 0.5}, TypeError, "fast_dev_run must be True, False or the number of micro-steps, got 0.5"),
        ({"min_epochs": 1.5}, TypeError, "min_epochs must be .*got 1.5"),
        *(
            ({"max_time": bad}, ValueError, "max_time must be .*'hours': 4.*'DD:HH:MM:SS', got ")
            for bad in ("1:00", "a:b:c:d", 60, {"hour": 1}, {"hours": 0}, datetime.timedelta(-1))
        ),
    ],
)
def test_bad_lengths_are_refused_at_construction(options, error, match):
    """Catches a value that fails in the middle of a run, or is ignored."""
    with pytest.raises(error, match=match):
        single(**options)
