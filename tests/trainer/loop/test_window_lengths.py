"""K by optimizer step, samples or tokens: which windows it makes, that they are repeated exactly, and what it costs."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiles import counted_compiles
from training import Logged, Recorder, assert_same, single, trainer

import jaxaccum
from jaxaccum import AccumulationSchedule
from jaxaccum.callbacks import Callback, GradientAccumulationScheduler, ModelCheckpoint
from jaxaccum.trainer.loop.counters import Counters
from jaxaccum.trainer.loop.window_lengths import WindowLengths

STEPS = AccumulationSchedule({0: 1, 2: 2, 4: 3}, by="step")
SAMPLES = AccumulationSchedule({0: 1, 16: 2, 40: 3}, by="samples")
TOKENS = AccumulationSchedule({0: 1, 16.5: 2, 64: 3}, by="tokens")


def weighing(optimizer=None):
    """A task whose micro-batches weigh the sum of their numbers."""
    return jaxaccum.Task(
        init=lambda key, batch: jnp.zeros(()),
        loss=lambda w, batch, key: jaxaccum.Weighted((w - batch) @ (w - batch), batch.sum()),
        optimizer=optimizer or optax.adam(0.1),
    )


def batches(examples, count, value=1.0):
    return [np.full(examples, value, np.float32) for _ in range(count)]


def closed(strategy, schedule, loader, the_task=None, **options):
    """(the lengths of the windows of a run, its Trainer)."""
    ends = Recorder(lambda t: (t.global_step, t.micro_step))
    t = trainer(strategy=strategy, accumulate_grad_batches=schedule, callbacks=ends, **options)
    t.fit(the_task or weighing(), loader)
    last = dict(ends.seen)  # The last micro-step at each number of optimizer steps.
    first = {step: micro_step for step, micro_step in reversed(ends.seen)}
    return np.diff([0, *(first[step] for step in sorted(last) if step)]).tolist(), t


# 8 examples of weight 1 a micro-step. By tokens, windows 0 to w - 2 weigh 0, 0, 8, 16, 24, 32, 48, 64.
WANT = {"step": [1, 1, 2, 2, 3, 3, 3, 1], "samples": [1, 1, 2, 2, 3, 3, 3, 1], "tokens": [1, 1, 1, 1, 2, 2, 2, 3, 3]}


@pytest.mark.parametrize(
    ("schedule", "strategy", "fuse"),
    [
        (STEPS, "single", False),
        (STEPS, "single", True),
        (SAMPLES, "ddp", False),
        (SAMPLES, "dp", True),
        (TOKENS, "single", True),
        (TOKENS, "ddp", False),
        (TOKENS, "ddp", True),
        (TOKENS, "dp", False),
        (TOKENS, "zero", False),
    ],
)
def test_k_changes_at_a_windows_start(schedule, strategy, fuse):
    """Catches a lag of another number of windows, one device's weight, and a K that takes effect in mid-window."""
    each, group = (2, 4) if strategy in ("ddp", "zero") else (8, 1)
    options = {"devices": 1 if strategy == "single" else 4, "fuse_windows": fuse}
    made, _ = closed(strategy, schedule, iter(batches(each, 16 * group)), **options)
    assert made == WANT[schedule.by]


@pytest.mark.parametrize("devices", [1, 4, 8])
def test_a_resume_at_any_micro_step_repeats_the_windows(tmp_path, devices):
    """Catches weights that a checkpoint lacks, another lag after a resume, and a K that is decided in mid-window."""
    rng, the_task = np.random.default_rng(0), weighing()
    loader = [rng.uniform(0.5, 1.5, 8 // devices + 1).astype(np.float32) for _ in range(14 * devices)]
    schedule = AccumulationSchedule({0: 1, 0.9 * 8: 3, 5.5 * 8: 2}, by="tokens")

    def run(log, *callbacks):
        return trainer(
            strategy="single" if devices == 1 else "ddp",
            devices=devices,
            accumulate_grad_batches=schedule,
            callbacks=callbacks,
            logger=log,
            log_every_n_steps=1,
        )

    log, saves = Logged(), ModelCheckpoint(tmp_path, every_n_micro_steps=1, save_top_k=-1)
    unbroken = run(log, saves)
    want = unbroken.fit(the_task, iter(loader))
    lengths = [record["accumulate_grad_batches"] for record in log.records]
    assert lengths[:3] == [1, 1, 3] and lengths[-1] == 2 and unbroken.micro_step == 14
    resumed_log = Logged()
    resumed = run(resumed_log)
    for i in range(1, 14):
        got = resumed.fit(the_task, iter(loader), ckpt_path=tmp_path / f"epoch=0-micro_step={i}")
        assert_same(got, want)
        assert resumed_log.records == log.records[len(log.records) - len(resumed_log.records) :]
        assert resumed._at == unbroken._at and resumed._run.lengths.state_dict() == unbroken._run.lengths.state_dict()


def test_the_newest_window_is_not_waited_for():
    """Catches a K that follows from the window that the devices may still run."""

    class Running:
        def copy_to_host_async(self):
            pass

        def __array__(self, *args, **kwargs):
            raise AssertionError("waited for the devices")

    lengths = WindowLengths(AccumulationSchedule({0: 1, 5: 2}, by="tokens"))
    lengths.close(jnp.float32(5), 1)
    lengths.close(Running(), 1)
    assert lengths.every_k(Counters(global_step=2)) == lengths.every_k(Counters(global_step=2)) == 2


@pytest.mark.parametrize(
    ("schedule", "step", "want"),
    [
        (AccumulationSchedule({0: 1, 2: 4, 4: 2}, by="step"), 1, 1 + 4 + 4 + 2),
        (AccumulationSchedule({0: 1, 2: 4, 4: 2}, by="step"), 3, 4 + 2),
        (AccumulationSchedule({0: 1, 2: 4, 4: 2}, by="samples"), 1, 1 + 4 * 3),
    ],
)
def test_the_micro_steps_that_are_left(schedule, step, want):
    """Catches a stream that is read beyond the last window, or from which too little is read after a resume."""
    assert WindowLengths(schedule).most_micro_steps(Counters(global_step=step), 5) == want


def test_what_is_left_out_weighs_nothing():
    """Catches tokens of micro-batches that were dropped, by which the schedule would run ahead."""
    loader = batches(8, 6)
    loader[1] = np.full(8, np.nan, np.float32)
    schedule = AccumulationSchedule({0: 1, 16: 3}, by="tokens")
    # Windows 0 to w - 2 weigh 0, 0, 8, 8, 16.
    assert closed("single", schedule, loader, nonfinite="drop")[0] == [1, 1, 1, 1, 2]


def test_a_plain_loss_weighs_its_examples_and_windows_end_with_epochs():
    """Catches a lag that starts anew with an epoch, and counts of one epoch alone."""
    plain = jaxaccum.Task(lambda key, batch: jnp.zeros(()), lambda w, batch, key: w * batch.mean(), optax.sgd(1.0))
    schedule = AccumulationSchedule({0: 1, 16: 2, 40: 4}, by="tokens")
    # Windows 0 to w - 2 weigh 0, 0, 8, 16; 24, 40; 56, 80.
    made, t = closed("single", schedule, batches(8, 5, value=7), plain, max_epochs=3)
    assert made == [1, 1, 1, 2, 2, 3, 4, 1] and t.global_step == 8


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("schedule", [STEPS, SAMPLES, TOKENS], ids=lambda schedule: schedule.by)
def test_max_steps_leaves_a_stream_the_rest(schedule, fuse):
    """Catches a stream that is read to its end, and one that is cut off where K grows."""
    stream = iter(batches(8, 40))
    made, _ = closed("single", schedule, stream, max_steps=6, max_epochs=None, fuse_windows=fuse)
    assert made == WANT[schedule.by][:6]
    ahead = 40 - sum(made) - len(list(stream))
    assert ahead == 0 if schedule.by == "step" else 0 <= ahead <= 3


def test_a_change_compiles_nothing():
    """Catches a K that is static in a program."""
    the_task, loader = weighing(), batches(8, 16)
    t = single(accumulate_grad_batches=TOKENS)
    t.fit(the_task, loader[:6])
    with counted_compiles() as compiles:
        t.fit(the_task, loader)
    assert t.global_step == 9 and not compiles


def test_the_callback_takes_a_schedule():
    """Catches a callback that takes keys by samples for epochs."""
    ends = Recorder(lambda t: t.global_step)
    single(callbacks=[GradientAccumulationScheduler(SAMPLES), ends]).fit(weighing(), batches(8, 7))
    assert ends.seen == [1, 2, 2, 3, 3, 4, 5]


def test_a_hook_does_not_set_k_beside_a_schedule():
    """Catches a K that is taken and then never used."""

    class Sets(Callback):
        def on_train_epoch_start(self, trainer, task):
            trainer.accumulate_grad_batches = 2

    with pytest.raises(RuntimeError, match=r"accumulate_grad_batches=2 .*follows an AccumulationSchedule"):
        single(accumulate_grad_batches=STEPS, callbacks=Sets()).fit(weighing(), batches(8, 2))
