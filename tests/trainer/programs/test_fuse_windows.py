"""`fuse_windows`: the same run as without, in one call a window; what its hooks see, and what waits for its end."""

import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training import Logged, Recorder, assert_close, assert_same, loader, ones, single, slope, task, trainer

import jaxaccum
from jaxaccum.callbacks import Callback, ModelCheckpoint
from jaxaccum.checkpoint import load

DEVICES = {"single": 1, "ddp": 2, "dp": 2, "zero": 2}


def masked():
    """A task with all there is: dropout, a model state, a metric, and a loss that weighs what its mask leaves."""
    inner = task(optax.adamw(0.05), dropout=0.2, model_state=True)

    def loss(params, state, batch, key):
        value, state, metrics = inner.loss(params, state, batch, key)
        weight = jnp.sum(batch["y"][:, 0] > 0.5).astype(value.dtype)
        return jaxaccum.Weighted(value * weight, weight), state, metrics

    return jaxaccum.Task(inner.init, loss, inner.optimizer, model_state=True)


def micro_batches(strategy, count, size=4):
    """Loader batches for so many micro-steps, the first of them of weight 0."""
    batches = loader(*[size] * count * (1 if strategy in ("single", "dp") else DEVICES[strategy]))
    batches[0]["y"][:] = 0
    return batches


class Outputs(Callback):
    """Keeps what hooks are given, and the counters that they see."""

    def __init__(self):
        self.starts, self.ends, self.outputs = [], [], []

    def on_train_batch_start(self, trainer, task, batch, batch_idx):
        self.starts.append((batch_idx, self.number(batch)))

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        counters = (trainer.micro_step, trainer.window_step, trainer.global_step, trainer.samples_seen)
        self.ends.append((batch_idx, self.number(batch), *counters, trainer.should_log))
        self.outputs.append(dict(outputs))

    @staticmethod
    def number(batch):
        return float(sum(np.sum(leaf) for leaf in jax.tree.leaves(batch)))


@pytest.mark.parametrize(
    ("strategy", "x64", "partial_window"),
    [
        ("single", False, "divide_by_k"),
        ("ddp", True, "divide_by_k"),
        ("dp", True, "exact"),
        ("zero", True, "exact"),
    ],
)
def test_a_fused_run_is_the_run(strategy, x64, partial_window):
    """Catches keys, weights, model state, partial windows, logs, outputs or counters that fusing changes."""
    tolerance = 1e-12 if x64 else 1e-6
    with jax.enable_x64(x64):
        batches, runs = micro_batches(strategy, 5), []
        for fuse in (False, True):
            seen, log = Outputs(), Logged()
            t = trainer(
                strategy=strategy,
                devices=DEVICES[strategy],
                accumulate_grad_batches=3,
                max_epochs=2,
                partial_window=partial_window,
                gradient_clip_val=0.5,
                log_every_n_steps=2,
                nonfinite="drop",
                callbacks=seen,
                logger=log,
                fuse_windows=fuse,
            )
            runs.append((t, t.fit(masked(), batches), seen, log.records))
        (plain, want, theirs, records), (fused, got, ours, fused_records) = runs
        assert_close(got, want, tolerance)
        assert ours.starts == theirs.starts and ours.ends == theirs.ends
        for one, other in zip(ours.outputs, theirs.outputs, strict=True):
            assert one == pytest.approx(other, rel=100 * tolerance, nan_ok=True)
        for one, other in zip(fused_records, records, strict=True):
            assert one == pytest.approx(other, rel=100 * tolerance)
        assert (fused.current_epoch, fused.window_step) == (plain.current_epoch, plain.window_step) == (2, 0)
        made = fused._running.setup.programs
        assert (made._accumulate._cache_size(), made._step._cache_size()) == (0, 0)


def saved(folder):
    """The checkpoints of a folder, and the micro-step of each."""
    return sorted((int(path.name.rpartition("=")[2]), path) for path in folder.iterdir())


@pytest.mark.parametrize("strategy", ["ddp", "dp", "zero"])
def test_a_fused_windows_devices_meet_once_outside_its_loop(strategy):
    """Catches a sum that is joined in every micro-step, and micro-batches that stacking moves to other devices."""
    t = trainer(strategy=strategy, devices=2, accumulate_grad_batches=3, fuse_windows=True)
    state = t.fit(masked(), micro_batches(strategy, 3))
    (piece,) = t._strategy.pieces(micro_batches(strategy, 1))
    programs = t._running.setup.programs
    window = jaxaccum.collectives(programs._window.lower(state, [piece.inputs] * 3, {}).compile())
    step = jaxaccum.collectives(programs._step.lower(state, *piece.inputs, {}).compile())
    assert window.count() == step.count() > 0 and window.count(in_loop=True) == 0


def test_each_number_of_micro_steps_compiles_once():
    """Catches a compile in every window, and one for every K that a window has."""
    ks = {0: 4, 1: 2, 2: 4, 3: 1, 4: 3}
    t = single(accumulate_grad_batches=ks, max_epochs=6, fuse_windows=True)
    t.fit(slope(), ones(*[2] * 12))
    made = t._running.setup.programs
    assert (made._window._cache_size(), made._accumulate._cache_size(), made._step._cache_size()) == (3, 0, 1)


@pytest.mark.parametrize(
    ("strategy", "sizes"), [("single", [4, 4, 3, 4, 4]), ("ddp", [4] * 10 + [3]), ("dp", [4, 4, 7, 4, 4])]
)
def test_a_window_that_cannot_be_stacked_runs_as_it_does_without(strategy, sizes):
    """Catches a batch of another size that is lost, padded, or that weighs as much as the others."""
    run = lambda fuse: trainer(
        strategy=strategy, devices=DEVICES[strategy], accumulate_grad_batches=3, fuse_windows=fuse
    )
    with jax.enable_x64(True):
        fused = run(True)
        assert_close(fused.fit(task(), loader(*sizes)), run(False).fit(task(), loader(*sizes)), 1e-12)
    assert fused._running.setup.programs._window._cache_size() == 1
    assert fused._running.setup.programs._accumulate._cache_size() > 0


def test_hooks_are_told_when_the_state_is_ahead_of_the_counters():
    """Catches a callback that can't know that state and counters don't belong together."""
    seen = Recorder(lambda t: (t.micro_step, float(t.state.params), t.state_is_ahead))
    single(accumulate_grad_batches=3, callbacks=seen, fuse_windows=True).fit(slope(), ones(*[2] * 4))
    assert seen.seen == [(1, -1, True), (2, -1, True), (3, -1, False), (4, -2, False)]


def test_hooks_of_a_window_come_before_and_after_it():
    """Catches a start that sees the state after its own micro-step, and hooks that are mixed."""
    calls = []

    class Writes(Callback):
        def on_train_batch_start(self, trainer, task, batch, batch_idx):
            calls.append(("start", batch_idx, trainer.micro_step, float(trainer.state.params)))

        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
            calls.append(("end", batch_idx, trainer.micro_step, float(trainer.state.params)))

    single(accumulate_grad_batches=2, callbacks=Writes(), fuse_windows=True).fit(slope(), ones(*[2] * 4))
    first = [("start", 0, 0, 0), ("start", 1, 0, 0), ("end", 0, 1, -1), ("end", 1, 2, -1)]
    assert calls == [*first, ("start", 2, 2, -1), ("start", 3, 2, -1), ("end", 2, 3, -2), ("end", 3, 4, -2)]


def test_a_hook_that_raises_leaves_counters_that_are_the_states():
    """Catches a window that the devices have made and the host has not, and one that the next fit counts."""

    class Breaks(Callback):
        at = None

        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
            if batch_idx == 4:
                raise KeyError("mine")

        def on_exception(self, trainer, task, error):
            self.at = trainer.micro_step, trainer.window_step, trainer.global_step, trainer.samples_seen

    breaks = Breaks()
    t = single(accumulate_grad_batches=3, callbacks=breaks, fuse_windows=True)
    with pytest.raises(KeyError, match="mine"):
        t.fit(slope(), ones(*[2] * 9))
    assert breaks.at == (6, 0, 2, 12) and not t.state_is_ahead
    assert float(t.state.params) == -2


def test_a_validation_and_a_stop_wait_for_the_windows_end():
    """Catches a validation that an interval within a window leaves out, and a stop that loses the window."""
    validated = []

    class Stops(Callback):
        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
            trainer.should_stop = trainer.should_stop or batch_idx == 9

        def on_validation_end(self, trainer, task):
            validated.append(trainer.micro_step)

    t = single(accumulate_grad_batches=4, val_check_interval=5, callbacks=Stops(), fuse_windows=True)
    t.fit(slope(), ones(*[2] * 16), ones(2))
    assert validated == [8, 12]
    assert (t.micro_step, t.window_step, float(t.state.params)) == (12, 0, -3)


def test_a_loader_that_raises_in_mid_window_loses_nothing_that_it_gave():
    """Catches batches that wait for their window and go with it."""

    class Breaks:
        def __iter__(self):
            yield from ones(2, 2, 2, 2, 2)
            raise OSError("disk")

    t = single(accumulate_grad_batches=3, fuse_windows=True)
    with pytest.raises(OSError, match="disk"):
        t.fit(slope(), Breaks())
    assert (t.micro_step, t.global_step, t.window_step) == (5, 1, 2)
    assert float(t.state.params) == -1 and int(t.state.pending.sums.mini_step) == 2


@pytest.mark.parametrize("strategy", ["single", "zero"])
def test_a_fused_run_goes_on_from_each_of_its_checkpoints(strategy, tmp_path):
    """Catches a checkpoint whose state and counters are of different micro-steps, and batches trained on twice."""
    run = lambda *callbacks: trainer(
        strategy=strategy,
        devices=DEVICES[strategy],
        accumulate_grad_batches=3,
        max_epochs=2,
        fuse_windows=True,
        callbacks=callbacks,
    )
    whole = run(ModelCheckpoint(tmp_path, every_n_train_steps=1, monitor="train_loss", save_top_k=-1))
    rest, the_task, batches = run(), masked(), micro_batches(strategy, 8)
    want = whole.fit(the_task, batches, batches)
    assert [step for step, _ in saved(tmp_path)] == [3, 6, 8, 11, 14, 16]
    for _, path in saved(tmp_path):
        assert_same(rest.fit(the_task, batches, batches, ckpt_path=path), want)
        assert rest._at == whole._at and rest.callback_metrics == whole.callback_metrics


@pytest.mark.parametrize("fused_first", [False, True])
def test_a_run_goes_on_fused_where_it_was_not_and_the_other_way_round(fused_first, tmp_path):
    """Catches windows that shift by what is pending in the checkpoint, and batches left out or made twice."""
    run = lambda fuse, *callbacks: trainer(
        strategy="ddp",
        devices=2,
        accumulate_grad_batches={0: 3, 1: 2},
        max_epochs=2,
        fuse_windows=fuse,
        callbacks=callbacks,
    )
    with jax.enable_x64(True):
        the_task, batches = task(dropout=0.3, model_state=True), micro_batches("ddp", 5)
        whole = run(fused_first, ModelCheckpoint(tmp_path, every_n_micro_steps=1, save_top_k=-1))
        want, rest = whole.fit(the_task, batches), run(not fused_first)
        made = [step for step, _ in saved(tmp_path)]
        assert made == ([3, 5, 7, 9, 10] if fused_first else [*range(1, 11)])
        for _, path in saved(tmp_path):
            assert_close(rest.fit(the_task, batches, ckpt_path=path), want, 1e-12)
            assert rest._at == whole._at


def test_a_checkpoint_that_falls_inside_a_window_is_saved_at_its_end(tmp_path):
    """Catches a save that is left out, one of a state that the counters don't have yet, and one made twice."""
    policy = ModelCheckpoint(tmp_path, every_n_micro_steps=4, monitor="train_loss", save_top_k=-1)
    single(accumulate_grad_batches=3, callbacks=policy, fuse_windows=True).fit(slope(), ones(*[2] * 11))
    steps = [(step, float(load(path).arrays[".params"])) for step, path in saved(tmp_path)]
    assert steps == [(6, -2), (9, -3), (11, -4)]


@pytest.mark.parametrize("raises", ["hook", "loader", "signal"])
def test_what_ends_a_fused_run_leaves_a_checkpoint_to_go_on_from(raises, tmp_path):
    """Catches a checkpoint of half a window, and batches that waited for theirs and are taken for trained on."""

    class Ends(Callback):
        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
            if batch_idx == 4 and raises == "hook":
                raise OSError("disk")
            if batch_idx == 4 and raises == "signal":
                signal.raise_signal(signal.SIGTERM)

    class Breaks:
        def __iter__(self):
            yield from batches[:5] if raises == "loader" else batches
            raise OSError("disk")

    batches, the_task = loader(*[4] * 8), task()
    run = lambda *callbacks: single(
        accumulate_grad_batches=3, fuse_windows=True, callbacks=[ModelCheckpoint(tmp_path), *callbacks]
    )
    with pytest.raises(SystemExit if raises == "signal" else OSError):
        run(Ends()).fit(the_task, Breaks())
    rest = run()
    got = rest.fit(the_task, batches, ckpt_path="last")
    assert (rest.micro_step, rest.global_step, rest.samples_seen) == (8, 3, 32)
    # Of the window that the loader broke off, what it gave is in the checkpoint: its rest is another program.
    assert_close(got, rest.fit(the_task, batches), 1e-6 if raises == "loader" else 0)


def test_a_window_that_cannot_be_looked_into_is_refused():
    """Catches an anomaly that is found K micro-steps late."""
    with pytest.raises(ValueError, match=r"detect_anomaly=True.*fuse_windows=True"):
        single(detect_anomaly=True, fuse_windows=True)
