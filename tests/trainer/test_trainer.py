"""The Trainer: what it shares with PyTorch Lightning or improves, row by row; then its loop and its errors."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training import Logged, Recorder, assert_close, assert_same, loader, ones, single, slope, task, trainer

import jaxaccum
from jaxaccum.callbacks import Callback, GradientAccumulationScheduler, ModelCheckpoint
from jaxaccum.loggers import records


def steps(batches, **options):
    """The optimizer steps made after every micro-step of a fit."""
    recorder = Recorder(lambda t: t.global_step)
    single(callbacks=recorder, **options).fit(slope(), batches)
    return recorder.seen


def by(scheduling, unit):
    return jaxaccum.AccumulationSchedule(scheduling, by=unit)


def test_row_1_k_is_an_int_or_a_dict_and_1_by_default():
    """Catches a dict that crashes in fit, as Lightning 2's does."""
    batches = ones(2, 2, 2, 2)
    assert steps(batches) == [1, 2, 3, 4]
    assert steps(batches, accumulate_grad_batches=2) == [0, 1, 1, 2]
    assert steps(batches, accumulate_grad_batches={0: 4, 1: 2}, max_epochs=2) == [0, 0, 0, 1, 1, 2, 2, 3]
    assert steps(batches, accumulate_grad_batches=jaxaccum.AccumulationSchedule({0: 4})) == [0, 0, 0, 1]


@pytest.mark.parametrize("k", [0, -1, 2.5, True, "2", None])
def test_row_2_a_bad_int_is_refused_at_construction(k):
    """Catches a K that divides by zero, ascends or is found out in mid-run."""
    with pytest.raises((TypeError, ValueError), match=f"accumulate_grad_batches must be .*{k}"):
        single(accumulate_grad_batches=k)


@pytest.mark.parametrize("bad", [{}, {-1: 2}, {0: 0}, {0.5: 2}, {0: True}, {True: 2}])
def test_row_3_a_bad_schedule_is_refused_at_construction(bad):
    """Catches a bool for an int, and a schedule that is checked only when its epoch comes."""
    for make in (lambda: single(accumulate_grad_batches=bad), lambda: GradientAccumulationScheduler(bad)):
        with pytest.raises((TypeError, ValueError)):
            make()


def test_row_4_the_largest_epoch_so_far_wins_and_the_callers_dict_stays():
    """Catches K other than 1 before the first key, an order that matters, and a dict with an entry more."""
    scheduling = {3: 1, 1: 2, 2: 4}
    for options in (
        {"accumulate_grad_batches": scheduling},
        {"callbacks": [GradientAccumulationScheduler(scheduling)]},
    ):
        k = Recorder(lambda t: t.accumulate_grad_batches)
        options["callbacks"] = [*options.get("callbacks", []), k]
        single(max_epochs=4, **options).fit(slope(), ones(2))
        assert k.seen == [1, 2, 4, 1]
    assert scheduling == {3: 1, 1: 2, 2: 4} and list(scheduling) == [3, 1, 2]


def test_row_5_k_changes_at_an_epochs_start_and_windows_start_with_it():
    """Catches a window that runs on into the next epoch, and a K that anyone can change in mid-window."""
    made = steps(ones(*[2] * 5), accumulate_grad_batches={0: 2, 1: 3}, max_epochs=2)
    assert made == [0, 1, 1, 2, 3, 3, 3, 4, 4, 5]

    class Changes(Callback):
        def on_train_batch_start(self, trainer, task, batch, batch_idx):
            trainer.accumulate_grad_batches = 2

    with pytest.raises(RuntimeError, match=r"accumulate_grad_batches=2 .*on_train_epoch_start"):
        single(callbacks=Changes()).fit(slope(), ones(2))


def test_row_6_the_last_batch_steps_where_the_loader_has_no_length():
    """Catches an epoch's end that is known only to loaders with a length."""

    class Stream:
        def __iter__(self):
            yield from ones(*[2] * 5)

    assert steps(Stream(), accumulate_grad_batches=4, max_epochs=2) == [0, 0, 0, 1, 2, 2, 2, 2, 3, 4]


@pytest.mark.parametrize(
    ("how", "clip", "want"),
    [("exact", None, [-1, -1, -1]), ("divide_by_k", None, [-1, -1, -0.5]), ("divide_by_k", 0.75, [-0.75, -0.75, -0.5])],
)
def test_row_7_a_partial_window_is_divided_by_what_it_holds_or_as_lightning_does(how, clip, want):
    """Catches the division by K where it was not asked for, or after the clipping: K=4 and N=10 give 1, 1, 0.5."""
    moved = Recorder(lambda t: float(t.state.params))
    options = {"partial_window": how, "gradient_clip_val": clip}
    single(accumulate_grad_batches=4, callbacks=moved, **options).fit(slope(), ones(*[2] * 10))
    positions = np.array([0, *moved.seen[3::4], moved.seen[-1]])
    np.testing.assert_allclose(np.diff(positions), want, rtol=1e-6)


def test_row_8_global_step_counts_optimizer_steps_and_batch_idx_micro_batches():
    """Catches counters that lag behind the batch that just ended, and max_steps in micro-steps."""
    look = lambda t: (t.global_step, t.micro_step, t.samples_seen, t.current_epoch, t.window_step)
    seen = Recorder(look)
    t = single(accumulate_grad_batches=2, max_epochs=-1, max_steps=3, callbacks=seen)
    t.fit(slope(), ones(3, 3, 2))
    assert seen.seen == [(0, 1, 3, 0, 1), (1, 2, 6, 0, 0), (2, 3, 8, 0, 0), (2, 4, 11, 1, 1), (3, 5, 14, 1, 0)]
    assert t.current_epoch == 1


def test_row_9_learning_rate_schedules_count_optimizer_steps():
    """Catches a schedule that ticks with every micro-step, or with the epoch's batches."""
    moved = Recorder(lambda t: float(t.state.params))
    rate = lambda step: jnp.array([1.0, 10.0, 100.0])[step]
    single(accumulate_grad_batches=2, callbacks=moved).fit(slope(optax.sgd(rate)), ones(*[2] * 5))
    assert moved.seen == [0, -1, -1, -11, -111]


def test_row_10_an_argument_beside_the_callback_is_refused_and_a_second_fit_works():
    """Catches K from two places, and a fit that leaves its K behind."""
    callback = GradientAccumulationScheduler({0: 2, 1: 4})
    for k in (3, {0: 2}):
        with pytest.raises(ValueError, match=r"accumulate_grad_batches=.*GradientAccumulationScheduler"):
            single(accumulate_grad_batches=k, callbacks=callback)
    made = Recorder(lambda t: t.global_step)
    t = single(accumulate_grad_batches=1, callbacks=[callback, made], max_epochs=2)
    for _ in range(2):
        made.seen.clear()
        t.fit(slope(), ones(*[2] * 4))
        assert made.seen == [0, 1, 1, 2, 2, 2, 2, 3] and t.current_epoch == 2


def test_row_11_two_schedulers_are_refused():
    """Catches the last one winning in silence."""
    with pytest.raises(ValueError, match="more than one GradientAccumulationScheduler"):
        single(callbacks=[GradientAccumulationScheduler({0: 2}), GradientAccumulationScheduler({0: 3})])


@pytest.mark.parametrize("strategy", ["single", "ddp", "dp", "zero"])
def test_row_12_clipping_is_once_a_window_on_the_mean_of_all_devices(strategy):
    """Catches clipping of each micro-batch or of each device's share: 9 and -1 have a mean of 4, clipped to 2."""
    moved = Recorder(lambda t: float(t.state.params))
    batches = [np.full(2, value, np.float32) for value in (9, 9, -1, -1)]
    devices, k = {"single": (1, 4), "ddp": (2, 2), "zero": (2, 2), "dp": (2, 4)}[strategy]
    options = {"devices": devices, "accumulate_grad_batches": k, "gradient_clip_val": 2.0}
    trainer(strategy=strategy, callbacks=moved, **options).fit(slope(), batches)
    assert moved.seen[-1] == -2


@pytest.mark.parametrize(("x64", "sizes"), [(False, [8] * 32), (True, [8] * 20 + [5])], ids=["equal", "ragged"])
def test_row_13_ddp_is_one_device_with_p_times_k(x64, sizes):
    """Catches a window of the wrong batches, a fill that counts, masks that differ, and a mean of means."""
    with jax.enable_x64(x64):
        options = {"max_epochs": 2, "gradient_clip_val": 0.5, "log_every_n_steps": 1}
        run = lambda strategy, k, log: trainer(strategy=strategy, accumulate_grad_batches=k, logger=log, **options)
        logs = Logged(), Logged()
        one, eight = run("single", 16, logs[0]), run("ddp", 2, logs[1])
        batches, the_task = loader(*sizes), task(dropout=0.2)
        want, got = one.fit(the_task, batches, batches[:5]), eight.fit(the_task, batches, batches[:5])
        tolerance = 1e-12 if x64 else 1e-6
        assert_close((got.params, got.opt_state), (want.params, want.opt_state), tolerance)
        assert eight.global_step == one.global_step and eight.samples_seen == one.samples_seen
        assert eight.effective_batch_size == one.effective_batch_size == 8 * 16
        differ = ("micro_step", "accumulate_grad_batches")
        for theirs, ours in zip(*(log.records for log in logs), strict=True):
            want, got = ({name: x for name, x in record.items() if name not in differ} for record in (theirs, ours))
            assert got == pytest.approx(want, rel=100 * tolerance)


@pytest.mark.parametrize("x64", [False, True])
def test_zero_is_ddp_with_its_optimizer_state_split_over_the_devices(x64):
    """Catches an update of one device's share alone, a norm of one share, and a state that is whole everywhere."""
    with jax.enable_x64(x64):
        rng = np.random.default_rng(0)
        batches = [{"x": rng.standard_normal((4, 16)), "y": rng.standard_normal((4, 2))} for _ in range(11)]
        run = lambda strategy: trainer(strategy=strategy, devices=4, accumulate_grad_batches=2, gradient_clip_val=0.5)
        ddp, zero = run("ddp").fit(task(dropout=0.2), batches), run("zero").fit(task(dropout=0.2), batches)
        assert_close((zero.params, zero.opt_state), (ddp.params, ddp.opt_state), 1e-12 if x64 else 1e-6)
        moments = [leaf for leaf in jax.tree.leaves(zero.opt_state) if leaf.shape == (16, 2)]
        assert len(moments) == 2 and all(leaf.sharding.shard_shape((16, 2)) == (4, 2) for leaf in moments)
        assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(zero.params))


@pytest.mark.parametrize(("x64", "sizes"), [(False, [16] * 6), (True, [16, 19, 5, 16])], ids=["whole", "with a rest"])
def test_row_14_dp_is_one_device_with_k(x64, sizes):
    """Catches a rest that is lost, or that counts once for each device."""
    with jax.enable_x64(x64):
        batches = loader(*sizes)
        run = lambda strategy: trainer(strategy=strategy, accumulate_grad_batches=3, max_epochs=2)
        one, eight = run("single"), run("dp")
        want, got = one.fit(task(), batches, batches), eight.fit(task(), batches, batches)
        assert_close((got.params, got.opt_state), (want.params, want.opt_state), 1e-12 if x64 else 1e-6)
        assert (eight.global_step, eight.micro_step) == (one.global_step, one.micro_step)
        assert eight.effective_batch_size == 16 * 3
        numbers = lambda t: {name: float(value) for name, value in t.callback_metrics.items()}
        assert numbers(eight) == pytest.approx(numbers(one), rel=1e-5)


def test_row_15_what_is_logged_is_the_windows_weighted_mean():
    """Catches the last micro-batch's loss logged, and an interval in micro-steps."""
    log = Logged()
    loss = lambda w, batch, key: (jnp.mean(batch) + 0 * w, {"largest": jaxaccum.Weighted(jnp.max(batch), 1)})
    the_task = jaxaccum.Task(lambda key, batch: jnp.zeros(()), loss, optax.sgd(1.0))
    batches = [np.full(n, value, np.float32) for n, value in [(1, 1), (3, 2), (1, 3), (3, 4), (1, 5), (1, 6)]]
    single(accumulate_grad_batches=2, log_every_n_steps=2, logger=log).fit(the_task, batches)
    _, record, _ = log.records  # The first window and the last one are always logged.
    assert record == {
        "step": 2,
        "epoch": 0,
        "micro_step": 4,
        "samples_seen": 8,
        "accumulate_grad_batches": 2,
        "effective_batch_size": 4,
        "train_loss": 3.75,
        "train_largest": 3.5,
    }


@pytest.mark.parametrize("strategy", ["single", "ddp"])
def test_row_16_validation_in_mid_window_keeps_what_is_pending(strategy):
    """Catches a validation that adds to the sums, clears them, or draws a dropout mask."""
    batches, the_task = loader(*[4] * 12), task(dropout=0.5)
    run = lambda **options: trainer(strategy=strategy, accumulate_grad_batches=3, **options)
    losses = Recorder(lambda t: t.callback_metrics.get("val_loss"))
    with_validation = run(val_check_interval=1, callbacks=losses).fit(the_task, batches, batches[:2])
    assert_same(with_validation, run().fit(the_task, batches))
    assert len(set(losses.seen[1:3])) == 1  # in mid-window the parameters are the same, and no mask is drawn


@pytest.mark.parametrize(
    ("flush", "division", "end"), [(False, "exact", -1), (True, "exact", -4), (True, "divide_by_k", -2.5)]
)
def test_row_17_a_stop_in_mid_window_keeps_it_or_flushes_it(flush, division, end):
    """Catches a partial window that a stop drops."""

    class Stop(Callback):
        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
            trainer.should_stop = batch_idx == 5

    log, options = Logged(), {"flush_on_stop": flush, "partial_window": division}
    t = single(accumulate_grad_batches=4, callbacks=Stop(), logger=log, log_every_n_steps=1, **options)
    state = t.fit(slope(), [np.full(2, value, np.float32) for value in (1, 1, 1, 1, 2, 4, 8, 8)])
    assert float(state.params) == end
    assert [record["step"] for record in log.records if "train_loss" in record] == ([1, 2] if flush else [1])
    assert (t.global_step, t.window_step, t.micro_step, t.current_epoch) == ((2, 0) if flush else (1, 2)) + (6, 0)
    if not flush:
        assert int(state.pending.sums.mini_step) == 2 and float(state.pending.sums.acc_grads) == 2 * (2 + 4)


@pytest.mark.parametrize("flush", [False, True])
def test_row_17_a_keyboard_interrupt_keeps_the_window_or_flushes_it(flush, tmp_path):
    """Catches an interrupt that loses the window, or that is swallowed, and one that is taken for a second signal."""

    class Interrupts(Callback):
        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
            if trainer.micro_step == 3:
                raise KeyboardInterrupt

        def on_exception(self, trainer, task, error):
            self.seen = type(error), trainer.micro_step, float(trainer.state.params)

    interrupts = Interrupts()
    t = single(accumulate_grad_batches=4, flush_on_stop=flush, callbacks=[interrupts, ModelCheckpoint(tmp_path)])
    with pytest.raises(KeyboardInterrupt):
        t.fit(slope(), ones(2, 2, 2, 2))
    assert interrupts.seen == (KeyboardInterrupt, 3, -1 if flush else 0)
    assert [path.name for path in tmp_path.iterdir()] == ["epoch=0-micro_step=3"]


def test_row_18_a_checkpoint_holds_the_pending_gradients_and_k(tmp_path):
    """Catches a resume whose window begins anew, and one with K=1, or the schedule's, until the next epoch."""
    where = lambda: Recorder(lambda t: (t.accumulate_grad_batches, t.window_step, float(t.state.params)))
    whole, rest = where(), where()
    options = {"accumulate_grad_batches": {0: 3, 1: 2}, "max_epochs": 2}
    saves = ModelCheckpoint(tmp_path, every_n_micro_steps=1, save_top_k=-1)
    batches, the_task = [np.full(2, value, np.float32) for value in (1, 2, 6, 4, 8)], slope()
    single(**options, callbacks=[whole, saves]).fit(the_task, batches)
    assert [step[2] for step in whole.seen[:5]] == [0, 0, -3, -3, -9]
    resumed = single(**options, callbacks=rest)
    for i in range(1, 10):
        rest.seen.clear()
        resumed.fit(the_task, batches, ckpt_path=tmp_path / f"epoch={(i - 1) // 5}-micro_step={i}")
        assert rest.seen == whole.seen[i:]


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({"accumulate_grad_batches": {0: 8, 4: 4, 8: 1}, "max_epochs": 10}, [2] * 14),
        ({"accumulate_grad_batches": 3, "max_epochs": 2, "strategy": "ddp"}, [2] * 29 + [1]),
        ({"accumulate_grad_batches": 3, "max_epochs": 2, "strategy": "dp"}, [16, 16, 3, 8]),
        ({"callbacks": GradientAccumulationScheduler({1: 2}), "max_epochs": 3, "limit_train_batches": 0.5}, [2] * 11),
        ({"accumulate_grad_batches": 2, "max_steps": 5, "max_epochs": 9, "limit_train_batches": 3}, [2] * 11),
        ({"accumulate_grad_batches": by({1: 2, 3: 4, 6: 3}, "step"), "max_epochs": 3}, [2] * 11),
        ({"accumulate_grad_batches": by({3: 3, 40: 2}, "samples"), "max_epochs": 3}, [2] * 11),
        ({"accumulate_grad_batches": by({9: 2, 40: 1}, "samples"), "max_epochs": 3, "strategy": "ddp"}, [2] * 48),
    ],
)
def test_row_19_estimated_stepping_batches_is_what_happens(options, sizes):
    """Catches an estimate that ignores the schedule (160 for an actual 56), the limits or the devices."""
    t = trainer(**{"strategy": "single"} | options)
    t.fit(slope(), ones(*sizes))
    assert t.estimated_stepping_batches == t.global_step


def test_row_19_the_estimate_of_an_endless_run():
    """Catches an int made up where there is none."""

    class Stream:
        def __iter__(self):
            yield from ones(2, 2)

    tokens = {"accumulate_grad_batches": by({0: 2}, "tokens"), "max_epochs": 1}
    for options, want in [
        ({"max_steps": 3}, 3),
        ({"max_steps": 3, "max_epochs": 1}, 3),
        ({}, math.inf),
        (tokens | {"max_steps": 3}, 3),
        (tokens, math.inf),
    ]:
        t = single(**options)
        t.fit(slope(), Stream())
        assert t.estimated_stepping_batches == want


@pytest.mark.parametrize("weighted", [False, True])
def test_row_21_unequal_batches_weigh_their_examples(weighted):
    """Catches the mean of means: K=3 and sizes 2, 2, 1 give 3.667 for a true 2.6."""
    batches = [np.array(x, np.float32) for x in ([1, 1], [2, 2], [7])]
    the_task = slope()
    if weighted:
        loss = lambda w, batch, key: jaxaccum.Weighted(w * jnp.sum(batch), batch.shape[0])
        the_task = jaxaccum.Task(the_task.init, loss, the_task.optimizer)
    state = single(accumulate_grad_batches=3).fit(the_task, batches)
    np.testing.assert_allclose(state.params, -2.6, rtol=1e-6)


@pytest.mark.parametrize("strategy", ["single", "ddp", "dp"])
def test_row_22_hooks_see_the_loss(strategy):
    """Catches loss/K, one device's loss, and copies that count."""

    class Reads(Callback):
        seen = ()

        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
            assert dict(outputs) == {"loss": outputs["loss"]}
            self.seen += (outputs["loss"],)

    reads = Reads()
    loss = lambda w, batch, key: jnp.mean(batch) + 0 * w
    the_task = jaxaccum.Task(lambda key, batch: jnp.zeros(()), loss, optax.sgd(1.0))
    batches = [np.arange(n, dtype=np.float32) for n in (4, 4, 3)]
    trainer(strategy=strategy, devices="auto" if strategy == "single" else 2, callbacks=reads).fit(the_task, batches)
    assert reads.seen == ((1.5, 1.0) if strategy == "ddp" else (1.5, 1.5, 1.0))


def test_row_23_a_bare_callback_and_no_max_epochs():
    """Catches a callback that must be in a list, and 1000 epochs without a word."""

    class Stop(Callback):
        def on_train_epoch_end(self, trainer, task):
            trainer.should_stop = trainer.current_epoch == 2

    t = jaxaccum.Trainer(accumulate_grad_batches=7, enable_progress_bar=False, callbacks=Stop())
    with pytest.warns(UserWarning, match="max_epochs is not set.*1000"):
        t.fit(slope(), ones(2))
    assert t.current_epoch == 3


def test_nothing_compiles_when_k_changes():
    """Catches K in a program: two of them serve every K, on one device and on several."""
    for strategy in ("single", "ddp", "zero"):
        t = trainer(strategy=strategy, accumulate_grad_batches={0: 4, 1: 2, 2: 8, 3: 3, 4: 5}, max_epochs=5)
        t.fit(slope(), ones(*[2] * 64))
        programs = t._running.setup.programs
        assert (programs._accumulate._cache_size(), programs._step._cache_size()) == (1, 1)


def test_a_second_fit_of_the_same_task_compiles_nothing():
    """Catches programs of each fit's own, and ones kept for a model or a task that is another."""
    # Of the first model ZeRO splits the weights' moments by row, of the second by column.
    batches = [{"x": np.ones((4, n), np.float32), "y": np.ones((4, 2), np.float32)} for n in (8, 3)]
    run = lambda: trainer(strategy="zero", devices=2, accumulate_grad_batches=2)
    t, the_task = run(), task(optax.adam(0.1))
    first = t.fit(the_task, batches[:1] * 4)
    made = t._running.setup.programs
    assert_same(t.fit(the_task, batches[:1] * 4), first)
    assert t._running.setup.programs is made and (made._start._cache_size(), made._step._cache_size()) == (1, 1)
    for another, wide in ((the_task, batches[1:] * 4), (task(optax.sgd(0.1)), batches[1:] * 4)):
        assert_same(t.fit(another, wide), run().fit(another, wide))


def test_the_accumulating_program_takes_parameters_and_pending_sums_alone():
    """Catches an optimizer state that passes through every micro-step."""
    t = single(accumulate_grad_batches=2)
    state = t.fit(task(optax.adam(0.1)), loader(4, 4))
    moments = len(jax.tree.leaves(state.opt_state))
    lowered = t._running.setup.programs._accumulate.lower(
        state.params, state.pending, loader(4)[0], t._strategy.constant((0, 1, 1), np.int32)
    )
    taken = len(jax.tree.leaves(lowered.args_info))
    assert moments and taken == len(jax.tree.leaves((state.params, state.pending))) + 2 + 1


@pytest.mark.parametrize("strategy", ["ddp", "dp", "zero"])
def test_devices_meet_once_a_window(strategy):
    """Catches a reduction in the accumulating program, of a log for instance, and a step's that runs in a loop."""
    t = trainer(strategy=strategy, accumulate_grad_batches=2)
    state = t.fit(task(optax.adam(0.1), model_state=True), loader(8, 8, 8, 8))
    (piece,) = t._strategy.pieces(loader(8) * t._strategy.group)
    programs = t._running.setup.programs
    accumulate = programs._accumulate.lower(state.params, state.pending, *piece.inputs).compile()
    step = programs._step.lower(state, *piece.inputs, {}).compile()
    assert jaxaccum.collectives(accumulate).count() == 0
    assert jaxaccum.collectives(step).count() > 0 and jaxaccum.collectives(step).count(in_loop=True) == 0


def test_model_state_is_carried_in_the_window_and_averaged_over_devices_after_it():
    """Catches a state that restarts, that one device's replaces or goes on with, or that weight-0 copies advance."""
    batches = loader(4, 4, 4, 4, 4)
    means = [batch["x"].mean() for batch in batches]
    state = single(accumulate_grad_batches=2).fit(task(model_state=True), batches)
    np.testing.assert_allclose(state.model_state["seen"], sum(means), rtol=1e-5)
    assert int(state.model_state["steps"]) == 5
    state = trainer(strategy="ddp", devices=2, accumulate_grad_batches=2).fit(task(model_state=True), batches)
    got, local = state.model_state, state.pending.model_state
    # Window 1: batches 0 and 2 on the first device, 1 and 3 on the second; window 2: batch 4 on the first.
    np.testing.assert_allclose(got["seen"], sum(means[:4]) / 2 + means[4] / 2, rtol=1e-5)
    assert int(got["steps"]) == 3
    np.testing.assert_array_equal(local["seen"], [got["seen"]] * 2)


def test_hooks_run_in_lightnings_order_and_in_the_order_of_the_callbacks():
    """Catches a hook that is missing, late, or called with the wrong arguments."""
    calls = []

    class Writes(Callback):
        def __init__(self, name):
            self.name = name

    def writer(hook):
        def write(self, trainer, task, *args):
            calls.append((hook, self.name, task is the_task, len(args)))

        return write

    arguments = {"on_train_batch_start": 2, "on_train_batch_end": 3, "on_exception": 1}
    for hook in [name for name in vars(Callback) if name.startswith("on_")]:
        setattr(Writes, hook, writer(hook))
    the_task = slope()
    single(callbacks=[Writes("a"), Writes("b")], max_epochs=2, val_check_interval=1).fit(the_task, ones(2), ones(2))
    names = [hook for hook, name, *_ in calls if name == "a"]
    epoch = ["on_train_epoch_start", "on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end"]
    epoch += ["on_validation_start", "on_validation_epoch_end", "on_validation_end", "on_train_epoch_end"]
    assert names == ["on_fit_start", "on_train_start", *epoch, *epoch, "on_train_end", "on_fit_end"]
    assert [name for _, name, *_ in calls] == ["a", "b"] * len(names)
    assert all(right and args == arguments.get(hook, 0) for hook, _, right, args in calls)


def test_a_loader_that_raises_loses_nothing_that_it_gave():
    """Catches batches dropped because they were fetched ahead, and an error that is not the user's."""

    class Breaks:
        def __iter__(self):
            yield from ones(2, 2, 2, 2, 2)
            raise OSError("disk")

    errors = []

    class Reads(Callback):
        def on_exception(self, trainer, task, error):
            errors.append(error)

    t = single(accumulate_grad_batches=4, callbacks=Reads())
    with pytest.raises(OSError, match="disk") as caught:
        t.fit(slope(), Breaks())
    assert errors == [caught.value]
    assert (t.micro_step, t.global_step, t.window_step) == (5, 1, 1)
    assert float(t.state.params) == -1 and int(t.state.pending.sums.mini_step) == 1


def test_a_callback_that_raises_is_the_users_error():
    """Catches an error that is swallowed, and records that are lost with it."""

    class Breaks(Callback):
        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
            if batch_idx == 3:
                raise KeyError("mine")

    log = Logged()
    t = single(callbacks=Breaks(), log_every_n_steps=1, logger=log)
    with pytest.raises(KeyError, match="mine"):
        t.fit(slope(), ones(*[2] * 6))
    assert [record["step"] for record in log.records] == [1, 2, 3] and t.micro_step == 4
    assert float(t.state.params) == -4


def test_a_nan_is_propagated_dropped_or_raised():
    """Catches a NaN that is ignored silently, and one that costs more than its micro-batch."""
    batches = [np.full(2, value, np.float32) for value in (1, np.nan, 3, 5)]
    assert np.isnan(single(accumulate_grad_batches=4).fit(slope(), batches).params)
    t = single(accumulate_grad_batches=4, nonfinite="drop", log_every_n_steps=1)
    state = t.fit(slope(), batches)
    assert float(state.params) == -3 and int(state.pending.sums.dropped) == 1
    assert np.isfinite(t.callback_metrics["train_loss"])
    t = single(accumulate_grad_batches=4, detect_anomaly=True)
    with pytest.raises(FloatingPointError, match=r"micro-step 1 of epoch 0.*nan.*nonfinite='drop'"):
        t.fit(slope(), batches)
    assert t.micro_step == 2 and float(t.state.pending.sums.acc_grads) == 2
    with pytest.raises(ValueError, match="detect_anomaly=True"):
        single(nonfinite="drop", detect_anomaly=True)


def test_an_endless_loader_ends_by_max_steps_or_by_limit():
    """Catches a loader read to its end, and a batch that the look-ahead takes out of the next epoch."""

    def endless():
        i = 0
        while True:
            yield np.full(2, i, np.float32)
            i += 1

    t = single(max_steps=5, max_epochs=-1, accumulate_grad_batches=2)
    t.fit(slope(), endless())
    assert (t.global_step, t.micro_step) == (5, 10)
    t = single(max_epochs=3, limit_train_batches=4, accumulate_grad_batches=4)
    assert float(t.fit(slope(), endless()).params) == -(1.5 + 5.5 + 9.5)


@pytest.mark.parametrize(("limit", "micro_steps"), [(3, 3), (0.5, 5), (1, 1), (1.0, 10), (100, 10), (0.01, 1)])
def test_limit_train_batches_is_lightnings(limit, micro_steps):
    """Catches 1 taken for all and 1.0 for one."""
    t = single(limit_train_batches=limit)
    t.fit(slope(), ones(*[2] * 10))
    assert t.micro_step == micro_steps


@pytest.mark.parametrize(
    ("options", "at"),
    [
        ({}, [7, 14]),
        ({"val_check_interval": 3}, [3, 6, 10, 13]),
        ({"val_check_interval": 0.5}, [3, 6, 10, 13]),
        ({"limit_val_batches": 0}, []),
    ],
)
def test_validation_comes_when_it_is_due(options, at):
    """Catches an interval that runs on across epochs."""
    seen = []

    class Reads(Callback):
        def on_validation_end(self, trainer, task):
            seen.append(trainer.micro_step)

    single(max_epochs=2, callbacks=Reads(), **options).fit(slope(), ones(*[2] * 7), ones(2))
    assert seen == at


def test_a_validation_after_a_part_of_an_epoch_without_a_length_is_refused_at_the_start():
    """Catches an interval that is found out after the first micro-step."""
    t = single(val_check_interval=0.5)
    with pytest.raises(ValueError, match=r"val_check_interval=0.5.*not known; pass an int"):
        t.fit(slope(), iter(ones(2, 2)), ones(2))
    assert t.micro_step == 0


def test_validate_gives_the_weighted_means():
    """Catches a mean of means, a limit that is not kept, and a state or a task that must be the last fit's."""
    batches = [np.full(n, value, np.float32) for n, value in [(1, 1), (3, 5), (4, 100)]]
    loss = lambda w, batch, key: (jnp.mean(batch) * w, {"count": jaxaccum.Weighted(batch.size * 1.0, 1)})
    the_task = jaxaccum.Task(lambda key, batch: jnp.ones(()), loss, optax.sgd(0.0))
    for strategy in ("single", "ddp", "dp"):
        t = trainer(strategy=strategy, limit_val_batches=2)
        state = t.fit(the_task, batches)
        assert t.validate(the_task, batches) == pytest.approx({"val_loss": 4.0, "val_count": 2.0})
        half = state._replace(params=jnp.full((), 0.5))
        assert t.validate(the_task, batches, half)["val_loss"] == pytest.approx(2.0)
        tripled = dataclasses.replace(the_task, loss=lambda *args: 3 * loss(*args)[0])
        assert t.validate(tripled, batches) == pytest.approx({"val_loss": 12.0})


@pytest.mark.parametrize("strategy", ["single", "ddp"])
def test_init_may_return_arrays_that_the_caller_keeps(strategy):
    """Catches a donation of what is not the Trainer's, and one buffer donated twice."""
    kept = {"w": jnp.ones(3), "same": jnp.ones(())}
    kept["again"] = kept["same"]
    loss = lambda p, batch, key: jnp.mean(batch) * sum(map(jnp.sum, p.values()))
    keeps = optax.GradientTransformation(lambda p: (p, p), lambda g, s, p=None: (g, s))
    the_task = jaxaccum.Task(lambda key, batch: kept, loss, optax.chain(optax.adam(0.1), keeps))
    t = trainer(strategy=strategy, devices={"single": 1, "ddp": 2}[strategy], accumulate_grad_batches=2)
    first = jax.tree.map(np.asarray, t.fit(the_task, ones(2, 2, 2)).params)
    assert_same(kept, {"w": np.ones(3), "same": np.ones(()), "again": np.ones(())})
    assert_same(t.fit(the_task, ones(2, 2, 2)).params, first)


def test_a_seed_is_a_run():
    """Catches an initialisation or a mask that is drawn from elsewhere."""
    batches, the_task = loader(4, 4, 4), task(dropout=0.5)
    same = [single(seed=seed).fit(the_task, batches).params["w"] for seed in (3, 3, 4)]
    np.testing.assert_array_equal(same[0], same[1])
    assert not np.allclose(same[0], same[2])


def test_an_optimizer_that_reads_the_value_gets_the_windows_mean_loss():
    """Catches an optimizer such as reduce_on_plateau left without its value."""
    seen = optax.GradientTransformationExtraArgs(
        lambda params: jnp.zeros(()), lambda updates, state, params=None, *, value, **_: (updates, value)
    )
    loss = lambda w, batch, key: jnp.mean(batch) + 0 * w
    the_task = jaxaccum.Task(lambda key, batch: jnp.zeros(()), loss, seen)
    state = single(accumulate_grad_batches=2).fit(the_task, [np.array([1.0, 1.0, 1.0], np.float32), ones(1)[0] * 5])
    assert float(state.opt_state) == 2


def test_a_profile_has_the_steps():
    """Catches a step that is not annotated, or is so by another number than the micro-step's."""
    numbers = []

    class Annotation(jax.profiler.StepTraceAnnotation):
        def __init__(self, name, **kwargs):
            numbers.append((name, kwargs))
            super().__init__(name, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.profiler, "StepTraceAnnotation", Annotation)
        single(max_epochs=2).fit(slope(), ones(2, 2))
    assert numbers == [("train", {"step_num": i}) for i in range(4)]


def test_plot_draws_losses_k_and_the_effective_batch(tmp_path):
    """Catches a curve over the wrong axis, and a window still on its way that is left out."""
    t = single(accumulate_grad_batches={0: 2, 1: 1}, max_epochs=2, log_every_n_steps=1)
    t.fit(slope(), ones(2, 2), ones(2))
    figure = t.plot(tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    losses, k, batch = figure.axes
    curve = lambda line: [list(map(float, values)) for values in line.get_data()]
    assert {line.get_label() for line in losses.lines} == {"train_loss", "val_loss"}
    assert curve(k.lines[0]) == [[4, 6, 8], [2, 1, 1]]
    assert curve(batch.lines[0]) == [[4, 6, 8], [4, 2, 2]]
    assert [axes.get_legend().get_texts()[0].get_text() for axes in (k, batch)] == ["K", "effective batch"]
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss", "micro-batches", "examples"]


def test_the_history_of_a_long_run_is_thinned(monkeypatch):
    """Catches a history that grows without end, and one that loses its validations first."""
    monkeypatch.setattr(records, "KEPT", 20)
    t = single(max_epochs=2, log_every_n_steps=1, val_check_interval=1)
    t.fit(slope(), ones(*[2] * 50), ones(2))
    history = t._running.metrics.records.history
    assert 10 <= len(history) <= 20
    for name in ("train_loss", "val_loss"):
        steps = [record["step"] for record in history if name in record]
        assert len(steps) >= 5 and steps[0] == 1 and steps[-1] > 90 and steps == sorted(set(steps))


def refused(error, match, batches=(), the_task=None, **options):
    with pytest.raises(error, match=match):
        single(**options).fit(the_task or slope(), batches)


def test_errors_name_argument_value_and_remedy():
    """Catches what is found out late, or not at all."""
    refused(ValueError, "train_loader.*empty")
    refused(ValueError, "iterated again.*list", iter(ones(2)), max_epochs=2)
    refused(ValueError, "no batch in epoch 1.*iterated again", iter(ones(2, 2)), max_epochs=2, limit_train_batches=2)
    refused(TypeError, "task must be a jaxaccum.Task", ones(2), the_task="task")
    refused(ValueError, "devices=9, but there are only 8", devices=9, strategy="ddp")
    refused(ValueError, "strategy='single'.*devices=2.*'ddp'", devices=2)
    refused(ValueError, "strategy must be one of.*'fsdp'", strategy="fsdp")
    refused(ValueError, "partial_window must be.*'half'", partial_window="half")
    refused(ValueError, "nonfinite must be.*'skip'", nonfinite="skip")
    refused(ValueError, "gradient_clip_val.*-1", gradient_clip_val=-1)
    refused(ValueError, "gradient_clip_val.*nan", gradient_clip_val=math.nan)
    refused(ValueError, "limit_train_batches=0.5.*pass an int", iter(ones(2)), limit_train_batches=0.5)
    refused(TypeError, "callbacks must be.*3", callbacks=3)
    refused(TypeError, "callbacks must be", callbacks=[Callback(), "x"])
    refused(TypeError, "logger must be.*write_scalars", logger=print)
    refused(TypeError, "logger must be.*got 'csv'", logger="csv")
    refused(TypeError, "Trainer got .*'accelerator': jax finds the devices", accelerator="gpu")
    refused(TypeError, "'num_micro_batches': K is accumulate_grad_batches", num_micro_batches=2)
    refused(TypeError, "'max_epoch': did you mean 'max_epochs'", max_epoch=2)
    refused(TypeError, r"task must be .* got \['float32 of shape \(2,\)'\]", ones(2), the_task=ones(2))
    refused(ValueError, r"log_every_n_steps .* got 0\.$", log_every_n_steps=0)
    with pytest.raises(TypeError, match=r"ckpt_path must be .*'last' or 'best', got True"):
        single().fit(slope(), ones(2), ckpt_path=True)
    for name in ("train", "val"):
        with pytest.raises(TypeError, match=f"fit got .*'{name}_dataloaders': it is {name}_loader here"):
            single().fit(slope(), ones(2), **{f"{name}_dataloaders": ones(2)})
    with_predict = dataclasses.replace(slope(), predict=lambda w, x: w * x)
    for method, name in (("validate", "val"), ("test", "test"), ("predict", "predict")):
        call = getattr(single(), method)
        with pytest.raises(TypeError, match=f"{method} got .*'dataloaders': it is {name}_loader here"):
            call(slope(), dataloaders=ones(2))
        with pytest.raises(RuntimeError, match="call fit first, or pass state= or ckpt_path="):
            call(with_predict, ones(2))
        with pytest.raises(TypeError, match=r"task must be a jaxaccum.Task, got 'task'"):
            call("task", ones(2))
    for name, bad in [("max_epochs", 0), ("max_steps", -2), ("limit_train_batches", 0), ("limit_train_batches", 1.5)]:
        refused(ValueError, f"{name} must be .*{bad}", **{name: bad})
    for name in ("max_epochs", "max_steps", "log_every_n_steps", "seed", "val_check_interval", "devices"):
        refused(TypeError, f"{name} must be .*'x'", **{name: "x"})
    for wrapper in (jaxaccum.MultiSteps, optax.MultiSteps):
        nested = optax.chain(optax.clip(1.0), wrapper(optax.sgd(1.0), 2))
        refused(ValueError, "accumulates by itself.*accumulate_grad_batches", ones(2), the_task=slope(nested))
    with pytest.raises(RuntimeError, match="fit"):
        _ = single().state


def test_dp_gives_each_share_of_a_batch_a_key_of_its_own():
    """Catches the rest of a batch, which the first device has alone, that draws the masks of its first share."""
    loss = lambda w, batch, key: (w * jnp.mean(batch), {"drawn": jax.random.uniform(key)})
    t = trainer(strategy="dp", devices=2, seed=3)
    t.fit(jaxaccum.Task(lambda key, batch: jnp.zeros(()), loss, optax.sgd(1.0)), ones(5))
    of_batch = jax.random.fold_in(jax.random.key(3), 0)
    draws = [jax.random.uniform(jax.random.fold_in(of_batch, share)) for share in range(3)]
    np.testing.assert_allclose(t.callback_metrics["train_drawn"], np.average(draws, weights=[2, 2, 1]), rtol=1e-6)
