"""Resumes are exact: a resumed run ends as one that was never interrupted, bit for bit."""

import jax
import pytest
from killed_runs import killed_and_resumed, life
from training import Logged, assert_close, assert_same, loader, task, trainer

import jaxaccum
from jaxaccum.callbacks import Callback, ModelCheckpoint

SCHEDULE = {0: 3, 1: 2}


class Tally(Callback):
    """Counts what happened, and keeps it in checkpoints."""

    def __init__(self):
        self.counts = {"epoch starts": 0, "batches": 0, "validations": 0, "epoch ends": 0}

    def on_train_epoch_start(self, trainer, task):
        self.counts["epoch starts"] += 1

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        self.counts["batches"] += 1

    def on_validation_end(self, trainer, task):
        self.counts["validations"] += 1

    def on_train_epoch_end(self, trainer, task):
        self.counts["epoch ends"] += 1

    def state_dict(self):
        return dict(self.counts)

    def load_state_dict(self, state_dict):
        self.counts = state_dict


def every_micro_step(folder):
    return ModelCheckpoint(folder, every_n_micro_steps=1, save_top_k=-1)


def saved(folder):
    """The checkpoints of a folder, in the order in which they were written."""
    key = lambda path: jaxaccum.checkpoint.load(path).notes["saved_at"]
    return sorted((path for path in folder.iterdir()), key=key)


@pytest.mark.parametrize(
    ("strategy", "sizes", "at"),
    [
        ("single", [4] * 6 + [3], range(14)),
        ("ddp", [2] * 26 + [1], (1, 6, 8)),
        ("dp", [16] * 6 + [13], (1, 6, 8)),
        ("zero", [2] * 26 + [1], (1,)),
    ],
)
def test_a_resume_at_any_micro_step_is_exact(tmp_path, strategy, sizes, at):
    """Catches anything that a checkpoint lacks: pending sums, K, keys, model state, logs, counters, hooks still due."""
    batches, the_task = loader(*sizes), task(dropout=0.3, model_state=True)

    def run(log, *callbacks):
        return trainer(
            strategy=strategy,
            devices=1 if strategy == "single" else 4,
            accumulate_grad_batches=SCHEDULE,
            max_epochs=2,
            callbacks=callbacks,
            logger=log,
            log_every_n_steps=1,
            val_check_interval=3,
            gradient_clip_val=0.5,
        )

    fit = lambda t, **options: t.fit(the_task, batches, batches[:8], **options)
    tally, recount, log, resumed_log = Tally(), Tally(), Logged(), Logged()
    unbroken, resumed = run(log, every_micro_step(tmp_path), tally), run(resumed_log, recount)
    want = fit(unbroken)
    paths = saved(tmp_path)[:14]
    assert unbroken.micro_step == 14
    assert tally.counts == {"epoch starts": 2, "batches": 14, "validations": 4, "epoch ends": 2}
    for i in at:
        recount.counts = {}  # Those of the checkpoint.
        assert_same(fit(resumed, ckpt_path=paths[i]), want)
        assert resumed._at == unbroken._at and recount.counts == tally.counts
        assert resumed_log.records == log.records[len(log.records) - len(resumed_log.records) :]
        assert len(resumed_log.records) >= (14 - i - 1) / 3


def run(strategy, devices, k, callbacks=(), **options):
    return trainer(
        strategy=strategy, devices=devices, accumulate_grad_batches=k, callbacks=callbacks, max_epochs=2, **options
    )


@pytest.mark.parametrize(
    ("before", "micro_step", "after"),
    [
        (("ddp", 8, 2), 3, [("ddp", 4, 4), ("single", 1, 16), ("zero", 2, 8)]),
        (("single", 1, 16), 24, [("ddp", 8, 2)]),
        (("dp", 8, 3), 4, [("dp", 4, 3), ("single", 1, 3)]),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_a_resume_on_other_devices_ends_at_the_same_parameters(tmp_path, before, micro_step, after):
    """Catches sums that are lost, counted twice or divided on their way, windows that shift, and batches seen twice."""
    with jax.enable_x64(True):
        dp = before[0] == "dp"
        batches, the_task = loader(*([16] * 7 + [13] if dp else [4] * 40)), task(dropout=0 if dp else 0.3)
        saves = ModelCheckpoint(tmp_path, every_n_micro_steps=micro_step, save_top_k=-1)
        log, resumed_log = Logged(), Logged()
        unbroken = run(*before, callbacks=saves, logger=log, log_every_n_steps=1)
        want = unbroken.fit(the_task, batches)
        path = tmp_path / f"epoch=0-micro_step={micro_step}"
        assert jaxaccum.checkpoint.load(path).notes["counters"]["window_step"] > 0
        for place in after:
            # K is the schedule's from the next epoch on; in the open one it is such that windows hold what they held.
            resumed = run(*place, logger=resumed_log, log_every_n_steps=1)
            got = resumed.fit(the_task, batches, ckpt_path=path)
            assert_close((got.params, got.opt_state), (want.params, want.opt_state), 1e-12)
            assert (resumed.global_step, resumed.samples_seen) == (unbroken.global_step, unbroken.samples_seen)
            ours = resumed_log.records
            for record, other in zip(ours, log.records[-len(ours) :], strict=True):
                assert record["train_loss"] == pytest.approx(other["train_loss"], rel=1e-12)
                assert record["effective_batch_size"] == other["effective_batch_size"]


def test_model_states_that_have_parted_go_on_from_their_mean(tmp_path):
    """Catches a device's model state that stands for all of them, or is summed: dp, whose means are the examples'."""
    batches, the_task = loader(*[16] * 6), task(model_state=True)
    saves = ModelCheckpoint(tmp_path, every_n_micro_steps=2, save_top_k=-1)
    want = run("dp", 8, 3, saves).fit(the_task, batches).model_state
    for place in [("dp", 4, 3), ("single", 1, 3)]:
        got = run(*place).fit(the_task, batches, ckpt_path=tmp_path / "epoch=0-micro_step=2").model_state
        assert_close(got, want, 1e-6)


@pytest.mark.parametrize(("devices", "kills"), [(1, 4), (4, 1)])
def test_a_run_killed_at_random_moments_ends_as_if_it_never_was(tmp_path, devices, kills):
    """Catches a micro-batch that is seen twice or never, and a checkpoint that can't be relied on."""
    (tmp_path / "unbroken").mkdir()
    (tmp_path / "killed").mkdir()
    want = life(tmp_path / "unbroken", devices, epochs=2 * kills + 4)
    got, _ = killed_and_resumed(tmp_path / "killed", devices, kills, seed=devices)
    assert got == want
    batches = list(range(7 * devices))
    assert [sorted(epoch) for epoch in want["epochs"]] == [batches] * (2 * kills + 4) and want["paths"] == [True, True]
    assert len({tuple(epoch) for epoch in want["epochs"]}) > 1


@pytest.mark.parametrize("devices", [1, 4])
def test_the_sums_of_a_window_that_is_over_are_not_gone_on_with(tmp_path, monkeypatch, devices):
    """Catches sums that version 0.1 left in its checkpoints after a window, added to those of the next one."""
    batches = loader(*[2] * 6 * devices)

    def run(*callbacks):
        options = {"strategy": "single" if devices == 1 else "ddp", "devices": devices}
        return trainer(accumulate_grad_batches=2, callbacks=callbacks, **options)

    want = run(every_micro_step(tmp_path)).fit(task(), batches)
    load = jaxaccum.checkpoint.load

    def of_before(path):
        checkpoint = load(path)
        stale = lambda name, x: x + 7 if name.startswith((".pending.sums.acc_grads", ".pending.sums.weight")) else x
        return checkpoint._replace(arrays={name: stale(name, x) for name, x in checkpoint.arrays.items()})

    first = saved(tmp_path)[1]
    assert load(first).notes["counters"]["window_step"] == 0
    monkeypatch.setattr(jaxaccum.checkpoint, "load", of_before)
    assert_same(run().fit(task(), batches, ckpt_path=first), want)
