"""A K that follows the noise scale: its windows, their replay and resume, the learning rate, and what it costs."""

import numpy as np
import optax
import pytest
from compiles import counted_compiles
from noise import linear, rows, two_sizes
from training import Logged, Recorder, assert_same, single, trainer

import jaxaccum
from jaxaccum import AccumulationSchedule, NoiseScale
from jaxaccum.callbacks import (
    AdaptiveAccumulation,
    Callback,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    NoiseScaleMonitor,
    adaptive,
)

SCALE = NoiseScale(decay=0.9)


@pytest.fixture(autouse=True)
def _short_warm_up(monkeypatch):
    monkeypatch.setattr(adaptive, "WARM_UP", 2)


def adapts(**options):
    return AdaptiveAccumulation(**{"min_k": 2, "max_k": 5, "scale": SCALE, **options})


def expected(loader, devices, every_k, rule):
    """(the windows' K by number, the windows' batches) from the batches alone."""
    states, windows, ks, at = [SCALE.init()], [], {0: every_k}, 0
    while at < len(loader):
        w = len(windows)
        if w > 2:  # From windows 0 to w - 2.
            found = SCALE.estimate(states[w - 1])
            if not found.low <= every_k * devices * 4 <= found.high:
                every_k = rule.next_k(every_k, float(found.scale), devices * 4)
            if every_k != list(ks.values())[-1]:
                ks[w] = every_k
        windows.append(loader[at : at + every_k * devices])
        parts = [windows[-1][:1]] if devices == 1 else [windows[-1][p::devices] for p in range(devices)]
        states.append(SCALE.update(states[-1], *map(np.array, two_sizes(parts, windows[-1]))))
        at += every_k * devices
    return ks, windows


@pytest.mark.parametrize(("devices", "fuse"), [(1, False), (1, True), (4, False), (4, True)])
def test_k_follows_the_noise_scale(devices, fuse):
    """Catches another lag, a K that leaves the interval out, and a learning rate of another window."""
    loader, callback = rows(*[4] * 60 * devices), adapts(learning_rate="sqrt")
    ks, windows = expected(loader, devices, 2, callback.rule)
    ends = Recorder(lambda t: t.global_step)
    options = {"strategy": "single" if devices == 1 else "ddp", "devices": devices, "fuse_windows": fuse}
    state = trainer(accumulate_grad_batches=1, callbacks=[callback, ends], **options).fit(linear(), loader)
    assert callback.chosen == ks and len(ks) > 1
    assert ends.seen[-1] == len(windows)
    follows = AccumulationSchedule(ks, by="step")
    means = [np.sqrt(follows(w) / 2) * np.concatenate(window).mean(0) for w, window in enumerate(windows)]
    np.testing.assert_allclose(state.params, -np.sum(means, axis=0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("devices", [1, 4])
def test_a_resume_at_any_micro_step_around_a_change(tmp_path, devices):
    """Catches estimates, a K or a schedule that a checkpoint lacks, and another lag after a resume."""
    loader = rows(*[4] * 22 * devices)

    def run(log, *callbacks):
        strategy = "single" if devices == 1 else "ddp"
        options = {"strategy": strategy, "devices": devices, "logger": log, "log_every_n_steps": 1}
        return trainer(accumulate_grad_batches=2, callbacks=callbacks, **options)

    callback, log = adapts(learning_rate="linear"), Logged()
    unbroken = run(log, callback, ModelCheckpoint(tmp_path, every_n_micro_steps=1, save_top_k=-1))
    want = unbroken.fit(linear(), loader)
    (change,) = list(callback.chosen)[1:]
    assert 3 <= change <= 6
    resumed_log, resumed_callback = Logged(), adapts(learning_rate="linear")
    resumed = run(resumed_log, resumed_callback)
    for i in range(2 * change - 5, 2 * change + 7):  # Both lags before the change, and its first window after it.
        got = resumed.fit(linear(), loader, ckpt_path=tmp_path / f"epoch=0-micro_step={i}")
        assert_same(got, want)
        assert resumed_callback.chosen == callback.chosen and list(resumed_callback.chosen) == list(callback.chosen)
        assert resumed_log.records == log.records[len(log.records) - len(resumed_log.records) :]
        assert resumed_callback.state_dict() == callback.state_dict() and resumed._at == unbroken._at
        assert resumed._run.lengths.state_dict() == unbroken._run.lengths.state_dict()


def test_its_schedule_repeats_the_run():
    """Catches a schedule whose changes are one window off, or with a K that no window had."""
    loader, callback, task = rows(*[4] * 30), adapts(), linear()
    ends = [Recorder(lambda t: (t.global_step, t.accumulate_grad_batches)) for _ in range(2)]
    want = single(accumulate_grad_batches=2, callbacks=[callback, ends[0]]).fit(task, loader)
    schedule = AccumulationSchedule(callback.chosen, by="step")
    got = single(accumulate_grad_batches=schedule, callbacks=ends[1]).fit(task, loader)
    assert len(schedule) > 1 and ends[0].seen == ends[1].seen
    assert_same(got.params, want.params)


def test_a_change_compiles_nothing():
    """Catches a K, or a factor of the learning rate, that is static in a program."""
    task, loader = linear(), rows(*[4] * 30)
    t = single(accumulate_grad_batches=3, callbacks=(callback := adapts(learning_rate="sqrt")))
    t.fit(task, loader[:9])
    assert len(callback.chosen) == 1
    with counted_compiles() as compiles:
        t.fit(task, loader)
    assert len(callback.chosen) > 1 and not compiles


def test_a_fresh_run_starts_anew():
    """Catches estimates of the run before, and its schedule."""
    task, loader = linear(), rows(*[4] * 30)
    t = single(accumulate_grad_batches=9, callbacks=(callback := adapts()))
    states = [(t.fit(task, loader), callback.chosen, callback.state_dict()) for _ in range(2)]
    assert_same(states[0][0], states[1][0])
    assert states[0][1:] == states[1][1:] and states[0][1][0] == 5  # Moved into the bounds.


def test_a_run_that_begins_to_adapt_warms_up(tmp_path, monkeypatch):
    """Catches a K from the first two windows that are measured, in a run that has made many before."""
    monkeypatch.setattr(adaptive, "WARM_UP", 5)
    loader, saves, callback = rows(*[4] * 60), ModelCheckpoint(tmp_path), adapts()
    single(accumulate_grad_batches=2, callbacks=saves, max_steps=9).fit(linear(), loader)
    single(accumulate_grad_batches=2, callbacks=[callback, saves]).fit(linear(), loader, ckpt_path="last")
    first, change, *_ = callback.chosen
    assert first == 0 and change >= 9 + 5 + 1


@pytest.mark.parametrize(
    ("every_k", "others"),
    [({0: 2, 1: 4}, []), (AccumulationSchedule({0: 2}, by="step"), []), (1, [GradientAccumulationScheduler({1: 4})])],
)
def test_a_schedule_beside_it_is_refused(every_k, others):
    """Catches a schedule that is taken and then never used."""
    with pytest.raises(ValueError, match="AdaptiveAccumulation sets K, and so does"):
        single(accumulate_grad_batches=every_k, callbacks=[adapts(), *others])


def test_what_is_not_known_is_refused():
    """Catches a number of optimizer steps that follows from the first K, and a hook's K that is never used."""
    task = jaxaccum.Task(linear().init, linear().loss, lambda total_steps: optax.sgd(1.0 / total_steps))
    with pytest.raises(ValueError, match="K by the noise scale"):
        single(accumulate_grad_batches=2, callbacks=adapts()).fit(task, rows(4, 4))
    single(accumulate_grad_batches=2, callbacks=adapts(), max_steps=1).fit(task, rows(4, 4))

    class Sets(Callback):
        def on_train_epoch_start(self, trainer, task):
            trainer.accumulate_grad_batches = 2

    with pytest.raises(RuntimeError, match=r"accumulate_grad_batches=2 .*AdaptiveAccumulation"):
        single(accumulate_grad_batches=2, callbacks=[adapts(), Sets()]).fit(linear(), rows(4, 4))


def test_a_stream_is_left_the_rest():
    """Catches a stream that is read to its end, and one that is cut off where K grows."""
    stream, callback = iter(rows(*[4] * 60)), adapts()
    t = single(accumulate_grad_batches=2, callbacks=callback, max_steps=9, max_epochs=None)
    t.fit(linear(), stream)
    assert len(callback.chosen) > 1 and t.global_step == 9
    assert 0 <= 60 - t.micro_step - len(list(stream)) <= 3


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize(
    ("before", "after"), [("none", "monitor"), ("monitor", "none"), ("none", "adaptive"), ("adaptive", "schedule")]
)
def test_a_resume_with_other_callbacks(tmp_path, devices, before, after):
    """Catches a run that can't begin or end to measure the noise scale, and estimates that are taken for weights."""
    loader, options = rows(*[4] * 20 * devices), {"strategy": "single" if devices == 1 else "ddp", "devices": devices}
    made = {"none": [], "schedule": [], "monitor": [NoiseScaleMonitor(SCALE)], "adaptive": [adapts()]}
    saves = ModelCheckpoint(tmp_path, every_n_micro_steps=1, save_top_k=-1)
    trainer(accumulate_grad_batches=2, callbacks=[*made[before], saves], **options).fit(linear(), loader)
    every_k = AccumulationSchedule({0: 2, 6: 3}, by="step") if after == "schedule" else 2
    t = trainer(accumulate_grad_batches=every_k, callbacks=made[after], **options)
    for micro_step in (4, 5):
        t.fit(linear(), loader, ckpt_path=tmp_path / f"epoch=0-micro_step={micro_step}")
        assert t.micro_step == 20
        if made[after]:
            assert float(made[after][0]._state.weight) > 2
