"""What the Trainer does at a window's end: gradient norms, clipping by value, a hook, and means of the epoch."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training import Logged, assert_same, ones, slope, trainer

import jaxaccum
from jaxaccum import Weighted
from jaxaccum.callbacks import Callback, EarlyStopping, ModelCheckpoint

STRATEGIES = pytest.mark.parametrize("strategy", ["single", "ddp", "dp", "zero"])
DEVICES = pytest.mark.parametrize("devices", [1, 4])
FUSED = pytest.mark.parametrize("fuse_windows", [False, True])

# The mean gradient of each micro-step; that of the first window of two is (3, -4).
MEANS = [(6, 0), (0, -8), (6, -8)]


def plane():
    """A task with two parameters, whose gradient is the batch's mean."""
    return jaxaccum.Task(
        init=lambda key, batch: {"a": jnp.zeros(()), "b": jnp.zeros(1)},
        loss=lambda p, batch, key: p["a"] * jnp.mean(batch["x"]) + p["b"][0] * jnp.mean(batch["y"]),
        optimizer=optax.sgd(1.0),
    )


def run(strategy, *callbacks, **options):
    devices = 1 if strategy == "single" else 4
    return trainer(strategy=strategy, devices=devices, callbacks=callbacks, accumulate_grad_batches=2, **options)


def batches(strategy):
    """Micro-steps with the mean gradients `MEANS`, of 4 rows that differ."""
    spread = np.array([0, 2, 0.5, 1.5], np.float32)
    rows = [{"x": x * spread, "y": y * spread} for x, y in MEANS]
    if strategy in ("single", "dp"):
        return rows
    return [{name: x[i : i + 1] for name, x in batch.items()} for batch in rows for i in range(4)]


def every_micro_step(folder):
    return ModelCheckpoint(folder, every_n_micro_steps=1, save_top_k=-1)


@STRATEGIES
@FUSED
def test_the_norm_is_of_the_windows_mean_before_clipping(tmp_path, strategy, fuse_windows):
    """Catches norms of micro-batches (6 and 8), of one device, after clipping, and of another window on a resume."""
    options = {"log_grad_norm": True, "log_every_n_steps": 1, "gradient_clip_val": 2.5, "fuse_windows": fuse_windows}
    log, rest = Logged(), Logged()
    t = run(strategy, every_micro_step(tmp_path), logger=log, **options)
    want = t.fit(plane(), batches(strategy))
    assert [record["grad_norm"] for record in log.records] == pytest.approx([5, 10], rel=1e-6)
    assert t.callback_metrics.keys() == {"train_loss", "grad_norm"}
    assert_same(want.params, {"a": np.float32(-3), "b": np.float32([4])})  # (3, -4) / 2 and (6, -8) / 4.
    path = tmp_path / f"epoch=0-micro_step={2 if fuse_windows else 1}"
    assert_same(run(strategy, logger=rest, **options).fit(plane(), batches(strategy), ckpt_path=path), want)
    assert rest.records == log.records[fuse_windows:]


def test_a_checkpoint_goes_on_with_and_without_norms(tmp_path):
    """Catches norms that are a part of a run's arrays, so that logging them can't be switched."""
    want = run("single", every_micro_step(tmp_path), log_grad_norm=True).fit(plane(), batches("single"))
    off = run("single", every_micro_step(tmp_path / "off"))
    assert_same(off.fit(plane(), batches("single"), ckpt_path=tmp_path / "epoch=0-micro_step=1"), want)
    on = run("ddp", log_grad_norm=True)
    on.fit(plane(), batches("single"), ckpt_path=tmp_path / "off" / "epoch=0-micro_step=2")
    assert on.callback_metrics["grad_norm"] == 10


def test_a_window_that_weighs_nothing_has_no_norm():
    """Catches the norm of another window, and a zero for what was not measured."""
    loss = lambda w, batch, key: Weighted(w * batch["x"].sum(), batch["weight"].sum())
    batch = {"x": np.ones(1, np.float32), "weight": np.zeros(1, np.float32)}
    t = run("single", log_grad_norm=True)
    t.fit(jaxaccum.Task(lambda key, batch: jnp.zeros(()), loss, optax.sgd(1.0)), [batch])
    assert np.isnan(t.callback_metrics["grad_norm"])


@STRATEGIES
def test_clipping_by_value_is_of_the_windows_mean(strategy):
    """Catches clipping of micro-batches or devices, to 0.5 and -0.5, and a scaling of the whole gradient."""
    options = {"gradient_clip_val": 3.5, "gradient_clip_algorithm": "value"}
    state = run(strategy, max_steps=1, **options).fit(plane(), batches(strategy))
    assert_same(state.params, {"a": np.float32(-3), "b": np.float32([3.5])})


class Steps(Callback):
    """Writes down where the run is before each optimizer step, and keeps that in checkpoints."""

    def __init__(self):
        self.at = []

    def on_before_optimizer_step(self, trainer, task):
        self.at.append((trainer.micro_step, trainer.global_step, float(trainer.state.params)))

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state_dict):
        self.at = [tuple(at) for at in state_dict["at"]]


@DEVICES
@FUSED
def test_the_hook_before_an_optimizer_step_is_called_once_for_each(tmp_path, devices, fuse_windows):
    """Catches a call for each micro-step, or after the step, and one that a partial window lacks. Steps are of 1."""
    strategy = "single" if devices == 1 else "ddp"
    whole, rest, data = Steps(), Steps(), ones(*[2] * 3 * devices)
    options = {"fuse_windows": fuse_windows, "max_epochs": 2}
    run(strategy, whole, every_micro_step(tmp_path), **options).fit(slope(), data)
    first = 0 if fuse_windows else 1
    assert whole.at == [(first, 0, 0), (2, 1, -1), (3 + first, 2, -2), (5, 3, -3)]
    path = tmp_path / f"epoch=1-micro_step={5 if fuse_windows else 4}"
    run(strategy, rest, **options).fit(slope(), data, ckpt_path=path)
    assert rest.at == whole.at


def test_a_flush_is_an_optimizer_step_too():
    """Catches a step that the hook does not see."""

    class Stops(Steps):
        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
            trainer.should_stop = True

    seen = Stops()
    run("single", seen, flush_on_stop=True).fit(slope(), ones(2, 2))
    assert seen.at == [(1, 0, 0)]


def plain_and_weighted():
    """A task whose loss is the mean of the rows; "m" is that of the batches, with their values as weights."""
    mean = jnp.mean
    return jaxaccum.Task(
        init=lambda key, batch: jnp.ones(()),
        loss=lambda w, batch, key: (w * mean(batch), {"m": Weighted(mean(batch) ** 2, mean(batch))}),
        optimizer=optax.sgd(0.0),
    )


class Doubled(list):
    """The rows of the second epoch are twice those of the first one."""

    def set_epoch(self, epoch):
        self.factor = epoch + 1

    def __iter__(self):
        return (batch * np.float32(self.factor) for batch in super().__iter__())


@DEVICES
@FUSED
def test_means_of_an_epoch_weigh_all_of_its_rows(tmp_path, devices, fuse_windows):
    """Catches a mean over windows, 5.5, and sums that a resume begins anew or an epoch does not.

    The rows of an epoch are 1, 1; 4; 9, 9. The windows of two have the means 2 and 9; all rows have 4.8. "m" is
    (1 + 16 + 81) / (1 + 4 + 9) = 7.
    """
    rows = [np.ones(2, np.float32), np.full(1, 4, np.float32), np.full(2, 9, np.float32)]
    data = Doubled(batch for batch in rows for _ in range(devices))
    strategy = "single" if devices == 1 else "ddp"
    options = {"log_epoch_means": True, "fuse_windows": fuse_windows, "max_epochs": 2}
    log, stopping = Logged(), EarlyStopping("train_loss_epoch")
    saves = every_micro_step(tmp_path)
    run(strategy, stopping, saves, logger=log, **options).fit(plain_and_weighted(), data)
    found = [record for record in log.records if "train_loss_epoch" in record]
    assert [record["train_loss_epoch"] for record in found] == [4.8, 9.6] and stopping.wait == 1
    assert [record["train_m_epoch"] for record in found] == [7, 14]
    assert [(record["epoch"], record["micro_step"]) for record in found] == [(0, 3), (1, 6)]
    for path in tmp_path.iterdir():
        rest = Logged()
        t = run(strategy, logger=rest, **options)
        t.fit(plain_and_weighted(), data, ckpt_path=path)
        assert t.callback_metrics["train_loss_epoch"] == 9.6
        again = [record for record in rest.records if "train_loss_epoch" in record]
        assert again == found[len(found) - len(again) :] and (again or path.name.endswith("=6"))


def test_means_of_an_epoch_leave_out_what_a_window_does():
    """Catches a dropped micro-batch that counts, and an epoch of nothing that has a mean."""
    data = [np.full(2, x, np.float32) for x in (1, np.nan, 4)]
    t = run("single", log_epoch_means=True, nonfinite="drop")
    t.fit(plain_and_weighted(), data)
    assert t.callback_metrics["train_loss_epoch"] == 2.5
    t.fit(plain_and_weighted(), data[1:2])
    assert np.isnan(t.callback_metrics["train_loss_epoch"])


def test_a_checkpoint_of_version_0_1_goes_on(tmp_path, monkeypatch):
    """Catches a note that it lacks, and a last window's loss under the name that it had there."""
    want = run("single", every_micro_step(tmp_path)).fit(slope(), ones(2, 2, 2))
    load = jaxaccum.checkpoint.load

    def of_before(path):
        checkpoint = load(path)
        notes = {name: x for name, x in checkpoint.notes.items() if name not in ("stop", "epoch_sums")}
        notes["means"] = {name.removeprefix("train_"): mean for name, mean in notes["means"].items()}
        return checkpoint._replace(notes=notes)

    class Reads(Callback):
        def on_train_start(self, trainer, task):
            self.found = trainer.callback_metrics

    reads = Reads()
    monkeypatch.setattr(jaxaccum.checkpoint, "load", of_before)
    assert_same(run("single", reads).fit(slope(), ones(2, 2, 2), ckpt_path=tmp_path / "epoch=0-micro_step=2"), want)
    assert reads.found == {"train_loss": 0}


def test_what_is_off_costs_nothing():
    """Catches results of the programs that no option asked for."""
    t = run("single")
    t.fit(slope(), ones(2, 2))
    assert t.callback_metrics.keys() == {"train_loss"}
    programs, piece = t._running.setup.programs, t._running.setup.strategy.pieces(ones(2))[0]
    _, _, logs = programs._step.eval_shape(t.state, *piece.inputs, {})
    assert logs.means.keys() == {"train_loss"} and logs.sums is None


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"gradient_clip_algorithm": "max"}, ValueError, r"gradient_clip_algorithm must be .*'norm', 'value'.* 'max'"),
        ({"gradient_clip_algorithm": "value"}, ValueError, "gradient_clip_algorithm='value'.*gradient_clip_val.*None"),
        ({"log_grad_norm": 1}, TypeError, "log_grad_norm must be True or False, got 1"),
        ({"log_epoch_means": "loss"}, TypeError, "log_epoch_means must be True or False, got 'loss'"),
    ],
)
def test_bad_values_are_refused_at_construction(options, error, match):
    """Catches a value that is ignored, or found out in the first window."""
    with pytest.raises(error, match=match):
        trainer(**options)
