"""The moving average of the parameters: its numbers, in checkpoints and in validations."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training import Logged, Recorder, assert_same, loader, ones, single, slope, task, trainer

import jaxaccum
from jaxaccum.callbacks import EMA, Callback, ModelCheckpoint

PLACES = [("single", 1), ("ddp", 4), ("zero", 4), ("dp", 4)]


class Raises(Callback):
    """Raises in the hook of a micro-step."""

    def __init__(self, at):
        self.at = at

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        if trainer.micro_step == self.at:
            raise ZeroDivisionError


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize(("strategy", "devices"), PLACES)
def test_the_average_follows_optimizer_steps_and_is_validated(strategy, devices, fuse):
    """Catches an update per micro-step, a start at zero or at the first step, and a validation of the parameters.

    The parameters go from 0 by -1 a window: the average is 0.75 of itself and 0.25 of -1, of -2 and of -3.
    """
    ema, log = EMA(decay=0.75), Logged()
    seen = Recorder(lambda t: (t.global_step, float(ema.params)))
    options = {"strategy": strategy, "devices": devices, "accumulate_grad_batches": 2, "fuse_windows": fuse}
    t = trainer(**options, callbacks=[ema, seen], logger=log, max_epochs=1, val_check_interval=2)
    group = devices if strategy in ("ddp", "zero") else 1
    val = ones(8)
    state = t.fit(slope(), ones(*[8] * 5 * group), val)
    averages = [-0.25, -0.6875, -1.265625]
    at_end = dict(seen.seen)
    assert [at_end[step] for step in (1, 2, 3)] == averages and state.params == -3
    assert fuse or seen.seen[0] == (0, 0.0)
    assert [record["val_loss"] for record in log.records if "val_loss" in record] == averages[:2]
    assert t.validate(slope(), val) == {"val_loss": averages[2]}
    assert t.validate(slope(), val, state) == {"val_loss": -3}
    assert [record["train_loss"] for record in log.records if "train_loss" in record] == [0, -2]


@pytest.mark.parametrize(
    ("strategy", "devices", "at"), [("single", 1, range(1, 8)), ("ddp", 4, (3, 4)), ("zero", 4, (3,))]
)
def test_a_resume_at_any_micro_step_is_exact(tmp_path, strategy, devices, at):
    """Catches an average that starts anew, one that is rounded on its way, and one of another step."""
    batches, the_task = loader(*[4] * 7 * devices), task(dropout=0.3)

    def run(log, *callbacks):
        ema = EMA(decay=0.9)
        options = {"accumulate_grad_batches": 3, "log_every_n_steps": 1, "val_check_interval": 2, "logger": log}
        return ema, trainer(strategy=strategy, devices=devices, callbacks=[*callbacks, ema], **options)

    log, resumed_log = Logged(), Logged()
    whole, unbroken = run(log, ModelCheckpoint(tmp_path, every_n_micro_steps=1, save_top_k=-1))
    unbroken.fit(the_task, batches, batches[:devices])
    for i in at:
        ema, resumed = run(resumed_log)
        resumed.fit(the_task, batches, batches[:devices], ckpt_path=tmp_path / f"epoch=0-micro_step={i}")
        assert_same(ema.average, whole.average)
        assert resumed_log.records == log.records[len(log.records) - len(resumed_log.records) :]


def test_a_step_that_a_hook_cut_off_is_averaged_after_the_resume(tmp_path):
    """Catches an average that lacks the step of the save, which was counted before the hook raised."""
    make = lambda *callbacks: single(accumulate_grad_batches=2, callbacks=[*callbacks, ModelCheckpoint(tmp_path)])
    with pytest.raises(ZeroDivisionError):
        make(Raises(4), EMA(0.75)).fit(slope(), ones(*[2] * 6))
    ema = EMA(0.75)
    make(ema).fit(slope(), ones(*[2] * 6), ckpt_path="last")
    assert ema.params == -1.265625


def test_a_flushed_window_is_averaged():
    """Catches a last step that only the parameters have."""

    class Stops(Callback):
        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
            trainer.should_stop = trainer.micro_step == 3

    ema = EMA(0.75)
    single(accumulate_grad_batches=2, flush_on_stop=True, callbacks=[ema, Stops()]).fit(slope(), ones(*[2] * 6))
    assert ema.params == -0.6875


def test_where_an_average_starts(tmp_path):
    """Catches an average that a second fit goes on with, and a start at what `Task.init` returned."""
    ema = EMA(0.75)
    t = single(callbacks=ema)
    for init_from, want in [(None, -0.25), (None, -0.25), (jnp.float32(4), 3.75)]:
        t.fit(slope(), ones(2), init_from=init_from)
        assert ema.params == want
    single(callbacks=ModelCheckpoint(tmp_path, every_n_micro_steps=1, save_top_k=-1)).fit(slope(), ones(2, 2))
    t.fit(slope(), ones(2, 2), ckpt_path=tmp_path / "epoch=0-micro_step=1")  # It has none: from -1.
    assert ema.params == -1.25


def test_the_average_of_a_checkpoint_is_validated(tmp_path):
    """Catches a checkpoint's parameters in place of the average by which it was ranked."""
    saves = ModelCheckpoint(tmp_path, monitor="val_loss", mode="max")
    t = single(callbacks=[EMA(0.75), saves], max_epochs=2)
    t.fit(slope(), ones(2), ones(2))
    assert t.validate(slope(), ones(2), ckpt_path="best") == {"val_loss": -0.25}
    arrays = jaxaccum.checkpoint.load(saves.best_model_path).arrays
    assert (arrays[".average"], arrays[".params"]) == (-0.25, -1)
    plain = single(callbacks=ModelCheckpoint(tmp_path, monitor="val_loss", mode="max"), max_epochs=2)
    assert plain.validate(slope(), ones(2), ckpt_path="best") == {"val_loss": -1}


def test_parameters_in_half_precision():
    """Catches an average in bfloat16, which a decay near 1 never moves."""
    init = lambda key, batch: jnp.ones((), jnp.bfloat16)
    loss = lambda w, batch, key: w.astype(jnp.float32) * batch.mean()
    ema = EMA(0.999)
    single(callbacks=ema).fit(jaxaccum.Task(init, loss, optax.sgd(1.0)), ones(2, 2))
    np.testing.assert_allclose(ema.average, 0.999 * (0.999 + 0.001 * 0) + 0.001 * -1, rtol=1e-6)
    assert ema.params.dtype == jnp.bfloat16


@pytest.mark.parametrize("decay", [1, 1.5, -0.1, float("nan"), True, "0.9"])
def test_a_bad_decay_is_refused_by_value(decay):
    """Catches an average that never moves."""
    with pytest.raises(ValueError, match=f"decay must be .*0.999, got {decay!r}"):
        EMA(decay)


def test_two_averages_are_refused():
    """Catches a validation of either of them."""
    with pytest.raises(ValueError, match="more than one EMA"):
        single(callbacks=[EMA(0.9), EMA(0.99)])
